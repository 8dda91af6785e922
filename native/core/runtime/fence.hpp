// A fence in two halves: the frequent side pays a compiler barrier, the rare side pays for both.
//
// Requests begin on every call, marks of quiescence are taken once a destruction: so the full barrier that
// orders "I am inside" before "which representative?" is bought by the mark, with membarrier(2), which runs a
// barrier on every CPU that executes a thread of this process. Where the kernel refuses it (a seccomp
// filter), and under ThreadSanitizer, which cannot see it, both sides are full fences.
#pragma once

#include <atomic>

namespace k42::runtime {

namespace detail {
extern const bool asymmetric;  // decided once, before any thread can be inside a request
}

// Orders the accesses before it against those after it, with respect to `fence_heavy` of another thread.
inline void fence_light() {
    if (detail::asymmetric) [[likely]] {
        std::atomic_signal_fence(std::memory_order_seq_cst);
    } else {
        std::atomic_thread_fence(std::memory_order_seq_cst);
    }
}

// The other half: 0.2 µs where nobody else runs, a few µs where the other CPUs must be interrupted.
void fence_heavy();

}  // namespace k42::runtime
