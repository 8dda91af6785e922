// The fault engine: one server thread a CPU, pinned there, that reads the faults of its CPU from every client's
// userfaultfd of that CPU and finishes them where all that is needed is at hand. What it cannot finish (a store,
// memory pressure, a stopped Region) it hands up to the Python objects, whose worker threads take it from next().
//
// It walks the native halves of the same objects that the Python way calls, in the same order: HAT, Process,
// Region, FCM, PM (paper, figure 2).
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "runtime/processor.hpp"
#include "vm/affinity.hpp"
#include "vm/file_cache.hpp"
#include "vm/hat.hpp"
#include "vm/reader.hpp"

namespace k42::vm {

// What the fault of one thread needs from Python. Holds a reference to the HAT.
struct HandedUp {
    Hat* hat;
    int cpu;
    uint64_t address;  // of the window, page-aligned
    uint64_t canonical;
    bool write;
};

class Engine {
  public:
    struct Counts {
        uint64_t faults, finished, handed_up;  // faults read; finished here; given to Python
        uint64_t read;                         // of those finished: for which native threads read a file
        uint64_t kept;                         // bursts of a thread that were kept on a CPU
        uint64_t local, remote;  // faults of threads that belong to the CPU that served them, or to another
        uint64_t rehomed;        // moves of spans that were asked for
    };

    // `cpus`: the numbers of the CPUs to serve, one server thread each. What it does for clients that ask for it:
    // `sticky`: keep threads that fault on a CPU; `homing`: move spans to the CPU of the threads that fault there.
    Engine(std::vector<int> cpus, bool sticky, bool homing);
    ~Engine();
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    void start();
    // Keeps on record which threads are held on a CPU; see Placement::keep_records.
    int keep_records(int memfd) { return placement_.keep_records(memfd); }
    // Ends the server threads and lets all HATs go; next() returns nothing and add() refuses from then on.
    void stop();

    // Serves the HAT's userfaultfd of this CPU (an index into cpus), of process `pid`, until remove().
    bool add(UffdHat* hat, int cpu, pid_t pid, bool sticky = true, bool homing = true);
    // After it, no server thread uses the HAT or what it leads to. Hand-ups in the queue keep their reference.
    void remove(UffdHat* hat);
    // Returns when every server thread has left what it was in at the call: what was unlinked before is unused.
    void synchronize();

    // Resolves one fault on the calling thread. False: it is Python's to finish.
    static bool handle(FaultAt fault);

    // A fault handed up on this CPU; waits for one. Nothing after stop().
    std::optional<HandedUp> next(int cpu);

    const std::vector<int>& cpus() const { return cpus_; }
    // The processor of the server thread of this CPU; nullptr until it runs.
    const runtime::Processor* processor(int cpu) const {
        return servers_[cpu]->processor.load(std::memory_order_seq_cst);
    }
    Counts counts() const;

  private:
    struct Client {
        UffdHat* hat;
        pid_t pid;
        int uffd;
        bool sticky, homing;
    };

    // What one server thread has; a cache line of its own for what it writes.
    struct alignas(runtime::apart) Server {
        // `cpu`: an index into cpus, of which `number` is the number.
        Server(Engine& engine, int cpu, int number)
            : affinity(engine.placement_, cpu),
              reader(number, [this](const ReadJob& job) { hand_up(*this, job.fault, job.canonical); }) {}

        std::atomic<runtime::Processor*> processor{nullptr};  // its thread's: handling faults is a request there
        std::atomic<uint64_t> faults{0}, finished{0}, handed_up{0}, kept{0}, local{0}, remote{0}, rehomed{0};
        StickyAffinity affinity;
        int epoll = -1;
        int wake = -1;
        std::thread thread;

        // Protects clients, and epoll against being closed; held while a server handles one client's faults.
        std::mutex clients_lock;
        std::vector<std::unique_ptr<Client>> clients;

        std::mutex queue_lock;  // protects queue and stopped; a leaf
        std::condition_variable queue_filled;
        std::deque<HandedUp> queue;
        bool stopped = false;

        Reader reader;
    };

    // `canonical`: what the window shows at the fault's address. With a `job` the file may be found to be read: true
    // then, and the job, for a Reader, has a cache.
    static bool handle(FaultAt fault, std::optional<uint64_t> canonical, ReadJob* job = nullptr);
    static void hand_up(Server& server, const FaultAt& fault, uint64_t canonical);
    void serve(int cpu);
    void read_faults(int cpu, Server& server, Client& client, uint64_t now);

    const std::vector<int> cpus_;
    const bool sticky_, homing_;
    Placement placement_;
    std::vector<std::unique_ptr<Server>> servers_;
    std::atomic<bool> stopping_{false};
};

}  // namespace k42::vm
