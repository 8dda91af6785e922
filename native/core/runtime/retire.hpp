// Deferred release: what was just unlinked from a structure may still be read by requests that run now, without a
// lock; `retire` releases it once they have ended.
//
// Retirements are batched by processor, so that the heavy fence of a mark is paid once for many. So a few dozen
// retired objects a processor wait for the next ones, or for `flush`; those of a freed processor for its next owner.
#pragma once

#include <cstddef>

namespace k42::runtime {

// Runs `release(object)` once every request that runs now has ended: on the calling processor, within a later
// `retire` or `flush`. Whoever calls it must have unlinked the object before, and hold no lock that `release` needs.
void retire(void* object, void (*release)(void*));

template <typename T>
void retire(T* object) {
    retire(object, [](void* o) { delete static_cast<T*>(o); });
}

// Releases what the calling processor has retired and nobody can be reading any more.
void flush();

// How many retirements of the calling processor have not been released.
std::size_t retired();

}  // namespace k42::runtime
