// Disjoint half-open ranges of 64-bit keys to values: the region list of a Process (paper 4.1, figure 5), with
// logarithmic look-up in place of the paper's linear lists.
//
// SharedIntervalMap is one tree under one lock, ReplicatedIntervalMap has a copy for each processor of what it has
// looked up. The five questions of the paper (section 3.2), of the replicated one:
// - What is local: a replica for each processor, a tree of copies of the intervals that were looked up there. Its owner
//   alone reads and changes it; what others may do is to mark a copy as dead.
// - What is shared: the master, a tree of all intervals under a lock; each lists its copies. A look-up that finds a
//   living copy touches nothing of it.
// - How replicas are made and join: `join` makes an empty one. It is filled by look-ups that miss.
// - How local and global operations synchronise: a removal holds the master's lock; it marks every copy, then removes
//   the interval. A look-up takes effect when it reads the mark: before the removal, or it goes to the master, where
//   it waits for the lock, and comes after it. So no look-up that begins after a removal has returned finds what was
//   removed, and the map is linearizable. Dead copies go when their owner meets them, or when it adds a copy and more
//   than half are dead: so a replica has at most twice the copies that live, and a few more.
// - How replicas are organised: in a list, newest first; they live as long as the map.
//
// Keys that no interval contains are looked up in the master each time, as in the paper: absence is not replicated.
//
// A value that was looked up may have been removed by the time it is used. If it points to something, free that by
// `retire`, once it is removed, and look up within requests of the runtime.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "alloc/allocator.hpp"
#include "runtime/processor.hpp"

namespace k42 {

template <class Value>
struct Interval {
    uint64_t start;
    uint64_t end;  // exclusive
    Value value;

    bool operator==(const Interval&) const = default;
};

// Memory of the processor that asks: what replicas consist of shares no line with what others have.
template <class T>
struct LocalAllocator {
    using value_type = T;

    LocalAllocator() = default;
    template <class U>
    LocalAllocator(const LocalAllocator<U>&) {}

    T* allocate(size_t n) { return static_cast<T*>(alloc::allocate(n * sizeof(T))); }
    void deallocate(T* p, size_t) noexcept { alloc::deallocate(p); }
    bool operator==(const LocalAllocator&) const = default;
};

// Disjoint intervals in order, each with its end and something else; used by one thread at a time.
template <class Payload>
class IntervalTree {
  public:
    struct Node {
        uint64_t end;
        Payload payload;
    };
    // By start; what is in it does not move.
    using Nodes = std::map<uint64_t, Node, std::less<>, LocalAllocator<std::pair<const uint64_t, Node>>>;
    using Position = typename Nodes::iterator;

    // The interval that contains `key`, or `end()`.
    Position find(uint64_t key) { return containing(nodes_, key); }
    typename Nodes::const_iterator find(uint64_t key) const { return containing(nodes_, key); }

    // The first interval that overlaps the range, or `end()`.
    Position first_overlap(uint64_t start, uint64_t end) {
        const Position before = find(start);
        if (before != nodes_.end()) return before;
        const Position next = nodes_.lower_bound(start);
        return next != nodes_.end() && next->first < end ? next : nodes_.end();
    }

    // The range is not empty and overlaps no other.
    Position insert(uint64_t start, uint64_t end, Payload payload) {
        return nodes_.emplace(start, Node{end, std::move(payload)}).first;
    }

    Position at(uint64_t start) { return nodes_.find(start); }
    Position erase(Position position) { return nodes_.erase(position); }
    Position begin() { return nodes_.begin(); }
    Position end() { return nodes_.end(); }
    auto begin() const { return nodes_.begin(); }
    auto end() const { return nodes_.end(); }
    size_t size() const { return nodes_.size(); }

  private:
    template <class Map>
    static auto containing(Map& nodes, uint64_t key) {
        auto next = nodes.upper_bound(key);  // the first that starts after `key`
        if (next == nodes.begin()) return nodes.end();
        auto candidate = std::prev(next);
        return key < candidate->second.end ? candidate : nodes.end();
    }

    Nodes nodes_;
};

template <class Value>
class SharedIntervalMap {
  public:
    using Interval = k42::Interval<Value>;

    // False, and nothing changed, when the range is empty or overlaps another: then `*overlapped` is the first of them.
    bool insert(uint64_t start, uint64_t end, Value value, Interval* overlapped = nullptr) {
        if (start >= end) return false;
        std::lock_guard guard(lock_);
        const auto overlap = intervals_.first_overlap(start, end);
        if (overlap != intervals_.end()) {
            if (overlapped) *overlapped = {overlap->first, overlap->second.end, overlap->second.payload};
            return false;
        }
        intervals_.insert(start, end, value);
        return true;
    }

    std::optional<Interval> lookup(uint64_t key) const {
        std::lock_guard guard(lock_);
        const auto found = intervals_.find(key);
        if (found == intervals_.end()) return std::nullopt;
        return Interval{found->first, found->second.end, found->second.payload};
    }

    // Removes the range that starts at `start` and returns its value.
    std::optional<Value> remove(uint64_t start) {
        std::lock_guard guard(lock_);
        const auto found = intervals_.at(start);
        if (found == intervals_.end()) return std::nullopt;
        Value value = found->second.payload;
        intervals_.erase(found);
        return value;
    }

    size_t size() const {
        std::lock_guard guard(lock_);
        return intervals_.size();
    }

    // All intervals at one moment, in order.
    std::vector<Interval> snapshot() const {
        std::lock_guard guard(lock_);
        std::vector<Interval> all;
        all.reserve(intervals_.size());
        for (const auto& [start, node] : intervals_) all.push_back({start, node.end, node.payload});
        return all;
    }

    // Calls visit(interval) for each until one returns what is not 0; without the lock: only while nobody changes the
    // map.
    template <class Visit>
    int visit(Visit visit) const {
        for (const auto& [start, node] : intervals_) {
            if (const int stop = visit(Interval{start, node.end, node.payload})) return stop;
        }
        return 0;
    }

  private:
    mutable std::mutex lock_;  // protects intervals_; a leaf: no other lock is taken while it is held
    IntervalTree<Value> intervals_;
};

template <class Value>
class ReplicatedIntervalMap {
  public:
    using Interval = k42::Interval<Value>;

    class Replica;

  private:
    // A copy in a replica. From its making until it is dead the master has it in a list; then only the owner knows it.
    struct Copy {
        Value value;
        Replica* replica;
        Copy* next;  // copies of the same interval; protected by the master's lock
        std::atomic<bool> dead{false};

        Copy(Value value_, Replica* replica_, Copy* next_) : value(value_), replica(replica_), next(next_) {}
        Copy(Copy&& other) noexcept : value(other.value), replica(other.replica), next(other.next) {}
    };

    struct Original {
        Value value;
        Copy* copies = nullptr;
    };

  public:
    // The intervals that one processor has looked up; by the owner of the processor alone.
    class alignas(runtime::apart) Replica {
      public:
        Replica(ReplicatedIntervalMap& map, Replica* next) : map_(map), next_(next) {}

        std::optional<Interval> lookup(uint64_t key) {
            const auto found = copies_.find(key);
            if (found != copies_.end()) {
                // Acquire: pairs with the release in `remove`, so that the copy is ours alone when it is dead.
                if (!found->second.payload.dead.load(std::memory_order_acquire)) [[likely]]
                    return Interval{found->first, found->second.end, found->second.payload.value};
                erase(found);
            }
            return miss(key);
        }

        // How many copies there are, dead ones with them.
        size_t copies() const { return copies_.size(); }

      private:
        friend ReplicatedIntervalMap;
        using Position = typename IntervalTree<Copy>::Position;

        Position erase(Position position) {
            dead_.fetch_sub(1, std::memory_order_relaxed);
            return copies_.erase(position);
        }

        std::optional<Interval> miss(uint64_t key) {
            if (dead_.load(std::memory_order_relaxed) > kFew + copies_.size() / 2) sweep();
            std::lock_guard guard(map_.lock_);
            const auto found = map_.master_.find(key);
            if (found == map_.master_.end()) return std::nullopt;
            const uint64_t start = found->first, end = found->second.end;
            Original& original = found->second.payload;
            // What overlaps a living interval here is dead, and was marked before that could be inserted.
            for (Position old; (old = copies_.first_overlap(start, end)) != copies_.end();) erase(old);
            const Position made = copies_.insert(start, end, Copy(original.value, this, original.copies));
            original.copies = &made->second.payload;
            return Interval{start, end, original.value};
        }

        void sweep() {
            for (Position at = copies_.begin(); at != copies_.end();) {
                at = at->second.payload.dead.load(std::memory_order_acquire) ? erase(at) : std::next(at);
            }
        }

        static constexpr size_t kFew = 16;

        ReplicatedIntervalMap& map_;
        Replica* const next_;
        IntervalTree<Copy> copies_;
        // Dead copies in copies_: raised by removals, lowered by the owner.
        alignas(runtime::apart) std::atomic<size_t> dead_{0};
    };

    ReplicatedIntervalMap() = default;
    ReplicatedIntervalMap(const ReplicatedIntervalMap&) = delete;
    ReplicatedIntervalMap& operator=(const ReplicatedIntervalMap&) = delete;
    ~ReplicatedIntervalMap() {
        while (replicas_) alloc::destroy(std::exchange(replicas_, replicas_->next_));
    }

    // A new replica, for the processor of the caller: made by the thread that will use it, so that its memory is near.
    Replica& join() {
        std::lock_guard guard(lock_);
        return *(replicas_ = alloc::make<Replica, alloc::Kind::padded>(*this, replicas_));
    }

    // False, and nothing changed, when the range is empty or overlaps another: then `*overlapped` is the first of them.
    bool insert(uint64_t start, uint64_t end, Value value, Interval* overlapped = nullptr) {
        if (start >= end) return false;
        std::lock_guard guard(lock_);
        const auto overlap = master_.first_overlap(start, end);
        if (overlap != master_.end()) {
            if (overlapped) *overlapped = {overlap->first, overlap->second.end, overlap->second.payload.value};
            return false;
        }
        master_.insert(start, end, Original{value});
        return true;
    }

    // Removes the range that starts at `start`, and all its copies, and returns its value.
    std::optional<Value> remove(uint64_t start) {
        std::lock_guard guard(lock_);
        const auto found = master_.at(start);
        if (found == master_.end()) return std::nullopt;
        for (Copy* copy = found->second.payload.copies; copy;) {
            Copy* const next = copy->next;  // a dead copy is its owner's
            copy->replica->dead_.fetch_add(1, std::memory_order_relaxed);
            copy->dead.store(true, std::memory_order_release);
            copy = next;
        }
        Value value = found->second.payload.value;
        master_.erase(found);
        return value;
    }

    size_t size() const {
        std::lock_guard guard(lock_);
        return master_.size();
    }

    // All intervals at one moment, in order.
    std::vector<Interval> snapshot() const {
        std::lock_guard guard(lock_);
        std::vector<Interval> all;
        all.reserve(master_.size());
        for (const auto& [start, node] : master_) all.push_back({start, node.end, node.payload.value});
        return all;
    }

    // Calls visit(interval) for each until one returns what is not 0; without the lock: only while nobody changes the
    // map.
    template <class Visit>
    int visit(Visit visit) const {
        for (const auto& [start, node] : master_) {
            if (const int stop = visit(Interval{start, node.end, node.payload.value})) return stop;
        }
        return 0;
    }

  private:
    mutable std::mutex lock_;  // protects master_, replicas_ and the lists of copies; a leaf, nothing is taken under it
    IntervalTree<Original> master_;
    Replica* replicas_ = nullptr;  // newest first
};

}  // namespace k42
