// The frames of the Global Page Manager (paper 4.2, figure 7). A frame is 4 KiB of budget; which memory backs it is
// decided where the page is (a memfd), so the pool counts. It counts under one lock or with a stock of free frames for
// each processor, and changes from one to the other while it is used: see structures/quota.hpp, which holds the budget
// exactly in both forms.
//
// It also keeps the promises that make running out an error at creation, never a hang later: anonymous memory is
// reserved when it is made, memory made with overcommit only ever uses what is not promised to others, and enough
// for one page of every open file mapping is promised to files.
//
// A frame that is taken is charged to an account at the same moment (account.hpp), and both end at one moment: so what
// is charged in all, and what is in use, are the same number whenever one looks (`census`).
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "structures/quota.hpp"
#include "vm/account.hpp"
#include "vm/region_gate.hpp"

namespace k42::vm {

// Who stands behind a page: a file that can give it back at any time, or anonymous memory.
enum class Backing : uint8_t { file, reserved, overcommitted };

class alignas(runtime::apart) FramePool {
  public:
    enum class Grant {
        granted,
        reclaim,    // none free now, on any processor: get file pages back, then ask again
        exhausted,  // none to be had for this backing until others give up theirs
        limited     // the account would have more than its limit, or is closed: get pages of its own back
    };

    struct Usage {
        uint64_t budget, file, reserved, overcommitted;  // frames in use, by backing
        uint64_t promised_anonymous, promised_file;      // frames promised
    };

    // By free frames. At LOW caches should give frames back until it is MID again; at CRITICAL who can wait should.
    enum class Level : uint8_t { critical, low, mid, high };

    explicit FramePool(uint64_t budget, bool distributed = false)
        : budget_(budget),
          low_(std::min<uint64_t>(budget / 16, 16384)),  // 64 MiB is enough for any reclaim to keep ahead
          quota_({int64_t(budget), int64_t(budget)}, Account::chunk_of(budget), distributed),
          accounts_(budget - enough(), distributed),
          transfers_(distributed) {}
    FramePool(const FramePool&) = delete;
    FramePool& operator=(const FramePool&) = delete;
    ~FramePool() {
        if (const int event = event_.load(std::memory_order_relaxed); event >= 0) close(event);
    }

    // Promises `frames` to anonymous memory; false when they cannot be had.
    bool reserve(uint64_t frames) {
        std::lock_guard guard(lock_);
        if (frames > budget_ || !quota_.withdraw(kUnpromised, int64_t(frames))) return false;
        promised_anonymous_ += frames;
        return true;
    }
    void unreserve(uint64_t frames) {
        std::lock_guard guard(lock_);
        promised_anonymous_ -= frames;
        quota_.deposit(kUnpromised, int64_t(frames));
    }

    // Promises that a page of `frames` fits for files; false when it does not. Kept for good.
    bool promise_file(uint64_t frames) {
        std::lock_guard guard(lock_);
        if (frames <= promised_file_) return true;
        if (frames > budget_ || !quota_.withdraw(kUnpromised, int64_t(frames - promised_file_))) return false;
        promised_file_ = frames;
        return true;
    }

    // Inside, frames and accounts may be changed together: a census sees both before or both after it. It never waits
    // for anything but a census, which waits for nobody that could wait for who is inside. Not to be entered twice.
    class Transfer {
      public:
        explicit Transfer(FramePool& pool) : pool_(pool) { pool_.transfers_.enter(); }
        ~Transfer() { pool_.transfers_.leave(); }
        Transfer(const Transfer&) = delete;
        Transfer& operator=(const Transfer&) = delete;

      private:
        const runtime::Within within_;  // of the accounts that are found inside
        FramePool& pool_;
    };

    // All `frames` or none, so that two who wait for frames never hold what the other needs. Charged to the account
    // `owner`.
    Grant allocate(uint64_t frames, Backing backing, uint16_t owner = 0) {
        if (frames > budget_) return backing == Backing::overcommitted ? Grant::exhausted : Grant::reclaim;
        const Transfer transfer(*this);
        Account* const account = accounts_.find(owner);
        if (!account || !account->charge(frames)) return Grant::limited;
        const auto taken = quota_.take(int64_t(frames), kinds_of(backing), size_t(backing));
        if (taken.lacks >= 0) account->uncharge(frames);
        if (taken.lacks == kUnpromised) return Grant::exhausted;
        if (taken.at_root) look_at_level(taken.lacks >= 0);
        return taken.lacks < 0 ? Grant::granted : Grant::reclaim;
    }

    void release(uint64_t frames, Backing backing, uint16_t owner = 0) {
        {
            const Transfer transfer(*this);
            if (Account* account = accounts_.find(owner)) account->uncharge(frames);
            if (quota_.put(int64_t(frames), kinds_of(backing), size_t(backing))) look_at_level(false);
        }
        tell_waiters();
    }

    // Says that frames which were in I/O can be reclaimed from now on.
    void announce_reclaimable() {
        quota_.announce();
        tell_waiters();
    }

    // For wait(): ask for it before what may fail.
    uint64_t changes() const { return quota_.changes(); }

    // Waits until changes() differs from `seen`; false when `timeout` came first.
    bool wait(uint64_t seen, std::chrono::milliseconds timeout) {
        std::unique_lock guard(wait_lock_);
        // Who puts something back does so under a lock that changes_now() takes, then looks for waiters: so it finds
        // us, or we find the change.
        waiters_.fetch_add(1, std::memory_order_seq_cst);
        const bool changed = changed_.wait_for(guard, timeout, [&] { return quota_.changes_now() != seen; });
        waiters_.fetch_sub(1, std::memory_order_relaxed);
        return changed;
    }

    // At one moment.
    Usage usage() const {
        std::lock_guard guard(lock_);
        const auto balance = quota_.balance();
        return {budget_,
                uint64_t(balance.counts[0]),
                uint64_t(balance.counts[1]),
                uint64_t(balance.counts[2]),
                promised_anonymous_,
                promised_file_};
    }

    // Whether, at one moment, all frames are accounted for: those in use, at the root and in the processors' stocks are
    // the budget, and so are those promised, in overcommitted use, and left to promise. At any time.
    bool check() const {
        std::lock_guard guard(lock_);
        const auto balance = quota_.balance();
        const auto& used = balance.counts;
        const int64_t in_use = used[0] + used[1] + used[2];
        return std::min({used[0], used[1], used[2]}) >= 0 &&
               in_use + balance.at_root[kFrames] + balance.in_parts[kFrames] == int64_t(budget_) &&
               int64_t(promised_anonymous_ + promised_file_) + used[2] + balance.at_root[kUnpromised] +
                       balance.in_parts[kUnpromised] ==
                   int64_t(budget_);
    }

    // What is charged and what is in use, while nobody takes or gives a frame; and what `count` counts meanwhile.
    struct Census {
        Usage usage;
        std::vector<std::pair<uint16_t, int64_t>> charged;  // frames, by account
    };
    template <class Count>
    Census census(Count&& count) {
        transfers_.stop();
        Census census{usage(), accounts_.charged()};
        count();
        transfers_.restart();
        return census;
    }

    uint64_t budget() const { return budget_; }
    // Frames that nobody uses; an estimate while others take and give.
    uint64_t free() const { return uint64_t(quota_.left(kFrames)); }

    // So many free frames are MID.
    uint64_t enough() const { return low_ + low_ / 4; }

    // With few frames in all none are kept free ahead of need: of 15 pages or fewer the level is always HIGH.
    Level level() const { return level_of(free()); }

    // An eventfd, the pool's own, that is written when the level falls to LOW or CRITICAL, and when an allocation is
    // answered `reclaim`. A processor's stock may hide a fall for as many frames as it holds. -1: errno says why.
    int low_event() {
        std::lock_guard guard(wait_lock_);
        int event = event_.load(std::memory_order_relaxed);
        if (event < 0) {
            event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
            event_.store(event, std::memory_order_release);
        }
        return event;
    }

    bool distributed() const { return quota_.distributed(); }
    // Changes the form; allocations go on.
    void distribute(bool distributed) {
        quota_.distribute(distributed);
        accounts_.distribute(distributed);
        transfers_.distribute(distributed);
    }
    uint64_t uses_by(const runtime::Processor& processor) const { return quota_.uses_by(processor); }
    Traffic traffic() const { return quota_.traffic(); }

    Accounts& accounts() { return accounts_; }

  private:
    // Kinds of the quota. What overcommitted memory uses is not to be promised, either.
    static constexpr int kUnpromised = 0, kFrames = 1;

    static unsigned kinds_of(Backing backing) {
        return 1u << kFrames | (backing == Backing::overcommitted ? 1u << kUnpromised : 0u);
    }

    Level level_of(uint64_t free) const {
        if (free >= low_) return free >= 2 * low_ ? Level::high : Level::mid;
        return free >= low_ / 4 ? Level::low : Level::critical;
    }

    // Tells of a fall. Of those who look at once each tells of the falls that it has seen.
    void look_at_level(bool refused) {
        const auto now = level();
        Level before = last_level_.load(std::memory_order_relaxed);
        if (now != before) before = last_level_.exchange(now, std::memory_order_relaxed);
        if (!(refused || (now < before && now <= Level::low))) return;
        const int event = event_.load(std::memory_order_acquire);
        const uint64_t one = 1;
        if (event >= 0) [[maybe_unused]]
            const auto written = write(event, &one, sizeof one);
    }

    void tell_waiters() {
        if (waiters_.load(std::memory_order_seq_cst) == 0) return;
        {
            std::lock_guard guard(wait_lock_);
        }  // who is about to sleep does so first
        changed_.notify_all();
    }

    const uint64_t budget_;
    const uint64_t low_;
    std::atomic<int> event_{-1};
    std::atomic<uint32_t> waiters_{0};  // read by every release; written while frames are short
    std::atomic<Level> last_level_{Level::high};

    Quota<2, 3> quota_;

    alignas(runtime::apart) mutable std::mutex lock_;  // protects what follows; before the quota's
    uint64_t promised_anonymous_ = 0, promised_file_ = 0;

    std::mutex wait_lock_;  // held between a look at the changes and the sleep, and over the making of event_
    std::condition_variable changed_;

    Accounts accounts_;
    RegionGate transfers_;  // every change of frames and accounts enters; before all locks here
};

}  // namespace k42::vm
