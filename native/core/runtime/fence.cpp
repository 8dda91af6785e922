#include "runtime/fence.hpp"

#ifdef __linux__
#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cerrno>
#include <cstdlib>

namespace k42::runtime {

namespace {

#if defined(__linux__) && !defined(__SANITIZE_THREAD__)
bool membarrier(int command) { return syscall(SYS_membarrier, command, 0, 0) == 0; }
bool prepare() { return membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED); }
bool interrupt() { return membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED); }
#else
bool prepare() { return false; }
bool interrupt() { return false; }
#endif

}  // namespace

const bool detail::asymmetric = prepare();

void fence_heavy() {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (!detail::asymmetric) return;
    if (interrupt()) return;
    // The registration belongs to the address space: a process image that lost it registers again.
    if (errno == EPERM && prepare() && interrupt()) return;
    std::abort();  // the light side already relies on it: going on would free what others use
}

}  // namespace k42::runtime
