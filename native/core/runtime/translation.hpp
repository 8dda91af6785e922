// Translation: from a reference to the root (one global table) and to the local representative (a table per
// processor); and the life of an entry: free, live, destroyed, and free again after quiescence.
//
// Section 2.2.1 of the paper. A local entry is a cache of what the root knows: it may be emptied at any time,
// and the next call on it misses. The state word of an entry holds its generation, whether it is live, whether its
// object is being switched to another implementation, and which processor alone ever translated it (most objects live
// and die on one: the paper's 99.4%), so that one compare-and-swap decides between a miss, a switch and a destruction
// that race.
#pragma once

#include <atomic>
#include <cstdint>

#include "runtime/processor.hpp"

namespace k42::runtime {

// A Clustered Object's identifier: index of its entry in the low half, generation in the high half. Zero
// names nothing.
using Coid = std::uint64_t;

// The end of an object (its root and its representatives).
struct Ending {
    void (*release)(void* object);  // runs once, when nobody can be using the object any more
    bool (*held)(void* object);     // whether a suspended request still uses it; whoever ends one calls `collect`
};

// Where a client keeps a coid. It is read inside a request, and `destroy` empties it first: so whoever enters
// after a destruction finds it empty, and the index can serve another object.
class Reference {
  public:
    Coid coid() const { return coid_.load(std::memory_order_acquire); }

  private:
    std::atomic<Coid> coid_{0};

    friend void create(Reference&, void*);
    friend bool destroy(Reference&, Ending, bool*);
};

// Gives `object` an entry from the calling processor's free list, and `reference` its coid.
void create(Reference& reference, void* object);

// Marks the object as destroyed: from now on calls do not find it; those that run finish. The release comes after
// quiescence: at once when no request runs that may use the object, else from a later `collect()`; after the switch,
// if one is under way. Allowed inside a request on the same object. Returns false when `reference` is empty (never made
// or destroyed before); `deferred` tells whether the release waits.
bool destroy(Reference& reference, Ending ending, bool* deferred);

// Releases what waited for requests that have ended since, and opens the processor's mail. Called when `leave` says so;
// never inside a lock, for releases run in it.
void collect();

// A local entry without a representative, on a processor that has used the object: destruction waits for it.
inline void* const used = reinterpret_cast<void*>(std::uintptr_t{1});

// The local representative, or nullptr: a miss. Inside a request.
inline void* translate(const Processor& p, Coid coid) {
    auto* entry = p.local.find(static_cast<Index>(coid));
    if (!entry) return nullptr;
    void* rep = entry->load(std::memory_order_acquire);
    return rep == used ? nullptr : rep;
}

// What the coid names. Inside the request that has translated it.
void* object_of(Coid coid);

struct Miss {
    enum class Outcome {
        found,      // install the representative
        passing,    // the object is being switched, and this request is older: do not install
        switching,  // the object is being switched: `await_switch`, and translate again
        destroyed,
    };
    Outcome outcome;
    void* object;  // unless destroyed; it outlives this request
};

// A miss begins, inside a request. Also for a look at the object: a representative that is installed stays so.
Miss begin_miss(Processor& p, Coid coid);

// Installs the representative that the miss found. When the object has been destroyed meanwhile, or is being
// switched, the entry stays empty; the request may still use the representative.
void install(Processor& p, Coid coid, void* rep);

// Takes back what the calling request has just installed: the next call misses.
void uninstall(Processor& p, Coid coid);

// Empties the entry of every processor: the next calls miss.
void empty_everywhere(Coid coid);

}  // namespace k42::runtime
