// Pools of free items, which whoever needs one takes and gives back: the free lists of the Global Page Manager (paper
// 4.2, figure 7), for items of any kind.
//
// SharedPool has one list under one lock, DistributedPool a list for each processor. The five questions of the paper
// (section 3.2), of the distributed one:
// - What is local: a list for each processor, of at most `cap` items, on lines of its own. Its owner takes and gives
//   there by plain loads and stores.
// - What is shared: the list of the root, which takes the overflow; and whether the pool is closed, on a line that is
//   only read while it is not. Items move between a list and the root in chunks of half a cap.
// - How parts are made and join: `join` makes one with an empty list.
// - How local and global operations synchronise: a lock that is biased to the owner. The owner says that it is busy
//   with its list, then looks whether the pool is closed; who needs all lists holds the root's lock, closes the pool,
//   and waits for those who are busy. The barrier that this needs is paid by the closer (runtime/fence.hpp).
// - How parts are organised: in a list, newest first; they live as long as the pool.
//
// No item is stranded: who finds neither its own list nor the root's with an item takes from the fullest list, half
// of what is there, and nobody is refused before all lists were seen empty at one moment. While somebody waits for an
// item the pool stays closed, so that every item that is given back goes to who has waited longest.
//
// Items are conserved: free in some list, or taken, they are `size` in all, at every moment that `counts` reports.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "alloc/allocator.hpp"
#include "runtime/fence.hpp"
#include "runtime/processor.hpp"
#include "structures/futex.hpp"

namespace k42 {

// What a pool gives to who asks: an item, the right to make one more, or nothing.
enum class Grant { taken, make, none };

struct PoolCounts {
    uint64_t size;    // items in all: taken + local + shared
    uint64_t taken;   // not given back yet, or on their way to who waited for one
    uint64_t local;   // free, in the lists of processors
    uint64_t shared;  // free, in the list of all
};

// Somebody who waits for an item. It has a place in the queue of one pool from a `take` that granted nothing until
// `settle`.
template <typename Item>
class PoolWaiter {
  public:
    PoolWaiter() = default;
    PoolWaiter(const PoolWaiter&) = delete;
    PoolWaiter& operator=(const PoolWaiter&) = delete;

    // Sleeps until there is news, or until `deadline`; may return early.
    void wait(Deadline deadline) { futex_wait(state_, kWaiting, deadline); }
    bool waiting() const { return state_.load(std::memory_order_acquire) == kWaiting; }

  private:
    template <typename>
    friend class PoolRoot;
    enum : uint32_t { kIdle, kWaiting, kGranted, kRetry };

    // With the pool's lock held; the waiter does not go before it has had it, in `settle`.
    void tell(uint32_t news) {
        state_.store(news, std::memory_order_release);
        futex_wake_all(state_);
    }

    std::atomic<uint32_t> state_{kIdle};
    Item item_{};  // when granted
    PoolWaiter* previous_ = nullptr;
    PoolWaiter* next_ = nullptr;
};

// What all pools share: the list of the root, the count of the items, and the queue of those who wait.
template <typename Item>
class PoolRoot {
    static_assert(std::is_trivially_copyable_v<Item>);

  public:
    using Waiter = PoolWaiter<Item>;

    // There are never more than `capacity` items that were made by `Grant::make`.
    explicit PoolRoot(uint64_t capacity) : capacity_(capacity) {}
    PoolRoot(const PoolRoot&) = delete;
    PoolRoot& operator=(const PoolRoot&) = delete;

    // A new item, which is free. Throws std::bad_alloc: lists are made for all items here, so that giving back never
    // fails.
    void add(Item item) {
        std::lock_guard guard(lock_);
        make_room();
        ++size_;
        put(item);
    }
    // A new item, which the caller has taken. Throws std::bad_alloc.
    void add_taken() {
        std::lock_guard guard(lock_);
        make_room();
        ++size_;
        ++taken_;
    }

    // After `Grant::make`, one of the two: the item was made, and the caller has it; or it was not, then those who wait
    // ask again.
    void made() {
        std::lock_guard guard(lock_);
        --making_;
        ++size_;
        ++taken_;
    }
    void unmade() {
        std::lock_guard guard(lock_);
        --making_;
        dismiss();
    }

    // Ends a waiting. True: an item had been handed over, the caller has taken it.
    bool settle(Waiter& waiter, Item& item) {
        std::lock_guard guard(lock_);
        const uint32_t state = waiter.state_.exchange(Waiter::kIdle, std::memory_order_acquire);
        if (state == Waiter::kWaiting) {
            unlink(waiter);
            open_if_nobody_waits();
        }
        if (state != Waiter::kGranted) return false;
        item = waiter.item_;
        return true;
    }

    // Those who wait shall ask again.
    void wake() {
        std::lock_guard guard(lock_);
        dismiss();
    }

    uint64_t capacity() const {
        std::lock_guard guard(lock_);
        return capacity_;
    }
    void set_capacity(uint64_t capacity) {
        std::lock_guard guard(lock_);
        capacity_ = capacity;
    }
    uint64_t size() const {
        std::lock_guard guard(lock_);
        return size_;
    }

  protected:
    // What follows is called with the lock held.

    bool can_make() const { return size_ + making_ < capacity_; }

    Grant make_or_wait(Waiter* waiter) {
        if (can_make()) {
            make_room();
            ++making_;
            return Grant::make;
        }
        if (waiter) {
            waiter->state_.store(Waiter::kWaiting, std::memory_order_relaxed);
            waiter->previous_ = last_;
            waiter->next_ = nullptr;
            (last_ ? last_->next_ : first_) = waiter;
            last_ = waiter;
        }
        return Grant::none;
    }

    // A free item: to who has waited longest, else into the list of all, which has room for it.
    void put(Item item) {
        if (Waiter* waiter = first_) {
            unlink(*waiter);
            ++taken_;
            waiter->item_ = item;
            waiter->tell(Waiter::kGranted);
            open_if_nobody_waits();
        } else {
            free_.push_back(item);
        }
    }

    void open_if_nobody_waits() {
        if (!first_) closed_.store(false, std::memory_order_release);  // pairs with the acquire of owners
    }

    // Protects what is below, and the lists of a closed pool. Innermost, no Python runs under it; its holder waits for
    // owners that are busy, which take no lock then.
    mutable std::mutex lock_;
    std::vector<Item> free_;  // the list of all, with room for every item
    int64_t taken_ = 0;       // by way of the root; negative when more came back than went
    Waiter* first_ = nullptr;
    // Read at each local operation, written with the lock held. On lines of its own.
    alignas(runtime::apart) std::atomic<bool> closed_{false};

  private:
    void make_room() {
        const std::size_t wanted = size_ + making_ + 1;
        if (free_.capacity() < wanted) free_.reserve(std::max(wanted, 2 * free_.capacity()));
    }

    void unlink(Waiter& waiter) {
        (waiter.previous_ ? waiter.previous_->next_ : first_) = waiter.next_;
        (waiter.next_ ? waiter.next_->previous_ : last_) = waiter.previous_;
    }

    void dismiss() {
        while (Waiter* waiter = first_) {
            unlink(*waiter);
            waiter->tell(Waiter::kRetry);
        }
        open_if_nobody_waits();
    }

    // On lines of their own after closed_, protected by lock_ too.
    alignas(runtime::apart) Waiter* last_ = nullptr;
    uint64_t size_ = 0;
    uint64_t making_ = 0;  // granted to who makes one now
    uint64_t capacity_;
};

// One list for all, under the lock.
template <typename Item>
class SharedPool : public PoolRoot<Item> {
    using Root = PoolRoot<Item>;
    using Root::free_;
    using Root::lock_;
    using Root::taken_;

  public:
    using typename Root::Waiter;
    struct Part {};  // nothing is local

    explicit SharedPool(uint64_t capacity) : Root(capacity) {}

    Part& join() { return part_; }

    // Never waits. False: there is no item, or the lock is taken; ask `take`.
    bool try_take(Part&, Item& item) {
        std::unique_lock guard(lock_, std::try_to_lock);
        return guard && pop(item);
    }
    // With a waiter: where nothing is granted, it has a place in the queue from now on. Throws std::bad_alloc.
    Grant take(Part&, Item& item, Waiter* waiter = nullptr) {
        std::lock_guard guard(lock_);
        return pop(item) ? Grant::taken : this->make_or_wait(waiter);
    }

    // Never waits. False: the lock is taken; ask `give`.
    bool try_give(Part&, Item item) {
        std::unique_lock guard(lock_, std::try_to_lock);
        if (!guard) return false;
        push(item);
        return true;
    }
    void give(Part&, Item item) {
        std::lock_guard guard(lock_);
        push(item);
    }

    PoolCounts counts() {
        std::lock_guard guard(lock_);
        const uint64_t shared = free_.size();
        return {shared + uint64_t(taken_), uint64_t(taken_), 0, shared};
    }
    std::vector<Item> free_items() {
        std::lock_guard guard(lock_);
        return free_;
    }

  private:
    bool pop(Item& item) {
        if (free_.empty()) return false;
        item = free_.back();
        free_.pop_back();
        ++taken_;
        return true;
    }
    void push(Item item) {
        --taken_;
        this->put(item);
    }

    Part part_;
};

// A list for each processor.
template <typename Item>
class DistributedPool : public PoolRoot<Item> {
    using Root = PoolRoot<Item>;
    using Root::closed_;
    using Root::first_;
    using Root::free_;
    using Root::lock_;
    using Root::taken_;

  public:
    using typename Root::Waiter;

    // What one processor has; by its owner, or, in a closed pool, by who holds the lock.
    class alignas(runtime::apart) Part {
        friend class DistributedPool;

        explicit Part(uint32_t size) : cap(size) {}

        Item* items() { return reinterpret_cast<Item*>(this + 1); }  // `cap` of them, in the same block
        bool full() const { return count.load(std::memory_order_relaxed) == cap; }
        void push(Item item) {
            const uint32_t n = count.load(std::memory_order_relaxed);
            items()[n] = item;
            count.store(n + 1, std::memory_order_relaxed);
        }
        bool pop(Item& item) {
            const uint32_t n = count.load(std::memory_order_relaxed);
            if (n == 0) return false;
            item = items()[n - 1];
            count.store(n - 1, std::memory_order_relaxed);
            return true;
        }

        std::atomic<bool> busy{false};   // the owner is in its list, or about to find that it must not be
        std::atomic<uint32_t> count{0};  // atomic for those who look for the fullest list
        const uint32_t cap;
        int64_t taken = 0;  // by way of this list; negative when more came back than went
        Part* next = nullptr;
    };
    static_assert(alignof(Item) <= alignof(Part));

    // Args: `cap` is the most that the list of a processor holds, at least 1.
    DistributedPool(uint64_t capacity, uint32_t cap)
        : Root(capacity), cap_(cap), chunk_(std::max<std::size_t>(1, cap / 2)) {}
    ~DistributedPool() {
        while (parts_) {
            Part* part = std::exchange(parts_, parts_->next);
            part->~Part();
            alloc::deallocate(part);
        }
    }

    // A new part, for the processor of the caller: made by the thread that will use it, so that its memory is near.
    // Throws std::bad_alloc.
    Part& join() {
        void* block = alloc::allocate(sizeof(Part) + cap_ * sizeof(Item), alloc::Kind::padded);
        Part* part = new (block) Part(cap_);
        std::uninitialized_value_construct_n(part->items(), cap_);
        std::lock_guard guard(lock_);
        part->next = parts_;
        parts_ = part;
        return *part;
    }

    // From the list of the part, by its owner. Never waits. False: it is empty, or the pool is closed; ask `take`.
    bool try_take(Part& part, Item& item) {
        const Busy busy(part, *this);
        if (!busy || !part.pop(item)) return false;
        ++part.taken;
        return true;
    }
    // From any list, by the owner of the part. With a waiter: where nothing is granted, it has a place in the queue
    // from now on. Throws std::bad_alloc.
    Grant take(Part& part, Item& item, Waiter* waiter = nullptr) {
        std::lock_guard guard(lock_);  // so nobody closes the pool: the own list is the owner's as before
        if (part.count.load(std::memory_order_relaxed) == 0) refill(part);
        if (part.pop(item)) {
            ++part.taken;
            return Grant::taken;
        }
        if (this->can_make() && !fullest()) return this->make_or_wait(waiter);
        const Closed closed(*this);
        if (Part* other = fullest()) {
            steal(*other, part);
            part.pop(item);
            ++part.taken;
            return Grant::taken;
        }
        return this->make_or_wait(waiter);
    }

    // Into the list of the part, by its owner. Never waits. False: it is full, or the pool is closed; ask `give`.
    bool try_give(Part& part, Item item) {
        const Busy busy(part, *this);
        if (!busy || part.full()) return false;
        part.push(item);
        --part.taken;
        return true;
    }
    void give(Part& part, Item item) {
        std::lock_guard guard(lock_);
        if (first_) {
            --taken_;
            return this->put(item);
        }
        if (part.full()) spill(part);
        part.push(item);
        --part.taken;
    }

    PoolCounts counts() {
        std::lock_guard guard(lock_);
        const Closed closed(*this);
        int64_t taken = taken_;
        uint64_t local = 0;
        for (const Part* part = parts_; part; part = part->next) {
            taken += part->taken;
            local += part->count.load(std::memory_order_relaxed);
        }
        const uint64_t shared = free_.size();
        return {shared + local + uint64_t(taken), uint64_t(taken), local, shared};
    }
    std::vector<Item> free_items() {
        std::lock_guard guard(lock_);
        const Closed closed(*this);
        std::vector<Item> items = free_;
        for (Part* part = parts_; part; part = part->next)
            items.insert(items.end(), part->items(), part->items() + part->count.load(std::memory_order_relaxed));
        return items;
    }

  private:
    // The owner is busy with its list. False: the pool is closed, hands off.
    class Busy {
      public:
        Busy(Part& part, const DistributedPool& pool) : part_(part) {
            part.busy.store(true, std::memory_order_relaxed);
            runtime::fence_light();  // "busy" before the look at `closed_`: pairs with the heavy fence of Closed
            open_ = !pool.closed_.load(std::memory_order_acquire);
        }
        ~Busy() { part_.busy.store(false, std::memory_order_release); }
        Busy(const Busy&) = delete;
        Busy& operator=(const Busy&) = delete;
        explicit operator bool() const { return open_; }

      private:
        Part& part_;
        bool open_;
    };

    // With the lock held: all lists are the caller's. It opens again, unless somebody waits by then.
    class Closed {
      public:
        explicit Closed(DistributedPool& pool) : pool_(pool) {
            if (pool.closed_.load(std::memory_order_relaxed)) return;  // somebody waits
            pool.closed_.store(true, std::memory_order_relaxed);
            runtime::fence_heavy();  // "closed" before the look at who is busy: pairs with Busy
            for (const Part* part = pool.parts_; part; part = part->next) {
                // A few instructions, unless its thread has lost its CPU meanwhile.
                while (part->busy.load(std::memory_order_acquire)) std::this_thread::yield();
            }
        }
        ~Closed() { pool_.open_if_nobody_waits(); }
        Closed(const Closed&) = delete;
        Closed& operator=(const Closed&) = delete;

      private:
        DistributedPool& pool_;
    };

    // With the lock held. An empty pool need not be closed to be seen as such, but others may give meanwhile.
    Part* fullest() {
        Part* found = nullptr;
        uint32_t most = 0;
        for (Part* part = parts_; part; part = part->next) {
            const uint32_t count = part->count.load(std::memory_order_relaxed);
            if (count > most) {
                most = count;
                found = part;
            }
        }
        return found;
    }

    void refill(Part& part) {
        for (std::size_t n = std::min(chunk_, free_.size()); n; --n) {
            part.push(free_.back());
            free_.pop_back();
        }
    }
    void spill(Part& part) {
        Item item;
        for (std::size_t n = chunk_; n && part.pop(item); --n) free_.push_back(item);
    }
    void steal(Part& from, Part& to) {
        const std::size_t half = (from.count.load(std::memory_order_relaxed) + 1) / 2;
        Item item;
        for (std::size_t n = std::min(chunk_, half); n && from.pop(item); --n) to.push(item);
    }

    const uint32_t cap_;
    const std::size_t chunk_;
    Part* parts_ = nullptr;  // protected by lock_
};

}  // namespace k42
