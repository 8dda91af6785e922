// Waiting on a 32-bit word, directly on the futex: std::atomic::wait keeps its waiters in a table of the whole
// process, whose lines every processor would share.
#pragma once

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <ctime>
#else
#include <thread>
#endif

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>

namespace k42 {

using Deadline = std::chrono::steady_clock::time_point;
inline constexpr Deadline never = Deadline::max();

// Sleeps while `word` holds `expected`; may return early, so callers look again.
inline void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
#ifdef __linux__
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
#else
    word.wait(expected);
#endif
}

// The same, until `deadline`: false when it has passed.
inline bool futex_wait(std::atomic<uint32_t>& word, uint32_t expected, Deadline deadline) {
    if (deadline == never) {
        futex_wait(word, expected);
        return true;
    }
    const Deadline now = std::chrono::steady_clock::now();
    if (now >= deadline) return false;
#ifdef __linux__
    using namespace std::chrono;  // the steady clock is CLOCK_MONOTONIC, which the bitset form takes as it is
    const auto since = deadline.time_since_epoch();
    const auto whole = duration_cast<seconds>(since);
    const timespec until{time_t(whole.count()), long(duration_cast<nanoseconds>(since - whole).count())};
    syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, expected, &until, nullptr, FUTEX_BITSET_MATCH_ANY);
#else
    // The standard library has no wait with a deadline.
    if (word.load() == expected) std::this_thread::sleep_for(std::chrono::milliseconds(1));
#endif
    return true;
}

inline void futex_wake_all(std::atomic<uint32_t>& word) {
#ifdef __linux__
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
    word.notify_all();
#endif
}

}  // namespace k42
