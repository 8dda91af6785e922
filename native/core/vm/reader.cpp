#include "vm/reader.hpp"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <system_error>

#include "runtime/processor.hpp"
#include "runtime/quiescence.hpp"
#include "vm/region.hpp"

namespace k42::vm {

namespace {

constexpr size_t kThreads = 4;     // a CPU: so many requests a disk gets at once from the faults of one
constexpr uint64_t kReclaim = 64;  // frames at least, so as not to come again at once

// What is read at once: most of it is in the processor's cache still when it is written to the frames.
struct Buffer {
    alignas(4096) std::byte bytes[8 * kPageSize];
};

// Size and times, as version_of() in src/k42/vm/fr/file.py.
struct Version {
    off_t size;
    timespec modified, changed;
    bool operator==(const Version& other) const {
        const auto same = [](const timespec& a, const timespec& b) {
            return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec;
        };
        return size == other.size && same(modified, other.modified) && same(changed, other.changed);
    }
};

bool version_of(int descriptor, Version& out) {
    struct stat status;
    if (fstat(descriptor, &status) < 0) return false;
    out = {status.st_size, status.st_mtim, status.st_ctim};
    return true;
}

template <typename Call>
bool whole(uint64_t length, Call&& call) {
    for (uint64_t done = 0; done < length;) {
        const ssize_t got = call(done);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        done += uint64_t(got);
    }
    return true;
}

// What an account may have; 0: its client has gone.
uint64_t limit_of(FramePool& pool, uint16_t number) {
    const runtime::Within within;
    const Account* account = pool.accounts().find(number);
    return account && account->open() ? account->limit() : 0;
}

// Frames for pages of this account. Where there are none free: those of clean pages of this file, as long as it is
// plain whose; else Python asks all, and waits.
bool take_frames(FileCache& cache, uint32_t count, Payer payer) {
    FramePool& pool = cache.pool();
    const uint16_t owner = payer.account;
    const bool thorough = cache.source()->pattern() != Source::Pattern::sequential;
    const auto take = [&] {
        const runtime::Within within;  // so that the number stays the client's
        if (payer.client && payer.client->retired()) return FramePool::Grant::limited;
        return pool.allocate(count, cache.backing(), owner);
    };
    FramePool::Grant grant = take();
    if (grant == FramePool::Grant::limited) {
        // Not the last ones: an access may need two pages, and what came with them.
        if (count <= limit_of(pool, owner) / 4 && cache.reclaim(count, thorough, owner).given) grant = take();
    } else if (grant == FramePool::Grant::reclaim && pool.accounts().refresh()) {
        const uint64_t wanted = std::max<uint64_t>(count, kReclaim);
        if (cache.reclaim(wanted, thorough, FileCache::kAboveShare).given) grant = take();
    }
    return grant == FramePool::Grant::granted;
}

void let_go(const ReadJob& job) {
    job.cache->source()->end();
    job.fault.hat->release();
}

}  // namespace

bool Source::may_hang(int descriptor) {
    struct statfs status;
    if (fstatfs(descriptor, &status) < 0) return true;
    switch (uint32_t(status.f_type)) {
        case 0x6969:      // NFS
        case 0x65735546:  // FUSE
        case 0x517b:      // SMB
        case 0xff534d42:  // CIFS
        case 0xfe534d42:  // SMB2
        case 0x01021997:  // 9p
        case 0x00c36400:  // Ceph
        case 0x5346414f:  // AFS
        case 0x6b414653:  // kAFS
        case 0x73757245:  // Coda
            return true;
        default:
            return false;
    }
}

bool Source::fill(int memfd, uint64_t first, uint32_t count) const {
    static thread_local std::unique_ptr<Buffer> buffer;
    if (!buffer) buffer = std::make_unique<Buffer>();
    std::byte* const bytes = buffer->bytes;
    const uint64_t offset = first * kPageSize;
    const uint64_t end = offset + count * kPageSize;
    const uint64_t writes = this->writes();
    const uint64_t size = size_.load(std::memory_order_seq_cst);
    if (end >= size + kPageSize) return false;
    Version before, after;
    if (!version_of(descriptor_, before)) return false;
    for (uint64_t at = offset; at < end; at += sizeof buffer->bytes) {
        const uint64_t length = std::min(end - at, sizeof buffer->bytes);
        const uint64_t wanted = std::min(length, size - at);
        if (!whole(wanted,
                   [&](uint64_t done) { return pread(descriptor_, bytes + done, wanted - done, off_t(at + done)); })) {
            return false;
        }
        memset(bytes + wanted, 0, length - wanted);
        if (!whole(length,
                   [&](uint64_t done) { return pwrite(memfd, bytes + done, length - done, off_t(at + done)); })) {
            return false;
        }
    }
    if (!version_of(descriptor_, after)) return false;
    // What others changed meanwhile is not to be a mixture. Writes of ours are of pages that are resident, so not of
    // these; changes of the length are.
    if (size_.load(std::memory_order_seq_cst) != size) return false;
    return before == after || (writes & 1) || writes != this->writes();
}

void Source::tell(FileCache& cache, Recent& miss, Hat& client) {
    if (prefetcher_ && !miss.told) prefetcher_->push(cache, miss.first, miss.count, client);
    miss.told = true;
}

void Source::touched(FileCache& cache, uint64_t page, Hat& client) {
    strays_.store(0, std::memory_order_relaxed);
    if (prefetcher_) prefetcher_->push(cache, page, 0, client);
}

Source::Recent* Source::near(uint64_t page) {
    for (Recent& recent : recent_) {
        if (recent.count && page + kReach >= recent.first && page <= recent.first + recent.count + kReach)
            return &recent;
    }
    return nullptr;
}

PageTable::Run Source::around(uint64_t page, PageTable::Run group) {
    const Pattern pattern = this->pattern();
    if (pattern == Pattern::random || group.count >= kMostPages) return group;
    std::lock_guard guard(recent_lock_);
    const Recent* const recent = near(page);
    uint64_t first = page - page % cluster_;
    uint64_t end = first + cluster_;
    if (pattern == Pattern::sequential) {
        end = page + kMostPages;
    } else if (recent && page == recent->first + recent->count) {
        end = page + 2 * recent->count;
    } else if (strays_.load(std::memory_order_relaxed) == kManyStrays) {
        return group;
    }
    first = std::min(first, group.first);
    end = std::max(end, group.first + group.count);
    return {first, uint32_t(std::min<uint64_t>(end - first, kMostPages))};
}

void Source::missed(FileCache& cache, PageTable::Run run, Hat& client) {
    const Pattern pattern = this->pattern();
    if (pattern == Pattern::random) return;
    Recent miss{run.first, run.count};
    std::lock_guard guard(recent_lock_);
    const uint32_t strays = strays_.load(std::memory_order_relaxed);
    Recent* const recent = near(run.first);
    if (!recent) {
        strays_.store(std::min(strays + 1, kManyStrays), std::memory_order_relaxed);
        if (pattern == Pattern::sequential) tell(cache, miss, client);
        recent_[next_++ % recent_.size()] = miss;
        return;
    }
    strays_.store(strays - std::min(strays, kNear), std::memory_order_relaxed);
    if (run.first >= recent->first) {
        tell(cache, *recent, client);
        tell(cache, miss, client);
    }
    *recent = miss;
}

void Reader::submit(const ReadJob& job) {
    bool taken;
    {
        std::lock_guard guard(lock_);
        jobs_.push_back(job);
        if (jobs_.size() > idle_ && threads_.size() < kThreads) {
            try {
                threads_.emplace_back([this] { serve(); });
            } catch (const std::system_error&) {
                // One thread is enough; without any it is not ours to do.
                if (threads_.empty()) jobs_.pop_back();
            }
        }
        taken = !threads_.empty();
    }
    if (taken) {
        filled_.notify_one();  // without the lock: who wakes up on this CPU goes on at once, and takes it
        return;
    }
    job.cache->abort_io(job.run);
    give_up(job);
}

void Reader::stop() {
    {
        std::lock_guard guard(lock_);
        stopped_ = true;
    }
    filled_.notify_all();
    for (std::thread& thread : threads_) thread.join();  // nobody submits, so no thread comes
    threads_.clear();
    for (const ReadJob& job : jobs_) {
        job.cache->abort_io(job.run);
        let_go(job);
    }
    jobs_.clear();
}

void Reader::add_processors(std::vector<runtime::Processor*>& out) {
    std::lock_guard guard(lock_);
    out.insert(out.end(), processors_.begin(), processors_.end());
}

void Reader::serve() {
    cpu_set_t here;
    CPU_ZERO(&here);
    CPU_SET(cpu_, &here);
    pthread_setaffinity_np(pthread_self(), sizeof here, &here);
    pthread_setname_np(pthread_self(), ("k42-read-" + std::to_string(cpu_)).c_str());
    std::unique_lock guard(lock_);
    processors_.push_back(&runtime::current());
    for (;;) {
        ++idle_;
        filled_.wait(guard, [&] { return stopped_ || !jobs_.empty(); });
        --idle_;
        if (stopped_) return;
        const ReadJob job = jobs_.front();
        jobs_.pop_front();
        guard.unlock();
        if (read(job)) {
            finished_.fetch_add(1, std::memory_order_relaxed);
            let_go(job);
        } else {
            give_up(job);
        }
        guard.lock();
    }
}

void Reader::give_up(const ReadJob& job) {
    given_up_.fetch_add(1, std::memory_order_relaxed);
    hand_up_(job);
    let_go(job);
}

bool fill_run(FileCache& cache, PageTable::Run run, Payer payer) {
    const Source& source = *cache.source();
    const bool granted = take_frames(cache, run.count, payer);
    if (granted && source.fill(cache.memfd(), run.first, run.count)) return true;
    cache.abort_io(run, granted ? run.count : 0, payer.account);
    return false;
}

ReadIn read_in(FileCache& cache, uint64_t first, uint64_t end, Payer payer) {
    uint64_t pages = 0;
    while (first < end) {
        const auto count = uint32_t(std::min<uint64_t>(end - first, Source::kMostPages));
        const PageTable::Run run = cache.begin_fill({first, count});
        if (run.count == 0) {  // others bring it in, or have
            first += count;
            continue;
        }
        if (!fill_run(cache, run, payer)) return {run.first, pages};
        cache.complete_io(nullptr, run.first, run, 0, 0, false, payer.account);
        pages += run.count;
        first = run.first + run.count;
    }
    return {first, pages};
}

// False: the pages are absent again.
bool Reader::read(const ReadJob& job) {
    FileCache& cache = *job.cache;
    const uint16_t owner = job.fault.hat->account();
    if (!fill_run(cache, job.run, {owner, job.fault.hat})) return false;
    FaultAt fault = job.fault;
    runtime::Processor& processor = runtime::current();
    runtime::enter(processor);
    // Only inside the gate does the window stay: it may have gone, and another come to its addresses.
    bool mapped = false;
    const auto entry = fault.hat->retired() ? std::nullopt : fault.hat->regions().lookup(job.canonical);
    Region* const region = entry ? entry->value : nullptr;
    if (region && region->gate.try_enter() == RegionGate::Entry::entered) {
        if (region->cache == &cache && fault.hat->canonical(fault.cpu, fault.address) == job.canonical &&
            region->page_at(job.canonical) == job.page) {
            fault.tracked = region->tracked.load(std::memory_order_relaxed);
            cache.complete_io(&fault, job.page, job.run, region->first_page, region->first_page + region->pages, false,
                              owner);
            mapped = true;
        }
        region->gate.leave();
    }
    (void)runtime::leave(processor);
    if (!mapped) {
        cache.complete_io(nullptr, job.page, job.run, 0, 0, false, owner);
        // It happens again where it can.
        fault.hat->wake(fault.cpu, fault.address, kPageSize);
    }
    return true;
}

void Prefetcher::push(FileCache& cache, uint64_t page, uint32_t missed, Hat& client) {
    {
        std::lock_guard guard(lock_);
        if (stopped_ || jobs_.size() >= kMostJobs) return;
        jobs_.push_back({&cache, &client, page, missed});
        if (jobs_.size() > idle_ && threads_.size() < kThreads) {
            try {
                threads_.emplace_back([this] { serve(); });
            } catch (const std::system_error&) {
                if (threads_.empty()) return jobs_.pop_back();
            }
        }
        client.retain();
        cache.source()->begin();
    }
    filled_.notify_one();
}

void Prefetcher::stop() {
    std::vector<std::thread> threads;
    std::deque<Job> jobs;
    {
        std::lock_guard guard(lock_);
        stopped_ = true;
        threads.swap(threads_);
        jobs.swap(jobs_);
    }
    filled_.notify_all();
    for (std::thread& thread : threads) thread.join();
    for (const Job& job : jobs) let_go(job);
}

void Prefetcher::serve() {
    // It was started by a fault server, which is bound to a CPU.
    cpu_set_t all;
    if (sched_getaffinity(getpid(), sizeof all, &all) == 0) pthread_setaffinity_np(pthread_self(), sizeof all, &all);
    pthread_setname_np(pthread_self(), "k42-read-ahead");
    std::unique_lock guard(lock_);
    for (;;) {
        std::deque<Job>::iterator next;
        ++idle_;
        filled_.wait(guard, [&] {
            next = std::find_if(jobs_.begin(), jobs_.end(),
                                [](const Job& job) { return !job.cache->source()->reading_ahead_; });
            return stopped_ || next != jobs_.end();
        });
        --idle_;
        if (stopped_) return;
        const Job job = *next;
        jobs_.erase(next);
        bool& reading = job.cache->source()->reading_ahead_;
        reading = true;
        guard.unlock();
        read(job);
        guard.lock();
        reading = false;
        if (!jobs_.empty()) filled_.notify_one();  // one for this file could not be taken before
        guard.unlock();
        let_go(job);
        guard.lock();
    }
}

void Prefetcher::read(const Job& job) {
    FileCache& cache = *job.cache;
    Source& source = *cache.source();
    ReadAhead& policy = source.read_ahead_;
    const auto ahead = job.missed ? policy.missed(job.page, job.missed) : policy.touched(job.page);
    if (!ahead) return;
    Hat& client = *job.client;
    // A window that fills the client's limit would push out what it has brought in.
    const uint64_t most = std::max<uint64_t>(1, limit_of(cache.pool(), client.account()) / 4);
    const uint64_t end = std::min({ahead->first + ahead->count, ahead->first + most, cache.pages()});
    if (end <= ahead->first) return;
    cache.set_marker(&rest_, source.id_, std::min(ahead->marker, end - 1));
    for (uint64_t first = ahead->first; first < end;) {
        // Nobody waits for it.
        if (client.retired() || source.closing_.load(std::memory_order_relaxed)) return;
        const uint64_t to = std::min<uint64_t>(first + Source::kMostPages, end);
        const ReadIn read = read_in(cache, first, to, {client.account(), &client});
        source.pages_ahead_.fetch_add(read.pages, std::memory_order_relaxed);
        if (read.reached < to) return rest_.push({source.id_, read.reached, client.id(), uint32_t(end - read.reached)});
        first = to;
    }
}

void Prefetcher::let_go(const Job& job) {
    job.cache->source()->end();
    job.client->release();
}

}  // namespace k42::vm
