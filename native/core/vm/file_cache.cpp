#include "vm/file_cache.hpp"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "vm/region.hpp"

namespace k42::vm {

// A fault that waits for the end of a page's I/O.
struct FileCache::Waiter : PageWaiter {
    explicit Waiter(const FaultAt& at) : fault(at) { fault.hat->retain(); }
    ~Waiter() { fault.hat->release(); }
    FaultAt fault;
};

FileCache::~FileCache() {
    clear();
    close(memfd_);
}

FileCache::Run FileCache::run_around(Page* const* pages, uint64_t first, uint32_t count, uint64_t page) {
    const auto at = uint32_t(page - first);
    const PageState state = pages[at]->state();
    uint32_t from = at;
    uint32_t to = at + 1;
    while (from > 0 && pages[from - 1]->state() == state) --from;
    while (to < count && pages[to]->state() == state) ++to;
    return {first + from, to - from};
}

// After an attempt that Linux stopped with `error`: lets the fault happen again where it may find things in order
// (another fault mapped the page; the window or the client is going), else ends the access.
static Outcome settle(const FaultAt& fault, int error) {
    switch (error) {
        case EEXIST:
        case ENOENT:
        case ESRCH:
        case EINVAL:
        case EAGAIN:
            fault.hat->wake(fault.cpu, fault.address, kPageSize);
            return Outcome::mapped;
        case EFAULT:
            // Resident by our table, gone from the memfd: another program punched it out. Never guess its bytes.
            fault.hat->fail(fault.cpu, fault.address, kPageSize, "another program removed the page's frame");
            return Outcome::failed;
        default:
            fault.hat->fail(fault.cpu, fault.address, kPageSize,
                            std::string("Linux could not map the page: ") + strerror(error));
            return Outcome::failed;
    }
}

Outcome FileCache::map_run(const FaultAt& fault, uint64_t page, Run run) {
    const uint64_t start = fault.address - (page - run.first) * kPageSize;
    RangeResult result = fault.hat->map(fault.cpu, start, run.count * kPageSize);
    if (result.error == EEXIST && start + result.done != fault.address) {
        // A neighbour is mapped already: the page itself is what matters.
        result = fault.hat->map(fault.cpu, fault.address, kPageSize);
    }
    return result.error == 0 ? Outcome::mapped : settle(fault, result.error);
}

Outcome FileCache::zero_run(const FaultAt& fault, uint64_t page, Run run, Page** pages) {
    if (pool_->allocate(run.count, backing_) != FramePool::Grant::granted) return Outcome::no_frame;
    const uint64_t start = fault.address - (page - run.first) * kPageSize;
    uint32_t done = 0;
    int error = 0;
    while (done < run.count) {
        const uint64_t at = start + done * kPageSize;
        RangeResult result =
            fault.hat->zero(fault.cpu, at, (run.count - done) * kPageSize, memfd_, (run.first + done) * kPageSize);
        if (result.error == EEXIST && result.done == 0) {
            // The client put a frame there through its own descriptor: its memory, its bytes.
            result = fault.hat->map(fault.cpu, at, kPageSize);
            if (result.error == EEXIST) result = {kPageSize, 0};
        }
        const auto made = uint32_t(result.done / kPageSize);
        table_.make_resident(pages + done, made);
        done += made;
        error = result.error;
        if (error != 0 && error != EEXIST) break;
    }
    zero_filled_.fetch_add(done, std::memory_order_relaxed);
    if (done == run.count) return Outcome::zero_filled;
    pool_->release(run.count - done, backing_);
    return page < run.first + done ? Outcome::zero_filled : settle(fault, error);
}

Outcome FileCache::resolve(const FaultAt& fault, uint64_t page, uint64_t first, uint32_t count) {
    Page* pages[kMaxGroup];
    table_.lock(first, count, pages);
    Page* const at = pages[page - first];
    Outcome outcome = Outcome::absent;
    switch (at->state()) {
        case PageState::io: {
            auto* waiter = new Waiter(fault);
            waiter->next = at->waiters;
            at->waiters = waiter;
            queued_.fetch_add(1, std::memory_order_relaxed);
            outcome = Outcome::queued;
            break;
        }
        case PageState::resident:
            mapped_.fetch_add(1, std::memory_order_relaxed);
            outcome = map_run(fault, page, run_around(pages, first, count, page));
            break;
        case PageState::absent:
            if (fill_ == Fill::zero) {
                const Run run = run_around(pages, first, count, page);
                outcome = zero_run(fault, page, run, pages + (run.first - first));
            }
            break;
    }
    table_.unlock(pages, count);
    return outcome;
}

FileCache::Run FileCache::begin_io(uint64_t page, uint64_t first, uint32_t count) {
    Page* pages[kMaxGroup];
    table_.lock(first, count, pages);
    Run run{page, 0};
    if (pages[page - first]->state() == PageState::absent) {
        run = run_around(pages, first, count, page);
        for (uint32_t i = 0; i < run.count; ++i) pages[run.first - first + i]->set_state(PageState::io);
    }
    table_.unlock(pages, count);
    return run;
}

PageWaiter* FileCache::take_waiters(Page** pages, uint32_t count) {
    PageWaiter* taken = nullptr;
    for (uint32_t i = 0; i < count; ++i) {
        while (PageWaiter* waiter = pages[i]->waiters) {
            pages[i]->waiters = waiter->next;
            waiter->next = taken;
            taken = waiter;
        }
    }
    return taken;
}

void FileCache::wake_all(PageWaiter* waiters) {
    while (waiters) {
        auto* waiter = static_cast<Waiter*>(waiters);
        waiters = waiter->next;
        waiter->fault.hat->wake(waiter->fault.cpu, waiter->fault.address, kPageSize);
        delete waiter;
    }
}

Outcome FileCache::complete_io(const FaultAt& fault, uint64_t page, Run run, uint64_t begin, uint64_t end) {
    Page* pages[kMaxGroup];
    table_.lock(run.first, run.count, pages);
    table_.make_resident(pages, run.count);
    (fill_ == Fill::zero ? zero_filled_ : filled_).fetch_add(run.count, std::memory_order_relaxed);
    const uint64_t from = std::max(run.first, begin);
    const uint64_t to = std::min(run.first + run.count, end);
    const Outcome outcome = map_run(fault, page, {from, uint32_t(to - from)});
    PageWaiter* waiters = take_waiters(pages, run.count);
    table_.unlock(pages, run.count);
    wake_all(waiters);
    pool_->announce_reclaimable();
    return outcome;
}

void FileCache::abort_io(Run run) {
    Page* pages[kMaxGroup];
    table_.lock(run.first, run.count, pages);
    punch(run.first, run.count);  // a fill that failed halfway has made some of the frames
    for (uint32_t i = 0; i < run.count; ++i) pages[i]->set_state(PageState::absent);
    PageWaiter* waiters = take_waiters(pages, run.count);
    table_.unlock(pages, run.count);
    wake_all(waiters);
}

void FileCache::punch(uint64_t first, uint64_t count) const {
    // Removes the frames and every mapping of them in every client, at once.
    while (fallocate(memfd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off_t(first * kPageSize),
                     off_t(count * kPageSize)) < 0 &&
           errno == EINTR) {
    }
}

uint64_t FileCache::give_back(uint64_t count) {
    uint64_t given = 0;
    while (given < count) {
        const std::vector<uint64_t> oldest = table_.take_oldest(std::min<uint64_t>(count - given, kMaxGroup));
        if (oldest.empty()) break;
        // Runs of neighbours go in one call.
        for (size_t i = 0; i < oldest.size();) {
            size_t end = i + 1;
            while (end < oldest.size() && oldest[end] == oldest[end - 1] + 1) ++end;
            const auto run = uint32_t(end - i);
            Page* pages[kMaxGroup];
            table_.lock(oldest[i], run, pages);
            punch(oldest[i], run);
            for (uint32_t k = 0; k < run; ++k) {
                pages[k]->set_state(PageState::absent);
                std::lock_guard guard(regions_lock_);
                for (Region* region : regions_) {
                    if (oldest[i] + k - region->first_page < region->pages)
                        region->hat->unmapped(*region, oldest[i] + k);
                }
            }
            table_.unlock(pages, run);
            given += run;
            i = end;
        }
    }
    if (given) {
        evicted_.fetch_add(given, std::memory_order_relaxed);
        pool_->release(given, backing_);
    }
    return given;
}

void FileCache::clear() { give_back(UINT64_MAX); }

void FileCache::attach(Region* region) {
    std::lock_guard guard(regions_lock_);
    regions_.push_back(region);
}

void FileCache::detach(Region* region) {
    std::lock_guard guard(regions_lock_);
    std::erase(regions_, region);
}

FileCache::Counts FileCache::counts() const {
    return {mapped_.load(std::memory_order_relaxed), zero_filled_.load(std::memory_order_relaxed),
            filled_.load(std::memory_order_relaxed), queued_.load(std::memory_order_relaxed),
            evicted_.load(std::memory_order_relaxed)};
}

}  // namespace k42::vm
