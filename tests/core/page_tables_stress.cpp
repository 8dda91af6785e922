// The page tables of a file cache, shared, replicated and partitioned: locks that exclude, copies that are recalled
// before what they say changes. Meant for ThreadSanitizer and AddressSanitizer; asserts what happened, never how fast.
// Takes a seed.
#include <algorithm>
#include <memory>
#include <vector>

#include "check.hpp"
#include "vm/partitioned_page_table.hpp"
#include "vm/replicated_page_table.hpp"

using namespace k42;
using namespace k42::vm;
using namespace k42::testing;

namespace {

constexpr uint64_t kPages = 96;
// Across two spans of the partitioned table, that is.
constexpr uint64_t kFirst = (uint64_t{1} << PartitionedPageTable::kShift) * 7 - kPages / 2;

enum class Kind { shared, replicated, partitioned };

std::unique_ptr<PageTable> make(Kind kind) {
    if (kind == Kind::shared) return std::make_unique<SharedPageTable>();
    if (kind == Kind::replicated) return std::make_unique<ReplicatedPageTable>(Policy::fifo, true);
    return std::make_unique<PartitionedPageTable>(Policy::fifo, 3);
}

// What is true of the pages. Plain: the locks of descriptors, and held copies, alone keep it in order.
struct Truth {
    std::vector<uint8_t> alive = std::vector<uint8_t>(kPages), dirty = std::vector<uint8_t>(kPages);
    std::vector<uint64_t> made = std::vector<uint64_t>(kPages), gone = std::vector<uint64_t>(kPages);
};

struct Counts {
    std::atomic<uint64_t> held{0}, found{0}, made{0};
};

void fault(PageTable& table, Truth& truth, Random& random, Counts& counts) {
    const uint64_t at = random.below(random.one_in(2) ? 8 : kPages);
    const bool write = random.one_in(8);
    if (const auto held = table.hold(kFirst + at, kFirst, kPages, write, 1); held.count) {
        CHECK(held.first <= kFirst + at && kFirst + at < held.first + held.count);
        for (uint64_t page = held.first; page < held.first + held.count; ++page) {
            CHECK(truth.alive[page - kFirst] && bool(truth.dirty[page - kFirst]) == held.dirty);
        }
        CHECK(held.dirty || !write);
        random.maybe_yield(16);
        CHECK(truth.alive[at]);
        table.release(held);
        counts.held.fetch_add(1, std::memory_order_relaxed);
        return;
    }
    Page* pages[kPages];
    table.lock(kFirst + at, 1, pages);
    Page* page = pages[0];
    if (page->state() == PageState::absent) {
        CHECK(!truth.alive[at]);
        truth.alive[at] = 1;
        ++truth.made[at];
        page->set_state(PageState::resident);
        counts.made.fetch_add(1, std::memory_order_relaxed);
    } else {
        CHECK(truth.alive[at]);
        counts.found.fetch_add(1, std::memory_order_relaxed);
    }
    if (write && !page->is(Page::kDirty)) {
        table.recall(&page, 1);
        page->set(Page::kDirty);
        truth.dirty[at] = 1;
    }
    const auto run = table.lock_around(page, kFirst, kPages, pages);
    CHECK(run.first <= kFirst + at && kFirst + at < run.first + run.count);
    for (uint32_t i = 0; i < run.count; ++i) {
        CHECK(pages[i]->index == run.first + i && pages[i]->state() == PageState::resident);
        CHECK(truth.alive[run.first + i - kFirst] && truth.dirty[run.first + i - kFirst] == truth.dirty[at]);
    }
    random.maybe_yield(16);
    for (uint32_t i = 0; i < run.count; ++i) pages[i]->used.store(1);
    table.copy(pages, run.count);
    table.unlock(pages, run.count);
}

// Takes what is resident in a range away, or makes it clean.
void take(PageTable& table, Truth& truth, uint64_t first, uint32_t count, bool clean) {
    Page* pages[kPages];
    table.lock(kFirst + first, count, pages);
    table.recall(pages, count);
    for (uint32_t i = 0; i < count; ++i) {
        const uint64_t at = first + i;
        CHECK_EQUAL(pages[i]->index, kFirst + at);
        CHECK_EQUAL(pages[i]->state() == PageState::resident, bool(truth.alive[at]));
        if (!truth.alive[at]) continue;
        truth.dirty[at] = 0;
        pages[i]->clear(Page::kDirty);
        if (clean) continue;
        truth.alive[at] = 0;
        ++truth.gone[at];
        pages[i]->set_state(PageState::absent);
    }
    table.unlock(pages, count);
}

void pages_come_and_go(Kind kind, bool switching) {
    begin("pages_come_and_go");
    auto table = make(kind);
    auto* replicated = dynamic_cast<ReplicatedPageTable*>(table.get());
    Truth truth;
    Counts counts;
    std::atomic<int> running{4};
    in_threads(7, [&](int who) {
        Random random(seed() + uint64_t(who));
        if (who < 4) {
            for (int i = 0; i < 6'000; ++i) fault(*table, truth, random, counts);
            running.fetch_sub(1);
        } else if (who < 6) {
            while (running.load() > 0) {
                const uint64_t first = random.below(kPages);
                take(*table, truth, first, uint32_t(1 + random.below(std::min<uint64_t>(kPages - first, 12))),
                     who == 5 && random.one_in(2));
                for (int i = 0; i < 8; ++i) std::this_thread::yield();
            }
        } else if (switching) {
            for (int i = 0; running.load() > 0; ++i) {
                replicated->replicate(i % 2);
                (void)table->bytes();
                for (int k = 0; k < 20; ++k) std::this_thread::yield();
            }
        }
    });
    if (switching) replicated->replicate(true);
    for (uint64_t i = 0; i < kPages; ++i) CHECK_EQUAL(truth.made[i] - truth.gone[i], truth.alive[i]);
    const auto alive = uint64_t(std::count(truth.alive.begin(), truth.alive.end(), 1));
    CHECK(table->size() == alive && table->resident().size() == alive);
    std::printf("  %llu held, %llu found, %llu made\n", static_cast<unsigned long long>(counts.held.load()),
                static_cast<unsigned long long>(counts.found.load()),
                static_cast<unsigned long long>(counts.made.load()));
    CHECK_EQUAL(counts.held > 0, kind == Kind::replicated);
    for (uint64_t first = 0; first < kPages; first += 12) take(*table, truth, first, 12, false);
    CHECK_EQUAL(table->size(), 0u);
    if (replicated) CHECK_EQUAL(replicated->copies(), 0u);
}

// All at once on one key: one finds it absent, all others find it.
void one_makes_it(Kind kind) {
    begin("one_makes_it");
    auto table = make(kind);
    for (int round = 0; round < 60; ++round) {
        std::atomic<int> made{0}, found{0};
        in_threads(4, [&](int) {
            if (const auto held = table->hold(kFirst, kFirst, 1, false, 1); held.count) {
                table->release(held);
                found.fetch_add(1);
                return;
            }
            Page* page;
            table->lock(kFirst, 1, &page);
            (page->state() == PageState::absent ? made : found).fetch_add(1);
            page->set_state(PageState::resident);
            page->used.store(1);
            table->copy(&page, 1);
            table->unlock(&page, 1);
        });
        CHECK(made == 1 && found == 3);
        Page* page;
        table->lock(kFirst, 1, &page);
        table->recall(&page, 1);
        page->set_state(PageState::absent);
        table->unlock(&page, 1);
        CHECK_EQUAL(table->size(), 0u);
        CHECK_EQUAL(table->hold(kFirst, kFirst, 1, false, 1).count, 0u);
    }
}

// A local table grows and shrinks with its copies.
void copies_grow_and_shrink() {
    begin("copies_grow_and_shrink");
    ReplicatedPageTable table(Policy::fifo, true);
    const size_t empty = table.bytes();
    for (int round = 0; round < 3; ++round) {
        for (uint64_t page = 0; page < 20'000; ++page) {
            Page* descriptor;
            table.lock(page, 1, &descriptor);
            descriptor->set_state(PageState::resident);
            table.copy(&descriptor, 1);
            table.unlock(&descriptor, 1);
        }
        CHECK(table.copies() == 20'000);
        for (uint64_t page = 0; page < 20'000; ++page) {
            Page* descriptor;
            table.lock(page, 1, &descriptor);
            table.recall(&descriptor, 1);
            descriptor->set_state(PageState::absent);
            table.unlock(&descriptor, 1);
        }
        CHECK_EQUAL(table.copies(), 0u);
    }
    // What stays are the master's descriptors, which it keeps for the next pages.
    CHECK(table.bytes() < empty + 20'000 * sizeof(Page) * 2);
}

}  // namespace

int main(int argc, char** argv) {
    start_program(argc, argv);
    for (Kind kind : {Kind::shared, Kind::replicated, Kind::partitioned}) {
        pages_come_and_go(kind, false);
        one_makes_it(kind);
    }
    pages_come_and_go(Kind::replicated, true);
    copies_grow_and_shrink();
    std::puts("ok");
}
