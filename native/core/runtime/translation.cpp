#include "runtime/translation.hpp"

#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "runtime/quiescence.hpp"
#include "runtime/retire.hpp"
#include "runtime/switch.hpp"

namespace k42::runtime {

// A page of the global table, which its home processor owns and gives entries of.
struct Range {
    Index number;
    std::uint32_t home;
    Index free = 0;             // LIFO list of free entries, linked by Entry::next; 0 ends it
    std::uint32_t taken = 0;    // entries that are not in the list
    Range* previous = nullptr;  // in the home's list of ranges with free entries
    Range* next = nullptr;
};

namespace {

// The state word of an entry: generation (32 bits), user (30 bits), switching (1 bit), live (1 bit).
using State = std::uint64_t;
constexpr State live = 1;
constexpr State switching = 2;
constexpr State no_user = 0;              // nobody has translated it yet
constexpr State many_users = 0x3fffffff;  // else: the id, plus one, of the only processor that has
constexpr Index index_of(Coid coid) { return static_cast<Index>(coid); }
constexpr State generation(std::uint64_t word) { return word >> 32; }
constexpr State user(State state) { return state >> 2 & many_users; }
constexpr State with_user(State state, State who) { return (state & ~(many_users << 2)) | who << 2; }
constexpr State user_of(const Processor& p) { return State{p.id} + 1; }

// An entry of the Global Translation Table.
struct Entry {
    std::atomic<State> state{0};
    void* object = nullptr;  // set before the entry is live, by its creator
    Index next = 0;          // in a list of free entries
    std::uint32_t home = 0;  // the processor that owns the range
};

}  // namespace

struct Deferred {
    Mark mark;
    Coid coid;
    void* object;
    Ending ending;
};

struct World {
    Table<Entry> entries;
    std::atomic<Range*>* ranges;  // by number

    std::mutex lock;  // protects the next four; innermost: nothing is taken or released under it
    std::vector<Deferred> deferred;
    Index range_count = 0;
    std::vector<Index> free_ranges;

    std::mutex switch_lock;  // protects `switches` and the switches in it; `Mark`s are taken under it
    std::vector<Switch*> switches;
    std::condition_variable switch_ended;

    static World& instance() {
        static World* world = new World();  // never destroyed, like the processors
        return *world;
    }

    Entry& entry(Coid coid) { return *entries.find(index_of(coid)); }

    // Call with switch_lock held.
    Switch* switch_of(Coid coid) const {
        for (Switch* s : switches) {
            if (s->coid_ == coid) return s;
        }
        return nullptr;
    }

  private:
    World() {
        void* memory = std::calloc(directory_size, sizeof(std::atomic<Range*>));
        if (!memory) throw std::bad_alloc();
        ranges = static_cast<std::atomic<Range*>*>(memory);
        pthread_atfork(
            [] {
                instance().switch_lock.lock();
                instance().lock.lock();
            },
            [] {
                instance().lock.unlock();
                instance().switch_lock.unlock();
            },
            after_fork_in_child);
    }
    static void after_fork_in_child();
};

namespace {

// The calling processor's ranges with free entries: a list, used from its front.

void link(Processor& p, Range& range) {
    range.previous = nullptr;
    range.next = p.ranges;
    if (p.ranges) p.ranges->previous = &range;
    p.ranges = &range;
}

void unlink(Processor& p, Range& range) {
    (range.previous ? range.previous->next : p.ranges) = range.next;
    if (range.next) range.next->previous = range.previous;
}

// All entries of a range are free: nobody finds its pages from now on, and they go when nobody can be reading them.
struct EmptyRange {
    Range* range;
    Table<Entry>::Page* page;
    std::vector<Table<std::atomic<void*>>::Page*> local;
};

void give_pages_back(World& world, Range& range) {
    auto* empty = new EmptyRange{&range, world.entries.take(range.number), {}};
    world.ranges[range.number].store(nullptr, std::memory_order_relaxed);
    for (std::uint32_t id = 0, n = processor_count(); id < n; ++id) {
        if (auto* page = processor(id).local.take(range.number)) empty->local.push_back(page);
    }
    retire(empty, [](void* object) {
        auto* gone = static_cast<EmptyRange*>(object);
        for (auto* page : gone->local) delete page;
        delete gone->page;
        {
            // Only now may the number be used again: a coid that an old request holds names nothing until then.
            World& here = World::instance();
            std::lock_guard guard(here.lock);
            here.free_ranges.push_back(gone->range->number);
        }
        delete gone->range;
        delete gone;
    });
    flush();
}

// The entry is free again. By the owner of its home.
void free_at_home(World& world, Processor& home, Index index) {
    Entry& entry = *world.entries.find(index);
    Range& range = *world.ranges[index >> page_bits].load(std::memory_order_relaxed);
    const bool listed = range.free != 0;
    entry.next = range.free;
    range.free = index;
    if (!listed) link(home, range);
    // A last range stays, so that an object made and destroyed again and again makes no pages.
    if (--range.taken == 0 && (range.next || range.previous)) {
        unlink(home, range);
        give_pages_back(world, range);
    }
}

void take_returned(World& world, Processor& p) {
    Index index = p.returned.exchange(0, std::memory_order_acquire);
    while (index) {
        const Index next = world.entries.find(index)->next;
        free_at_home(world, p, index);
        index = next;
    }
}

// The calling processor has no free entry: what others returned, else a new range.
void refill(World& world, Processor& p) {
    take_returned(world, p);
    if (p.ranges) return;
    flush();
    Index number;
    {
        std::lock_guard guard(world.lock);
        if (!world.free_ranges.empty()) {
            number = world.free_ranges.back();
            world.free_ranges.pop_back();
        } else if (world.range_count < directory_size) {
            number = world.range_count++;
        } else {
            throw std::bad_alloc();
        }
    }
    auto* range = new Range{.number = number, .home = p.id};
    world.ranges[number].store(range, std::memory_order_relaxed);
    const Index first = number << page_bits;
    for (Index i = first + page_size; i-- > first;) {
        if (i == 0) break;  // index 0 names nothing
        Entry& entry = world.entries.at(i);
        entry.home = p.id;
        entry.next = range->free;
        range->free = i;
    }
    link(p, *range);
}

void recycle(World& world, Processor& here, Index index) {
    Entry& entry = *world.entries.find(index);
    entry.object = nullptr;
    if (entry.home == here.id) {
        free_at_home(world, here, index);
        return;
    }
    std::atomic<Index>& returned = processor(entry.home).returned;
    Index head = returned.load(std::memory_order_relaxed);
    do {
        entry.next = head;
    } while (!returned.compare_exchange_weak(head, index, std::memory_order_release, std::memory_order_relaxed));
}

void finish(World& world, Coid coid, void* object, Ending ending) {
    recycle(world, current(), index_of(coid));
    ending.release(object);
}

// Empties the local entries of those who have used the object, leaving `rest` in them; returns the processors.
std::vector<Processor*> empty(Coid coid, State state, void* rest) {
    std::vector<Processor*> users;
    auto clear = [&](Processor& p) {
        std::atomic<void*>* entry = p.local.find(index_of(coid));
        if (!entry) return;
        void* seen = entry->load(std::memory_order_seq_cst);
        while (seen && !entry->compare_exchange_weak(seen, rest, std::memory_order_seq_cst)) {
        }
        if (seen) users.push_back(&p);
    };
    if (user(state) == many_users) {
        for (std::uint32_t id = 0, n = processor_count(); id < n; ++id) clear(processor(id));
    } else if (user(state) != no_user) {
        clear(processor(static_cast<std::uint32_t>(user(state) - 1)));
    }
    return users;
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

// The entry is not live any more, `state` is what it was: releases the object now or later.
bool end_object(World& world, Coid coid, State state, Ending ending) {
    void* object = world.entry(coid).object;
    const std::vector<Processor*> users = empty(coid, state, nullptr);
    Mark mark = Mark::take(users);
    if (mark.elapsed() && !ending.held(object)) {
        finish(world, coid, object, ending);
        return false;
    }
    defer(world, {std::move(mark), coid, object, ending});
    return true;
}

}  // namespace

void create(Reference& reference, void* object) {
    World& world = World::instance();
    Processor& p = current();
    if (!p.ranges) refill(world, p);
    Range& range = *p.ranges;
    Index index = range.free;
    Entry& entry = *world.entries.find(index);
    range.free = entry.next;
    ++range.taken;
    if (!range.free) unlink(p, range);
    entry.object = object;
    State gen = (generation(entry.state.load(std::memory_order_relaxed)) + 1) & UINT32_MAX;
    entry.state.store(gen << 32 | live, std::memory_order_release);
    reference.coid_.store(gen << 32 | index, std::memory_order_release);
}

bool destroy(Reference& reference, Ending ending, bool* deferred) {
    *deferred = false;
    Coid coid = reference.coid_.exchange(0, std::memory_order_seq_cst);
    if (coid == 0) return false;
    World& world = World::instance();
    Entry& entry = world.entry(coid);
    State state = entry.state.load(std::memory_order_seq_cst);
    for (;;) {
        if (state & switching) {
            std::lock_guard guard(world.switch_lock);
            if (Switch* s = world.switch_of(coid)) {
                s->ending_ = ending;
                s->doomed_ = true;
                *deferred = true;
                return true;
            }
            state = entry.state.load(std::memory_order_seq_cst);
        } else if (entry.state.compare_exchange_weak(state, state & ~live, std::memory_order_seq_cst)) {
            break;
        }
    }
    *deferred = end_object(world, coid, state, ending);
    return true;
}

void collect() {
    World& world = World::instance();
    // Inside a request (a destruction begun there) its end must still be watched.
    Processor& p = current();
    if (p.depth == 0) p.watched.store(false, std::memory_order_seq_cst);  // before the look at the mail: see `post`
    std::vector<Deferred> elapsed;
    {
        std::lock_guard guard(world.lock);
        std::erase_if(world.deferred, [&](Deferred& item) {
            if (!item.mark.elapsed() || item.ending.held(item.object)) return false;
            elapsed.push_back(std::move(item));
            return true;
        });
    }
    for (Deferred& item : elapsed) finish(world, item.coid, item.object, item.ending);
    open_mail(p);
}

void* object_of(Coid coid) { return World::instance().entry(coid).object; }

Miss begin_miss(Processor& p, Coid coid) {
    World& world = World::instance();
    const Index index = index_of(coid);
    Entry* entry = index ? world.entries.find(index) : nullptr;
    auto is_dead = [&](State state) { return !(state & live) || generation(state) != generation(coid); };
    if (!entry || is_dead(entry->state.load(std::memory_order_acquire))) return {Miss::Outcome::destroyed, nullptr};
    // First say that we use it, then look: whoever ends or switches it does so in the other order. What we said is not
    // taken back, for an outer call of this request may use the object: it costs a later object here one look at us.
    std::atomic<void*>& local = p.local.at(index);
    void* nothing = nullptr;
    local.compare_exchange_strong(nothing, used, std::memory_order_seq_cst);
    State state = entry->state.load(std::memory_order_seq_cst);
    for (;;) {
        if (is_dead(state)) return {Miss::Outcome::destroyed, nullptr};
        if (state & switching) {
            std::lock_guard guard(world.switch_lock);
            if (Switch* s = world.switch_of(coid)) {
                if (s->mark_.includes(p)) return {Miss::Outcome::passing, entry->object};
                return {Miss::Outcome::switching, entry->object};
            }
            state = entry->state.load(std::memory_order_seq_cst);
            continue;
        }
        const State who = user(state) == no_user || user(state) == user_of(p) ? user_of(p) : many_users;
        if (entry->state.compare_exchange_weak(state, with_user(state, who), std::memory_order_seq_cst))
            return {Miss::Outcome::found, entry->object};
    }
}

void install(Processor& p, Coid coid, void* rep) {
    std::atomic<void*>& local = p.local.at(index_of(coid));
    local.store(rep, std::memory_order_seq_cst);
    // Either a destruction or a switch that races sees our entry and empties it, or we see its mark. The page of the
    // entry is there while our request runs, even if the object is not.
    State state = World::instance().entry(coid).state.load(std::memory_order_seq_cst);
    if (!(state & live) || (state & switching) || generation(state) != generation(coid))
        local.store(used, std::memory_order_seq_cst);
}

void uninstall(Processor& p, Coid coid) { p.local.at(index_of(coid)).store(used, std::memory_order_seq_cst); }

void empty_everywhere(Coid coid) {
    Processor& p = current();
    enter(p);
    Entry* entry = World::instance().entries.find(index_of(coid));
    if (entry) empty(coid, entry->state.load(std::memory_order_seq_cst), used);
    if (leave(p)) collect();
}

// --- Switches.

Switch::Outcome Switch::attempt(const Reference& reference, std::chrono::steady_clock::time_point until, Held held,
                                Pause pause) {
    World& world = World::instance();
    Processor& p = current();
    enter(p);  // so that the page of the entry stays
    Outcome outcome = Outcome::quiet;
    {
        std::lock_guard guard(world.switch_lock);
        const Coid coid = reference.coid();
        Entry* entry = coid ? world.entries.find(index_of(coid)) : nullptr;
        State state = entry ? entry->state.load(std::memory_order_seq_cst) : 0;
        do {
            if (!(state & live) || generation(state) != generation(coid)) {
                outcome = Outcome::destroyed;
            } else if (state & switching) {
                outcome = Outcome::busy;
            }
        } while (outcome == Outcome::quiet &&
                 !entry->state.compare_exchange_weak(state, state | switching, std::memory_order_seq_cst));
        if (outcome == Outcome::quiet) {
            coid_ = coid;
            object_ = entry->object;
            doomed_ = false;
            mark_ = Mark::take(empty(coid, state, used));
            mark_.forget(p);  // our own request is this function
            world.switches.push_back(this);
        }
    }
    if (leave(p)) collect();
    if (outcome != Outcome::quiet) return outcome;
    outcome = Outcome::timeout;
    for (int turn = 0;; ++turn) {
        bool stuck;
        {
            std::lock_guard guard(world.switch_lock);  // misses look at the mark
            if (mark_.elapsed() && !held(object_)) {
                workers_.push_back(&p);
                return Outcome::quiet;
            }
            stuck = mark_.waits_for_a_switch();
        }
        if (stuck || std::chrono::steady_clock::now() >= until) break;
        if (!pause()) {
            outcome = Outcome::interrupted;
            break;
        }
        if (turn < 16) {
            std::this_thread::yield();
        } else {
            std::this_thread::sleep_for(std::chrono::microseconds(100));
        }
    }
    close();
    return outcome;
}

void Switch::close() {
    World& world = World::instance();
    State state;
    {
        std::lock_guard guard(world.switch_lock);
        std::erase(world.switches, this);
        workers_.clear();
        Entry& entry = world.entry(coid_);
        state = entry.state.fetch_and(~(doomed_ ? switching | live : switching), std::memory_order_seq_cst);
    }
    world.switch_ended.notify_all();
    if (doomed_) end_object(world, coid_, state, ending_);
}

Switch::Outcome Switch::begin(const Reference& reference, std::chrono::nanoseconds timeout, Held held, Pause pause) {
    using namespace std::chrono_literals;
    Processor& p = current();
    if (p.depth != 0) return Outcome::in_request;
    {
        World& world = World::instance();
        std::lock_guard guard(world.switch_lock);
        const Switch* other = world.switch_of(reference.coid());
        if (other && std::ranges::count(other->workers_, &p)) return Outcome::in_request;
    }
    const auto end = std::chrono::steady_clock::now() + timeout;
    std::chrono::nanoseconds patience = 5ms;
    for (std::uint64_t tries = 0;; ++tries) {
        const Outcome outcome =
            attempt(reference, std::min(end, std::chrono::steady_clock::now() + patience), held, pause);
        if (outcome != Outcome::busy && outcome != Outcome::timeout) return outcome;
        if (std::chrono::steady_clock::now() >= end) return outcome;
        if (!pause()) return Outcome::interrupted;
        // Those whom we held up go on meanwhile. Two switches that met do not meet again: each has its own rhythm.
        std::this_thread::sleep_for(patience / 8 * (1 + (p.id + tries) % 3));
        patience = std::min<std::chrono::nanoseconds>(2 * patience, 1s);
    }
}

void Switch::end() { close(); }

void Switch::add_worker() {
    std::lock_guard guard(World::instance().switch_lock);
    workers_.push_back(&current());
}

void Switch::remove_worker() {
    std::lock_guard guard(World::instance().switch_lock);
    const auto mine = std::ranges::find(workers_, &current());
    if (mine != workers_.end()) workers_.erase(mine);
}

bool Switch::needs(const Processor& p) const {
    World& world = World::instance();
    return std::ranges::any_of(workers_, [&](const Processor* worker) {
        if (worker == &p) return true;
        const Coid awaited = worker->waits_for_switch_of.load(std::memory_order_relaxed);
        const Switch* other = awaited ? world.switch_of(awaited) : nullptr;
        return other && other->needs(p);
    });
}

Wait await_switch(Processor& p, Coid coid, bool (*pause)()) {
    World& world = World::instance();
    std::unique_lock guard(world.switch_lock);
    Wait result = Wait::over;
    while (const Switch* s = world.switch_of(coid)) {
        if (s->needs(p)) {
            result = Wait::circle;
            break;
        }
        p.waits_for_switch_of.store(coid, std::memory_order_relaxed);
        world.switch_ended.wait_for(guard, std::chrono::milliseconds(50));
        guard.unlock();
        const bool go_on = pause();
        guard.lock();
        p.waits_for_switch_of.store(0, std::memory_order_relaxed);
        if (!go_on) {
            result = Wait::interrupted;
            break;
        }
    }
    return result;
}

// The threads that switched, and those that waited for them, are not in the child.
void World::after_fork_in_child() {
    World& world = instance();
    for (Switch* s : world.switches) world.entry(s->coid_).state.fetch_and(~switching, std::memory_order_seq_cst);
    world.switches.clear();
    new (&world.switch_ended) std::condition_variable();  // it still counts waiters that are not here
    world.lock.unlock();
    world.switch_lock.unlock();
}

}  // namespace k42::runtime
