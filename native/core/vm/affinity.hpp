// Sticky affinity: a thread in a burst of faults is kept on the CPU that serves them, so that serving one is a
// hand-off on that CPU and not an interrupt to another (there: 4 to 6 µs a fault; elsewhere: 60 to 125 µs). The
// scheduler alone keeps moving an unpinned client away, since its CPU is busy with the server when it wakes.
#pragma once

#include <sched.h>
#include <sys/types.h>

#include <cstdint>
#include <vector>

namespace k42::vm {

class StickyAffinity {
  public:
    // Faults that follow each other within kGap make a burst; kBurst of them, and the thread is kept. When kIdle
    // has passed without one, it gets its own mask back. A burst is short enough to gain from it at once, and a
    // thread that faults now and then is never held.
    static constexpr uint64_t kGap = 300'000;     // ns
    static constexpr uint32_t kBurst = 4;         // faults
    static constexpr uint64_t kIdle = 2'000'000;  // ns

    explicit StickyAffinity(int cpu) : cpu_(cpu) {}
    ~StickyAffinity() { release_all(); }
    StickyAffinity(const StickyAffinity&) = delete;
    StickyAffinity& operator=(const StickyAffinity&) = delete;

    // What a held thread starts meanwhile, threads and processes, inherits the narrow mask, and would keep it for ever:
    // when the thread gets its mask back, so do they. (A new thread that its program has bound to this very CPU by
    // itself cannot be told from those, and is widened too.)

    // A fault of thread `tid` of process `pid` at `now` (ns, CLOCK_MONOTONIC).
    void fault(pid_t pid, pid_t tid, uint64_t now);
    // Gives idle threads their masks back; true while some are still kept.
    bool release_idle(uint64_t now);
    void release_all();

    uint64_t kept() const { return kept_; }

  private:
    struct Thread {
        pid_t pid;
        pid_t tid;
        uint64_t last;    // time of its last fault
        uint32_t faults;  // of the burst so far
        bool held;        // `own` is to be given back
        cpu_set_t own;    // the thread's mask before
        pid_t newest;     // the newest thread or process of the system when it was held
    };

    void hold(Thread& thread) const;
    void give_back(Thread& thread) const;
    void widen(pid_t task, const cpu_set_t& own) const;
    void widen_newer(pid_t pid, const Thread& holder, pid_t newest) const;

    const int cpu_;
    std::vector<Thread> threads_;  // the server thread's alone; those seen within kIdle
    uint64_t kept_ = 0;            // bursts held, ever
};

}  // namespace k42::vm
