// Snapshots under contention: threads write to a file cache while snapshots of it come and go and pages are pushed out,
// on a HAT in memory whose write-protection is exact. Meant for ThreadSanitizer and AddressSanitizer; asserts what
// happened, never how fast. Takes a seed.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "check.hpp"
#include "vm/file_cache.hpp"
#include "vm/hat.hpp"
#include "vm/region.hpp"

using namespace k42;
using namespace k42::vm;
using namespace k42::testing;

namespace {

constexpr uint64_t kPages = 12, kStart = 1 << 20;

int memory(uint64_t bytes) {
    const int fd = memfd_create("k42-stress", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, off_t(bytes)) == 0);
    return fd;
}

uint64_t read_frame(const FileCache& cache, uint64_t page) {
    uint64_t value = 0;
    CHECK(pread(cache.memfd(), &value, sizeof value, off_t(page * kPageSize)) == sizeof value);
    return value;
}
void write_frame(const FileCache& cache, uint64_t page, uint64_t value) {
    std::array<uint64_t, kPageSize / 8> words{};
    words[0] = value;
    CHECK(pwrite(cache.memfd(), words.data(), sizeof words, off_t(page * kPageSize)) == ssize_t(sizeof words));
}

// A HAT of one window, where a write finds, as on a real processor, either that it may or that it may not.
class ExactHat final : public Hat {
  public:
    explicit ExactHat(RegionMap* regions) : Hat(1, regions, 1) {}

    RangeResult map(int, uint64_t address, uint64_t length, bool writable) override {
        each(address, length, [&](Shown& page) {
            page.mapped = true;
            page.writable = writable;
        });
        return {length, 0};
    }
    RangeResult allow_write(int cpu, uint64_t address, uint64_t length) override {
        return map(cpu, address, length, true);
    }
    bool protect(const Region&, uint64_t first, uint64_t count, uint32_t) override {
        each(kStart + first * kPageSize, count * kPageSize, [](Shown& page) { page.writable = false; });
        return true;
    }
    void soft_unmap(const Region& region, uint64_t first, uint64_t count, uint32_t) override {
        for (uint64_t page = first; page < first + count; ++page) unmapped(region, page);
    }
    RangeResult zero(int cpu, uint64_t address, uint64_t length, int memfd, uint64_t offset) override {
        CHECK(fallocate(memfd, 0, off_t(offset), off_t(length)) == 0);
        return map(cpu, address, length, true);
    }
    void wake(int, uint64_t, uint64_t) override {}
    void wake_everywhere(uint64_t, uint64_t) override {}
    void fail(int, uint64_t, uint64_t, const std::string&) override { CHECK(false); }
    void unmapped(const Region&, uint64_t page) override {
        std::lock_guard guard(shown_[page].lock);
        shown_[page].mapped = shown_[page].writable = false;
    }

    // Adds one to the page's number; false: the page is not to be written.
    bool increment(const FileCache& cache, uint64_t page) {
        std::lock_guard guard(shown_[page].lock);
        if (!shown_[page].writable) return false;
        write_frame(cache, page, read_frame(cache, page) + 1);
        return true;
    }

  private:
    struct Shown {
        std::mutex lock;
        bool mapped = false, writable = false;
    };
    template <typename Visit>
    void each(uint64_t address, uint64_t length, Visit&& visit) {
        for (uint64_t page = (address - kStart) / kPageSize; length > 0; ++page, length -= kPageSize) {
            std::lock_guard guard(shown_[page].lock);
            visit(shown_[page]);
        }
    }
    std::array<Shown, kPages> shown_;
};

// A file cache with its swap space.
struct Node {
    Node(FramePool* pool, Fill fill)
        : cache(pool, memory(kPages * kPageSize), memory(kPages), kPages, fill, Backing::file, Policy::fifo, 1) {}

    void push_out() {
        cache.reclaim(1, false);
        const FileCache::Run run = cache.take_laundry(4);
        if (!run.count) return;
        for (uint64_t page = run.first; page < run.first + run.count; ++page) swap[page] = read_frame(cache, page);
        cache.end_write(run, true, true);
    }
    FileCache cache;
    std::array<std::atomic<uint64_t>, kPages> swap{};
};

// What src/k42/vm/snapshot.py does, with one snapshot at a time.
class World {
  public:
    explicit World(uint64_t budget) : pool_(budget), origin_(&pool_, Fill::zero), hat_(new ExactHat(&regions_)) {
        region_ = std::make_unique<Region>(kStart, kPages, 0, 1, 4, true, &origin_.cache, hat_);
        origin_.cache.attach(region_.get());
    }
    ~World() {
        origin_.cache.clear();
        origin_.cache.detach(region_.get());
        hat_->release();
    }

    void increment(uint64_t page) {
        while (!hat_->increment(origin_.cache, page)) {
            CHECK(region_->gate.enter());
            const FaultAt fault{hat_, 0, kStart + page * kPageSize, true, false, true};
            const Outcome outcome = origin_.cache.resolve(fault, page, {page, 1}, {page - page % 4, 4});
            CHECK(region_->gate.leave());
            if (outcome == Outcome::shared) preserve(page);
            if (outcome == Outcome::absent) bring_in(origin_, page);
            if (outcome == Outcome::no_frame) push_all_out();
        }
    }
    void push_all_out() {
        origin_.push_out();
        if (const auto heir = this->heir()) heir->push_out();
    }

    std::shared_ptr<Node> snapshot() {
        auto made = std::make_shared<Node>(&pool_, Fill::source);
        CHECK(region_->gate.stop() == RegionGate::Stop::stopped);
        {
            std::lock_guard guard(links_);
            heir_ = made;
            CHECK(origin_.cache.share());
        }
        CHECK(region_->gate.restart());
        return made;
    }
    void drop() {
        for (auto& stripe : stripes_) stripe.lock();
        {
            std::lock_guard guard(links_);
            heir_.reset();
            origin_.cache.unshare();
        }
        for (auto& stripe : stripes_) stripe.unlock();
    }
    uint64_t read(Node& node, uint64_t page) {
        while (!node.cache.pin({page, 1})) bring_in(node, page);
        const uint64_t value = read_frame(node.cache, page);
        node.cache.unpin({page, 1});
        return value;
    }
    uint64_t frames() const { return pool_.usage().file; }

  private:
    std::shared_ptr<Node> heir() {
        std::lock_guard guard(links_);
        return heir_;
    }
    void allocate(Node& node) {
        while (pool_.allocate(1, Backing::file) != FramePool::Grant::granted) {
            node.push_out();
            push_all_out();
            std::this_thread::yield();
        }
    }
    // With the page's stripe: what the origin has there, which does not change.
    uint64_t fetch(uint64_t page) {
        if (!origin_.cache.pin({page, 1})) return origin_.swap[page];
        const uint64_t value = read_frame(origin_.cache, page);
        origin_.cache.unpin({page, 1});
        return value;
    }
    void bring_in(Node& node, uint64_t page) {
        allocate(node);
        if (!node.cache.begin_io(page, {page, 1}).count) {
            pool_.release(1, Backing::file);
            return;
        }
        {
            std::lock_guard guard(stripes_[page % stripes_.size()]);
            const bool own = &node == &origin_ || node.cache.stored(page);
            write_frame(node.cache, page, own ? node.swap[page].load() : fetch(page));
        }
        node.cache.complete_io(nullptr, page, {page, 1}, 0, 0);
    }
    void preserve(uint64_t page) {
        bool frame = false;
        for (;;) {
            std::shared_ptr<Node> heir;
            uint64_t seen = 0;
            auto owned = FileCache::Owned::owned;
            {
                std::lock_guard stripe(stripes_[page % stripes_.size()]);
                uint64_t generation = 0;
                {
                    std::lock_guard guard(links_);
                    heir = heir_;
                    generation = origin_.cache.generation();
                }
                if (heir) {
                    seen = heir->cache.endings();
                    owned = heir->cache.own(page);
                    if (owned == FileCache::Owned::lacks && frame && heir->cache.begin_io(page, {page, 1}).count) {
                        frame = false;
                        write_frame(heir->cache, page, fetch(page));
                        heir->cache.complete_io(nullptr, page, {page, 1}, 0, 0, true);
                        owned = FileCache::Owned::owned;
                    }
                    if (owned == FileCache::Owned::owned) origin_.cache.allow(page, generation);
                }
            }
            if (owned == FileCache::Owned::owned) break;
            if (owned == FileCache::Owned::busy) {
                heir->cache.wait_ending(seen, std::chrono::milliseconds(100));
            } else if (!frame) {
                allocate(*heir);
                frame = true;
            }
        }
        if (frame) pool_.release(1, Backing::file);
    }

    FramePool pool_;
    RegionMap regions_;
    Node origin_;
    ExactHat* const hat_;
    std::unique_ptr<Region> region_;
    std::array<std::mutex, 4> stripes_;  // before links_
    std::mutex links_;                   // protects heir_
    std::shared_ptr<Node> heir_;
};

// Writers count on their pages in order, so that in a snapshot no page is ahead of the one before it.
void one_moment(const char* name, uint64_t budget, int rounds) {
    begin(name);
    constexpr uint64_t kWriters = 3, kEach = kPages / kWriters;
    World world(budget);
    std::atomic<bool> stop{false};
    in_threads(int(kWriters) + 2, [&](int who) {
        if (uint64_t(who) < kWriters) {
            while (!stop.load()) {
                for (uint64_t i = 0; i < kEach; ++i) world.increment(uint64_t(who) * kEach + i);
            }
        } else if (uint64_t(who) == kWriters) {
            while (!stop.load()) {
                world.push_all_out();
                std::this_thread::yield();
            }
        } else {
            std::array<uint64_t, kPages> before{};
            for (int round = 0; round < rounds; ++round) {
                const auto snapshot = world.snapshot();
                std::array<uint64_t, kPages> seen{};
                for (int look = 0; look < 3; ++look) {
                    for (uint64_t page = 0; page < kPages; ++page) {
                        const uint64_t value = world.read(*snapshot, page);
                        if (look) CHECK_EQUAL(value, seen[page]);
                        seen[page] = value;
                        CHECK(value >= before[page]);
                    }
                }
                for (uint64_t page = 0; page < kPages; ++page) {
                    const uint64_t first = seen[page - page % kEach];
                    CHECK(seen[page] <= (page % kEach ? seen[page - 1] : first) && first - seen[page] <= 1);
                }
                before = seen;
                world.drop();
            }
            stop = true;
        }
    });
    CHECK(world.frames() <= kPages);
}

}  // namespace

int main(int argc, char** argv) {
    start_program(argc, argv);
    one_moment("one_moment, frames for all", 2 * kPages, 200);
    one_moment("one_moment, few frames", kPages, 100);
    one_moment("one_moment, four frames", 4, 30);
    std::puts("ok");
}
