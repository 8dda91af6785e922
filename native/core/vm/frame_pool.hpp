// The frames of the Global Page Manager (paper 4.2, figure 7, the non-distributed form: one lock). A frame is
// 4 KiB of budget; which memory backs it is decided where the page is (a memfd), so the pool counts.
//
// It also keeps the promises that make running out an error at creation, never a hang later: anonymous memory is
// reserved when it is made, memory made with overcommit only ever uses what is not promised to others, and enough
// for one page of every open file mapping is promised to files.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace k42::vm {

// Who stands behind a page: a file that can give it back at any time, or anonymous memory.
enum class Backing : uint8_t { file, reserved, overcommitted };

class FramePool {
  public:
    enum class Grant {
        granted,
        reclaim,   // none free now: get file pages back, then ask again
        exhausted  // none to be had for this backing until others give up theirs
    };

    struct Usage {
        uint64_t budget, file, reserved, overcommitted;  // frames in use, by backing
        uint64_t promised_anonymous, promised_file;      // frames promised
    };

    explicit FramePool(uint64_t budget) : usage_{budget, 0, 0, 0, 0, 0} {}

    // Promises `frames` to anonymous memory; false when they cannot be had.
    bool reserve(uint64_t frames) {
        std::lock_guard guard(lock_);
        if (frames > unpromised()) return false;
        usage_.promised_anonymous += frames;
        return true;
    }
    void unreserve(uint64_t frames) {
        std::lock_guard guard(lock_);
        usage_.promised_anonymous -= frames;
    }

    // Promises that a page of `frames` fits for files; false when it does not. Kept for good.
    bool promise_file(uint64_t frames) {
        std::lock_guard guard(lock_);
        if (frames <= usage_.promised_file) return true;
        if (frames - usage_.promised_file > unpromised()) return false;
        usage_.promised_file = frames;
        return true;
    }

    // All `frames` or none, so that two who wait for frames never hold what the other needs.
    Grant allocate(uint64_t frames, Backing backing) {
        std::lock_guard guard(lock_);
        if (backing == Backing::overcommitted && frames > unpromised()) return Grant::exhausted;
        if (used() + frames > usage_.budget) return Grant::reclaim;
        in_use(backing) += frames;
        return Grant::granted;
    }

    void release(uint64_t frames, Backing backing) {
        {
            std::lock_guard guard(lock_);
            in_use(backing) -= frames;
            ++changes_;
        }
        changed_.notify_all();
    }

    // Says that frames which were in I/O can be reclaimed from now on.
    void announce_reclaimable() {
        {
            std::lock_guard guard(lock_);
            ++changes_;
        }
        changed_.notify_all();
    }

    uint64_t changes() const {
        std::lock_guard guard(lock_);
        return changes_;
    }

    // Waits until changes() differs from `seen`; false when `timeout` came first.
    bool wait(uint64_t seen, std::chrono::milliseconds timeout) {
        std::unique_lock guard(lock_);
        return changed_.wait_for(guard, timeout, [&] { return changes_ != seen; });
    }

    Usage usage() const {
        std::lock_guard guard(lock_);
        return usage_;
    }

  private:
    uint64_t used() const { return usage_.file + usage_.reserved + usage_.overcommitted; }
    uint64_t unpromised() const {
        const uint64_t taken = usage_.promised_anonymous + usage_.promised_file + usage_.overcommitted;
        return usage_.budget > taken ? usage_.budget - taken : 0;
    }
    uint64_t& in_use(Backing backing) {
        switch (backing) {
            case Backing::file:
                return usage_.file;
            case Backing::reserved:
                return usage_.reserved;
            default:
                return usage_.overcommitted;
        }
    }

    mutable std::mutex lock_;  // protects usage_ and changes_; a leaf: taken with page descriptors locked
    std::condition_variable changed_;
    Usage usage_;
    uint64_t changes_ = 0;  // releases and announcements, for wait()
};

}  // namespace k42::vm
