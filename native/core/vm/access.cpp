#include "vm/access.hpp"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstring>
#include <mutex>
#include <optional>

#include "vm/uffd.hpp"

namespace k42::vm {

namespace {

struct Touch {
    uint64_t start;
    uint64_t length;
    uint64_t failed;
    sigjmp_buf before;
};

// What this thread is touching under guard. Of the initial-exec model: a signal handler reads it, and must not be the
// one that makes it.
constinit thread_local Touch* current __attribute__((tls_model("initial-exec"))) = nullptr;

// The address that could not be had; nothing when all went well. The signal mask is not saved, which would be a system
// call each time: whoever leaves restores it.
std::optional<uint64_t> attempt(uint64_t start, uint64_t length, void (*touch)(void*), void* argument) {
    Touch mine;
    mine.start = start;
    mine.length = length;
    if (sigsetjmp(mine.before, 0)) return mine.failed;
    current = &mine;
    std::atomic_signal_fence(std::memory_order_seq_cst);
    touch(argument);
    std::atomic_signal_fence(std::memory_order_seq_cst);
    current = nullptr;
    return std::nullopt;
}

// Each protects the healing of the pages that fall to it, against other healers; held while the page is asked for,
// since whoever waits for it needs the same answer. Leaves.
std::mutex healing[64];

// Takes the mark of failure off a page that all its writers share.
void heal(uint64_t page) {
    std::lock_guard guard(healing[page / kPageSize % std::size(healing)]);
    auto probe = [](void* p) { (void)*static_cast<volatile const char*>(p); };
    if (attempt(page, kPageSize, probe, reinterpret_cast<void*>(page))) {
        madvise(reinterpret_cast<void*>(page), kPageSize, MADV_DONTNEED);
    }
}

}  // namespace

void leave_guarded_touch(uint64_t address, const void* context) {
    Touch* touch = current;
    if (!touch || address - touch->start >= touch->length) return;
    current = nullptr;
    touch->failed = address;
    // As it was before the signal: here, and where a handler before ours (a sanitizer's) blocks more.
    pthread_sigmask(SIG_SETMASK, &static_cast<const ucontext_t*>(context)->uc_sigmask, nullptr);
    siglongjmp(touch->before, 1);
}

bool touch_guarded(const WindowRecord& window, uint64_t start, uint64_t length, void (*touch)(void*), void* argument,
                   AccessFailure& failure) {
    constexpr int kTries = 3;  // other threads that fail on the page may mark it between our healing and our touch
    const uint64_t before = StatusPage::newest(window.status);
    for (int tries = 1;; ++tries) {
        const auto failed = attempt(start, length, touch, argument);
        if (!failed) return true;
        failure.address = *failed;
        failure.abandoned = window.abandoned->load(std::memory_order_relaxed);
        const uint64_t sequence = StatusPage::copy_reason(window.status, *failed, failure.reason);
        const bool stale = !failure.abandoned && sequence <= before;
        failure.marked = stale && window.copies;
        if (!window.copies) heal(*failed & ~(kPageSize - 1));
        if (!stale || failure.marked || tries == kTries) return false;
    }
}

}  // namespace k42::vm
