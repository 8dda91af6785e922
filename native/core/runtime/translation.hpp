// Translation: from a reference to the root (one global table) and to the local representative (a table per
// processor); and the life of an entry: free, live, destroyed, and free again after quiescence.
//
// Section 2.2.1 of the paper. A local entry is a cache of what the root knows: it may be emptied at any time,
// and the next call on it misses. The state word of an entry holds its generation, whether it is live, and
// which processor alone ever translated it (most objects live and die on one: the paper's 99.4%), so that one
// compare-and-swap decides between a miss and a destruction that race.
#pragma once

#include <atomic>
#include <cstdint>

#include "runtime/processor.hpp"

namespace k42::runtime {

// A Clustered Object's identifier: index of its entry in the low half, generation in the high half. Zero
// names nothing.
using Coid = std::uint64_t;

// Where a client keeps a coid. It is read inside a request, and `destroy` empties it first: so whoever enters
// after a destruction finds it empty, and the index can serve another object.
class Reference {
  public:
    Coid coid() const { return coid_.load(std::memory_order_acquire); }

  private:
    std::atomic<Coid> coid_{0};

    friend void create(Reference&, void*);
    friend bool destroy(Reference&, void (*)(void*), bool*);
};

// What releases an object (its root and its representatives) when nobody can be using it any more.
using Release = void (*)(void* object);

// Gives `object` an entry from the calling processor's free list, and `reference` its coid.
void create(Reference& reference, void* object);

// Marks the object as destroyed: from now on calls do not find it; those that run finish. `release(object)`
// runs once, after quiescence: at once when no request runs, else from a later `collect()`. Allowed inside a
// request on the same object. Returns false when `reference` is empty (never made or destroyed before);
// `deferred` tells whether the release waits.
bool destroy(Reference& reference, Release release, bool* deferred);

// Releases what waited for requests that have ended since. Called when `leave` says so; never inside a lock,
// for `release` runs in it.
void collect();

// The local representative, or nullptr: a miss. Inside a request.
inline void* translate(const Processor& p, Coid coid) {
    auto* entry = p.local.find(static_cast<Index>(coid));
    return entry ? entry->load(std::memory_order_acquire) : nullptr;
}

// A miss begins, inside a request: the object, which now outlives this request; or nullptr when it is
// destroyed.
void* begin_miss(Processor& p, Coid coid);

// Installs the representative that the miss found. When the object has been destroyed meanwhile the entry
// stays empty; the request may still use the representative.
void install(Processor& p, Coid coid, void* rep);

}  // namespace k42::runtime
