// Disjoint half-open ranges of 64-bit keys to values: the region list of a Process (paper 4.1, figure 5, the
// non-distributed form: one list, one lock), with logarithmic look-up in place of the paper's linear list.
#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

namespace k42 {

template <class Value>
class IntervalMap {
  public:
    struct Interval {
        uint64_t start;
        uint64_t end;  // exclusive
        Value value;
    };

    // False, and nothing changed, when the range is empty or overlaps another.
    bool insert(uint64_t start, uint64_t end, Value value) {
        if (start >= end) return false;
        std::lock_guard guard(lock_);
        auto next = after(start);
        if (next != intervals_.end() && next->start < end) return false;
        if (next != intervals_.begin() && std::prev(next)->end > start) return false;
        intervals_.insert(next, Interval{start, end, value});
        return true;
    }

    std::optional<Interval> lookup(uint64_t key) const {
        std::lock_guard guard(lock_);
        auto next = after(key);
        if (next == intervals_.begin()) return std::nullopt;
        const Interval& candidate = *std::prev(next);
        if (key >= candidate.end) return std::nullopt;
        return candidate;
    }

    // Removes the range that starts at `start` and returns its value.
    std::optional<Value> remove(uint64_t start) {
        std::lock_guard guard(lock_);
        auto next = after(start);
        if (next == intervals_.begin() || std::prev(next)->start != start) return std::nullopt;
        Value value = std::prev(next)->value;
        intervals_.erase(std::prev(next));
        return value;
    }

    size_t size() const {
        std::lock_guard guard(lock_);
        return intervals_.size();
    }

    std::vector<Interval> snapshot() const {
        std::lock_guard guard(lock_);
        return intervals_;
    }

  private:
    // The first interval that starts after `key`; call with lock_ held.
    auto after(uint64_t key) const {
        return std::upper_bound(intervals_.begin(), intervals_.end(), key,
                                [](uint64_t k, const Interval& i) { return k < i.start; });
    }

    mutable std::mutex lock_;          // protects intervals_; a leaf: no other lock is taken while it is held
    std::vector<Interval> intervals_;  // sorted by start
};

}  // namespace k42
