// The plain structures of the virtual memory system alone, against models and under contention: meant for
// ThreadSanitizer and AddressSanitizer. Mutual exclusion is proved with plain variables, which
// ThreadSanitizer reports when two threads are let in. Takes a seed.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <optional>

#include "check.hpp"
#include "vm/frame_pool.hpp"
#include "vm/page_table.hpp"

using namespace k42;
using namespace k42::testing;
using namespace k42::vm;

namespace {

constexpr std::chrono::milliseconds kLong{60'000};  // a wait that lasts so long has lost its wake-up

// PageTable

void make_resident(PageTable& table, Page** pages, uint32_t count) {
    for (uint32_t i = 0; i < count; ++i) {
        pages[i]->set_state(PageState::resident);
        table.replacement(0).insert(pages[i]->index);
    }
}

// The pages whose turn it is to go; the caller's alone.
std::vector<uint64_t> take_oldest(PageTable& table, size_t count) {
    std::vector<Replacement::Candidate> candidates;
    table.replacement(0).next(count, candidates);
    std::vector<uint64_t> oldest;
    for (const auto& candidate : candidates) oldest.push_back(candidate.index);
    return oldest;
}

// A page table in the hands of threads that drive pages through their states. What they believe of a page is
// plain data: two holders of a descriptor would be a data race.
void page_locks_exclude() {
    begin("page_locks_exclude");
    constexpr uint64_t kPages = 96;
    constexpr int kThreads = 6, kRounds = 4'000;
    struct Known {
        PageState state = PageState::absent;
        uint64_t locks = 0;
        uint64_t arrivals = 0;
    };
    SharedPageTable table;
    std::vector<Known> known(kPages);
    std::atomic<uint64_t> locked{0}, arrived{0}, evicted{0};
    in_threads(kThreads, [&](int who) {
        Random random(seed() + who);
        std::vector<uint64_t> filling;
        Page* pages[16];
        auto lock = [&](uint64_t first, uint32_t count) {
            table.lock(first, count, pages);
            for (uint32_t i = 0; i < count; ++i) {
                Known& page = known[first + i];
                CHECK_EQUAL(pages[i]->index, first + i);
                CHECK_EQUAL(uint32_t(pages[i]->state()), uint32_t(page.state));
                ++page.locks;
            }
            locked.fetch_add(count, std::memory_order_relaxed);
        };
        for (int round = 0; round < kRounds; ++round) {
            const uint64_t first = random.below(kPages);
            const auto count = uint32_t(1 + random.below(std::min<uint64_t>(16, kPages - first)));
            switch (random.below(4)) {
                case 0:  // only look; absent descriptors come and go
                    lock(first, count);
                    random.maybe_yield(8);
                    table.unlock(pages, count);
                    break;
                case 1:  // begin to fill the absent ones
                    lock(first, count);
                    for (uint32_t i = 0; i < count; ++i) {
                        if (known[first + i].state != PageState::absent) continue;
                        pages[i]->set_state(known[first + i].state = PageState::io);
                        filling.push_back(first + i);
                    }
                    random.maybe_yield(8);
                    table.unlock(pages, count);
                    break;
                case 2:  // filled, or not
                    for (uint64_t index : filling) {
                        lock(index, 1);
                        CHECK(known[index].state == PageState::io);
                        if (random.one_in(4)) {
                            pages[0]->set_state(known[index].state = PageState::absent);
                        } else {
                            make_resident(table, pages, 1);
                            known[index].state = PageState::resident;
                            ++known[index].arrivals;
                            arrived.fetch_add(1, std::memory_order_relaxed);
                        }
                        table.unlock(pages, 1);
                    }
                    filling.clear();
                    break;
                default:  // evict: what was taken is ours alone, and resident
                    for (uint64_t index : take_oldest(table, count)) {
                        random.maybe_yield(8);
                        lock(index, 1);
                        CHECK(known[index].state == PageState::resident);
                        pages[0]->set_state(known[index].state = PageState::absent);
                        evicted.fetch_add(1, std::memory_order_relaxed);
                        table.unlock(pages, 1);
                    }
            }
        }
        for (uint64_t index : filling) {
            lock(index, 1);
            pages[0]->set_state(known[index].state = PageState::absent);
            table.unlock(pages, 1);
        }
    });
    std::vector<uint64_t> resident;
    uint64_t locks = 0, arrivals = 0;
    for (uint64_t i = 0; i < kPages; ++i) {
        if (known[i].state == PageState::resident) resident.push_back(i);
        CHECK(known[i].state != PageState::io);
        locks += known[i].locks;
        arrivals += known[i].arrivals;
    }
    CHECK(table.resident() == resident);
    CHECK_EQUAL(table.size(), resident.size());  // absent ones were given back
    CHECK_EQUAL(locks, locked.load());
    CHECK_EQUAL(arrivals, arrived.load());
    CHECK_EQUAL(arrived - evicted, resident.size());
    std::vector<uint64_t> rest = take_oldest(table, SIZE_MAX);
    std::sort(rest.begin(), rest.end());
    CHECK(rest == resident);
    for (uint64_t index : rest) {
        Page* page;
        table.lock(index, 1, &page);
        page->set_state(PageState::absent);
        table.unlock(&page, 1);
    }
    CHECK_EQUAL(table.size(), size_t{0});
}

// Nothing but ranges that overlap, all absent: every descriptor is recycled all the time, also under waiters.
void page_descriptors_recycle() {
    begin("page_descriptors_recycle");
    constexpr uint64_t kPages = 24;
    constexpr int kThreads = 5, kRounds = 6'000;
    SharedPageTable table;
    std::vector<uint64_t> counts(kPages, 0);
    std::atomic<uint64_t> total{0};
    in_threads(kThreads, [&](int who) {
        Random random(seed() + who);
        Page* pages[16];
        for (int round = 0; round < kRounds; ++round) {
            const uint64_t first = random.below(kPages);
            const auto count = uint32_t(1 + random.below(std::min<uint64_t>(12, kPages - first)));
            table.lock(first, count, pages);
            for (uint32_t i = 0; i < count; ++i) {
                CHECK(pages[i]->index == first + i && pages[i]->state() == PageState::absent);
                ++counts[first + i];
            }
            random.maybe_yield(4);
            total.fetch_add(count, std::memory_order_relaxed);
            table.unlock(pages, count);
        }
    });
    uint64_t sum = 0;
    for (uint64_t count : counts) sum += count;
    CHECK_EQUAL(sum, total.load());
    CHECK_EQUAL(table.size(), size_t{0});
    // No more descriptors were ever made than can be in use at once (with the slack of two slabs).
    CHECK(table.bytes() <= sizeof(SharedPageTable) + 64 * sizeof(Page*) + (kPages + 32) * sizeof(Page));
}

// Waiters sleep until the holder is done, whether the descriptor stays, goes, or is another page's by then.
void page_lock_waits() {
    begin("page_lock_waits");
    for (int round = 0; round < 200; ++round) {
        SharedPageTable table;
        Page* held;
        table.lock(5, 1, &held);
        int plain = 0;
        std::atomic<int> through{0};
        auto take = [&](uint64_t first, uint32_t count) {
            Page* pages[8];
            table.lock(first, count, pages);
            ++plain;
            through.fetch_add(1);
            table.unlock(pages, count);
        };
        std::thread a(take, 5, 1), b(take, 3, 4), c(take, 5, 3);
        for (int i = 0; i < round % 16; ++i) std::this_thread::yield();
        CHECK_EQUAL(through.load(), 0);
        CHECK_EQUAL(plain, 0);
        const bool stays = round % 2;
        if (stays) held->set_state(PageState::io);
        table.unlock(&held, 1);
        Page* other;  // perhaps the same descriptor
        table.lock(77, 1, &other);
        for (int i = 0; i < 4; ++i) std::this_thread::yield();
        table.unlock(&other, 1);
        a.join();
        b.join();
        c.join();
        CHECK_EQUAL(plain, 3);
        CHECK_EQUAL(table.size(), size_t{stays});
    }
}

void page_waiters_keep_descriptor() {
    begin("page_waiters_keep_descriptor");
    SharedPageTable table;
    Page* pages[2];
    PageWaiter waiter;
    table.lock(8, 2, pages);
    CHECK_EQUAL(table.size(), size_t{2});
    pages[1]->waiters = &waiter;
    table.unlock(pages, 2);
    CHECK_EQUAL(table.size(), size_t{1});
    table.lock(8, 2, pages);
    CHECK(pages[0]->waiters == nullptr && pages[1]->waiters == &waiter);
    pages[1]->waiters = nullptr;
    table.unlock(pages, 2);
    CHECK_EQUAL(table.size(), size_t{0});
}

void page_order_growth_and_reuse() {
    begin("page_order_growth_and_reuse");
    constexpr uint64_t kPages = 50'000, kBatch = 50;
    Random random(seed());
    SharedPageTable table;
    std::vector<uint64_t> order;  // random, sparse, all different
    for (uint64_t i = 0; i < kPages; i += kBatch) order.push_back((i / kBatch) << (random.below(2) * 20));
    std::sort(order.begin(), order.end());
    order.erase(std::unique(order.begin(), order.end()), order.end());
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
    size_t bytes = 0;
    for (int turn = 0; turn < 3; ++turn) {
        std::vector<uint64_t> expected;
        for (uint64_t start : order) {
            Page* pages[kBatch];
            table.lock(start * kBatch, kBatch, pages);
            make_resident(table, pages, kBatch);
            table.unlock(pages, kBatch);
            for (uint64_t i = 0; i < kBatch; ++i) expected.push_back(start * kBatch + i);
        }
        CHECK_EQUAL(table.size(), expected.size());
        std::vector<uint64_t> sorted = expected;
        std::sort(sorted.begin(), sorted.end());
        CHECK(table.resident() == sorted);
        if (turn == 0) bytes = table.bytes();
        CHECK_EQUAL(table.bytes(), bytes);  // descriptors were reused
        CHECK(bytes < expected.size() * 96);
        size_t at = 0;
        while (at < expected.size()) {
            for (uint64_t index : take_oldest(table, 1 + random.below(700))) {
                CHECK_EQUAL(index, expected[at]);  // first in, first out
                ++at;
                Page* page;
                table.lock(index, 1, &page);
                CHECK(page->state() == PageState::resident);
                page->set_state(PageState::absent);
                table.unlock(&page, 1);
            }
        }
        CHECK(table.size() == 0 && take_oldest(table, 1).empty() && table.resident().empty());
    }
}

// FramePool

void frames_against_model(bool distributed) {
    begin("frames_against_model");
    Random random(seed());
    for (uint64_t budget : {1, 31, 1000}) {
        FramePool pool(budget, distributed);
        uint64_t in_use[3] = {}, promised_anonymous = 0, promised_file = 0, changes = 0;
        auto unpromised = [&] { return budget - promised_anonymous - promised_file - in_use[2]; };
        for (int i = 0; i < 20'000; ++i) {
            const uint64_t frames = random.below(budget / 3 + 2);
            const auto backing = Backing(random.below(3));
            uint64_t& used = in_use[int(backing)];
            switch (random.below(7)) {
                case 0: {
                    const bool fits = frames <= unpromised();
                    CHECK_EQUAL(pool.reserve(frames), fits);
                    if (fits) promised_anonymous += frames;
                    break;
                }
                case 1: {
                    const uint64_t back = std::min(frames, promised_anonymous);
                    pool.unreserve(back);
                    promised_anonymous -= back;
                    break;
                }
                case 2: {
                    const uint64_t few = frames % 4;
                    const bool fits = few <= promised_file || few - promised_file <= unpromised();
                    CHECK_EQUAL(pool.promise_file(few), fits);
                    if (fits) promised_file = std::max(promised_file, few);
                    break;
                }
                case 3:
                case 4: {
                    FramePool::Grant grant = FramePool::Grant::granted;
                    if (backing == Backing::overcommitted && frames > unpromised()) {
                        grant = FramePool::Grant::exhausted;
                    } else if (in_use[0] + in_use[1] + in_use[2] + frames > budget) {
                        grant = FramePool::Grant::reclaim;
                    }
                    CHECK(pool.allocate(frames, backing) == grant);
                    if (grant == FramePool::Grant::granted) used += frames;
                    break;
                }
                case 5: {
                    const uint64_t back = std::min(frames, used);
                    pool.release(back, backing);
                    used -= back;
                    ++changes;
                    break;
                }
                default:
                    pool.announce_reclaimable();
                    ++changes;
            }
            const FramePool::Usage usage = pool.usage();
            CHECK(usage.budget == budget && usage.file == in_use[0] && usage.reserved == in_use[1] &&
                  usage.overcommitted == in_use[2] && usage.promised_anonymous == promised_anonymous &&
                  usage.promised_file == promised_file);
            CHECK(usage.file + usage.reserved + usage.overcommitted <= budget);
            CHECK(usage.promised_anonymous + usage.promised_file + usage.overcommitted <= budget);
            CHECK_EQUAL(pool.changes(), changes);
            CHECK_EQUAL(pool.free(), budget - in_use[0] - in_use[1] - in_use[2]);
            CHECK(pool.check());
            if (random.one_in(1'000)) pool.distribute(distributed = !distributed);
        }
        CHECK(pool.wait(changes + 1, kLong));  // differs already
        CHECK(!pool.wait(changes, std::chrono::milliseconds(1)));
    }
}

// Nobody ever holds more than there is; a reservation never fails for want of frames once files are given
// back.
void frames_within_budget(bool distributed, bool switching, uint64_t kBudget) {
    begin("frames_within_budget");
    FramePool pool(kBudget, distributed);
    CHECK(pool.promise_file(4));
    std::atomic<int64_t> held{0}, most{0};
    std::atomic<uint64_t> refused{0};
    std::atomic<int> running{6};
    in_threads(7, [&](int who) {
        Random random(seed() + who);
        if (who == 6) {
            for (int i = 0; running.load() > 0; ++i) {
                CHECK(pool.check());  // at any time
                if (switching) pool.distribute(i % 2);
                std::this_thread::yield();
            }
            return;
        }
        const auto backing = Backing(who % 3);
        for (int i = 0; i < 8'000; ++i) {
            const uint64_t frames = 1 + random.below(8);
            if (backing == Backing::reserved && !pool.reserve(frames)) continue;
            if (pool.allocate(frames, backing) == FramePool::Grant::granted) {
                const int64_t now = held.fetch_add(int64_t(frames)) + int64_t(frames);
                CHECK(now <= int64_t(kBudget));
                int64_t seen = most.load();
                while (now > seen && !most.compare_exchange_weak(seen, now)) {
                }
                random.maybe_yield(4);
                held.fetch_sub(int64_t(frames));
                pool.release(frames, backing);
            } else {
                refused.fetch_add(1, std::memory_order_relaxed);
            }
            if (backing == Backing::reserved) pool.unreserve(frames);
        }
        running.fetch_sub(1);
    });
    const FramePool::Usage usage = pool.usage();
    CHECK(usage.file == 0 && usage.reserved == 0 && usage.overcommitted == 0);
    CHECK(usage.promised_anonymous == 0 && usage.promised_file == 4);
    CHECK(held == 0 && most > 0);
    CHECK(pool.allocate(kBudget, Backing::file) == FramePool::Grant::granted);  // wherever they are
    CHECK(pool.allocate(1, Backing::file) == FramePool::Grant::reclaim);
}

// One frame for all, and waiting for it: a plain counter shows that only one has it, a wait that ends without
// a change shows that one was lost.
void frames_wait(bool distributed) {
    begin("frames_wait");
    constexpr int kThreads = 5, kTurns = 1'500;
    FramePool pool(1, distributed);
    long plain = 0;
    in_threads(kThreads, [&](int who) {
        Random random(seed() + who);
        for (int i = 0; i < kTurns; ++i) {
            for (;;) {
                const uint64_t seen = pool.changes();
                if (pool.allocate(1, Backing::file) == FramePool::Grant::granted) break;
                random.maybe_yield(2);  // the change may come here
                CHECK(pool.wait(seen, kLong));
            }
            ++plain;
            random.maybe_yield(2);
            pool.release(1, Backing::file);
        }
    });
    CHECK_EQUAL(plain, long{kThreads} * kTurns);
    CHECK_EQUAL(pool.changes(), uint64_t{kThreads} * kTurns);
}

// The level falls once for each fall, and the event says so; none where the budget is too small to keep frames free.
void frame_levels(bool distributed) {
    begin("frame_levels");
    using Level = FramePool::Level;
    for (uint64_t budget : {1, 15, 31, 1'000, 1'000'000}) {
        FramePool pool(budget, distributed);
        const int event = pool.low_event();
        CHECK(event >= 0);
        auto told = [&] {
            uint64_t count = 0;
            return read(event, &count, sizeof count) == sizeof count;
        };
        const uint64_t low = std::min<uint64_t>(budget / 16, 16384);
        for (int turn = 0; turn < 2; ++turn) {
            CHECK(pool.level() == Level::high && !told());
            uint64_t taken = budget - low;
            CHECK(pool.allocate(taken, Backing::file) == FramePool::Grant::granted);
            CHECK(pool.level() == (low ? Level::mid : Level::high));
            CHECK(!told());
            for (; taken < budget; ++taken) CHECK(pool.allocate(1, Backing::file) == FramePool::Grant::granted);
            CHECK_EQUAL(told(), low > 0);
            CHECK(pool.level() == (low >= 4 ? Level::critical : low ? Level::low : Level::high));
            CHECK(pool.allocate(1, Backing::file) == FramePool::Grant::reclaim && told() && !told());
            pool.release(taken, Backing::file);
        }
    }
}

// Accounts: exact at the limit whoever charges, on whatever thread frames come back.
void account_limits(bool distributed, uint64_t limit) {
    begin("account_limits");
    FramePool pool(1'000, distributed);
    Account* account = pool.accounts().open(limit, distributed);
    std::atomic<int64_t> held{0};
    std::atomic<uint64_t> left{0};  // charged by one thread, for any other to give back
    std::atomic<int> running{5};
    in_threads(6, [&](int who) {
        Random random(seed() + who);
        if (who == 5) {
            for (int i = 0; running.load() > 0; ++i) {
                CHECK(account->check());
                account->distribute(i % 2);
                std::this_thread::yield();
            }
            return;
        }
        for (int i = 0; i < 8'000; ++i) {
            const uint64_t frames = 1 + random.below(std::min<uint64_t>(limit, 4));
            if (account->charge(frames)) {
                CHECK(held.fetch_add(int64_t(frames)) + int64_t(frames) <= int64_t(limit));
                left.fetch_add(frames);
            }
            const uint64_t back = left.exchange(0);
            held.fetch_sub(int64_t(back));
            account->uncharge(back);
        }
        running.fetch_sub(1);
    });
    CHECK_EQUAL(account->used(), 0u);
    CHECK(account->charge(limit) && !account->charge(1));
    CHECK_EQUAL(account->used(), limit);
    account->uncharge(limit);
    pool.accounts().close(account);
}

// Numbers come back once their account is closed and empty, and never while a frame stands on it.
void account_numbers() {
    begin("account_numbers");
    FramePool pool(100, true);
    Accounts& accounts = pool.accounts();
    CHECK(accounts.above_share(0) && accounts.find(0)->used() == 0);
    for (int round = 0; round < 70'000; ++round) {
        Account* account = accounts.open(std::nullopt, round % 2);
        CHECK(account && account->id() > 0 && accounts.find(account->id()) == account);
        accounts.close(account);
    }
    Account* greedy = accounts.open(std::nullopt, true);
    Account* modest = accounts.open(10, true);
    const uint16_t number = greedy->id();
    CHECK(greedy->charge(60) && modest->charge(10) && !modest->charge(1));
    accounts.refresh();
    CHECK(accounts.above_share(number) && !accounts.above_share(modest->id()));
    CHECK(accounts.share(*greedy) == 46 && accounts.share(*modest) == 10);
    CHECK(accounts.excess(number) == 14 && accounts.excess(modest->id()) == 0);
    greedy->uncharge(20);
    accounts.refresh();
    CHECK(!accounts.above_share(number));
    accounts.close(greedy);
    CHECK(!greedy->charge(1) && accounts.above_share(number));  // its 40 frames are still there
    for (int round = 0; round < 200; ++round) {
        Account* other = accounts.open(std::nullopt, true);
        CHECK(other->id() != number);
        accounts.close(other);
    }
    const auto uncharge = [&](uint16_t id, uint64_t frames) {
        const runtime::Within within;
        accounts.find(id)->uncharge(frames);
    };
    in_threads(2, [&](int) { uncharge(number, 20); });
    accounts.refresh();
    CHECK(!accounts.find(number));
    accounts.close(modest);
    uncharge(modest->id(), 10);
    CHECK(accounts.check() && accounts.size() == 0);
}

}  // namespace

int main(int argc, char** argv) {
    start_program(argc, argv);
    page_locks_exclude();
    page_descriptors_recycle();
    page_lock_waits();
    page_waiters_keep_descriptor();
    page_order_growth_and_reuse();
    for (bool distributed : {false, true}) {
        frames_against_model(distributed);
        frames_within_budget(distributed, false, 31);
        frames_wait(distributed);
        frame_levels(distributed);
        for (uint64_t limit : {1, 7, 2'000}) account_limits(distributed, limit);
    }
    frames_within_budget(true, false, 10'000);
    frames_within_budget(true, true, 31);
    account_numbers();
    std::puts("ok");
}
