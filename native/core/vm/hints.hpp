// Hints to Python: a fault came to the place where the next read-ahead is due, or native read-ahead found no frames.
// Losing one costs time, never a byte, so a full queue drops.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>

namespace k42::vm {

struct Hint {
    uint64_t id;         // whose, as set_marker() was told
    uint64_t page;       // that was touched, and bears the marker
    uint64_t client;     // by whom: the HAT's number
    uint32_t count = 0;  // not 0: so many pages from there on are to be brought in
};

class HintQueue {
  public:
    static constexpr size_t kMost = 1024;

    void push(Hint hint) {
        {
            std::lock_guard guard(lock_);
            if (closed_ || queue_.size() >= kMost) return;
            queue_.push_back(hint);
        }
        filled_.notify_one();
    }
    // Waits for one; nothing once the queue is closed.
    std::optional<Hint> next() {
        std::unique_lock guard(lock_);
        filled_.wait(guard, [&] { return closed_ || !queue_.empty(); });
        if (closed_) return std::nullopt;
        const Hint hint = queue_.front();
        queue_.pop_front();
        return hint;
    }
    void close() {
        {
            std::lock_guard guard(lock_);
            closed_ = true;
        }
        filled_.notify_all();
    }

  private:
    std::mutex lock_;  // protects all; a leaf: taken with page descriptors locked
    std::condition_variable filled_;
    std::deque<Hint> queue_;
    bool closed_ = false;
};

}  // namespace k42::vm
