// The client's side of "never a wrong byte": when the kernel has died and none has taken over in time, every access
// that would need it ends in SIGBUS; and whoever gets a SIGBUS on a mapping reads on stderr which one, and why.
//
// No code here needs the interpreter: the thread that waits for a page may hold the GIL.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "vm/agent.hpp"

namespace k42::vm {

// What the SIGBUS handler knows of one window. Never freed, only reused: a handler may be reading.
struct WindowRecord {
    std::atomic<uint64_t> base{0};  // 0: not in use
    uint64_t length = 0;
    uint64_t offset = 0;                           // of the file, at `base`
    const void* status = nullptr;                  // the kernel's StatusPage, as mapped here
    const std::atomic<bool>* abandoned = nullptr;  // its connection's
    bool copies = false;  // pages written to are copies of this process's own, and in the window alone
    pid_t owner = 0;      // a forked child lists again what it has shown again
    char name[160] = {};
    WindowRecord* next = nullptr;
};

// Puts our SIGBUS handler before the one that is there, if another has come since. Cheap: one system call.
void lead_bus_handlers();

// Lists a window for the SIGBUS handler, which is put before the one that was there.
WindowRecord* list_window(uint64_t base, uint64_t length, uint64_t offset, bool copies, const std::string& name,
                          const void* status, const std::atomic<bool>* abandoned);
void unlist_window(WindowRecord* record);

// Watches the connection to one kernel, in a thread of its own.
class Guard {
  public:
    // `socket`: the connection; stays the caller's, until stop() at least.
    Guard(int socket, int grace_ms);
    ~Guard();
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

    // A userfaultfd whose faults the kernel serves, on the CPU with this index of the kernel's; taken over. It is open
    // as long as a window shows anything: pages touched after its end would read as zeros.
    void watch(size_t cpu, int uffd) { windows_.watch(cpu, uffd); }
    void add_range(const Windows::Range& range) { windows_.add(range); }  // a window on one of them
    // May wait for a command that is being executed, and so for the kernel.
    void remove_range(uint64_t base) { windows_.remove(base); }
    // Executes the commands that the kernel writes into this memfd; once. Throws std::system_error.
    void obey(int memfd) { agent_ = std::make_unique<Agent>(windows_, memfd); }
    void stop();
    void forget_in_child();  // after fork(): the child's copies of the descriptors are of no use

    // True once the kernel was given up; in memory that the SIGBUS handler may read for ever.
    const std::atomic<bool>* abandoned() const { return abandoned_; }

  private:
    void run();
    void abandon();

    const int socket_;
    const int grace_ms_;
    const int wake_;
    const pid_t pid_ = getpid();
    std::atomic<bool>* const abandoned_ = new std::atomic<bool>(false);  // leaked on purpose
    std::atomic<bool> stopping_{false};

    Windows windows_;
    std::unique_ptr<Agent> agent_;
    std::thread thread_;
};

}  // namespace k42::vm
