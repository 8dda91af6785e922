#include "runtime/translation.hpp"

#include <pthread.h>

#include <mutex>
#include <new>
#include <vector>

#include "runtime/quiescence.hpp"

namespace k42::runtime {

namespace {

// The state word of an entry: generation (32 bits), user (31 bits), live (1 bit).
using State = std::uint64_t;
constexpr State live = 1;
constexpr State no_user = 0;              // nobody has translated it yet
constexpr State many_users = 0x7fffffff;  // else: the id, plus one, of the only processor that has
constexpr Index index_of(Coid coid) { return static_cast<Index>(coid); }
constexpr State generation(std::uint64_t word) { return word >> 32; }
constexpr State user(State state) { return state >> 1 & many_users; }
constexpr State state_word(State gen, State who) { return gen << 32 | who << 1 | live; }
constexpr State user_of(const Processor& p) { return State{p.id} + 1; }

// An entry of the Global Translation Table.
struct Entry {
    std::atomic<State> state{0};
    void* object = nullptr;  // set before the entry is live, by its creator
    Index next = 0;          // in a free list
    std::uint32_t home = 0;  // the processor that owns the range
};

struct Deferred {
    Mark mark;
    Coid coid;
    void* object;
    Release release;
};

struct World {
    Table<Entry> entries;
    std::atomic<Index> ranges{0};  // pages of the global table that are in somebody's range
    std::mutex lock;               // protects deferred; innermost: nothing is taken or released under it
    std::vector<Deferred> deferred;

    static World& instance() {
        static World* world = new World();  // never destroyed, like the processors
        return *world;
    }

  private:
    World() {
        pthread_atfork([] { instance().lock.lock(); }, [] { instance().lock.unlock(); },
                       [] { instance().lock.unlock(); });
    }
};

// The calling processor's list is empty: what others returned, else a new range.
void refill(World& world, Processor& p) {
    p.free = p.returned.exchange(0, std::memory_order_acquire);
    if (p.free) return;
    Index range = world.ranges.fetch_add(1, std::memory_order_relaxed);
    if (range >= directory_size) throw std::bad_alloc();
    Index first = range << page_bits;
    for (Index i = first + page_size; i-- > first;) {
        if (i == 0) break;  // index 0 names nothing
        Entry& entry = world.entries.at(i);
        entry.home = p.id;
        entry.next = p.free;
        p.free = i;
    }
}

// The entry is free again, at home, under a new generation.
void recycle(World& world, Processor& here, Index index) {
    Entry& entry = world.entries.at(index);
    entry.object = nullptr;
    if (entry.home == here.id) {
        entry.next = here.free;
        here.free = index;
        return;
    }
    std::atomic<Index>& returned = processor(entry.home).returned;
    Index head = returned.load(std::memory_order_relaxed);
    do {
        entry.next = head;
    } while (!returned.compare_exchange_weak(head, index, std::memory_order_release, std::memory_order_relaxed));
}

void finish(World& world, Coid coid, void* object, Release release) {
    recycle(world, current(), index_of(coid));
    release(object);
}

void empty(Processor& p, Index index) {
    if (auto* entry = p.local.find(index)) entry->store(nullptr, std::memory_order_seq_cst);
}

void defer(World& world, Deferred item) {
    {
        std::lock_guard guard(world.lock);
        world.deferred.push_back(std::move(item));
        world.deferred.back().mark.watch();
    }
    // A request that ended before it could see that it is watched is found by our own collect.
    fence_heavy();
    collect();
}

}  // namespace

void create(Reference& reference, void* object) {
    World& world = World::instance();
    Processor& p = current();
    if (!p.free) refill(world, p);
    Index index = p.free;
    Entry& entry = world.entries.at(index);
    p.free = entry.next;
    entry.object = object;
    State gen = (generation(entry.state.load(std::memory_order_relaxed)) + 1) & UINT32_MAX;
    entry.state.store(state_word(gen, no_user), std::memory_order_release);
    reference.coid_.store(gen << 32 | index, std::memory_order_release);
}

bool destroy(Reference& reference, Release release, bool* deferred) {
    *deferred = false;
    Coid coid = reference.coid_.exchange(0, std::memory_order_seq_cst);
    if (coid == 0) return false;
    World& world = World::instance();
    Processor& here = current();
    Index index = index_of(coid);
    Entry& entry = world.entries.at(index);
    State state = entry.state.fetch_and(~live, std::memory_order_seq_cst);
    void* object = entry.object;

    Mark mark;
    if (user(state) == user_of(here)) {
        // We alone ever translated it: nobody else can be inside.
        empty(here, index);
        mark = Mark::take(here);
    } else if (user(state) != no_user) {
        for (std::uint32_t id = 0, n = processor_count(); id < n; ++id) empty(processor(id), index);
        mark = Mark::take();
    }
    if (mark.elapsed()) {
        finish(world, coid, object, release);
        return true;
    }
    *deferred = true;
    defer(world, {std::move(mark), coid, object, release});
    return true;
}

void collect() {
    World& world = World::instance();
    // Inside a request (a destruction begun there) its end must still be watched.
    Processor& p = current();
    if (p.depth == 0) p.watched.store(false, std::memory_order_relaxed);
    std::vector<Deferred> elapsed;
    {
        std::lock_guard guard(world.lock);
        std::erase_if(world.deferred, [&](Deferred& item) {
            if (!item.mark.elapsed()) return false;
            elapsed.push_back(std::move(item));
            return true;
        });
    }
    for (Deferred& item : elapsed) finish(world, item.coid, item.object, item.release);
}

void* begin_miss(Processor& p, Coid coid) {
    Index index = index_of(coid);
    if (index == 0) return nullptr;
    Entry* entry = World::instance().entries.find(index);
    if (!entry) return nullptr;
    State state = entry->state.load(std::memory_order_acquire);
    State wanted;
    do {
        if (!(state & live) || generation(state) != generation(coid)) return nullptr;
        State who = user(state) == no_user || user(state) == user_of(p) ? user_of(p) : many_users;
        wanted = state_word(generation(state), who);
    } while (!entry->state.compare_exchange_weak(state, wanted, std::memory_order_seq_cst));
    return entry->object;
}

void install(Processor& p, Coid coid, void* rep) {
    Index index = index_of(coid);
    std::atomic<void*>& local = p.local.at(index);
    local.store(rep, std::memory_order_seq_cst);
    // Either a destruction that races sees our entry and empties it, or we see its mark.
    State state = World::instance().entries.at(index).state.load(std::memory_order_seq_cst);
    if (!(state & live) || generation(state) != generation(coid)) local.store(nullptr, std::memory_order_seq_cst);
}

}  // namespace k42::runtime
