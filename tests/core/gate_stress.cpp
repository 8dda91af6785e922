// The gates alone, against a model and under contention: meant for ThreadSanitizer and AddressSanitizer. Exclusion is
// proved with plain variables, which ThreadSanitizer reports when a stopper is not alone. Takes a seed.
#include <memory>
#include <mutex>

#include "check.hpp"
#include "structures/gate.hpp"

using namespace k42;
using namespace k42::testing;

namespace {

// Waits for what another thread is about to do; no assertion hangs on how long.
template <class Condition>
void until(Condition condition) {
    while (!condition()) std::this_thread::yield();
}

const Patience kAtOnce{Deadline{}};  // has passed

Deadline moment() { return std::chrono::steady_clock::now() + std::chrono::milliseconds(1); }

// The three ways to use a gate. A thread makes a User for itself.

struct Word {  // as the virtual memory system does
    using Gate = SharedGate;
    struct User {
        explicit User(Gate& g) : gate(g) {}
        Gate::Entry try_enter() { return gate.try_enter(); }
        Gate::Entry enter() { return gate.enter() ? Gate::Entry::entered : Gate::Entry::rejected; }
        bool leave() { return gate.leave(); }
        Gate& gate;
    };
    static constexpr bool knows_who_is_inside = false;
};

struct Shared {
    using Gate = SharedGate;
    using User = SharedGate::Part;
    static constexpr bool knows_who_is_inside = true;
};

struct Distributed {
    using Gate = DistributedGate;
    struct User {
        explicit User(Gate& gate) : part(gate.join()) {}
        Gate::Entry try_enter() { return part.try_enter(); }
        Gate::Entry enter(Deadline deadline = never) { return part.enter(deadline); }
        bool leave() { return part.leave(); }
        uint32_t inside() const { return part.inside(); }
        Gate::Part& part;
    };
    static constexpr bool knows_who_is_inside = true;
};

// One thread. What each call answers, whoever calls.

template <class Use>
void against_model() {
    using Gate = typename Use::Gate;
    using Entry = typename Gate::Entry;
    using Stop = typename Gate::Stop;
    using State = typename Gate::State;
    Random random(seed());
    for (int round = 0; round < 200; ++round) {
        Gate gate;
        std::vector<std::unique_ptr<typename Use::User>> users;
        std::vector<uint32_t> inside;
        State state = State::normal;
        for (int i = 0; i < 100; ++i) {
            if (users.empty() || random.one_in(16)) {  // also while the gate is stopped or shut
                users.push_back(std::make_unique<typename Use::User>(gate));
                inside.push_back(0);
            }
            const size_t who = random.below(users.size());
            uint32_t all = 0;
            for (uint32_t n : inside) all += n;
            switch (random.below(8)) {
                case 0:
                case 1:
                case 2: {
                    Entry expected = state == State::normal    ? Entry::entered
                                     : state == State::stopped ? Entry::stopped
                                                               : Entry::rejected;
                    if (Use::knows_who_is_inside && inside[who]) expected = Entry::entered;
                    CHECK(users[who]->try_enter() == expected);
                    if (expected == Entry::entered) ++inside[who];
                    break;
                }
                case 3:
                case 4:
                case 5:
                    if (!Use::knows_who_is_inside && !inside[who] && all) break;
                    CHECK_EQUAL(users[who]->leave(), inside[who] > 0);
                    if (inside[who]) --inside[who];
                    break;
                case 6: {
                    const Stop expected = state == State::shutdown             ? Stop::rejected
                                          : state == State::stopped || all > 0 ? Stop::gave_up
                                                                               : Stop::stopped;
                    CHECK(gate.stop(kAtOnce) == expected);
                    if (expected == Stop::stopped) state = State::stopped;
                    break;
                }
                default:
                    if (random.one_in(8)) {
                        CHECK_EQUAL(gate.shutdown(kAtOnce), all == 0);
                        state = State::shutdown;
                    } else {
                        CHECK_EQUAL(gate.restart(), state == State::stopped);
                        if (state == State::stopped) state = State::normal;
                    }
            }
            all = 0;
            for (uint32_t n : inside) all += n;
            CHECK_EQUAL(gate.inside(), all);
            CHECK(gate.state() == state);
        }
    }
}

// While the gate is stopped its stopper is alone: requests read a plain variable that stoppers write.
template <class Use>
void stop_excludes() {
    using Gate = typename Use::Gate;
    using Entry = typename Gate::Entry;
    using Stop = typename Gate::Stop;
    constexpr int kRequesters = 4, kStoppers = 2, kRequests = 6'000;
    Gate gate;
    long guarded = 0;
    long stops = 0;
    std::atomic<long> entered{0};
    std::atomic<int> running{kRequesters};
    in_threads(kRequesters + kStoppers, [&](int who) {
        Random random(seed() + who);
        if (who < kRequesters) {
            typename Use::User user(gate);
            for (int i = 0; i < kRequests; ++i) {
                if (random.one_in(2)) {
                    CHECK(user.enter() == Entry::entered);
                } else {
                    const Entry entry = user.try_enter();
                    CHECK(entry != Entry::rejected);
                    if (entry == Entry::stopped) continue;
                }
                const long seen = guarded;
                if (Use::knows_who_is_inside && random.one_in(4)) {  // again: whoever waits for us
                    CHECK(user.enter() == Entry::entered && user.leave());
                }
                random.maybe_yield(16);
                CHECK_EQUAL(guarded, seen);
                entered.fetch_add(1, std::memory_order_relaxed);
                CHECK(gate.inside() > 0);
                CHECK(user.leave());
            }
            running.fetch_sub(1);
            return;
        }
        while (running.load() > 0) {
            const bool patient = random.one_in(2);
            const Stop stop = gate.stop(patient ? Patience{} : Patience{moment()});
            if (!patient && stop == Stop::gave_up) continue;
            CHECK(stop == Stop::stopped);
            CHECK(gate.state() == Gate::State::stopped);
            ++guarded;
            random.maybe_yield(2);
            ++stops;
            CHECK(gate.restart());
            random.maybe_yield(2);
        }
    });
    CHECK_EQUAL(guarded, stops);
    CHECK(gate.inside() == 0 && entered > 0 && gate.state() == Gate::State::normal);
}

// The same interleavings forced: someone inside when stop() begins, someone waiting when restart() comes.
template <class Use>
void wakes() {
    using Gate = typename Use::Gate;
    using Entry = typename Gate::Entry;
    using Stop = typename Gate::Stop;
    for (int round = 0; round < 200; ++round) {
        Gate gate;
        int plain = 0;
        std::atomic<bool> stopped{false};
        typename Use::User user(gate);
        CHECK(user.enter() == Entry::entered);
        std::thread stopper([&] {
            CHECK(gate.stop() == Stop::stopped);
            plain = 1;
            stopped = true;
        });
        until([&] { return gate.state() == Gate::State::stopping; });
        CHECK(!gate.restart());  // not yet stopped
        std::thread first([&] {
            typename Use::User mine(gate);  // joins during the stop
            CHECK(mine.enter() == Entry::entered);
            CHECK(plain == 2);
            CHECK(mine.leave());
        });
        std::thread second([&] {  // a second stopper waits for the first to restart
            CHECK(gate.stop() == Stop::stopped);
            CHECK(plain == 2);
            CHECK(gate.restart());
        });
        if constexpr (Use::knows_who_is_inside) {
            CHECK(user.enter() == Entry::entered && user.inside() == 2);  // inside already: it does not wait
            CHECK(user.leave());
        }
        for (int i = 0; i < round % 8; ++i) std::this_thread::yield();
        CHECK(!stopped);  // we are inside
        CHECK(user.leave());
        stopper.join();
        CHECK(plain == 1);
        for (int i = 0; i < round % 4; ++i) std::this_thread::yield();
        plain = 2;
        CHECK(gate.restart());
        first.join();
        second.join();
    }
}

// A stop that gives up lets newcomers in again, and those who wait already; a shutdown that gives up does not.
template <class Use>
void giving_up() {
    using Gate = typename Use::Gate;
    using Entry = typename Gate::Entry;
    using Stop = typename Gate::Stop;
    for (int round = 0; round < 40; ++round) {
        Gate gate;
        typename Use::User user(gate);
        CHECK(user.enter() == Entry::entered);
        std::atomic<bool> tried{false};
        std::thread waiting([&] {
            typename Use::User mine(gate);
            until([&] { return gate.state() != Gate::State::normal || tried; });
            CHECK(mine.enter() == Entry::entered && mine.leave());
        });
        CHECK(gate.stop({moment()}) == Stop::gave_up);
        tried = true;
        waiting.join();
        CHECK(gate.state() == Gate::State::normal && gate.inside() == 1);
        if (round < 3) {
            CHECK(gate.stop({never, [] { return true; }}) == Stop::gave_up);
            CHECK(!gate.shutdown({never, [] { return true; }}));
        }
        CHECK(!gate.shutdown({moment()}));
        CHECK(gate.state() == Gate::State::shutdown && gate.inside() == 1);
        CHECK(gate.stop() == Stop::rejected && !gate.restart());
        std::thread last([&] { CHECK(gate.shutdown()); });
        CHECK(user.leave());
        last.join();
        CHECK(user.enter() == Entry::rejected && !user.leave() && gate.inside() == 0);
    }
    if constexpr (Use::knows_who_is_inside) {
        Gate gate;
        typename Use::User user(gate);
        CHECK(gate.stop() == Stop::stopped);
        CHECK(user.enter(moment()) == Entry::stopped && user.inside() == 0);
        CHECK(gate.stop({moment()}) == Stop::gave_up && gate.state() == Gate::State::stopped);
        CHECK(gate.restart() && user.enter(moment()) == Entry::entered && user.leave());
    }
}

// After shutdown() nobody is inside and nobody comes: what the requests used can go.
template <class Use>
void shutdown_races() {
    using Gate = typename Use::Gate;
    using Entry = typename Gate::Entry;
    using Stop = typename Gate::Stop;
    for (int round = 0; round < 150; ++round) {
        Gate gate;
        auto used = std::make_unique<long>(7);
        std::barrier start(5);
        std::vector<std::thread> threads;
        for (int who = 0; who < 3; ++who) {
            threads.emplace_back([&, who] {
                Random random(seed() + round * 8 + who);
                typename Use::User user(gate);
                start.arrive_and_wait();
                while (user.enter() == Entry::entered) {
                    CHECK(*used == 7);
                    random.maybe_yield(4);
                    CHECK(user.leave());
                }
                CHECK(user.try_enter() == Entry::rejected);
            });
        }
        threads.emplace_back([&] {
            start.arrive_and_wait();
            while (gate.stop() == Stop::stopped) gate.restart();
        });
        start.arrive_and_wait();
        for (int i = 0; i < round % 16; ++i) std::this_thread::yield();
        CHECK(gate.shutdown());
        CHECK_EQUAL(gate.inside(), 0u);
        *used = 8;  // plain
        used.reset();
        for (std::thread& thread : threads) thread.join();
    }
    // Those who wait at a stopped gate are rejected, not forgotten.
    Gate gate;
    CHECK(gate.stop() == Stop::stopped);
    std::vector<std::thread> waiting;
    for (int i = 0; i < 3; ++i) {
        waiting.emplace_back([&] {
            typename Use::User user(gate);
            CHECK(user.enter() == Entry::rejected);
        });
    }
    waiting.emplace_back([&] { CHECK(gate.stop() == Stop::rejected); });
    std::this_thread::yield();
    CHECK(gate.shutdown());
    for (std::thread& thread : waiting) thread.join();
}

// Stoppers that follow one another at once starve no request: the program would hang.
template <class Use>
void nobody_starves() {
    using Gate = typename Use::Gate;
    Gate gate;
    std::atomic<bool> done{false};
    in_threads(3, [&](int who) {
        if (who == 0) {
            typename Use::User user(gate);
            for (int i = 0; i < 300; ++i) CHECK(user.enter() == Gate::Entry::entered && user.leave());
            done = true;
            return;
        }
        while (!done) CHECK(gate.stop() == Gate::Stop::stopped && gate.restart());
    });
}

// A part belongs to a processor: threads come and go, what is inside stays counted.
void parts_outlive_threads() {
    begin("parts_outlive_threads");
    DistributedGate gate;
    DistributedGate::Part* part = nullptr;
    std::thread([&] {
        part = &gate.join();
        CHECK(part->enter() == DistributedGate::Entry::entered);
    }).join();
    CHECK(gate.stop({moment()}) == DistributedGate::Stop::gave_up);
    std::thread([&] { CHECK(part->leave() && !part->leave()); }).join();
    CHECK(gate.stop() == DistributedGate::Stop::stopped);
}

void layout() {
    begin("layout");
    DistributedGate gate;
    for (int i = 0; i < 3; ++i) {
        CHECK_EQUAL(reinterpret_cast<uintptr_t>(&gate.join()) % runtime::apart, 0u);
        CHECK_EQUAL(sizeof(DistributedGate::Part), runtime::apart);
    }
}

template <class Use>
void all(const char* name) {
    std::printf("%s\n", name);
    begin("against_model");
    against_model<Use>();
    begin("wakes");
    wakes<Use>();
    begin("giving_up");
    giving_up<Use>();
    begin("nobody_starves");
    nobody_starves<Use>();
    begin("stop_excludes");
    stop_excludes<Use>();
    begin("shutdown_races");
    shutdown_races<Use>();
}

}  // namespace

int main(int argc, char** argv) {
    start_program(argc, argv);
    layout();
    parts_outlive_threads();
    all<Word>("one word");
    all<Shared>("shared");
    all<Distributed>("distributed");
    std::puts("ok");
}
