// The pools alone, against a model and under contention: meant for ThreadSanitizer and AddressSanitizer. Takes a seed.
#include <set>

#include "check.hpp"
#include "structures/pool.hpp"
#include "structures/roster.hpp"

using namespace k42;
using namespace k42::testing;

namespace {

// Written by whoever has it, plainly: ThreadSanitizer sees two who do.
struct Thing {
    int uses = 0;
};
using Shared = SharedPool<Thing*>;
using Distributed = DistributedPool<Thing*>;
constexpr uint32_t kCap = 4;

template <typename Pool>
struct Made : Pool {
    explicit Made(uint64_t capacity)
        requires std::same_as<Pool, Shared>
        : Pool(capacity) {}
    explicit Made(uint64_t capacity, uint32_t cap = kCap)
        requires std::same_as<Pool, Distributed>
        : Pool(capacity, cap) {}
};

// The two ways of a call: at once, else with the lock.
template <typename Pool>
Grant take(Pool& pool, typename Pool::Part& part, Thing*& thing, typename Pool::Waiter* waiter = nullptr) {
    return pool.try_take(part, thing) ? Grant::taken : pool.take(part, thing, waiter);
}
template <typename Pool>
void give(Pool& pool, typename Pool::Part& part, Thing* thing) {
    if (!pool.try_give(part, thing)) pool.give(part, thing);
}

// One thread that is several processors: what is granted, and how many items are where.
template <typename Pool>
void against_model(const char* name) {
    begin(name);
    Random random(seed());
    for (int round = 0; round < 60; ++round) {
        const uint64_t capacity = random.below(30);
        std::vector<Thing> things(capacity + 8);
        size_t made = 0;
        Made<Pool> pool(capacity);
        std::set<Thing*> free;
        std::vector<Thing*> taken;
        for (uint64_t i = random.below(8); i; --i) {
            free.insert(&things[made]);
            pool.add(&things[made++]);
        }
        std::vector<typename Pool::Part*> parts;
        for (uint64_t i = 1 + random.below(4); i; --i) parts.push_back(&pool.join());
        for (int step = 0; step < 400; ++step) {
            auto& part = *parts[random.below(parts.size())];
            if (!taken.empty() && random.one_in(2)) {
                const size_t which = random.below(taken.size());
                give(pool, part, taken[which]);
                CHECK(free.insert(taken[which]).second);
                taken[which] = taken.back();
                taken.pop_back();
            } else {
                Thing* thing = nullptr;
                const Grant grant = take(pool, part, thing);
                CHECK(grant == (!free.empty() ? Grant::taken : made < capacity ? Grant::make : Grant::none));
                if (grant == Grant::taken) CHECK_EQUAL(free.erase(thing), 1u);
                if (grant == Grant::make && random.one_in(3)) {
                    pool.unmade();
                } else if (grant == Grant::make) {
                    thing = &things[made++];
                    pool.made();
                }
                if (thing) taken.push_back(thing);
            }
            const PoolCounts counts = pool.counts();
            CHECK_EQUAL(counts.size, made);
            CHECK_EQUAL(pool.size(), made);
            CHECK_EQUAL(counts.taken, taken.size());
            CHECK_EQUAL(counts.local + counts.shared, free.size());
            CHECK(counts.local <= parts.size() * kCap);
            const auto items = pool.free_items();
            CHECK(std::set<Thing*>(items.begin(), items.end()) == free && items.size() == free.size());
        }
    }
}

// Nobody has an item that another has, and none is lost, at any moment that somebody looks.
template <typename Pool>
void threads_take_and_give(const char* name) {
    begin(name);
    constexpr int kThreads = 4, kItems = 24, kHeld = 5;  // items enough for all: nobody is refused
    constexpr int kSteps = kThreadSanitizer ? 6'000 : 40'000;
    static_assert(kThreads * kHeld < kItems);
    std::vector<Thing> things(kItems);
    Made<Pool> pool(0);
    for (Thing& thing : things) pool.add(&thing);
    std::atomic<int> left{kThreads};
    std::atomic<int> uses{0};
    in_threads(kThreads + 1, [&](int i) {
        if (i == kThreads) {
            while (left.load()) {
                const PoolCounts counts = pool.counts();
                CHECK_EQUAL(counts.size, kItems);
                CHECK(counts.taken <= kThreads * kHeld);
                std::this_thread::sleep_for(std::chrono::milliseconds(1));
            }
            return;
        }
        auto& part = pool.join();
        Random random(seed() + uint64_t(i));
        std::vector<Thing*> held;
        int mine = 0;
        for (int step = 0; step < kSteps; ++step) {
            if (held.size() < kHeld && (held.empty() || random.one_in(2))) {
                Thing* thing = nullptr;
                CHECK(take(pool, part, thing) == Grant::taken);
                ++thing->uses;
                ++mine;
                held.push_back(thing);
            } else {
                give(pool, part, held.back());
                held.pop_back();
            }
            random.maybe_yield(500);
        }
        for (Thing* thing : held) give(pool, part, thing);
        uses.fetch_add(mine);
        left.fetch_sub(1);
    });
    CHECK_EQUAL(pool.counts().taken, 0u);
    int sum = 0;
    for (const Thing& thing : things) sum += thing.uses;
    CHECK_EQUAL(sum, uses.load());
}

// What some processors give back others can take, to the last item, whatever list it lies in.
template <typename Pool>
void nothing_is_stranded(const char* name) {
    begin(name);
    for (int round = 0; round < 100; ++round) {
        constexpr int kItems = 3 * kCap;
        std::vector<Thing> things(kItems);
        Made<Pool> pool(kItems);
        for (Thing& thing : things) pool.add(&thing);
        std::atomic<int> filled{0};
        in_threads(4, [&](int i) {
            auto& part = pool.join();
            Thing* held[kCap];
            if (i < 3) {
                for (Thing*& thing : held) CHECK(take(pool, part, thing) == Grant::taken);
                for (Thing* thing : held) give(pool, part, thing);
                filled.fetch_add(1);
                return;
            }
            while (filled.load() < 3) std::this_thread::yield();
            for (int n = 0; n < kItems; ++n) CHECK(take(pool, part, held[0]) == Grant::taken);
            CHECK(take(pool, part, held[0]) == Grant::none);
            CHECK_EQUAL(pool.counts().taken, kItems);
        });
    }
}

// More threads than items: each gets one in the end, whether others give up, are woken, or fail to make one.
template <typename Pool>
void who_waits_gets_one(const char* name) {
    begin(name);
    constexpr int kThreads = 6, kCapacity = 2;
    constexpr int kTakes = kThreadSanitizer ? 300 : 1'000;
    std::vector<Thing> things(kCapacity);
    std::atomic<size_t> made{0};
    Made<Pool> pool(kCapacity);
    std::atomic<int> left{kThreads};
    in_threads(kThreads + 1, [&](int i) {
        if (i == kThreads) {
            while (left.load()) {
                pool.wake();
                std::this_thread::sleep_for(std::chrono::milliseconds(2));
            }
            return;
        }
        auto& part = pool.join();
        Random random(seed() + uint64_t(i));
        for (int n = 0; n < kTakes;) {
            typename Pool::Waiter waiter;
            Thing* thing = nullptr;
            switch (take(pool, part, thing, &waiter)) {
                case Grant::taken:
                    break;
                case Grant::make:
                    if (random.one_in(2)) {
                        pool.unmade();
                        continue;
                    }
                    thing = &things[made.fetch_add(1)];
                    pool.made();
                    break;
                case Grant::none:
                    // Now and then without patience.
                    if (random.one_in(4)) {
                        waiter.wait(std::chrono::steady_clock::now() + std::chrono::microseconds(random.below(50)));
                    } else {
                        while (waiter.waiting()) waiter.wait(never);
                    }
                    if (!pool.settle(waiter, thing)) continue;
            }
            ++thing->uses;
            ++n;
            random.maybe_yield(3);
            give(pool, part, thing);
        }
        left.fetch_sub(1);
    });
    const PoolCounts counts = pool.counts();
    CHECK_EQUAL(counts.size, made.load());
    CHECK_EQUAL(counts.taken, 0u);
    int sum = 0;
    for (const Thing& thing : things) sum += thing.uses;
    CHECK_EQUAL(sum, kThreads * kTakes);
}

// Who has waited longest comes first, and what it gets no newcomer takes.
template <typename Pool>
void first_come_first_served(const char* name) {
    begin(name);
    Thing thing;
    Made<Pool> pool(0);
    pool.add(&thing);
    auto& part = pool.join();
    Thing *mine = nullptr, *got = nullptr;
    typename Pool::Waiter waiters[3];
    CHECK(take(pool, part, mine) == Grant::taken);
    for (auto& waiter : waiters) CHECK(take(pool, part, got, &waiter) == Grant::none);
    CHECK(!pool.settle(waiters[1], got));  // gives up, from the middle of the queue
    give(pool, part, mine);
    CHECK(!waiters[0].waiting() && waiters[2].waiting());
    CHECK(take(pool, part, got) == Grant::none);
    CHECK_EQUAL(pool.counts().taken, 1u);
    CHECK(pool.settle(waiters[0], got) && got == &thing);
    CHECK(!pool.settle(waiters[2], mine));
    give(pool, part, got);
    CHECK_EQUAL(pool.counts().taken, 0u);
    CHECK(take(pool, part, got) == Grant::taken && got == &thing);
}

// Look-ups while the roster grows; of all who give a member back at once one succeeds.
void rosters() {
    begin("rosters");
    constexpr int kMembers = 3'000, kThreads = 3;
    std::vector<Thing> things(kMembers);
    Roster roster;
    std::atomic<int> inserted{0}, freed{0};
    in_threads(kThreads + 1, [&](int i) {
        if (i == kThreads) {
            for (Thing& thing : things) {
                CHECK(roster.insert(&thing, false));
                CHECK(!roster.insert(&thing, false));
                inserted.fetch_add(1);
            }
            return;
        }
        Thing foreign;
        for (int next = 0; next < kMembers;) {
            CHECK(!roster.find(&foreign));
            for (const int end = inserted.load(); next < end; ++next) {
                Member* member = roster.find(&things[size_t(next)]);
                CHECK(member && member->object == &things[size_t(next)]);
                if (member->set_free()) freed.fetch_add(1);
            }
            std::this_thread::yield();
        }
    });
    CHECK_EQUAL(freed.load(), kMembers);
    CHECK_EQUAL(roster.members().size(), size_t(kMembers));
}

}  // namespace

int main(int argc, char** argv) {
    start_program(argc, argv);
    rosters();
    against_model<Shared>("shared_against_model");
    against_model<Distributed>("distributed_against_model");
    first_come_first_served<Shared>("shared_first_come_first_served");
    first_come_first_served<Distributed>("distributed_first_come_first_served");
    nothing_is_stranded<Shared>("shared_nothing_is_stranded");
    nothing_is_stranded<Distributed>("distributed_nothing_is_stranded");
    threads_take_and_give<Shared>("shared_threads_take_and_give");
    threads_take_and_give<Distributed>("distributed_threads_take_and_give");
    who_waits_gets_one<Shared>("shared_who_waits_gets_one");
    who_waits_gets_one<Distributed>("distributed_who_waits_gets_one");
    return 0;
}
