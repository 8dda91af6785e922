// Accesses to a window by the library's own code (slices, reads, searches): where a page cannot be had they end in an
// error that can be raised, not in SIGBUS, and the page can be asked for again.
//
// The SIGBUS handler leaves such an access by siglongjmp. That is sound because the signal is synchronous and comes
// from the touching function alone, which owns nothing: it copies or compares bytes, and may be run again from the
// start.
#pragma once

#include <cstdint>

#include "vm/guard.hpp"
#include "vm/status_page.hpp"

namespace k42::vm {

// Why an access ended.
struct AccessFailure {
    uint64_t address = 0;
    bool abandoned = false;  // the kernel is gone, and none took over in time
    bool marked = false;     // it failed at an earlier access, and the mark of that was not taken off
    char reason[sizeof(FailureRecord::reason)] = {};
};

// Runs touch(argument), which may touch [start, start + length) of the window, and nothing else that can fault. It is
// run again where the page was only marked as failed from an earlier time. False, and the reason, where a page could
// not be had. The mark is taken off, so that the next access asks the kernel for it anew; but not in a window of
// copies: there the mark is the kernel's to replace, which has to be asked for it (`marked`). To drop it here could
// drop a copy: between the look at the mark and the drop the kernel may replace it, for the fault of another thread
// that was on its way before there was a mark, and that thread may write.
bool touch_guarded(const WindowRecord& window, uint64_t start, uint64_t length, void (*touch)(void*), void* argument,
                   AccessFailure& failure);

// For the SIGBUS handler, with its third argument: does not return if this thread is in a guarded touch of `address`.
void leave_guarded_touch(uint64_t address, const void* context);

}  // namespace k42::vm
