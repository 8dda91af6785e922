#include "vm/file_cache.hpp"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <system_error>

#include "vm/partitioned_page_table.hpp"
#include "vm/reader.hpp"
#include "vm/region.hpp"

namespace k42::vm {

namespace {

// How many pages a file may grow by while it is cached: its journal's addresses are set aside at the start.
constexpr uint64_t kGrowth = 1 << 26;

// Frames in all: with fewer no more pages are mapped than asked for, since those that are look used.
constexpr uint64_t kFewFrames = 1024;

}  // namespace

// A fault that waits for the end of a page's I/O.
struct FileCache::Waiter : PageWaiter {
    explicit Waiter(const FaultAt& at) : fault(at) { fault.hat->retain(); }
    ~Waiter() { fault.hat->release(); }
    FaultAt fault;
};

FileCache::FileCache(FramePool* pool, int memfd, int journal, uint64_t pages, Fill fill, Backing backing, Policy policy,
                     int cpus, Tables tables)
    : pool_(pool),
      memfd_(memfd),
      journal_fd_(journal),
      pages_(pages),
      fill_(fill),
      backing_(backing),
      journal_bytes_(pages + kGrowth),
      cpus_(cpus),
      cpu_counts_(std::make_unique<CpuCounts[]>(size_t(cpus))) {
    if (tables == Tables::partitioned) {
        table_ = std::make_unique<PartitionedPageTable>(policy);
    } else {
        replicated_ = new ReplicatedPageTable(policy, tables == Tables::replicated);
        table_.reset(replicated_);
    }
    void* bytes = mmap(nullptr, journal_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, journal, 0);
    if (bytes == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "the journal of a file cache");
    journal_ = static_cast<std::atomic<uint8_t>*>(bytes);
}

FileCache::~FileCache() {
    if (source_) source_->drain();
    clear();
    munmap(journal_, journal_bytes_);
    close(memfd_);
    close(journal_fd_);
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

Outcome FileCache::map_run(const FaultAt& fault, uint64_t page, Run run, bool writable) {
    if (fault.guarded && writable) {
        const RangeResult result = fault.hat->allow_write(fault.cpu, fault.address, kPageSize);
        return result.error == 0 ? Outcome::mapped : settle(fault, result.error);
    }
    const uint64_t start = fault.address - (page - run.first) * kPageSize;
    RangeResult result = fault.hat->map(fault.cpu, start, run.count * kPageSize, writable);
    if (result.error == EEXIST && start + result.done != fault.address) {
        // A neighbour is mapped already: the page itself is what matters.
        result = fault.hat->map(fault.cpu, fault.address, kPageSize, writable);
    }
    if (result.error == EEXIST && fault.write && writable) {
        // Mapped when it was clean.
        result = fault.hat->allow_write(fault.cpu, fault.address, kPageSize);
    }
    return result.error == 0 ? Outcome::mapped : settle(fault, result.error);
}

// `cpu`: of the fault; -1: there is none.
void FileCache::make_dirty(Page* page, int cpu) {
    write_journal(page->index, journaled(page->index) | kValid | kDirty);
    page->set(Page::kDirty);
    (cpu < 0 ? prefilled_dirty_ : cpu_counts_[cpu].dirtied).fetch_add(1, std::memory_order_relaxed);
}

// The CPUs on which any of these pages was mapped since it became resident.
static uint32_t used_by(Page* const* pages, uint32_t count) {
    uint32_t used = 0;
    for (uint32_t i = 0; i < count; ++i) used |= pages[i]->used.load(std::memory_order_relaxed);
    return used;
}

void FileCache::note_use(const FaultAt& fault, Page** pages, uint32_t count) const {
    const uint32_t bit = cpu_bit(fault.cpu);
    for (uint32_t i = 0; i < count; ++i) {
        if (!(pages[i]->used.load(std::memory_order_relaxed) & bit)) {
            pages[i]->used.fetch_or(bit, std::memory_order_relaxed);
        }
    }
}

// Pages of nobody, or of a client that has gone, become those of the client that uses them now, if its limit allows.
void FileCache::adopt(const FaultAt& fault, Page** pages, uint32_t count) {
    const uint16_t mine = fault.hat->account();
    if (mine == 0) return;
    for (uint32_t i = 0; i < count; ++i) {
        if (pages[i]->owner() == mine) continue;
        const FramePool::Transfer transfer(*pool_);
        Account* const before = pool_->accounts().find(pages[i]->owner());
        Account* const now = pool_->accounts().find(mine);
        if (!before || before->open() || !now || !now->charge(1)) continue;
        pages[i]->set_owner(mine);
        before->uncharge(1);
    }
}

// Of those whose pages are not asked for; `going`: so many pages are as good as evicted.
bool FileCache::spared(const Page& page, uint32_t whose, uint64_t going) const {
    if (whose == kAnybodys) return false;
    if (whose != kAboveShare) return page.owner() != whose;
    return pool_->accounts().excess(page.owner()) <= going;
}

FileCache::Run FileCache::widened(int cpu, uint64_t page, const Region& region) {
    const Region::Group around = region.around_of(page);
    if (!region.widens || pool_->budget() < kFewFrames) return {around.first, around.count};
    CpuCounts& counts = cpu_counts_[cpu];
    const bool goes_on = counts.next.load(std::memory_order_relaxed) == page;
    const uint32_t before = goes_on ? counts.reach.load(std::memory_order_relaxed) : 0;
    const uint32_t reach = std::min(std::max(2 * before, around.count), kMaxGroup);
    counts.reach.store(reach, std::memory_order_relaxed);
    if (reach <= around.count) return {around.first, around.count};
    const Region::Group ahead = region.ahead_of(page, reach);
    return {ahead.first, ahead.count};
}

// A fault maps these resident pages: gives the hints of read-ahead.
void FileCache::note_mapped(const FaultAt& fault, Run mapped) {
    cpu_counts_[fault.cpu].next.store(mapped.first + mapped.count, std::memory_order_relaxed);
    // Acquire: pairs with the release in set_marker(), after which the page, the queue and the number are there.
    for (uint32_t left = markers_.set.load(std::memory_order_acquire); left != 0; left &= left - 1) {
        const int slot = std::countr_zero(left);
        const uint64_t page = markers_.pages[slot].load(std::memory_order_relaxed);
        if (page - mapped.first >= mapped.count) continue;
        // Who takes the bit away gives the hint. Should the slot have got another marker since, that one is lost: its
        // reader comes to a page that is absent, and is read ahead for again.
        const uint32_t bit = 1u << slot;
        if (!(markers_.set.fetch_and(~bit, std::memory_order_acq_rel) & bit)) continue;
        if (source_) {
            source_->touched(*this, page, *fault.hat);
            continue;
        }
        const uint64_t id = markers_.id.load(std::memory_order_relaxed);
        markers_.hints.load(std::memory_order_relaxed)->push({id, page, fault.hat->id()});
    }
}

void FileCache::set_marker(HintQueue* queue, uint64_t id, uint64_t page) {
    std::lock_guard guard(markers_.lock);
    const uint32_t set = markers_.set.load(std::memory_order_relaxed);
    uint32_t slot = markers_.next;
    for (uint32_t i = 0; i < kMarkers; ++i) {
        const uint32_t other = (markers_.next + i) % kMarkers;
        if (!(set & 1u << other)) {
            slot = other;
            break;
        }
    }
    if (slot == markers_.next) markers_.next = (slot + 1) % kMarkers;
    markers_.set.fetch_and(~(1u << slot), std::memory_order_relaxed);
    markers_.hints.store(queue, std::memory_order_relaxed);
    markers_.id.store(id, std::memory_order_relaxed);
    markers_.pages[slot].store(page, std::memory_order_relaxed);
    markers_.set.fetch_or(1u << slot, std::memory_order_release);
}

Outcome FileCache::zero_run(const FaultAt& fault, uint64_t page, Run run, Page** pages) {
    const uint16_t owner = fault.hat->account();
    if (pool_->allocate(run.count, backing_, owner) != FramePool::Grant::granted) return Outcome::no_frame;
    const uint64_t start = fault.address - (page - run.first) * kPageSize;
    uint32_t done = 0;
    int error = 0;
    // The client may write to the page before we hear of it again, and we may die before that.
    for (uint32_t i = 0; i < run.count; ++i) write_journal(run.first + i, kValid | kDirty);
    while (done < run.count) {
        const uint64_t at = start + done * kPageSize;
        RangeResult result =
            fault.hat->zero(fault.cpu, at, (run.count - done) * kPageSize, memfd_, (run.first + done) * kPageSize);
        if (result.error == EEXIST && result.done == 0) {
            // The client put a frame there through its own descriptor: its memory, its bytes.
            result = fault.hat->map(fault.cpu, at, kPageSize, true);
            if (result.error == EEXIST) result = {kPageSize, 0};
        }
        const auto made = uint32_t(result.done / kPageSize);
        for (uint32_t i = done; i < done + made; ++i) {
            pages[i]->set_owner(owner);
            pages[i]->set_state(PageState::resident);
            make_dirty(pages[i], fault.cpu);
            if (replaceable()) {
                const uint64_t index = pages[i]->index;
                table_->replacement(table_->part_of(index)).insert(index);
            }
        }
        note_use(fault, pages + done, made);
        done += made;
        error = result.error;
        if (error != 0 && error != EEXIST) break;
    }
    cpu_counts_[fault.cpu].zero_filled.fetch_add(done, std::memory_order_relaxed);
    if (done == run.count) return Outcome::zero_filled;
    for (uint32_t i = done; i < run.count; ++i) write_journal(run.first + i, 0);
    pool_->release(run.count - done, backing_, owner);
    return page < run.first + done ? Outcome::zero_filled : settle(fault, error);
}

Outcome FileCache::resolve_resident(const FaultAt& fault, Page* page, Run around) {
    if (fault.write && fault.tracked && !may_change(page)) {
        table_->unlock(&page, 1);
        return Outcome::shared;
    }
    CpuCounts& counts = cpu_counts_[fault.cpu];
    counts.mapped.fetch_add(1, std::memory_order_relaxed);
    if (fault.write && fault.tracked && !page->is(Page::kDirty)) {
        table_->recall(&page, 1);
        make_dirty(page, fault.cpu);
    }
    page->use();
    Page* pages[kMaxGroup];
    pages[0] = page;
    Run run{page->index, 1};
    // A write to a page that is mapped concerns that page alone.
    if (around.count > 1 && !fault.guarded) run = table_->lock_around(page, around.first, around.count, pages);
    // Looked at with all of them locked. Under an heir's eyes a write concerns its page alone, and a read allows none.
    const bool shared = heir_.load(std::memory_order_seq_cst);
    const bool writable = !fault.tracked || (shared ? fault.write : page->is(Page::kDirty));
    note_use(fault, pages, run.count);
    adopt(fault, pages, run.count);
    const Run mapped = shared && writable && fault.tracked ? Run{page->index, 1} : run;
    note_mapped(fault, mapped);
    const Outcome outcome = map_run(fault, page->index, mapped, writable);
    if (outcome == Outcome::mapped && !shared) table_->copy(pages, run.count);
    table_->unlock(pages, run.count);
    return outcome;
}

Outcome FileCache::resolve(const FaultAt& fault, uint64_t page, Run group, Run around) {
    // Under an heir's eyes there are no copies.
    if (const PageTable::Held held =
            table_->hold(page, around.first, around.count, fault.write && fault.tracked, cpu_bit(fault.cpu));
        held.count) {
        cpu_counts_[fault.cpu].mapped.fetch_add(1, std::memory_order_relaxed);
        note_mapped(fault, {held.first, held.count});
        const Outcome outcome = map_run(fault, page, {held.first, held.count}, !fault.tracked || held.dirty);
        table_->release(held);
        return outcome;
    }
    // First the page alone: where it is there, its neighbours are not asked for what they are not.
    Page* pages[kMaxGroup];
    table_->lock(page, 1, pages);
    if (page >= this->pages()) {
        table_->unlock(pages, 1);
        fault.hat->fail(fault.cpu, fault.address, kPageSize, "it lies behind the end of the file, which has shrunk");
        return Outcome::failed;
    }
    if (pages[0]->state() == PageState::resident) return resolve_resident(fault, pages[0], around);
    if (group.count > 1 && pages[0]->state() == PageState::absent) {
        table_->unlock(pages, 1);
        group.count = uint32_t(std::min<uint64_t>(group.count, this->pages() - group.first));
        table_->lock(group.first, group.count, pages);
        if (Page* came = pages[page - group.first]; came->state() == PageState::resident) {  // between our two looks
            std::swap(pages[page - group.first], pages[group.count - 1]);
            table_->unlock(pages, group.count - 1);
            return resolve_resident(fault, came, around);
        }
    } else {
        group = {page, 1};
    }
    Page* const at = pages[page - group.first];
    Outcome outcome = Outcome::absent;
    switch (at->state()) {
        case PageState::io: {
            auto* waiter = new Waiter(fault);
            waiter->next = at->waiters;
            at->waiters = waiter;
            cpu_counts_[fault.cpu].queued.fetch_add(1, std::memory_order_relaxed);
            outcome = Outcome::queued;
            break;
        }
        case PageState::resident:
            break;  // dealt with above
        case PageState::absent:
            // What an heir may read comes in as all else does: mapped so that a write is a fault.
            if (fill_ == Fill::zero && !(journaled(page) & kStored) && !heir_.load(std::memory_order_seq_cst)) {
                Run run = run_around(pages, group.first, group.count, page);
                // Not over pages that the store has.
                uint64_t first = page;
                uint64_t end = page + 1;
                while (first > run.first && !(journaled(first - 1) & kStored)) --first;
                while (end < run.first + run.count && !(journaled(end) & kStored)) ++end;
                run = {first, uint32_t(end - first)};
                outcome = zero_run(fault, page, run, pages + (run.first - group.first));
            }
            break;
    }
    table_->unlock(pages, group.count);
    return outcome;
}

FileCache::Run FileCache::begin_io(uint64_t page, Run within) {
    Page* pages[kMaxGroup];
    table_->lock(within.first, within.count, pages);
    const Run run = begin_locked(page, within, pages);
    table_->unlock(pages, within.count);
    return run;
}

FileCache::Run FileCache::begin_fill(Run within) {
    Page* pages[kMaxGroup];
    table_->lock(within.first, within.count, pages);
    uint32_t at = 0;
    while (at < within.count && pages[at]->state() != PageState::absent) ++at;
    const Run run = at < within.count ? begin_locked(within.first + at, within, pages) : Run{within.first, 0};
    table_->unlock(pages, within.count);
    return run;
}

FileCache::Run FileCache::begin_locked(uint64_t page, Run within, Page** pages) {
    if (pages[page - within.first]->state() != PageState::absent || page >= this->pages()) return {page, 0};
    Run run = run_around(pages, within.first, within.count, page);
    run.count = uint32_t(std::min<uint64_t>(run.count, this->pages() - run.first));
    for (uint32_t i = 0; i < run.count; ++i) pages[run.first - within.first + i]->set_state(PageState::io);
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

void FileCache::ended() {
    {
        std::lock_guard guard(endings_lock_);
        ++endings_;
    }
    ending_.notify_all();
}

uint64_t FileCache::endings() const {
    std::lock_guard guard(endings_lock_);
    return endings_;
}

bool FileCache::wait_ending(uint64_t seen, std::chrono::milliseconds timeout) {
    std::unique_lock guard(endings_lock_);
    return ending_.wait_for(guard, timeout, [&] { return endings_ != seen; });
}

Outcome FileCache::complete_io(const FaultAt* fault, uint64_t page, Run run, uint64_t begin, uint64_t end, bool own,
                               uint16_t owner) {
    Page* pages[kMaxGroup];
    table_->lock(run.first, run.count, pages);
    const uint64_t limit = this->pages();
    uint32_t kept = 0;
    uint32_t zeros = 0;
    for (uint32_t i = 0; i < run.count; ++i) {
        if (run.first + i >= limit) break;  // the file shrank meanwhile
        zeros += fill_ == Fill::zero && !(journaled(run.first + i) & kStored);
        pages[i]->set_owner(owner);
        pages[i]->set_state(PageState::resident);
        write_journal(run.first + i, uint8_t((journaled(run.first + i) & kStored) | kValid));
        if (own) make_dirty(pages[i], -1);
        if (replaceable()) table_->replacement(table_->part_of(run.first + i)).insert(run.first + i);
        ++kept;
    }
    const uint32_t lost = run.count - kept;
    if (lost) {
        punch(run.first + kept, lost);
        for (uint32_t i = kept; i < run.count; ++i) pages[i]->set_state(PageState::absent);
        pool_->release(lost, backing_, owner);
    }
    if (fault) {
        cpu_counts_[fault->cpu].filled.fetch_add(kept - zeros, std::memory_order_relaxed);
        cpu_counts_[fault->cpu].zero_filled.fetch_add(zeros, std::memory_order_relaxed);
    } else {
        prefetched_.fetch_add(kept, std::memory_order_relaxed);
    }
    Outcome outcome = Outcome::mapped;
    const bool shared = heir_.load(std::memory_order_seq_cst);
    // The region may track writes only since an heir came, after the fault.
    const bool tracked = fault && (fault->tracked || (shared && anonymous()));
    const bool write = tracked && fault->write;
    // A write that an heir must be asked about first happens again.
    if (fault && page < run.first + kept && !(write && shared)) {
        const uint64_t from = std::max(run.first, begin);
        const uint64_t to = std::min(run.first + kept, end);
        Run mapped{from, uint32_t(to - from)};
        if (write) {
            make_dirty(pages[page - run.first], fault->cpu);
            mapped = {page, 1};
        }
        note_use(*fault, pages + (mapped.first - run.first), mapped.count);
        outcome = map_run(*fault, page, mapped, !tracked || fault->write);
    } else if (fault) {
        fault->hat->wake(fault->cpu, fault->address, kPageSize);
    }
    PageWaiter* waiters = take_waiters(pages, run.count);
    table_->unlock(pages, run.count);
    wake_all(waiters);
    pool_->announce_reclaimable();
    ended();
    return outcome;
}

void FileCache::abort_io(Run run, uint64_t frames, uint16_t owner) {
    Page* pages[kMaxGroup];
    table_->lock(run.first, run.count, pages);
    punch(run.first, run.count);  // a fill that failed halfway has made some of the frames
    if (frames) pool_->release(frames, backing_, owner);
    for (uint32_t i = 0; i < run.count; ++i) pages[i]->set_state(PageState::absent);
    PageWaiter* waiters = take_waiters(pages, run.count);
    table_->unlock(pages, run.count);
    wake_all(waiters);
    ended();
}

void FileCache::punch(uint64_t first, uint64_t count) const {
    // Removes the frames and every mapping of them in every client, at once.
    while (fallocate(memfd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off_t(first * kPageSize),
                     off_t(count * kPageSize)) < 0 &&
           errno == EINTR) {
    }
}

template <typename Visit>
void FileCache::each_region(Visit&& visit) {
    std::lock_guard guard(regions_lock_);
    for (Region* region : regions_) visit(*region);
}

void FileCache::drop(Run run, Page** pages) {
    table_->recall(pages, run.count);
    uint64_t dirty = 0;
    for (uint32_t i = 0; i < run.count; ++i) {
        dirty += pages[i]->is(Page::kDirty);
        write_journal(run.first + i, journaled(run.first + i) & kStored);
    }
    punch(run.first, run.count);
    each_region([&](Region& region) {
        for (uint32_t i = 0; i < run.count; ++i) {
            if (run.first + i - region.first_page < region.pages) region.hat->unmapped(region, run.first + i);
        }
    });
    for (uint32_t i = 0, end; i < run.count; i = end) {
        const uint16_t owner = pages[i]->owner();
        for (end = i; end < run.count && pages[end]->owner() == owner; ++end) pages[end]->set_state(PageState::absent);
        pool_->release(end - i, backing_, owner);
    }
    if (dirty) cleaned_.fetch_add(dirty, std::memory_order_relaxed);
    evicted_.fetch_add(run.count, std::memory_order_relaxed);
}

uint64_t FileCache::look_at(const std::vector<Replacement::Candidate>& candidates, size_t begin, size_t end,
                            Replacement& order, bool thorough, uint32_t whose, Reclaimed& result) {
    const auto count = uint32_t(end - begin);
    const uint64_t first = candidates[begin].index;
    Page* pages[kMaxGroup];
    table_->lock(first, count, pages);
    Page* locked[kMaxGroup];  // unlock() reorders
    std::copy_n(pages, count, locked);
    // Neighbours that are treated alike go in one call.
    uint32_t evict = 0;
    uint32_t probe = 0;  // so many up to here
    uint64_t sparing = 0;
    const auto flush = [&](uint32_t to) {
        if (evict) {
            drop({first + to - evict, evict}, pages + to - evict);
            for (uint32_t i = to - evict; i < to; ++i) order.evicted(candidates[begin + i]);
            result.given += evict;
        }
        if (probe) {
            table_->recall(pages + to - probe, probe);  // so that its next use is seen
            const uint32_t used = used_by(pages + to - probe, probe);
            each_region([&](Region& region) { region.hat->soft_unmap(region, first + to - probe, probe, used); });
            probed_.fetch_add(probe, std::memory_order_relaxed);
        }
        evict = probe = 0;
    };
    for (uint32_t i = 0; i < count; ++i) {
        const Replacement::Candidate& candidate = candidates[begin + i];
        Page* page = pages[i];
        if (page->state() == PageState::absent) {
            flush(i);
            continue;  // it went in another way
        }
        if (spared(*page, whose, evict + result.dirty) && !page->is(Page::kLaundry)) {
            flush(i);
            order.put_back(candidate, Replacement::Verdict::spare);
            ++sparing;
            continue;
        }
        auto verdict = Replacement::Verdict::wait;
        const bool free =
            page->state() == PageState::resident && !page->is(Page::kPinned | Page::kWriting | Page::kLaundry);
        if (free) {
            const bool mapped = page->used.load(std::memory_order_relaxed) != 0;
            verdict = order.judge(candidate, {page->uses(), mapped, page->is(Page::kProbed)}, thorough);
        } else if (page->is(Page::kLaundry)) {
            flush(i);
            continue;  // it comes back when it is written
        }
        if (verdict == Replacement::Verdict::evict && page->is(Page::kDirty)) {
            flush(i);
            page->set(Page::kLaundry);
            std::lock_guard guard(laundry_lock_);
            laundry_.push_back(page->index);
            ++result.dirty;
            continue;
        }
        if (verdict != Replacement::Verdict::evict) {
            if (evict) flush(i);
            if (verdict == Replacement::Verdict::probe) {
                page->set(Page::kProbed);
                ++probe;
            } else {
                flush(i);
            }
            if (verdict == Replacement::Verdict::rescue) {
                page->clear(Page::kUses);
                rescued_.fetch_add(1, std::memory_order_relaxed);
            }
            order.put_back(candidate, verdict);
            continue;
        }
        if (probe) flush(i);
        ++evict;
    }
    flush(count);
    table_->unlock(locked, count);
    return sparing;
}

FileCache::Reclaimed FileCache::reclaim(uint64_t count, bool thorough, uint32_t whose) {
    Reclaimed result{0, 0};
    const size_t parts = table_->parts();
    const size_t start = next_part_.fetch_add(1, std::memory_order_relaxed);
    std::vector<Replacement::Candidate> candidates;
    for (size_t k = 0; k < parts && result.given < count; ++k) {
        Replacement& order = table_->replacement((start + k) % parts);
        // Of a large file that nobody has more than his share of the pages are not gone through again and again.
        const uint64_t owners = whose == kAboveShare ? pool_->accounts().version() : 0;
        if (owners && order.has_none(owners)) continue;
        const uint64_t inserted = order.inserted();
        const uint64_t all = order.size();
        uint64_t sparing = 0;
        // Each page is looked at three times at most: used, unmapped, still unused; or once, if it is to be spared.
        uint64_t looks = 3 * all;
        while (looks > 0 && sparing < all && result.given < count) {
            candidates.clear();
            order.next(std::min<uint64_t>({count - result.given, looks, kMaxGroup}), candidates);
            if (candidates.empty()) break;
            const uint64_t before = sparing;
            for (size_t i = 0; i < candidates.size();) {
                size_t end = i + 1;
                while (end < candidates.size() && candidates[end].index == candidates[end - 1].index + 1) ++end;
                sparing += look_at(candidates, i, end, order, thorough, whose, result);
                i = end;
            }
            looks -= candidates.size() - (sparing - before);
        }
        if (owners && sparing >= all && looks == 3 * all) order.note_none(owners, inserted);
    }
    return result;
}

FileCache::Writing FileCache::begin_write_locked(Run within, Page** pages) {
    Writing writing{{within.first, 0}, 0};
    uint32_t i = 0;
    const auto dirty = [&](uint32_t k) {
        return pages[k]->state() == PageState::resident && pages[k]->is(Page::kDirty);
    };
    while (i < within.count && (!dirty(i) || pages[i]->is(Page::kWriting))) {
        writing.busy += pages[i]->is(Page::kWriting);
        ++i;
    }
    const uint32_t from = i;
    while (i < within.count && dirty(i) && !pages[i]->is(Page::kWriting)) ++i;
    if (i == from) return writing;
    const Run run{within.first + from, i - from};
    // No write may pass from here on that does not make its page dirty again.
    table_->recall(pages + from, run.count);
    const uint32_t used = used_by(pages + from, run.count);
    bool safe = true;
    each_region([&](Region& region) {
        if (region.tracked.load(std::memory_order_relaxed))
            safe = region.hat->protect(region, run.first, run.count, used) && safe;
    });
    if (!safe) {
        writing.busy += run.count;
        return writing;
    }
    for (uint32_t k = from; k < i; ++k) {
        pages[k]->clear(Page::kDirty);
        pages[k]->set(Page::kWriting);
    }
    writing.run = run;
    return writing;
}

FileCache::Writing FileCache::begin_write(Run within) {
    Page* pages[kMaxGroup];
    table_->lock(within.first, within.count, pages);
    const Writing writing = begin_write_locked(within, pages);
    table_->unlock(pages, within.count);
    return writing;
}

FileCache::Run FileCache::take_laundry(uint32_t most) {
    for (;;) {
        Run run;
        {
            std::lock_guard guard(laundry_lock_);
            if (laundry_.empty()) return {0, 0};
            run = {laundry_.front(), 1};
            laundry_.pop_front();
            while (run.count < most && !laundry_.empty() && laundry_.front() == run.first + run.count) {
                laundry_.pop_front();
                ++run.count;
            }
        }
        Page* pages[kMaxGroup];
        table_->lock(run.first, run.count, pages);
        Page* locked[kMaxGroup];
        std::copy_n(pages, run.count, locked);
        const Writing writing = begin_write_locked(run, pages);
        // What is not written now, for whatever reason, is an ordinary page again.
        for (uint32_t i = 0; i < run.count; ++i) {
            const uint64_t index = run.first + i;
            if (index - writing.run.first < writing.run.count || !pages[i]->is(Page::kLaundry)) continue;
            pages[i]->clear(Page::kLaundry);
            table_->replacement(table_->part_of(index)).insert(index);
        }
        table_->unlock(locked, run.count);
        if (writing.run.count) return writing.run;
    }
}

uint64_t FileCache::end_write(Run run, bool written, bool evict) {
    Page* pages[kMaxGroup];
    table_->lock(run.first, run.count, pages);
    Page* locked[kMaxGroup];
    std::copy_n(pages, run.count, locked);
    uint64_t given = 0;
    uint32_t going = 0;
    const auto flush = [&](uint32_t to) {
        if (going) drop({run.first + to - going, going}, pages + to - going);
        given += going;
        going = 0;
    };
    const uint8_t stored = anonymous() ? kStored : 0;
    if (stored && written) stored_.store(true, std::memory_order_release);
    for (uint32_t i = 0; i < run.count; ++i) {
        Page* page = pages[i];
        const uint64_t index = run.first + i;
        if (!page->is(Page::kWriting)) {
            flush(i);
            continue;
        }
        const bool again = page->is(Page::kDirty);  // it was written to meanwhile
        page->clear(Page::kWriting);
        if (written) {
            write_journal(index, uint8_t((again ? journaled(index) : journaled(index) & ~kDirty) | stored));
        } else if (!again) {
            table_->recall(&page, 1);
            page->set(Page::kDirty);
        }
        // A page that was made dirty again counts once more.
        if (written || again) cleaned_.fetch_add(1, std::memory_order_relaxed);
        const bool laundry = page->is(Page::kLaundry);
        page->clear(Page::kLaundry);
        if (evict && written && !again && !page->is(Page::kPinned) && page->uses() == 0) {
            ++going;
            continue;
        }
        flush(i);
        if (laundry && replaceable()) table_->replacement(table_->part_of(index)).insert(index);
    }
    flush(run.count);
    if (written) written_.fetch_add(run.count, std::memory_order_relaxed);
    table_->unlock(locked, run.count);
    ended();
    return given;
}

// The descriptors that `chosen(page)`, as runs in ascending order.
template <typename Chosen>
std::vector<FileCache::Run> FileCache::runs_of(Chosen&& chosen) const {
    std::vector<uint64_t> found;
    table_->each([&](const Page& page) {
        if (chosen(page)) found.push_back(page.index);
    });
    std::sort(found.begin(), found.end());
    std::vector<Run> runs;
    for (uint64_t index : found) {
        if (!runs.empty() && runs.back().first + runs.back().count == index && runs.back().count < kMaxGroup) {
            ++runs.back().count;
        } else {
            runs.push_back({index, 1});
        }
    }
    return runs;
}

std::vector<FileCache::Run> FileCache::dirty_runs(uint64_t first, uint64_t end) const {
    return runs_of([&](const Page& page) {
        return page.index >= first && page.index < end && page.is(Page::kDirty | Page::kWriting);
    });
}

void FileCache::tally(Tally& sum) const {
    table_->each([&](const Page& page) {
        if (const auto owner = page.resident_owner()) {
            ++sum.resident[*owner];
        } else {
            ++sum.moving;
        }
    });
}

uint64_t FileCache::present(uint64_t first, uint64_t end) const {
    uint64_t count = 0;
    table_->each([&](const Page& page) {
        count += page.index >= first && page.index < end && page.state() != PageState::absent;
    });
    return count;
}

uint64_t FileCache::discard(uint64_t first, uint64_t end, bool dirty) {
    uint64_t busy = 0;
    for (const Run& run : runs_of([&](const Page& page) { return page.index >= first && page.index < end; })) {
        Page* pages[kMaxGroup];
        table_->lock(run.first, run.count, pages);
        Page* locked[kMaxGroup];
        std::copy_n(pages, run.count, locked);
        uint32_t going = 0;
        for (uint32_t k = 0; k <= run.count; ++k) {
            const bool goes = k < run.count && pages[k]->state() == PageState::resident &&
                              !pages[k]->is(Page::kWriting) && (dirty || !pages[k]->is(Page::kDirty | Page::kPinned));
            if (goes) {
                ++going;
                continue;
            }
            if (going) drop({run.first + k - going, going}, pages + k - going);
            going = 0;
            if (k < run.count && pages[k]->state() != PageState::absent) ++busy;
        }
        table_->unlock(locked, run.count);
    }
    if (dirty) forget_stored(first, std::min(end, this->pages()));
    for (size_t part = 0; part < table_->parts(); ++part) {
        Replacement& order = table_->replacement(part);
        if (order.size() <= 2 * table_->size() + 1024) continue;
        std::vector<uint64_t> resident = table_->resident();
        order.sweep([&](uint64_t index) { return !std::binary_search(resident.begin(), resident.end(), index); });
    }
    return busy;
}

template <typename Visit>
void FileCache::each_journaled(uint64_t first, uint64_t end, Visit&& visit) const {
    // Holes of the journal are not looked at, or they would become memory.
    for (auto at = off_t(first); at < off_t(end);) {
        const off_t data = lseek(journal_fd_, at, SEEK_DATA);
        if (data < 0 || data >= off_t(end)) break;
        const off_t hole = std::min(lseek(journal_fd_, data, SEEK_HOLE), off_t(end));
        for (auto page = uint64_t(data); page < uint64_t(hole); ++page) {
            if (journaled(page)) visit(page, journaled(page));
        }
        at = hole;
    }
}

template <typename Visit>
void FileCache::each_stored(uint64_t first, uint64_t end, Visit&& visit) const {
    if (!stored_.load(std::memory_order_acquire)) return;
    each_journaled(first, end, [&](uint64_t page, uint8_t seen) {
        if (seen & kStored) visit(page);
    });
}

void FileCache::forget_stored(uint64_t first, uint64_t end) {
    each_stored(first, end, [&](uint64_t page) { write_journal(page, journaled(page) & uint8_t(~kStored)); });
}

void FileCache::forget_holes() {
    uint64_t begin = 0;  // the frames [begin, end) are there, and none between the page of the last look and `begin`
    uint64_t end = 0;
    each_journaled(0, pages(), [&](uint64_t page, uint8_t seen) {
        if (seen & kStored) stored_.store(true, std::memory_order_release);
        if (page >= end) {
            const off_t data = lseek(memfd_, off_t(page * kPageSize), SEEK_DATA);
            begin = data < 0 ? UINT64_MAX : uint64_t(data) / kPageSize;
            end = data < 0 ? UINT64_MAX : uint64_t(lseek(memfd_, data, SEEK_HOLE)) / kPageSize;
        }
        if (page < begin && seen & (kValid | kDirty)) write_journal(page, seen & kStored);
    });
}

bool FileCache::resize(uint64_t pages) {
    if (pages == 0 || pages > journal_bytes_) return false;
    pages_.store(pages, std::memory_order_seq_cst);
    return true;
}

bool FileCache::share() {
    heir_.store(true, std::memory_order_seq_cst);
    generation_.fetch_add(1, std::memory_order_seq_cst);
    // All descriptors, also of pages that are just becoming resident. Who makes one later finds that there is an heir.
    bool safe = true;
    for (const Run& run : runs_of([](const Page&) { return true; })) {
        Page* pages[kMaxGroup];
        table_->lock(run.first, run.count, pages);
        table_->recall(pages, run.count);
        for (uint32_t k = 0; k < run.count; ++k) pages[k]->clear(Page::kAllowed);
        const uint32_t used = used_by(pages, run.count);
        each_region([&](Region& region) {
            if (!region.tracked.load(std::memory_order_relaxed)) return;
            safe = region.hat->protect(region, run.first, run.count, used) && safe;
        });
        table_->unlock(pages, run.count);
    }
    return safe;
}

void FileCache::allow(uint64_t page, uint64_t generation) {
    Page* descriptor;
    table_->lock(page, 1, &descriptor);
    // share() changes the generation before it comes to the page.
    if (descriptor->state() == PageState::resident && this->generation() == generation) {
        descriptor->set(Page::kAllowed);
    }
    table_->unlock(&descriptor, 1);
}

FileCache::Owned FileCache::own(uint64_t page) {
    if (page >= this->pages()) return Owned::owned;  // it has no use for the page
    Page* descriptor;
    table_->lock(page, 1, &descriptor);
    Owned owned = journaled(page) & kStored ? Owned::owned : Owned::lacks;
    switch (descriptor->state()) {
        case PageState::absent:
            break;
        case PageState::io:
            if (owned == Owned::lacks) owned = Owned::busy;
            break;
        case PageState::resident:
            // While it is written back swap space will have it, or else it is dirty again.
            if (owned == Owned::lacks && !descriptor->is(Page::kDirty | Page::kWriting)) {
                table_->recall(&descriptor, 1);
                make_dirty(descriptor, -1);
            }
            owned = Owned::owned;
            break;
    }
    table_->unlock(&descriptor, 1);
    return owned;
}

std::vector<uint64_t> FileCache::owned(bool all) const {
    std::vector<uint64_t> found;
    table_->each([&](const Page& page) {
        const bool here = page.state() == PageState::resident && (all || page.is(Page::kDirty | Page::kWriting));
        if (here && page.index < pages()) found.push_back(page.index);
    });
    each_stored(0, pages(), [&](uint64_t page) { found.push_back(page); });
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    return found;
}

bool FileCache::pin(Run run) {
    Page* pages[kMaxGroup];
    table_->lock(run.first, run.count, pages);
    bool all = true;
    for (uint32_t i = 0; i < run.count; ++i) all = all && pages[i]->state() == PageState::resident;
    if (all) {
        std::lock_guard guard(pins_lock_);
        for (uint32_t i = 0; i < run.count; ++i) {
            write_pins(run.first + i, ++pins_[run.first + i]);
            pages[i]->set(Page::kPinned);
        }
    }
    table_->unlock(pages, run.count);
    return all;
}

void FileCache::unpin(Run run) {
    Page* pages[kMaxGroup];
    table_->lock(run.first, run.count, pages);
    {
        std::lock_guard guard(pins_lock_);
        for (uint32_t i = 0; i < run.count; ++i) {
            const auto found = pins_.find(run.first + i);
            if (found == pins_.end()) continue;
            write_pins(run.first + i, --found->second);
            if (found->second > 0) continue;
            pins_.erase(found);
            pages[i]->clear(Page::kPinned);
        }
    }
    table_->unlock(pages, run.count);
}

std::vector<std::pair<uint64_t, uint32_t>> FileCache::pinned() {
    std::lock_guard guard(pins_lock_);
    return {pins_.begin(), pins_.end()};
}

void FileCache::set_pins(uint64_t page, uint32_t count) {
    Page* descriptor;
    table_->lock(page, 1, &descriptor);
    if (descriptor->state() == PageState::resident) {
        std::lock_guard guard(pins_lock_);
        write_pins(page, count);
        if (count) {
            pins_[page] = count;
            descriptor->set(Page::kPinned);
        } else {
            pins_.erase(page);
            descriptor->clear(Page::kPinned);
        }
    }
    table_->unlock(&descriptor, 1);
}

void FileCache::write_pins(uint64_t page, uint32_t count) {
    write_journal(page, uint8_t((journaled(page) & (kOnePin - 1)) | kOnePin * std::min(count, kMostPins)));
}

uint64_t FileCache::restore() {
    uint64_t restored = 0;
    const auto end = off_t(pages() * kPageSize);
    forget_holes();
    for (off_t at = 0; at < end;) {
        const off_t data = lseek(memfd_, at, SEEK_DATA);
        if (data < 0) break;
        const off_t hole = lseek(memfd_, data, SEEK_HOLE);
        for (auto page = uint64_t(data) / kPageSize; page < uint64_t(hole) / kPageSize; ++page) {
            const uint8_t seen = journaled(page);
            if (!(seen & kValid)) {
                punch(page, 1);
                continue;
            }
            Page* descriptor;
            table_->lock(page, 1, &descriptor);
            descriptor->set_state(PageState::resident);
            descriptor->used.store(~0u, std::memory_order_relaxed);  // nobody knows any more
            if (seen & kDirty) {
                descriptor->set(Page::kDirty);
                prefilled_dirty_.fetch_add(1, std::memory_order_relaxed);
            }
            if (seen >= kOnePin) {
                descriptor->set(Page::kPinned);
                std::lock_guard guard(pins_lock_);
                pins_[page] = seen / kOnePin == kMostPins ? UINT32_MAX / 2 : seen / kOnePin;
            }
            if (replaceable()) table_->replacement(table_->part_of(page)).insert(page);
            table_->unlock(&descriptor, 1);
            ++restored;
        }
        at = hole;
    }
    prefetched_.fetch_add(restored, std::memory_order_relaxed);
    return restored;
}

void FileCache::read_from(std::unique_ptr<Source> source) { source_ = std::move(source); }

FileCache::Run FileCache::begin_read(uint64_t page, Run group, Hat& client) {
    Run within = source_->around(page, group);
    within.count = uint32_t(std::min<uint64_t>(within.count, std::max(pages(), page + 1) - within.first));
    source_->begin();
    const Run run = begin_io(page, within);
    run.count ? source_->missed(*this, run, client) : source_->end();
    return run;
}

bool FileCache::replicate(bool replicated) {
    if (replicated_) replicated_->replicate(replicated);
    return replicated_ != nullptr;
}

Tables FileCache::tables() const {
    if (!replicated_) return Tables::partitioned;
    return replicated_->replicated() ? Tables::replicated : Tables::shared;
}

void FileCache::clear() { discard(0, UINT64_MAX, true); }

void FileCache::attach(Region* region) {
    std::lock_guard guard(regions_lock_);
    regions_.push_back(region);
}

void FileCache::detach(Region* region) {
    std::lock_guard guard(regions_lock_);
    std::erase(regions_, region);
}

FileCache::Counts FileCache::counts() const {
    Counts sum{};
    // What goes first, what comes after it: so that no difference is below zero.
    sum.evicted = evicted_.load(std::memory_order_acquire);
    const uint64_t cleaned = cleaned_.load(std::memory_order_acquire);
    sum.written = written_.load(std::memory_order_relaxed);
    sum.probed = probed_.load(std::memory_order_relaxed);
    sum.rescued = rescued_.load(std::memory_order_relaxed);
    for (int i = 0; i < cpus_; ++i) {
        const CpuCounts& cpu = cpu_counts_[size_t(i)];
        sum.mapped += cpu.mapped.load(std::memory_order_relaxed);
        sum.zero_filled += cpu.zero_filled.load(std::memory_order_relaxed);
        sum.filled += cpu.filled.load(std::memory_order_relaxed);
        sum.queued += cpu.queued.load(std::memory_order_relaxed);
        sum.dirtied += cpu.dirtied.load(std::memory_order_relaxed);
    }
    sum.filled += prefetched_.load(std::memory_order_relaxed);
    sum.read_ahead = source_ ? source_->pages_ahead() : 0;
    sum.resident = sum.zero_filled + sum.filled - sum.evicted;
    sum.dirty = sum.dirtied + prefilled_dirty_.load(std::memory_order_relaxed) - cleaned;
    return sum;
}

size_t FileCache::bytes() const {
    size_t order = 0;
    for (size_t part = 0; part < table_->parts(); ++part) order += table_->replacement(part).size();
    return table_->bytes() + order * 5;
}

}  // namespace k42::vm
