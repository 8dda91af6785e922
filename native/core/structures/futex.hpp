// Waiting on a 32-bit word, directly on the futex: std::atomic::wait keeps its waiters in a table of the whole
// process, whose lines every processor would share.
#pragma once

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <climits>
#include <cstdint>

namespace k42 {

// Sleeps while `word` holds `expected`; may return early, so callers look again.
inline void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
#ifdef __linux__
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
#else
    word.wait(expected);
#endif
}

inline void futex_wake_all(std::atomic<uint32_t>& word) {
#ifdef __linux__
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
    word.notify_all();
#endif
}

}  // namespace k42
