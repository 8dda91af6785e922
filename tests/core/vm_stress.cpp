// The native virtual memory system under contention: faults, fills and evictions that race on file caches, first on
// HATs in memory, then on real memory of this process through userfaultfd. Meant for ThreadSanitizer and
// AddressSanitizer; asserts what happened and how often, never how fast. Takes a seed.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <memory>
#include <set>
#include <string>

#include "check.hpp"
#include "vm/affinity.hpp"
#include "vm/engine.hpp"
#include "vm/file_cache.hpp"
#include "vm/hat.hpp"
#include "vm/reader.hpp"
#include "vm/region.hpp"
#include "vm/status_page.hpp"
#include "vm/uffd.hpp"

using namespace k42;
using namespace k42::vm;
using namespace k42::testing;

namespace {

constexpr std::chrono::milliseconds kLong{60'000};  // a wait that lasts so long has lost its wake-up

// What a store holds at byte `offset` (a multiple of 8) of a page.
uint64_t pattern(uint64_t page, uint64_t offset) {
    return (page + 1) * 0x9E3779B97F4A7C15ull ^ offset * 0xD1B54A32D192ED03ull;
}

// A memfd, and how much of it Linux has made.
class Memory {
  public:
    explicit Memory(uint64_t pages) : fd_(memfd_create("k42-stress", MFD_CLOEXEC)) {
        CHECK(fd_ >= 0 && ftruncate(fd_, off_t(pages * kPageSize)) == 0);
    }
    ~Memory() { close(fd_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    int fd() const { return fd_; }
    int another_fd() const { return fcntl(fd_, F_DUPFD_CLOEXEC, 0); }  // for whoever takes it over
    uint64_t allocated() const {
        struct stat status;
        CHECK(fstat(fd_, &status) == 0);
        return uint64_t(status.st_blocks) * 512 / kPageSize;
    }
    void fill(uint64_t page) const {
        uint64_t words[kPageSize / 8];
        for (uint64_t i = 0; i < kPageSize / 8; ++i) words[i] = pattern(page, i * 8);
        CHECK(pwrite(fd_, words, sizeof words, off_t(page * kPageSize)) == ssize_t(sizeof words));
    }
    bool filled(uint64_t page) const {
        uint64_t words[kPageSize / 8];
        CHECK(pread(fd_, words, sizeof words, off_t(page * kPageSize)) == ssize_t(sizeof words));
        for (uint64_t i = 0; i < kPageSize / 8; ++i) {
            if (words[i] != pattern(page, i * 8)) return false;
        }
        return true;
    }

  private:
    const int fd_;
};

int make_journal(uint64_t pages) {
    const int fd = memfd_create("k42-stress-journal", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, off_t(pages)) == 0);
    return fd;
}

// What the tests know of a file's pages; plain, so that ThreadSanitizer sees who comes near a page without its lock.
struct Known {
    explicit Known(uint64_t pages) : live(pages, 0), fills(pages, 0) {}
    std::vector<uint8_t> live;  // filled and not evicted since
    std::vector<uint32_t> fills;
};

// A HAT without any lock: only the locks of the page descriptors keep its plain table in order.
class WitnessHat final : public Hat {
  public:
    WitnessHat(uint64_t id, RegionMap* regions, int cpus, uint64_t start, uint64_t pages)
        : Hat(id, regions, cpus), start_(start), mapped_(pages, 0) {}

    RangeResult map(int cpu, uint64_t address, uint64_t length, bool) override {
        const uint64_t first = (*canonical(cpu, address) - start_) / kPageSize;
        for (uint64_t i = 0; i < length / kPageSize; ++i) {
            // Another region of the same file shows it further up: only the first one is checked page by page.
            if (known && first + i < known->live.size()) CHECK(known->live[first + i]);
            mapped_[first + i] = 1;
        }
        return {length, 0};
    }
    RangeResult zero(int cpu, uint64_t address, uint64_t length, int memfd, uint64_t offset) override {
        CHECK(fallocate(memfd, 0, off_t(offset), off_t(length)) == 0);
        const uint64_t first = (*canonical(cpu, address) - start_) / kPageSize;
        for (uint64_t i = 0; i < length / kPageSize; ++i) {
            CHECK(!mapped_[first + i]);
            mapped_[first + i] = 1;
        }
        return {length, 0};
    }
    RangeResult allow_write(int, uint64_t, uint64_t length) override { return {length, 0}; }
    bool protect(const Region&, uint64_t, uint64_t, uint32_t) override { return true; }
    void soft_unmap(const Region& region, uint64_t first, uint64_t count, uint32_t) override {
        for (uint64_t page = std::max(first, region.first_page); page < first + count; ++page) {
            if (page - region.first_page >= region.pages) break;
            mapped_[(region.start - start_) / kPageSize + page - region.first_page] = 0;
        }
    }
    void wake_everywhere(uint64_t, uint64_t) override {}
    void wake(int, uint64_t, uint64_t) override { wakes_.fetch_add(1, std::memory_order_relaxed); }
    void fail(int, uint64_t, uint64_t, const std::string&) override {
        failures_.fetch_add(1, std::memory_order_relaxed);
    }
    void unmapped(const Region& region, uint64_t page) override {
        mapped_[(region.start - start_) / kPageSize + page - region.first_page] = 0;
        if (known && region.start == start_) {
            CHECK(known->live[page]);
            known->live[page] = 0;
        }
    }

    std::vector<uint64_t> mapped() const {
        std::vector<uint64_t> addresses;
        for (uint64_t i = 0; i < mapped_.size(); ++i) {
            if (mapped_[i]) addresses.push_back(start_ + i * kPageSize);
        }
        return addresses;
    }
    uint64_t wakes() const { return wakes_.load(std::memory_order_relaxed); }
    uint64_t failures() const { return failures_.load(std::memory_order_relaxed); }

    Known* known = nullptr;

  private:
    const uint64_t start_;
    std::vector<uint8_t> mapped_;  // by canonical page; each element protected by its page's descriptor
    std::atomic<uint64_t> wakes_{0}, failures_{0};
};

// One process, one file, and what the Python objects do with faults that the engine hands up.
struct World {
    World(uint64_t budget, uint64_t pages, Fill fill, Backing backing, Policy policy = Policy::fifo)
        : pool(budget),
          memory(pages),
          known(pages),
          cache(&pool, memory.another_fd(), make_journal(pages), pages, fill, backing, policy, 8) {}

    // Resolves the fault as the kernel's worker threads do. `abort_one_in`: a fill that fails halfway; 0: never.
    void finish(const FaultAt& fault, Random& random, uint64_t abort_one_in) {
        const auto canonical = fault.hat->canonical(fault.cpu, fault.address);
        const auto entry = canonical ? regions.lookup(*canonical) : std::nullopt;
        if (!entry || !entry->value->gate.enter()) {
            fault.hat->fail(fault.cpu, fault.address, kPageSize, "unmapped");
            return;
        }
        Region& region = *entry->value;
        const uint64_t page = region.page_at(*canonical);
        const Region::Group group = region.group_of(page);
        for (;;) {
            const Outcome outcome = cache.resolve(fault, page, {group.first, group.count}, {group.first, group.count});
            if (outcome != Outcome::absent && outcome != Outcome::no_frame) break;
            uint64_t first = group.first;
            uint32_t count = group.count;
            if (cluster > count && random.one_in(2)) {  // read on, past what the region shows
                first = page - page % cluster;
                count = uint32_t(std::min(cluster, cache.pages() - first));
            }
            const FileCache::Run run = cache.begin_io(page, {first, count});
            if (!run.count) continue;
            // Others' read-ahead brings pages in as well as the client that faults.
            const uint16_t owner = random.one_in(2) ? fault.hat->account() : account_of(random);
            allocate(run.count, random, owner);
            if (abort_one_in && random.one_in(abort_one_in)) {
                for (uint32_t i = 0; i < run.count / 2 + 1; ++i) memory.fill(run.first + i);
                aborted.fetch_add(run.count, std::memory_order_relaxed);
                cache.abort_io(run, run.count, owner);
                continue;
            }
            for (uint32_t i = 0; i < run.count; ++i) {
                const uint64_t at = run.first + i;
                if (tells_evictions) CHECK(!known.live[at]);
                if (cache.fill() == Fill::store) memory.fill(at);
                random.maybe_yield(8);
                if (tells_evictions) known.live[at] = 1;
                ++known.fills[at];
            }
            cache.complete_io(&fault, page, run, region.first_page, region.first_page + region.pages, false, owner);
            break;
        }
        CHECK(region.gate.leave());
    }

    void allocate(uint32_t frames, Random& random, uint16_t owner = 0) {
        for (;;) {
            const uint64_t seen = pool.changes();
            if (pool.allocate(frames, cache.backing(), owner) == FramePool::Grant::granted) return;
            random.maybe_yield(2);
            if (!reclaim(frames, random)) CHECK(pool.wait(seen, kLong));
        }
    }

    // First from those above their shares, as the Global PM does; sometimes from somebody.
    uint64_t reclaim(uint64_t frames, Random& random) {
        if (random.one_in(8)) cache.reclaim(frames, random.one_in(2), account_of(random));
        const uint64_t given =
            pool.accounts().refresh() ? cache.reclaim(frames, random.one_in(2), FileCache::kAboveShare).given : 0;
        return given ? given : cache.reclaim(frames, random.one_in(2)).given;
    }

    uint16_t account_of(Random& random) {
        return random.one_in(3) ? uint16_t(0) : accounts[random.below(accounts.size())]->id();
    }

    // At any moment: what is charged is in use, and has pages, or will have.
    void check_accounts() {
        FileCache::Tally tally;
        const FramePool::Census census = pool.census([&] { cache.tally(tally); });
        const uint64_t in_use = census.usage.file + census.usage.reserved + census.usage.overcommitted;
        uint64_t charged = 0, resident = 0;
        for (const auto& [number, frames] : census.charged) {
            charged += uint64_t(frames);
            resident += tally.resident[number];
            CHECK(uint64_t(frames) >= tally.resident[number]);
        }
        CHECK_EQUAL(charged, in_use);
        CHECK(resident <= in_use && in_use <= resident + tally.moving);
        CHECK(pool.check() && pool.accounts().check());
    }

    // Nobody is at work: the pool, the table, the memfd, and the counts agree, and the pages hold what they should.
    void check_quiet() {
        const std::vector<uint64_t> resident = cache.table().resident();
        const FramePool::Usage usage = pool.usage();
        CHECK_EQUAL(cache.table().size(), resident.size());  // no descriptor but those of resident pages
        CHECK_EQUAL(usage.file + usage.reserved + usage.overcommitted, resident.size());
        CHECK(resident.size() <= usage.budget);
        check_accounts();
        const FileCache::Counts counts = cache.counts();
        CHECK_EQUAL(counts.filled + counts.zero_filled - counts.evicted, resident.size());
        CHECK_EQUAL(memory.allocated(), resident.size());
        for (uint64_t page : resident) {
            if (cache.fill() == Fill::store) CHECK(memory.filled(page));
        }
    }

    FramePool pool;
    const std::array<Account*, 2> accounts{pool.accounts().open(std::nullopt, true),
                                           pool.accounts().open(std::nullopt, false)};
    Memory memory;
    Known known;
    FileCache cache;
    RegionMap regions;
    bool tells_evictions = false;  // the HAT keeps known.live
    uint64_t cluster = 0;          // pages
    std::atomic<uint64_t> aborted{0};
};

// A World on a HAT in memory, on two CPUs: region `whole` shows the file, `part` the middle of it.
template <class HatType>
struct SoftWorld : World {
    static constexpr uint64_t kStart = 0x10'0000'0000;
    static constexpr uint64_t kOtherWindow = 0x20'0000'0000;

    SoftWorld(uint64_t budget, uint64_t pages, uint32_t group, Fill fill = Fill::store, Backing backing = Backing::file,
              uint32_t around = 1, Policy policy = Policy::fifo)
        : World(budget, pages, fill, backing, policy),
          part_first(pages / 4 + 1),
          part_pages(pages / 2),
          hat(make_hat(pages)),
          whole(kStart, pages, 0, group, around, false, &cache, hat),
          part(kStart + pages * kPageSize, part_pages, part_first, std::max(1u, group / 4), 1, false, &cache, hat) {
        for (Region* region : {&whole, &part}) {
            const uint64_t length = region->pages * kPageSize;
            CHECK(regions.insert(region->start, region->start + length, region));
            CHECK(hat->add_window(0, region->start, length, region->start));
            CHECK(hat->add_window(1, region->start - kStart + kOtherWindow, length, region->start));
            cache.attach(region);
        }
        hat->charge_to(accounts[0]->id());
    }
    ~SoftWorld() {
        cache.detach(&whole);
        cache.detach(&part);
        hat->release();
    }

    HatType* make_hat(uint64_t pages) {
        if constexpr (std::is_same_v<HatType, WitnessHat>) {
            auto* made = new WitnessHat(1, &regions, 2, kStart, pages + part_pages);
            made->known = &known;
            tells_evictions = true;
            return made;
        } else {
            return new SoftHat(1, &regions, 2);
        }
    }

    FaultAt random_fault(Random& random) {
        // Every other fault is on one of few pages, so that faults meet.
        const uint64_t among = random.one_in(2) ? 8 : whole.pages + part.pages;
        const uint64_t offset = random.below(among) * kPageSize;
        const int cpu = int(random.below(2));
        return {hat, cpu, (cpu ? kOtherWindow : kStart) + offset};
    }
    // The engine's way first, as ever; now and then Python's at once.
    void fault(Random& random, uint64_t abort_one_in) {
        const FaultAt at = random_fault(random);
        if (random.one_in(4) || !Engine::handle(at)) finish(at, random, abort_one_in);
    }

    uint64_t page_of(uint64_t canonical) const {
        return canonical < part.start ? whole.page_at(canonical) : part.page_at(canonical);
    }
    void check_quiet() {
        World::check_quiet();
        const std::vector<uint64_t> resident = cache.table().resident();
        for (uint64_t address : hat->mapped()) {
            CHECK(std::binary_search(resident.begin(), resident.end(), page_of(address)));
        }
        CHECK_EQUAL(hat->wakes(), cache.counts().queued);  // every waiter was woken, once
        if (cache.fill() == Fill::store) {
            for (uint64_t page = 0; page < cache.pages(); ++page) {
                const bool is = std::binary_search(resident.begin(), resident.end(), page);
                if constexpr (std::is_same_v<HatType, WitnessHat>) CHECK_EQUAL(bool(known.live[page]), is);
                if (is) CHECK(known.fills[page] > 0);
            }
        }
    }

    const uint64_t part_first, part_pages;
    HatType* const hat;
    Region whole, part;
};

// Faults, fills that fail, and evictions, all at once; quiet points in between.
template <class HatType>
void cache_races(const char* name, uint64_t budget, uint64_t pages, uint32_t group, uint64_t cluster, int faults) {
    begin(name);
    constexpr int kFaulters = 4, kEvictors = 2;
    SoftWorld<HatType> world(budget, pages, group);
    world.cluster = cluster;
    uint64_t fills = 0;
    for (int round = 0; round < 4; ++round) {
        std::atomic<int> running{kFaulters};
        std::atomic<uint64_t> progress{0};
        in_threads(kFaulters + kEvictors, [&](int who) {
            Random random(seed() + uint64_t(round * 16 + who));
            if (who < kFaulters) {
                for (int i = 0; i < faults; ++i) {
                    world.fault(random, 8);
                    progress.fetch_add(1);
                    random.maybe_yield(8);
                }
                running.fetch_sub(1);
                return;
            }
            while (running.load() > 0) {
                // As often as there are faults, or so: else no page would be found resident.
                const uint64_t seen = progress.load();
                const uint64_t wanted = seen + 1 + random.below(16);
                while (running.load() > 0 && progress.load() < wanted) std::this_thread::yield();
                world.reclaim(1 + random.below(std::min<uint64_t>(budget, 24)), random);
                world.check_accounts();
            }
        });
        world.check_quiet();
        fills = 0;
        for (uint32_t count : world.known.fills) fills += count;
        CHECK_EQUAL(world.cache.counts().filled, fills);
    }
    const FileCache::Counts counts = world.cache.counts();
    std::printf("  filled %llu, evicted %llu, mapped %llu, queued %llu, aborted %llu\n",
                static_cast<unsigned long long>(counts.filled), static_cast<unsigned long long>(counts.evicted),
                static_cast<unsigned long long>(counts.mapped), static_cast<unsigned long long>(counts.queued),
                static_cast<unsigned long long>(world.aborted.load()));
    CHECK(counts.filled > budget && counts.evicted > 0 && counts.mapped > 0 && world.aborted > 0);
    world.cache.clear();
    world.check_quiet();
    CHECK(world.hat->mapped().empty() && world.memory.allocated() == 0);
}

// A page in I/O queues every fault on it, and its end wakes each once: made to happen, not hoped for.
void waiters_are_woken() {
    begin("waiters_are_woken");
    SoftWorld<SoftHat> world(8, 8, 4);
    Random random(seed());
    const FaultAt fault{world.hat, 0, world.whole.start + 2 * kPageSize};
    for (int turn = 0; turn < 2; ++turn) {
        CHECK(world.cache.resolve(fault, 2, {0, 4}, {0, 4}) == Outcome::absent);
        const FileCache::Run run = world.cache.begin_io(2, {0, 4});
        CHECK(run.first == 0 && run.count == 4);
        CHECK_EQUAL(world.cache.begin_io(3, {0, 4}).count, 0u);  // only one fills
        world.allocate(4, random);
        in_threads(4, [&](int who) {
            for (int i = 0; i < 50; ++i) {
                const uint64_t page = uint64_t(who + i) % 4;
                const FaultAt at{world.hat, who % 2, (who % 2 ? world.kOtherWindow : world.kStart) + page * kPageSize};
                CHECK(world.cache.resolve(at, page, {0, 4}, {0, 4}) == Outcome::queued);
            }
        });
        CHECK_EQUAL(world.hat->wakes(), uint64_t(turn) * 200);
        if (turn == 0) {
            world.memory.fill(run.first);  // half of it came
            world.cache.abort_io(run);
            world.pool.release(4, Backing::file);
            CHECK(world.hat->mapped().empty());
        } else {
            for (uint64_t page = 0; page < 4; ++page) {
                world.memory.fill(page);
                world.known.fills[page] = 1;
            }
            CHECK(world.cache.complete_io(&fault, 2, run, 1, 3) == Outcome::mapped);
            // Only what the region shows, [1, 3), is mapped.
            CHECK(
                (world.hat->mapped() == std::vector<uint64_t>{world.kStart + kPageSize, world.kStart + 2 * kPageSize}));
        }
        CHECK_EQUAL(world.hat->wakes(), uint64_t(turn + 1) * 200);
        world.check_quiet();
    }
}

// Zero-filling by all threads at once: each page once, whoever comes first, within its budget.
void zero_fill_once(uint32_t group, Backing backing, uint64_t budget) {
    begin("zero_fill_once");
    constexpr uint64_t kPages = 256;
    SoftWorld<SoftHat> world(budget, kPages, group, Fill::zero, backing);
    if (backing == Backing::reserved) CHECK(world.pool.reserve(kPages));
    std::atomic<uint64_t> refused{0};
    in_threads(4, [&](int who) {
        Random random(seed() + who);
        for (int i = 0; i < 1'500; ++i) {
            if (!Engine::handle(world.random_fault(random))) refused.fetch_add(1, std::memory_order_relaxed);
            random.maybe_yield(16);
        }
    });
    world.check_quiet();
    const FileCache::Counts counts = world.cache.counts();
    CHECK_EQUAL(counts.zero_filled, world.cache.table().resident().size());
    CHECK(counts.queued == 0 && counts.filled == 0 && counts.evicted == 0);
    if (budget >= kPages) CHECK(refused == 0 && counts.zero_filled == kPages);
    if (budget < kPages) CHECK(refused > 0 && counts.zero_filled > budget - group);
}

// After a region's shutdown nothing is mapped in it any more, and faults on it are ended; the file goes on.
void shutdown_ends_mapping() {
    begin("shutdown_ends_mapping");
    for (int round = 0; round < 20; ++round) {
        SoftWorld<SoftHat> world(31, 128, 4);
        std::atomic<bool> stop{false};
        std::atomic<uint64_t> faults{0};
        std::vector<std::thread> threads;
        for (int who = 0; who < 4; ++who) {
            threads.emplace_back([&, who] {
                Random random(seed() + uint64_t(round * 16 + who));
                while (!stop.load()) {
                    if (who == 3) {
                        world.cache.reclaim(4, true);
                        std::this_thread::yield();
                    } else {
                        world.fault(random, 8);
                        faults.fetch_add(1);
                    }
                }
            });
        }
        auto more = [&] {
            const uint64_t seen = faults.load();
            while (faults.load() < seen + 60) std::this_thread::yield();
        };
        auto in_part = [&] {
            std::set<uint64_t> addresses;
            for (uint64_t address : world.hat->mapped()) {
                if (address >= world.part.start) addresses.insert(address);
            }
            return addresses;
        };
        more();
        world.part.gate.shutdown();
        std::set<uint64_t> before = in_part();
        for (int step = 0; step < 3; ++step) {
            more();
            const std::set<uint64_t> after = in_part();
            CHECK(std::includes(before.begin(), before.end(), after.begin(), after.end()));
            before = after;
            if (step == 1) CHECK(world.regions.remove(world.part.start) == &world.part);
        }
        stop = true;
        for (std::thread& thread : threads) thread.join();
        CHECK_EQUAL(world.part.gate.inside(), 0u);
        CHECK(!world.hat->failed().empty());
        for (const auto& [address, reason] : world.hat->failed()) CHECK(address >= world.part.start);
        world.check_quiet();
    }
}

// clear() and evictors share the pages out: each is given back once, and nothing is left.
void clear_among_evictors() {
    begin("clear_among_evictors");
    for (int round = 0; round < 100; ++round) {
        SoftWorld<SoftHat> world(64, 64, 16);
        Random random(seed() + uint64_t(round));
        for (uint64_t page = 0; page < 64; page += 16) {
            world.finish({world.hat, 0, world.kStart + page * kPageSize}, random, 0);
        }
        world.check_quiet();
        std::atomic<uint64_t> given{0};
        in_threads(4, [&](int who) {
            Random mine(seed() + uint64_t(round * 16 + who));
            if (who == 0) {
                for (uint64_t i = mine.below(8); i > 0; --i) std::this_thread::yield();
                world.cache.clear();
                return;
            }
            for (int i = 0; i < 20; ++i) {
                given.fetch_add(world.cache.reclaim(2, false).given);
                mine.maybe_yield(2);
            }
        });
        world.check_quiet();
        CHECK_EQUAL(world.cache.counts().evicted, uint64_t{64});
        CHECK(given <= 64);
        CHECK(world.cache.table().resident().empty() && world.hat->mapped().empty());
    }
}

// StatusPage

void status_page() {
    begin("status_page");
    auto page = StatusPage::create();
    CHECK(page);
    CHECK(ftruncate(page->descriptor(), 0) < 0);  // sealed
    const void* seen = mmap(nullptr, StatusPage::kBytes, PROT_READ, MAP_SHARED, page->descriptor(), 0);
    CHECK(seen != MAP_FAILED);
    CHECK(!StatusPage::find(seen, 0) && !StatusPage::find(seen, 4096));
    for (uint64_t i = 1; i <= 40; ++i) {
        page->report(i * 8192, 4096, "failure " + std::to_string(i));
        for (uint64_t k = 0; k <= 41; ++k) {
            const bool kept = k >= 1 && k <= i && k + StatusPage::kRecords > i;
            const FailureRecord* record = StatusPage::find(seen, k * 8192 + 4095);
            CHECK_EQUAL(record != nullptr, kept);
            if (record) CHECK(record->reason == "failure " + std::to_string(k));
            CHECK(!StatusPage::find(seen, k * 8192 + 4096));
        }
    }
    page->report(40 * 8192, 8, "newer");
    CHECK(StatusPage::find(seen, 40 * 8192 + 7)->reason == std::string("newer"));
    CHECK(StatusPage::find(seen, 40 * 8192 + 8)->reason == std::string("failure 40"));
    page->report(4096, 4096, std::string(1000, 'x'));
    CHECK_EQUAL(std::strlen(StatusPage::find(seen, 4096)->reason), sizeof(FailureRecord::reason) - 1);

    // Reporters take turns: no record is lost or mixed with another.
    in_threads(4, [&](int who) {
        for (uint64_t i = 0; i < 2'000; ++i) page->report((uint64_t(who) << 32) + 4096, 4096, std::to_string(who));
    });
    const auto* records = static_cast<const FailureRecord*>(seen);
    std::set<uint64_t> sequences;
    for (size_t i = 0; i < StatusPage::kRecords; ++i) {
        CHECK(records[i].reason == std::to_string(records[i].address >> 32));
        sequences.insert(records[i].sequence.load());
    }
    CHECK_EQUAL(sequences.size(), StatusPage::kRecords);
    CHECK_EQUAL(*sequences.rbegin(), uint64_t{2 * (42 + 4 * 2'000)});
    munmap(const_cast<void*>(seen), StatusPage::kBytes);
}

// Real memory

// A World whose file is mapped in this process, one window a CPU, and served by an engine.
struct RealWorld : World {
    RealWorld(uint64_t budget, uint64_t pages_, uint32_t group, Fill fill, Backing backing, bool stick,
              std::unique_ptr<Source> source = nullptr)
        : World(budget, pages_, fill, backing),
          cpus(machine_cpus()),
          pages(pages_),
          hat(new UffdHat(1, &regions, int(cpus.size()), StatusPage::create(), CommandRing::create())),
          engine(cpus, stick, stick) {
        for (size_t cpu = 0; cpu < cpus.size(); ++cpu) {
            void* window = mmap(nullptr, length(), PROT_READ | PROT_WRITE, MAP_SHARED, memory.fd(), 0);
            CHECK(window != MAP_FAILED);
            windows.push_back(static_cast<unsigned char*>(window));
            const int uffd = open_userfaultfd(false);
            CHECK(uffd >= 0);
            CHECK(hat->attach(int(cpu), uffd) && !hat->attach(int(cpu), uffd));
            CHECK_EQUAL(register_range(uffd, base(cpu), length(), false), 0);
            CHECK(hat->add_window(int(cpu), base(cpu), length(), base(0)));
        }
        region = std::make_unique<Region>(base(0), pages, 0, group, 1, false, &cache, hat);
        CHECK(regions.insert(base(0), base(0) + length(), region.get()));
        cache.attach(region.get());
        if (source) cache.read_from(std::move(source));
        CHECK(!engine.add(hat, 0, getpid()));  // not started
        engine.start();
        add();
    }
    ~RealWorld() {
        engine.remove(hat);
        engine.stop();
        if (region) cache.detach(region.get());
        for (unsigned char* window : windows) munmap(window, length());
        hat->release();
    }

    void add() {
        for (size_t cpu = 0; cpu < cpus.size(); ++cpu) CHECK(engine.add(hat, int(cpu), getpid()));
    }
    uint64_t length() const { return pages * kPageSize; }
    uint64_t base(size_t cpu) const { return reinterpret_cast<uint64_t>(windows[cpu]); }

    const std::vector<int> cpus;
    const uint64_t pages;
    std::vector<unsigned char*> windows;
    UffdHat* const hat;
    std::unique_ptr<Region> region;
    Engine engine;
};

// Threads that write words of their own into random pages and read them back, on any CPU's window.
class Writers {
  public:
    Writers(RealWorld& world, int count) : world_(world), touched_(count), seen_(count), count_(count) {}

    void touch(int who, int touches) {
        Random random(seed() + uint64_t(who));
        auto& mine = touched_[who];
        for (int i = 0; i < touches; ++i) {
            const uint64_t page = random.below(world_.pages);
            *word(who, page, random) = value(who, page);
            mine.insert(page);
            const uint64_t other = random.below(world_.pages);
            CHECK_EQUAL(*word(who, other, random), mine.count(other) ? value(who, other) : 0);
            seen_[who].insert(page);
            seen_[who].insert(other);
            random.maybe_yield(8);
        }
    }
    // All that was written is there, in every window, and nothing else.
    void check() {
        for (uint64_t page = 0; page < world_.pages; ++page) {
            uint64_t words[kPageSize / 8];
            CHECK(pread(world_.memory.fd(), words, sizeof words, off_t(page * kPageSize)) == ssize_t(sizeof words));
            for (uint64_t i = 0; i < kPageSize / 8; ++i) {
                const int who = int(i) - 5;
                const bool written = who >= 0 && who < count_ && touched_[who].count(page);
                CHECK_EQUAL(words[i], written ? value(who, page) : 0);
            }
        }
    }

    // Pages that must have been made: the groups of all that were written or read.
    uint64_t made() const {
        std::set<uint64_t> pages;
        for (const auto& seen : seen_) {
            for (uint64_t page : seen) {
                const Region::Group group = world_.region->group_of(page);
                for (uint32_t i = 0; i < group.count; ++i) pages.insert(group.first + i);
            }
        }
        return pages.size();
    }

  private:
    static uint64_t value(int who, uint64_t page) { return pattern(page, uint64_t(who)); }
    volatile uint64_t* word(int who, uint64_t page, Random& random) const {
        unsigned char* window = world_.windows[random.below(world_.windows.size())];
        return reinterpret_cast<volatile uint64_t*>(window + page * kPageSize) + 5 + who;
    }

    RealWorld& world_;
    std::vector<std::set<uint64_t>> touched_;
    std::vector<std::set<uint64_t>> seen_;
    const int count_;
};

bool real_faults_possible() {
    const int uffd = open_userfaultfd(false);
    if (uffd < 0) {
        std::printf("SKIPPED, NOT TESTED: real page faults (userfaultfd: %s)\n", strerror(-uffd));
        return false;
    }
    close(uffd);
    return true;
}

// Zero-filled memory: every page made once, every byte kept, all faults finished natively; threads that stuck to a
// CPU get their masks back.
void real_zero_fill(uint32_t group) {
    begin("real_zero_fill");
    constexpr int kThreads = 4, kTouches = 400;
    constexpr uint64_t kPages = 600;
    const std::vector<int> all = machine_cpus();
    RealWorld world(kPages, kPages, group, Fill::zero, Backing::reserved, true);
    CHECK(world.pool.reserve(kPages));
    Writers writers(world, kThreads);
    std::atomic<int> given_back{0};
    in_threads(kThreads, [&](int who) {
        writers.touch(who, kTouches);
        // The burst is over: bounded only by the watchdog.
        while (machine_cpus() != all) usleep(1000);
        given_back.fetch_add(1);
    });
    CHECK_EQUAL(given_back.load(), kThreads);
    CHECK(machine_cpus() == all);
    const FileCache::Counts counts = world.cache.counts();
    CHECK_EQUAL(counts.zero_filled, writers.made());
    world.check_quiet();
    CHECK(counts.queued == 0 && counts.filled == 0 && counts.evicted == 0);
    writers.check();
    world.engine.synchronize();
    world.engine.stop();
    const Engine::Counts served = world.engine.counts();
    CHECK(served.faults == served.finished && served.handed_up == 0);
    CHECK(served.faults >= writers.made() / group);
    std::printf("  pages %llu, faults %llu, bursts kept %llu\n", static_cast<unsigned long long>(counts.zero_filled),
                static_cast<unsigned long long>(served.faults), static_cast<unsigned long long>(served.kept));
}

// Faults that find their client removed from the engine wait, and are served when it is added again.
void real_remove_and_add() {
    begin("real_remove_and_add");
    constexpr int kThreads = 3;
    constexpr uint64_t kPages = 400;
    RealWorld world(kPages, kPages, 1, Fill::zero, Backing::reserved, false);
    CHECK(world.pool.reserve(kPages));
    Writers writers(world, kThreads);
    std::atomic<int> running{kThreads};
    uint64_t removals = 0;
    in_threads(kThreads + 2, [&](int who) {
        Random random(seed() + uint64_t(who));
        if (who < kThreads) {
            writers.touch(who, 400);
            running.fetch_sub(1);
            return;
        }
        while (running.load() > 0) {
            if (who == kThreads) {
                world.engine.synchronize();
            } else {
                world.engine.remove(world.hat);
                for (uint64_t i = random.below(4); i > 0; --i) std::this_thread::yield();
                world.add();
                ++removals;
            }
            for (uint64_t i = random.below(16); i > 0; --i) std::this_thread::yield();
        }
    });
    CHECK(removals > 0);
    CHECK_EQUAL(world.cache.counts().zero_filled, writers.made());
    world.check_quiet();
    writers.check();
}

// The same where native threads read, for faults and ahead of them: from a file whose length, and so whose times,
// changes while they do. What they give up for that is filled by workers.
void real_file_read_natively(uint64_t budget, int reads) {
    begin("real_file_read_natively");
    constexpr int kReaders = 4;
    constexpr uint64_t kPages = 2'000;
    const Memory file(kPages);
    for (uint64_t page = 0; page < kPages; ++page) file.fill(page);
    HintQueue hints;
    Prefetcher prefetcher(hints);
    ReadAhead read_ahead(kPages, 64, 4);
    auto made = std::make_unique<Source>(file.fd(), kPages * kPageSize, 4, read_ahead, &prefetcher, 7);
    Source& source = *made;
    RealWorld world(budget, kPages, 1, Fill::store, Backing::file, true, std::move(made));
    std::vector<std::thread> workers;
    for (size_t i = 0; i < 2 * world.cpus.size(); ++i) {
        workers.emplace_back([&, i] {
            Random random(seed() + 100 + i);
            while (const auto fault = world.engine.next(int(i % world.cpus.size()))) {
                world.finish({fault->hat, fault->cpu, fault->address}, random, 16);
                fault->hat->release();
            }
        });
    }
    std::atomic<int> running{kReaders};
    in_threads(kReaders + 4, [&](int who) {
        Random random(seed() + uint64_t(who));
        while (who >= kReaders && running.load() > 0) {
            if (who == kReaders) {
                world.cache.reclaim(1 + random.below(64), random.one_in(2));
            } else if (who == kReaders + 1) {
                CHECK(ftruncate(file.fd(), off_t((kPages + random.below(3)) * kPageSize)) == 0);
            } else if (who == kReaders + 2) {
                const uint64_t first = random.below(kPages);
                const uint64_t end = std::min(first + 1 + random.below(100), kPages);
                const uint64_t reached = read_in(world.cache, first, end, {}).reached;
                CHECK(reached >= first && reached <= end);
            } else {
                read_ahead.advise(Source::Pattern(random.below(3)));
                source.resize(0);
                source.resize(kPages * kPageSize);
                source.begin_write();
                source.end_write();
                world.engine.synchronize();
            }
            for (uint64_t i = random.below(64); i > 0; --i) std::this_thread::yield();
        }
        if (who >= kReaders) return;
        for (int i = 0; i < reads; ++i) {
            const uint64_t page = who % 2 ? random.below(kPages) : uint64_t(i) % kPages;  // half of them read ahead
            const unsigned char* window = world.windows[random.below(world.windows.size())];
            const auto* words = reinterpret_cast<const volatile uint64_t*>(window + page * kPageSize);
            for (uint64_t k = 0; k < kPageSize / 8; k += 64) CHECK_EQUAL(words[k], pattern(page, k * 8));
        }
        running.fetch_sub(1);
    });
    const Engine::Counts served = world.engine.counts();
    world.engine.stop();
    for (std::thread& worker : workers) worker.join();
    source.drain();
    world.check_quiet();
    CHECK(served.read > 0);
    std::printf("  reads %llu, handed up %llu\n", static_cast<unsigned long long>(served.read),
                static_cast<unsigned long long>(served.handed_up));
}

// A file of more pages than there are frames: what is handed up is filled from the store, an evictor takes pages
// away all the time, and nobody ever reads a wrong byte.
void real_file(uint64_t budget, uint32_t group, int reads) {
    begin("real_file");
    constexpr int kReaders = 3;
    constexpr uint64_t kPages = 200;
    RealWorld world(budget, kPages, group, Fill::store, Backing::file, true);
    if (budget >= 16) world.cluster = 8;
    std::vector<std::thread> workers;
    std::atomic<uint64_t> taken{0};
    for (size_t i = 0; i < 2 * world.cpus.size(); ++i) {
        workers.emplace_back([&, i] {
            Random random(seed() + 100 + i);
            const int cpu = int(i % world.cpus.size());
            while (const auto fault = world.engine.next(cpu)) {
                CHECK(fault->hat == world.hat && fault->cpu == cpu);
                CHECK_EQUAL(fault->canonical - world.base(0), fault->address - world.base(size_t(cpu)));
                world.finish({fault->hat, fault->cpu, fault->address}, random, 16);
                fault->hat->release();
                taken.fetch_add(1);
            }
        });
    }
    std::atomic<int> running{kReaders};
    in_threads(kReaders + 1, [&](int who) {
        Random random(seed() + uint64_t(who));
        if (who == kReaders) {
            while (running.load() > 0) {
                world.cache.reclaim(1 + random.below(8), random.one_in(2));
                for (uint64_t i = random.below(32); i > 0; --i) std::this_thread::yield();
            }
            return;
        }
        for (int i = 0; i < reads; ++i) {
            const uint64_t page = random.below(kPages);
            const unsigned char* window = world.windows[random.below(world.windows.size())];
            const auto* words = reinterpret_cast<const volatile uint64_t*>(window + page * kPageSize);
            for (uint64_t k = 0; k < kPageSize / 8; ++k) {
                if (words[k] != pattern(page, k * 8)) {
                    std::fprintf(stderr, "page %llu, byte %llu is wrong\n", static_cast<unsigned long long>(page),
                                 static_cast<unsigned long long>(k * 8));
                    std::_Exit(1);
                }
            }
            random.maybe_yield(8);
        }
        running.fetch_sub(1);
    });
    world.engine.stop();
    CHECK(!world.engine.next(0));
    for (std::thread& worker : workers) worker.join();
    world.check_quiet();
    const FileCache::Counts counts = world.cache.counts();
    uint64_t fills = 0;
    for (uint32_t count : world.known.fills) fills += count;
    CHECK_EQUAL(counts.filled, fills);
    CHECK(counts.filled > budget && counts.evicted > 0);
    const Engine::Counts served = world.engine.counts();
    CHECK_EQUAL(served.faults, served.finished + served.handed_up);
    CHECK(served.handed_up >= taken.load());
    std::printf("  filled %llu, evicted %llu, faults %llu, handed up %llu\n",
                static_cast<unsigned long long>(counts.filled), static_cast<unsigned long long>(counts.evicted),
                static_cast<unsigned long long>(served.faults), static_cast<unsigned long long>(served.handed_up));
}

// A region goes while threads fault on it, in the order in which the kernel does it. System calls touch the pages,
// so that what is ended shows as EFAULT and not as a signal. AddressSanitizer watches the freed objects.
void real_unmap(Fill fill) {
    begin("real_unmap");
    const Memory file(256);
    HintQueue hints;
    Prefetcher prefetcher(hints);
    for (int round = 0; round < 8; ++round) {
        RegionMap regions;
        FramePool pool(256);
        Memory memory(256);
        ReadAhead read_ahead(256, 64, 4);
        const std::vector<int> cpus = machine_cpus();
        auto* hat = new UffdHat(1, &regions, int(cpus.size()), StatusPage::create(), CommandRing::create());
        Engine engine(cpus, true, true);
        auto cache = std::make_unique<FileCache>(&pool, memory.another_fd(), make_journal(256), 256, fill,
                                                 Backing::overcommitted, Policy::fifo, int(cpus.size()));
        if (fill == Fill::store) {
            cache->read_from(std::make_unique<Source>(file.fd(), 256 * kPageSize, 16, read_ahead, &prefetcher, 0));
        }
        engine.start();
        constexpr uint64_t kLength = 256 * kPageSize;
        std::vector<unsigned char*> windows;
        for (size_t cpu = 0; cpu < cpus.size(); ++cpu) {
            void* window = mmap(nullptr, kLength, PROT_READ | PROT_WRITE, MAP_SHARED, memory.fd(), 0);
            CHECK(window != MAP_FAILED);
            windows.push_back(static_cast<unsigned char*>(window));
            const int uffd = open_userfaultfd(false);
            CHECK(uffd >= 0 && hat->attach(int(cpu), uffd));
            const auto base = reinterpret_cast<uint64_t>(window);
            CHECK_EQUAL(register_range(uffd, base, kLength, false), 0);
            CHECK(hat->add_window(int(cpu), base, kLength, reinterpret_cast<uint64_t>(windows[0])));
            CHECK(engine.add(hat, int(cpu), getpid()));
        }
        const auto start = reinterpret_cast<uint64_t>(windows[0]);
        auto region = std::make_unique<Region>(start, 256, 0, 4, 1, false, cache.get(), hat);
        CHECK(regions.insert(start, start + kLength, region.get()));
        cache->attach(region.get());

        std::atomic<int> touches{0};
        std::vector<std::thread> threads;
        for (int who = 0; who < 3; ++who) {
            threads.emplace_back([&, who] {
                Random random(seed() + uint64_t(round * 16 + who));
                Memory scratch(1);
                for (;;) {
                    const unsigned char* window = windows[random.below(windows.size())];
                    // One of them in order, so that there is read-ahead.
                    const uint64_t page = who ? random.below(256) : uint64_t(touches.load()) % 256;
                    const unsigned char* at = window + page * kPageSize;
                    const ssize_t size = pwrite(scratch.fd(), at, 8, 0);
                    if (size != 8) {
                        CHECK(size < 0 && errno == EFAULT);
                        break;
                    }
                    uint64_t word = 1;
                    CHECK(pread(scratch.fd(), &word, 8, 0) == 8 && word == 0);
                    touches.fetch_add(1);
                }
            });
        }
        while (touches.load() < 20 + round * 10) std::this_thread::yield();
        region->gate.shutdown();
        for (size_t cpu = 0; cpu < cpus.size(); ++cpu) {
            const auto base = reinterpret_cast<uint64_t>(windows[cpu]);
            CHECK(hat->remove_window(base));
            hat->wake_everywhere(base, kLength);
        }
        CHECK(regions.remove(start) == region.get());
        engine.synchronize();
        cache->detach(region.get());
        region.reset();
        cache.reset();  // gives all frames back
        for (std::thread& thread : threads) thread.join();
        CHECK_EQUAL(memory.allocated(), uint64_t{0});
        CHECK_EQUAL(pool.usage().overcommitted, uint64_t{0});
        void* status = mmap(nullptr, StatusPage::kBytes, PROT_READ, MAP_SHARED, hat->status().descriptor(), 0);
        CHECK(status != MAP_FAILED);
        const auto* records = static_cast<const FailureRecord*>(status);
        CHECK(records[1].sequence == 2);
        CHECK(StatusPage::find(status, records[1].address));
        munmap(status, StatusPage::kBytes);
        if (round % 2) engine.remove(hat);
        engine.stop();
        for (unsigned char* window : windows) munmap(window, kLength);
        hat->release();
    }
}

// Two faults of one group are handed up; the first brings the page of the second in, too. The second stays in the
// queue while its window goes and another file's comes to the same address: it must not touch that.
void real_stale_hand_up() {
    begin("real_stale_hand_up");
    constexpr uint64_t kPages = 4, kLength = kPages * kPageSize;
    World old(16, kPages, Fill::store, Backing::file);
    World now(16, kPages, Fill::store, Backing::file);
    Random random(seed());
    const std::vector<int> cpus = machine_cpus();
    auto* hat = new UffdHat(1, &old.regions, int(cpus.size()), StatusPage::create(), CommandRing::create());
    const int uffd = open_userfaultfd(false);
    CHECK(uffd >= 0 && hat->attach(0, uffd));
    // The region's addresses are those of a window elsewhere.
    void* canonical = mmap(nullptr, kLength, PROT_READ, MAP_SHARED, old.memory.fd(), 0);
    auto* window =
        static_cast<volatile unsigned char*>(mmap(nullptr, kLength, PROT_READ, MAP_SHARED, old.memory.fd(), 0));
    CHECK(canonical != MAP_FAILED && window != MAP_FAILED);
    const auto start = reinterpret_cast<uint64_t>(canonical);
    const auto base = reinterpret_cast<uint64_t>(window);
    CHECK_EQUAL(register_range(uffd, base, kLength, false), 0);
    Region region(start, kPages, 0, kPages, 1, false, &old.cache, hat);
    CHECK(old.regions.insert(start, start + kLength, &region) && hat->add_window(0, base, kLength, start));
    Engine engine(cpus, false, false);
    engine.start();
    CHECK(engine.add(hat, 0, getpid()));

    std::thread first([&] { CHECK_EQUAL(window[0], uint8_t(pattern(0, 0))); });
    const auto fault = engine.next(0);
    CHECK(fault);
    std::thread second([&] { CHECK_EQUAL(window[kPageSize], uint8_t(pattern(1, 0))); });
    while (engine.counts().handed_up < 2) std::this_thread::yield();
    old.finish({fault->hat, fault->cpu, fault->address}, random, 0);
    fault->hat->release();
    first.join();
    second.join();

    CHECK(hat->remove_window(base));
    CHECK(mmap(reinterpret_cast<void*>(base), kLength, PROT_READ, MAP_SHARED | MAP_FIXED, now.memory.fd(), 0) !=
          MAP_FAILED);
    CHECK_EQUAL(register_range(uffd, base, kLength, false), 0);
    Region other(base, kPages, 0, 1, 1, false, &now.cache, hat);
    CHECK(old.regions.insert(base, base + kLength, &other) && hat->add_window(0, base, kLength, base));
    const FileCache::Run run = now.cache.begin_io(1, {1, 1});
    now.allocate(1, random);
    CHECK(pwrite(now.memory.fd(), "half", 4, off_t(kPageSize)) == 4);
    // What next() gives is the new file's fault, and the page in I/O was mapped by nobody.
    std::thread third([&] { CHECK_EQUAL(window[2 * kPageSize], uint8_t(pattern(2, 0))); });
    const auto next = engine.next(0);
    CHECK(next);
    CHECK_EQUAL(next->address, base + 2 * kPageSize);
    CHECK_EQUAL(next->canonical, next->address);
    const FileCache::Run filled = now.cache.begin_io(2, {2, 1});
    now.allocate(1, random);
    now.memory.fill(2);
    const FaultAt at{next->hat, next->cpu, next->address};
    CHECK(now.cache.complete_io(&at, 2, filled, 0, kPages) == Outcome::mapped);
    next->hat->release();
    third.join();
    std::thread fourth([&] { CHECK_EQUAL(window[kPageSize], uint8_t(pattern(1, 0))); });
    while (now.cache.counts().queued == 0) std::this_thread::yield();  // it faulted: the page was not mapped
    now.memory.fill(1);
    const FaultAt waited{hat, 0, base + kPageSize};
    CHECK(now.cache.complete_io(&waited, 1, run, 0, kPages) == Outcome::mapped);
    fourth.join();

    engine.stop();
    old.check_quiet();
    munmap(canonical, kLength);
    munmap(reinterpret_cast<void*>(base), kLength);
    hat->release();
}

size_t open_descriptors() {
    size_t count = 0;
    DIR* directory = opendir("/proc/self/fd");
    CHECK(directory);
    while (readdir(directory)) ++count;
    closedir(directory);
    return count;
}

// stop() against all else: who waits in next() is let go, add() is refused, remove() finds nothing, and the HAT and
// the descriptors are let go.
void real_engine_stop() {
    begin("real_engine_stop");
    const size_t before = open_descriptors();
    for (int round = 0; round < 60; ++round) {
        RegionMap regions;
        const std::vector<int> cpus = machine_cpus();
        auto* hat = new UffdHat(1, &regions, int(cpus.size()), StatusPage::create(), CommandRing::create());
        for (size_t cpu = 0; cpu < cpus.size(); ++cpu) CHECK(hat->attach(int(cpu), open_userfaultfd(false)));
        {
            Engine engine(cpus, true, true);
            if (round % 8) engine.start();
            std::atomic<bool> stopped{false};
            in_threads(5, [&](int who) {
                Random random(seed() + uint64_t(round * 16 + who));
                if (who < 2) {
                    CHECK(!engine.next(who % int(cpus.size())));
                } else if (who == 2) {
                    while (!stopped.load()) {
                        for (size_t cpu = 0; cpu < cpus.size(); ++cpu) engine.add(hat, int(cpu), getpid());
                        if (random.one_in(2)) engine.remove(hat);
                    }
                    CHECK(!engine.add(hat, 0, getpid()));
                } else if (who == 3) {
                    while (!stopped.load()) engine.synchronize();
                } else {
                    for (uint64_t i = random.below(32); i > 0; --i) std::this_thread::yield();
                    engine.stop();
                    engine.stop();
                    stopped = true;
                }
            });
        }
        hat->release();
    }
    CHECK_EQUAL(open_descriptors(), before);
}

}  // namespace

int main(int argc, char** argv) {
    start_program(argc, argv);
    status_page();
    waiters_are_woken();
    zero_fill_once(1, Backing::reserved, 256);
    zero_fill_once(16, Backing::overcommitted, 256);
    zero_fill_once(4, Backing::overcommitted, 100);
    cache_races<SoftHat>("cache_races, one frame", 1, 40, 1, 0, 150);
    cache_races<WitnessHat>("cache_races, one frame, no locks but the pages'", 1, 40, 1, 0, 150);
    cache_races<SoftHat>("cache_races, 31 frames", 31, 200, 16, 0, 300);
    cache_races<WitnessHat>("cache_races, 31 frames, no locks but the pages'", 31, 200, 4, 16, 300);
    cache_races<SoftHat>("cache_races, frames for all", 200, 200, 4, 16, 300);
    cache_races<WitnessHat>("cache_races, frames for all, no locks but the pages'", 200, 200, 16, 0, 300);
    shutdown_ends_mapping();
    clear_among_evictors();
    if (real_faults_possible()) {
        real_zero_fill(1);
        real_zero_fill(16);
        real_remove_and_add();
        real_file_read_natively(1'024, 2'000);
        real_file_read_natively(31, 250);
        real_file(31, 1, 250);
        real_file(31, 4, 250);
        real_file(1, 1, 20);
        real_unmap(Fill::zero);
        real_unmap(Fill::store);
        real_stale_hand_up();
        real_engine_stop();
    }
    std::puts("ok");
}
