// Where threads that fault belong. Sticky affinity: a thread in a burst of faults is kept on one CPU, so that serving
// one is a hand-off on that CPU and not an interrupt to another (there: 4 to 6 µs a fault; elsewhere: 60 to 125 µs).
// The scheduler alone keeps moving an unpinned client away, since its CPU is busy with the server when it wakes.
//
// Placement chooses the CPU and knows who is held where, one for all; each server has a StickyAffinity, which knows the
// threads whose faults come there. The spans of memory then follow the threads (homing.hpp).
#pragma once

#include <sched.h>
#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "runtime/processor.hpp"

namespace k42::vm {

// Where a thread may be held: nowhere; on the CPU where its faults are served, since they will not come elsewhere; or
// on any, to which the memory can follow.
enum class Hold : uint8_t { nowhere, here, anywhere };

// Who is held, in a memfd that outlives the kernel: if it dies, the next one gives the masks back.
struct HeldRecord {
    std::atomic<int32_t> tid;  // 0: not in use; written last
    int32_t pid;
    int32_t cpu;  // its number
    int32_t newest;
    cpu_set_t own;
};

class Placement {
  public:
    static constexpr size_t kRecords = 1024;  // no more threads are held at a time
    static constexpr size_t kRecordBytes = kRecords * sizeof(HeldRecord);

    // A thread that is kept on a CPU. Lines of its own: written where the thread faults, which is on that CPU, mostly.
    struct alignas(runtime::apart) Held {
        pid_t pid;
        pid_t tid;
        int place;                       // index of the CPU
        cpu_set_t own;                   // the thread's mask before
        pid_t newest;                    // the newest thread or process of the system when it was held
        HeldRecord* record = nullptr;    // its own, if there are records
        std::atomic<uint64_t> last;      // time of a recent fault
        std::atomic<bool> active{true};  // `own` is to be given back
    };
    struct Place {
        int cpu;  // index; -1: it belongs nowhere in particular
        std::shared_ptr<Held> held;
        bool fresh;  // held by this very call
    };

    // Numbers of CPUs, which are known by their index here.
    explicit Placement(std::vector<int> cpus) : cpus_(std::move(cpus)), count_(cpus_.size(), 0) {}
    ~Placement();
    Placement(const Placement&) = delete;
    Placement& operator=(const Placement&) = delete;

    // A thread's faults come in a burst on the CPU with this index. It belongs to the CPU where it is held already; if
    // its program left it one CPU alone, to that. Else it may be held: where its mask allows it and the
    // fewest are held; of such CPUs here, else where it last ran.
    Place place(pid_t pid, pid_t tid, int here, Hold hold, uint64_t now);

    // False when the program has changed the thread's mask, which is then left alone.
    bool still_held(const std::shared_ptr<Held>& held);

    // Keeps records in this memfd, from now on; first gives the masks back that a kernel on record there had taken.
    // Before any thread is held. How many there were; -1 with errno set.
    int keep_records(int memfd);

    // Gives the thread its mask back, unless another server has seen a fault of it within `idle` ns.
    void release(const std::shared_ptr<Held>& held, uint64_t now, uint64_t idle);
    void release_all();

    // What a held thread starts meanwhile, threads and processes, inherits the narrow mask, and would keep it for ever:
    // when the thread gets its mask back, so do they. (A new thread that its program has bound to this very CPU by
    // itself cannot be told from those, and is widened too.)

  private:
    int choose(const cpu_set_t& own, pid_t pid, pid_t tid, int here, Hold hold) const;
    void forget(const std::shared_ptr<Held>& held);
    void forget_record(Held& held);
    void give_back(const Held& held) const;
    void widen(pid_t task, const Held& holder) const;
    void widen_newer(pid_t pid, const Held& holder, pid_t newest) const;

    const std::vector<int> cpus_;
    std::mutex lock_;                              // protects the members below, and the masks of held threads; a leaf
    std::map<pid_t, std::shared_ptr<Held>> held_;  // by thread
    std::vector<int> count_;                       // of threads held on each CPU
    HeldRecord* records_ = nullptr;
    std::vector<HeldRecord*> free_records_;
};

class StickyAffinity {
  public:
    // Faults that follow each other within kGap make a burst; kBurst of them, and the thread is placed. When kIdle
    // has passed without one, it gets its own mask back. A burst is short enough to gain from it at once, and a
    // thread that faults now and then is never held.
    static constexpr uint64_t kGap = 300'000;     // ns
    static constexpr uint32_t kBurst = 4;         // faults
    static constexpr uint64_t kIdle = 2'000'000;  // ns
    // So often is a held thread looked at: its program may have bound it elsewhere.
    static constexpr uint32_t kCheck = 1024;  // faults

    // `here`: index of the CPU.
    StickyAffinity(Placement& placement, int here) : placement_(placement), here_(here) {}
    StickyAffinity(const StickyAffinity&) = delete;
    StickyAffinity& operator=(const StickyAffinity&) = delete;

    // A fault of thread `tid` of process `pid` at `now` (ns, CLOCK_MONOTONIC). The index of the CPU to which the thread
    // belongs; -1: not known (yet), or none.
    int fault(pid_t pid, pid_t tid, Hold hold, uint64_t now);
    // Gives idle threads their masks back; true while some are still watched.
    bool release_idle(uint64_t now);

    uint64_t kept() const { return kept_; }

  private:
    struct Thread {
        pid_t tid;
        uint64_t last;    // time of its last fault here
        uint32_t faults;  // of the burst so far
        int place;
        std::shared_ptr<Placement::Held> held;
    };

    Placement& placement_;
    const int here_;
    std::vector<Thread> threads_;  // the server thread's alone; those seen within kIdle
    uint64_t kept_ = 0;            // bursts held, ever
};

}  // namespace k42::vm
