// The agent: what the kernel asks of a client that only the client can do to its own address space, and the thread
// of the client that does it. The kernel writes commands into a ring in shared memory and goes on: a client that
// does not execute them loses speed, nothing else.
//
// The client only reads the ring, and the kernel reads nothing back from it, so that a hostile client damages itself
// at most. A ring that is full loses its oldest commands. Both sides meet at a futex in the ring: to wake the agent
// never makes the kernel wait, whatever the client does to its descriptors.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

namespace k42::vm {

struct Command {
    enum class What : uint16_t {
        soft_unmap = 1,  // unmap the pages, keep their frames: the next touches are faults
        rehome = 2,      // let the CPU `to` serve the range: fresh page tables, empty
    };
    What what;
    uint16_t from, to;  // indices of CPUs; of `rehome`: they may be the same
    uint64_t address, length;

    bool operator==(const Command&) const = default;
};

// How the ring lies in memory. An entry is written like a sequence lock's data.
struct CommandMemory {
    static constexpr uint32_t kEntries = 511;

    struct Entry {
        std::atomic<uint64_t> number;  // of the command, from 1; 0: being written
        std::atomic<uint64_t> what_from_to;
        std::atomic<uint64_t> address;
        std::atomic<uint64_t> length;
    };
    std::atomic<uint32_t> posted;  // the low bits of the newest number; a futex
    uint32_t unused[7];
    Entry entries[kEntries];
};
static_assert(sizeof(CommandMemory) == 16384);

// The kernel's side.
class CommandRing {
  public:
    // A new sealed memfd; nullptr with errno set. The descriptor stays the object's.
    static std::unique_ptr<CommandRing> create();
    // The one that a kernel left which has gone; takes the descriptor over. nullptr with errno set.
    static std::unique_ptr<CommandRing> adopt(int fd);
    ~CommandRing();
    CommandRing(const CommandRing&) = delete;
    CommandRing& operator=(const CommandRing&) = delete;

    int descriptor() const { return fd_; }
    void post(const Command& command);

  private:
    CommandRing(int fd, CommandMemory* memory) : fd_(fd), memory_(memory) {}

    const int fd_;
    CommandMemory* const memory_;
    std::atomic_flag writing_;  // protects the entries and next_; a leaf, held for one command
    uint64_t next_ = 0;
};

// The client's side of the ring; used by one thread.
class CommandReader {
  public:
    explicit CommandReader(const CommandMemory* memory) : memory_(memory) {}

    std::optional<Command> next();
    // Commands that were lost since the ring was full.
    uint64_t lost() const { return lost_; }

  private:
    const CommandMemory* const memory_;
    uint64_t last_ = 0;
    uint64_t lost_ = 0;
};

// What the client's native threads know of one connection: its windows, and the userfaultfds that serve them.
struct Windows {
    // What Linux maps: for reading; shared and writable, writes tracked; or writable, and what is written is copied for
    // the client alone: such copies are nowhere else, so that nothing is to unmap them.
    enum class Kind : uint8_t { read, shared, copies };
    struct Range {
        uint64_t base;
        uint64_t length;
        int memfd;  // the mapping's, open as long as the range is listed
        uint64_t offset;
        Kind kind;
    };

    // Protects what the ranges show: held while a command is executed, and while a range is delisted. Whoever holds
    // it may wait for the kernel. Before `lock`.
    std::mutex changing;
    std::mutex lock;         // protects the members below; a leaf
    std::vector<int> uffds;  // by the kernel's index of the CPU; -1: none there
    std::vector<Range> ranges;

    void watch(size_t cpu, int uffd);
    int uffd_of(size_t cpu);
    std::vector<int> all_uffds();
    void add(const Range& range);
    void remove(uint64_t base);  // no command touches it from then on
    // The range that contains these addresses.
    std::optional<Range> find(uint64_t address, uint64_t length);
    // Reads what waits on the userfaultfds: ends the events that block our own threads; faults happen again.
    void drain();
};

// The client's thread that executes commands. It can be blocked by a kernel that is stopped or dead (until someone
// reads the event of a moved range), so no other thread waits for it unless it reads the events itself.
class Agent {
  public:
    // Maps the ring for itself. `windows` outlives it. Throws std::system_error.
    Agent(Windows& windows, int memfd);
    ~Agent();
    Agent(const Agent&) = delete;
    Agent& operator=(const Agent&) = delete;

    void stop();
    // After fork(): the child has no such thread; the object is left behind.
    void forget_in_child();

  private:
    void run();
    void execute(const Command& command);
    void rehome(const Command& command, const Windows::Range& range);

    Windows& windows_;
    const CommandMemory* memory_;
    std::atomic<uint32_t> stopping_{0};  // a futex
    std::atomic<bool> ended_{false};
    std::thread thread_;
};

}  // namespace k42::vm
