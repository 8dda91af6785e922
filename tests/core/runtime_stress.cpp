// The Clustered Object runtime alone, under contention: meant for ThreadSanitizer and AddressSanitizer.
// Exits with 1 at the first broken promise. Bounded by counts to a few seconds.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "check.hpp"
#include "runtime/processor.hpp"
#include "runtime/quiescence.hpp"
#include "runtime/retire.hpp"
#include "runtime/switch.hpp"
#include "runtime/translation.hpp"

using namespace k42::runtime;

namespace {

std::atomic<int> objects_alive{0};
std::atomic<int> reps_alive{0};
std::atomic<int> boxes_alive{0};
std::atomic<int> releases{0};

struct Rep {
    Rep() { reps_alive.fetch_add(1); }
    ~Rep() { reps_alive.fetch_sub(1); }
    long count = 0;  // plain: the sanitizers see a use after free, or a use by two processors
};

// A distributed object: a representative per processor.
struct Object {
    Object() { objects_alive.fetch_add(1); }
    ~Object() { objects_alive.fetch_sub(1); }
    Rep* miss(const Processor& p) {
        misses.fetch_add(1);
        std::lock_guard guard(lock);
        return &reps[p.id];
    }
    long total() {
        std::lock_guard guard(lock);
        long sum = before;
        for (auto& [id, rep] : reps) sum += rep.count;
        return sum;
    }
    // Another implementation with the same state. While nobody is inside.
    void become_new() {
        before = total();
        reps.clear();
    }
    std::atomic<int> misses{0};
    std::mutex lock;  // protects the rest
    std::map<std::uint32_t, Rep> reps;
    long before = 0;
};

void release(void* object) {
    releases.fetch_add(1);
    delete static_cast<Object*>(object);
}

// Runs `use(rep)` as a request; false when the object is destroyed.
template <typename Use>
bool call(Reference& reference, Use use) {
    Processor& p = current();
    enter(p);
    Coid coid = reference.coid();
    auto* rep = static_cast<Rep*>(translate(p, coid));
    while (!rep) {
        const Miss miss = begin_miss(p, coid);
        if (miss.outcome == Miss::Outcome::destroyed) break;
        if (miss.outcome == Miss::Outcome::switching) {
            CHECK(await_switch(p, coid, [] { return true; }) == Wait::over);
            coid = reference.coid();
            rep = static_cast<Rep*>(translate(p, coid));
            continue;
        }
        rep = static_cast<Object*>(miss.object)->miss(p);
        if (miss.outcome == Miss::Outcome::found) install(p, coid, rep);
    }
    if (rep) use(*rep);
    if (leave(p)) collect();
    return rep != nullptr;
}

bool destroy(Reference& reference) {
    bool deferred;
    return k42::runtime::destroy(reference, {release, [](void*) { return false; }}, &deferred);
}

template <typename Work>
void in_threads(int n, Work work) {
    std::barrier start(n);
    std::vector<std::thread> threads;
    for (int i = 0; i < n; ++i) {
        threads.emplace_back([&, i] {
            current();  // a processor of its own before anyone starts
            start.arrive_and_wait();
            work(i);
            start.arrive_and_wait();  // and until all have finished
        });
    }
    for (auto& thread : threads) thread.join();
}

void exact_counts() {
    constexpr int n = 8, k = 5000;
    Reference reference;
    auto* object = new Object();
    create(reference, object);
    in_threads(n, [&](int) {
        for (int i = 0; i < k; ++i) CHECK(call(reference, [](Rep& rep) { ++rep.count; }));
    });
    CHECK(object->misses == n);
    CHECK(object->total() == long{n} * k);
    CHECK(destroy(reference));
    CHECK(!destroy(reference));
    CHECK(!call(reference, [](Rep&) {}));
    CHECK(reps_alive == 0 && objects_alive == 0);
}

void churn() {
    constexpr int waves = 200, n = 8;
    Reference reference;
    auto* object = new Object();
    create(reference, object);
    for (int wave = 0; wave < waves; ++wave)
        in_threads(n, [&](int) { CHECK(call(reference, [](Rep& rep) { ++rep.count; })); });
    CHECK(object->total() == waves * n);
    CHECK(object->misses <= int(processor_count()));
    CHECK(processor_count() <= n + 1);
    CHECK(destroy(reference));
}

// Many more processors than a machine word has bits.
void many_processors() {
    constexpr int n = 200;
    Reference reference;
    auto* object = new Object();
    create(reference, object);
    in_threads(n, [&](int) { CHECK(call(reference, [](Rep& rep) { ++rep.count; })); });
    CHECK(object->misses == n && object->total() == n);
    CHECK(processor_count() >= n);
    CHECK(destroy(reference));
}

// A destruction inside the object's own call, and while another is inside: the calls finish, each release
// once.
void deferred_destruction() {
    Reference reference;
    create(reference, new Object());
    int before = releases;
    CHECK(call(reference, [&](Rep& rep) {
        CHECK(destroy(reference));
        CHECK(releases == before);
        CHECK(!call(reference, [](Rep&) {}));
        ++rep.count;
    }));
    CHECK(releases == before + 1);

    create(reference, new Object());
    std::barrier inside(2), marked(2);
    std::thread caller([&] {
        CHECK(call(reference, [&](Rep& rep) {
            inside.arrive_and_wait();
            marked.arrive_and_wait();
            ++rep.count;
        }));
    });
    inside.arrive_and_wait();
    CHECK(destroy(reference));
    CHECK(releases == before + 1);
    for (int i = 0; i < 100; ++i) CHECK(!call(reference, [](Rep&) {}));
    marked.arrive_and_wait();
    caller.join();
    CHECK(releases == before + 2);
    CHECK(reps_alive == 0 && objects_alive == 0);
}

// Requests that begin after a mark do not hold it up: overlapping ones on two processors, never a gap.
void later_requests_do_not_delay() {
    Reference target, other;
    create(target, new Object());
    create(other, new Object());
    int before = releases;
    std::barrier step(2);
    std::thread helper([&] {
        call(target, [&](Rep&) {
            step.arrive_and_wait();  // inside, before the mark
            step.arrive_and_wait();  // marked
        });
        call(other, [&](Rep&) {
            step.arrive_and_wait();  // inside, after the mark
            step.arrive_and_wait();
        });
    });
    step.arrive_and_wait();
    call(target, [](Rep&) {});
    CHECK(destroy(target));
    CHECK(releases == before);
    step.arrive_and_wait();
    step.arrive_and_wait();
    CHECK(releases == before + 1);
    step.arrive_and_wait();
    helper.join();
    CHECK(destroy(other));
}

// Calls, destructions and creations race over a few references; indices are reused all the time.
void races() {
    constexpr int n = 4, slots = 4, rounds = 6000;
    struct Slot {
        std::mutex making;  // one creator at a time; destruction and calls take no lock
        Reference reference;
    };
    std::vector<Slot> table(slots);
    for (Slot& slot : table) create(slot.reference, new Object());
    in_threads(n, [&](int who) {
        unsigned random = 12345u + who;
        for (int i = 0; i < rounds; ++i) {
            random = random * 1664525u + 1013904223u;
            Slot& slot = table[random >> 16 & (slots - 1)];
            if ((random >> 24) % 16 == 0) {
                std::lock_guard guard(slot.making);
                if (destroy(slot.reference)) create(slot.reference, new Object());
            } else if ((random >> 24) % 16 == 1) {
                Slot& inner = table[random >> 20 & (slots - 1)];
                call(slot.reference, [&](Rep& rep) {
                    ++rep.count;
                    call(inner.reference, [](Rep& nested) { ++nested.count; });
                });
            } else {
                call(slot.reference, [](Rep& rep) { ++rep.count; });
            }
        }
    });
    for (Slot& slot : table) CHECK(destroy(slot.reference));
    collect();
    CHECK(reps_alive == 0 && objects_alive == 0);
}

// A freed index goes home, under another generation, and is used again.
void reuse() {
    std::set<Index> seen;
    Reference reference;
    Coid last = 0;
    for (int i = 0; i < 5000; ++i) {
        create(reference, new Object());
        CHECK(reference.coid() != last);
        last = reference.coid();
        seen.insert(static_cast<Index>(last));
        CHECK(destroy(reference));
    }
    CHECK(seen.size() == 1);
    // Freed by another thread: returned to the home processor, which takes it when its own list is empty.
    for (int i = 0; i < 3; ++i) {
        std::vector<std::unique_ptr<Reference>> references;
        for (Index j = 0; j < 2 * page_size; ++j) {
            references.push_back(std::make_unique<Reference>());
            create(*references.back(), new Object());
            seen.insert(static_cast<Index>(references.back()->coid()));
        }
        std::thread([&] {
            for (auto& r : references) CHECK(destroy(*r));
        }).join();
    }
    CHECK(seen.size() <= 4 * page_size);
    CHECK(reps_alive == 0 && objects_alive == 0);
}

bool never_held(void*) { return false; }
bool go_on() { return true; }

// Switches under continuous calls, recursive ones too, by threads that come and go; and destructions during them.
void switches() {
    constexpr int n = 4, rounds = 300;
    Reference reference;
    auto* object = new Object();
    create(reference, object);
    std::atomic<bool> done{false};
    std::atomic<long> added{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < n; ++t) {
        threads.emplace_back([&, t] {
            while (!done) {
                std::thread short_lived([&] {  // a first touch, in the middle of a switch or not
                    for (int i = 0; i < 50; ++i) {
                        CHECK(call(reference, [&](Rep& rep) {
                            ++rep.count;
                            if (i % 8 == t) call(reference, [](Rep& inner) { ++inner.count; });
                        }));
                        added.fetch_add(i % 8 == t ? 2 : 1);
                    }
                });
                short_lived.join();
            }
        });
    }
    for (int i = 0; i < rounds; ++i) {
        Switch s;
        CHECK(s.begin(reference, std::chrono::minutes(1), never_held, go_on) == Switch::Outcome::quiet);
        static_cast<Object*>(s.object())->become_new();
        s.end();
    }
    done = true;
    for (auto& thread : threads) thread.join();
    CHECK(object->total() == added);
    call(reference, [&](Rep&) {
        Switch s;
        CHECK(s.begin(reference, std::chrono::minutes(1), never_held, go_on) == Switch::Outcome::in_request);
    });
    // A destruction during the switch happens at its end.
    const int before = releases;
    Switch s;
    CHECK(s.begin(reference, std::chrono::minutes(1), never_held, go_on) == Switch::Outcome::quiet);
    CHECK(destroy(reference));
    CHECK(releases == before);
    s.end();
    CHECK(releases == before + 1);
    CHECK(s.begin(reference, std::chrono::minutes(1), never_held, go_on) == Switch::Outcome::destroyed);
}

// An older request waits for a lock that a younger one holds, which waits for the switch: nobody waits for ever.
void switch_behind_a_lock() {
    Reference reference;
    create(reference, new Object());
    std::mutex lock;
    std::barrier inside(2), held(2);
    std::thread older([&] {
        call(reference, [&](Rep& rep) {
            inside.arrive_and_wait();
            held.arrive_and_wait();
            std::lock_guard guard(lock);
            ++rep.count;
        });
    });
    std::thread younger([&] {
        inside.arrive_and_wait();
        std::lock_guard guard(lock);
        held.arrive_and_wait();
        for (int i = 0; i < 100; ++i) call(reference, [](Rep& rep) { ++rep.count; });
    });
    Switch s;
    CHECK(s.begin(reference, std::chrono::minutes(1), never_held, go_on) == Switch::Outcome::quiet);
    s.end();
    older.join();
    younger.join();
    CHECK(destroy(reference));
}

// Two objects that call each other, each switched all the time: A calls B calls A.
void switch_cycles() {
    Reference a, b;
    auto *object_a = new Object(), *object_b = new Object();
    create(a, object_a);
    create(b, object_b);
    constexpr int calls = 1500;
    std::atomic<int> running{2};
    auto caller = [&](Reference& first, Reference& second) {
        for (int i = 0; i < calls; ++i) {
            call(first, [&](Rep& one) {
                ++one.count;
                call(second, [&](Rep& two) {
                    ++two.count;
                    call(first, [](Rep& again) { ++again.count; });
                });
            });
        }
        --running;
    };
    auto switcher = [&](Reference& reference) {
        while (running) {
            Switch s;
            CHECK(s.begin(reference, std::chrono::minutes(1), never_held, go_on) == Switch::Outcome::quiet);
            static_cast<Object*>(s.object())->become_new();
            s.end();
            std::this_thread::yield();
        }
    };
    std::vector<std::thread> threads;
    threads.emplace_back(caller, std::ref(a), std::ref(b));
    threads.emplace_back(caller, std::ref(b), std::ref(a));
    threads.emplace_back(switcher, std::ref(a));
    threads.emplace_back(switcher, std::ref(b));
    for (auto& thread : threads) thread.join();
    CHECK(object_a->total() + object_b->total() == 6L * calls);
    CHECK(destroy(a) && destroy(b));
}

// What is asked of a processor's owner is done once, in order, outside of requests: by the owner, or by the next one.
void mail() {
    struct Letter {
        std::uint32_t to;
        int from, number;
        std::atomic<int>* opened;
        std::map<int, int>* last;  // the number of the last letter from each sender; the owner's
    };
    constexpr int n = 3, letters = 2000;
    std::atomic<int> opened{0}, sent{0}, ready{0};
    std::vector<Processor*> owners(n);
    std::vector<std::map<int, int>> last(n);
    in_threads(2 * n, [&](int who) {
        Reference mine;
        create(mine, new Object());
        if (who < n) {
            owners[who] = &current();
            ready.fetch_add(1);
            while (sent < n * letters) CHECK(call(mine, [](Rep& rep) { ++rep.count; }));
        } else {
            while (ready < n) std::this_thread::yield();
            for (int i = 0; i < letters; ++i) {
                const int to = i % n;
                post(
                    *owners[to],
                    [](void* what) {
                        const std::unique_ptr<Letter> letter(static_cast<Letter*>(what));
                        CHECK(current().id == letter->to && current().depth == 0);
                        int& before = (*letter->last)[letter->from];
                        CHECK(letter->number > before);
                        before = letter->number;
                        letter->opened->fetch_add(1);
                    },
                    new Letter{owners[to]->id, who, i + 1, &opened, &last[to]});
                sent.fetch_add(1);
            }
        }
        // What came last is there for whoever has the processor next.
        CHECK(destroy(mine));
    });
    in_threads(static_cast<int>(processor_count()), [](int) { open_mail(current()); });
    CHECK(opened == n * letters);
}

std::atomic<int> suspended{0};

// A destruction and a switch wait for requests that are suspended: for what `held` says.
void held() {
    auto is_held = [](void*) { return suspended.load() != 0; };
    constexpr int rounds = 300;
    for (int i = 0; i < rounds; ++i) {
        Reference reference;
        create(reference, new Object());
        CHECK(call(reference, [](Rep& rep) { ++rep.count; }));
        suspended = 1;
        const int before = releases;
        std::thread resumer([&] {
            current();
            suspended = 0;
            collect();
        });
        Switch s;
        const auto outcome = s.begin(reference, std::chrono::minutes(1), is_held, go_on);
        CHECK(outcome == Switch::Outcome::quiet && suspended == 0);
        s.end();
        resumer.join();
        suspended = 1;
        bool deferred;
        CHECK(k42::runtime::destroy(reference, {release, is_held}, &deferred));
        CHECK(deferred && releases == before);
        std::thread([&] {
            current();
            suspended = 0;
            collect();
        }).join();
        CHECK(releases == before + 1);
    }
}

// Who works on a switch cannot wait for it, nor for one that waits for it; nor begin it again.
void switch_circles() {
    Reference a, b;
    create(a, new Object());
    create(b, new Object());
    auto waits = [](const Reference& reference) {
        Processor& p = current();
        enter(p);
        const Miss miss = begin_miss(p, reference.coid());
        Wait wait = Wait::over;
        if (miss.outcome == Miss::Outcome::switching) wait = await_switch(p, reference.coid(), go_on);
        if (leave(p)) collect();
        return wait;
    };
    for (int i = 0; i < 100; ++i) {
        std::barrier both(2);
        std::atomic<int> circles{0};
        in_threads(2, [&](int who) {
            const Reference &mine = who ? a : b, &other = who ? b : a;
            Switch s;
            CHECK(s.begin(mine, std::chrono::minutes(1), never_held, go_on) == Switch::Outcome::quiet);
            CHECK(waits(mine) == Wait::circle);
            Switch again;
            CHECK(again.begin(mine, std::chrono::minutes(1), never_held, go_on) == Switch::Outcome::in_request);
            std::thread helper([&] {
                s.add_worker();
                CHECK(waits(mine) == Wait::circle);
                s.remove_worker();
            });
            helper.join();
            both.arrive_and_wait();
            if (waits(other) == Wait::circle) circles.fetch_add(1);
            s.end();
        });
        CHECK(circles == 1);
    }
    // A wait ends when its `pause` says so.
    Switch s;
    CHECK(s.begin(a, std::chrono::minutes(1), never_held, go_on) == Switch::Outcome::quiet);
    std::thread([&] {
        Processor& p = current();
        enter(p);
        CHECK(begin_miss(p, a.coid()).outcome == Miss::Outcome::switching);
        CHECK(await_switch(p, a.coid(), [] { return false; }) == Wait::interrupted);
        if (leave(p)) collect();
    }).join();
    s.end();
    CHECK(destroy(a) && destroy(b));
}

#ifndef __SANITIZE_THREAD__  // which does not follow the child of a program with threads
// In the child of a fork there is no switch, and nobody waits for one.
void fork_in_a_switch() {
    Reference reference;
    create(reference, new Object());
    Switch s;
    CHECK(s.begin(reference, std::chrono::minutes(1), never_held, go_on) == Switch::Outcome::quiet);
    std::vector<std::thread> waiting;
    for (int t = 0; t < 3; ++t) waiting.emplace_back([&] { CHECK(call(reference, [](Rep& rep) { ++rep.count; })); });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    pid_t child = 0;
    std::thread([&] {
        child = fork();
        if (child != 0) return;
        alarm(60);
        CHECK(call(reference, [](Rep& rep) { ++rep.count; }));
        for (int i = 0; i < 20; ++i) {
            Switch mine;
            CHECK(mine.begin(reference, std::chrono::minutes(1), never_held, go_on) == Switch::Outcome::quiet);
            std::thread later([&] { CHECK(call(reference, [](Rep& rep) { ++rep.count; })); });
            std::this_thread::yield();
            mine.end();
            later.join();
        }
        CHECK(destroy(reference));
        _exit(0);
    }).join();
    int status = 0;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    s.end();
    for (auto& thread : waiting) thread.join();
    CHECK(destroy(reference));
}
#endif

// Pages of the tables come and go with the objects, while others call objects of their own.
void table_pages() {
    std::atomic<bool> done{false};
    std::thread other([&] {
        Reference mine;
        create(mine, new Object());
        while (!done) call(mine, [](Rep& rep) { ++rep.count; });
        CHECK(destroy(mine));
    });
    for (int round = 0; round < 6; ++round) {
        std::vector<std::unique_ptr<Reference>> references;
        for (Index j = 0; j < 4 * page_size; ++j) {
            references.push_back(std::make_unique<Reference>());
            create(*references.back(), new Object());
            call(*references.back(), [](Rep& rep) { ++rep.count; });
        }
        std::set<Index> ranges;
        for (auto& r : references) ranges.insert(static_cast<Index>(r->coid()) >> page_bits);
        CHECK(ranges.size() >= 4);
        CHECK(*ranges.rbegin() < 100);  // numbers are used again
        for (auto& r : references) CHECK(destroy(*r));
        CHECK(reps_alive <= 1);
        while (retired() != 0) flush();
        long left = 0;
        for (Index range : ranges) left += current().local.find(range << page_bits) != nullptr;
        CHECK(left <= 1);  // one range stays
    }
    done = true;
    other.join();
}

// What a writer unlinks and retires stays readable to the requests that may have found it, and goes when they end.
void retirement() {
    struct Box {
        explicit Box(int n) : number(n) { ++boxes_alive; }
        ~Box() {
            number = -1;
            --boxes_alive;
        }
        int number;
    };
    constexpr int writers = 2, readers = 3, rounds = 3000;
    std::atomic<Box*> current{new Box(0)};
    std::atomic<bool> done{false};
    std::vector<std::thread> threads;
    for (int t = 0; t < readers; ++t) {
        threads.emplace_back([&] {
            while (!done) {
                Processor& p = k42::runtime::current();
                enter(p);
                Box* box = current.load(std::memory_order_seq_cst);
                CHECK(box->number >= 0);
                std::this_thread::yield();
                CHECK(box->number >= 0);
                if (leave(p)) collect();
            }
        });
    }
    std::vector<std::thread> changers;
    for (int t = 0; t < writers; ++t) {
        changers.emplace_back([&] {
            for (int i = 1; i <= rounds; ++i) retire(current.exchange(new Box(i), std::memory_order_seq_cst));
            synchronize();
            flush();
            while (retired() != 0) flush();  // readers' requests are short
        });
    }
    for (std::thread& thread : changers) thread.join();
    done = true;
    for (std::thread& thread : threads) thread.join();
    CHECK(boxes_alive == 1);
    delete current.load();
}

}  // namespace

int main() {
    exact_counts();
    churn();
    deferred_destruction();
    later_requests_do_not_delay();
    races();
    reuse();
    retirement();
    switches();
    switch_behind_a_lock();
    switch_cycles();
    switch_circles();
    mail();
    held();
#ifndef __SANITIZE_THREAD__
    fork_in_a_switch();
#endif
    table_pages();
    many_processors();
    CHECK(reps_alive == 0 && objects_alive == 0);
    std::puts("ok");
}
