// Counters, as in the motivating example of the paper (section 1.1, figure 1): one under a lock, one atomic, one
// with a part for each processor in an array, one with the parts kept apart. 64 bits signed. Overflow is found
// where it happens: an add that would leave the range adds nothing and returns false.
//
// The five questions of the paper (section 3.2), for the two with parts; the others share everything:
// - What is local: a part for each processor, which its owner alone writes.
// - What is shared: the start, and the list of the parts. An add touches neither.
// - How parts are made and join: `join` makes one that counts 0, and from then on gathering reads it. A part
//   belongs to a processor, not to a thread: the next owner goes on with it, so what was counted stays.
// - How local and global operations synchronise: they do not. An add is a plain load and store of its part;
//   gathering reads all parts, one after the other, while their owners go on.
// - How parts are organised: in blocks, newest first, that never move and live as long as the counter.
//
// What gathering guarantees. Each part is one atomic variable with one writer, so by coherence alone: it counts
// every add that happens before it; one gathering that happens after another counts no less in any part, so
// without negative adds it returns no less; and without them, it returns no less than the count when it began and no
// more than the count when it ended. It is not a snapshot: of two concurrent adds on different processors it may
// count the later one alone.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <utility>

#include "alloc/allocator.hpp"
#include "runtime/processor.hpp"

namespace k42 {

// One count for all, under a lock.
class SharedCount {
  public:
    explicit SharedCount(int64_t start) : count_(start) {}

    bool add(int64_t k) {
        std::lock_guard guard(lock_);
        return locked_add(k);
    }
    // Never waits: nothing when the lock is taken.
    std::optional<bool> try_add(int64_t k) {
        std::unique_lock guard(lock_, std::try_to_lock);
        if (!guard) return std::nullopt;
        return locked_add(k);
    }
    int64_t value() const {
        std::lock_guard guard(lock_);
        return count_.load(std::memory_order_relaxed);
    }
    // Without the lock.
    int64_t approximate() const { return count_.load(std::memory_order_relaxed); }

  private:
    bool locked_add(int64_t k) {
        int64_t sum;
        if (__builtin_add_overflow(count_.load(std::memory_order_relaxed), k, &sum)) return false;
        count_.store(sum, std::memory_order_relaxed);
        return true;
    }

    mutable std::mutex lock_;     // protects count_; innermost, nothing is called under it
    std::atomic<int64_t> count_;  // atomic for approximate() alone
};

// One count for all, changed atomically. A loop, like the paper's load-and-reserve: x86's own fetch-and-add saves a
// quarter of it under contention, and wraps around before anyone can object.
class AtomicCount {
  public:
    explicit AtomicCount(int64_t start) : count_(start) {}

    bool add(int64_t k) {
        int64_t seen = count_.load(std::memory_order_relaxed), sum;
        do {
            if (__builtin_add_overflow(seen, k, &sum)) return false;
        } while (!count_.compare_exchange_weak(seen, sum, std::memory_order_release, std::memory_order_relaxed));
        return true;
    }
    // Acquire: whoever sees an add sees what its thread did before; pairs with the release in `add`.
    int64_t value() const { return count_.load(std::memory_order_acquire); }
    int64_t approximate() const { return count_.load(std::memory_order_relaxed); }

  private:
    std::atomic<int64_t> count_;
};

// What one processor has counted.
class CountPart {
  public:
    // By the owner of the processor alone.
    bool add(int64_t k) {
        int64_t sum;
        if (__builtin_add_overflow(count_.load(std::memory_order_relaxed), k, &sum)) return false;
        count_.store(sum, std::memory_order_release);  // pairs with the acquire of a gathering that sees it
        return true;
    }
    int64_t load(std::memory_order order) const { return count_.load(order); }

  private:
    std::atomic<int64_t> count_{0};
};

// The distance of neighbours that must not share a line is `runtime::apart`, 128 bytes: a line of x86 is 64, but its
// prefetcher fetches lines in pairs; other processors have lines of 128 (the paper's own among them). GCC's
// std::hardware_destructive_interference_size says 64, and that it may change with -mtune.
struct alignas(runtime::apart) PaddedPart : CountPart {};
struct PackedPart : CountPart {};
inline constexpr std::size_t packed = 2 * runtime::apart / sizeof(PackedPart);  // parts in a block: four lines

// A part for each processor, `Together` of them in a block that begins at a line of its own.
template <typename Part_, std::size_t Together>
class PerProcessorCount {
  public:
    using Part = Part_;

    explicit PerProcessorCount(int64_t start) : start_(start) {}
    PerProcessorCount(const PerProcessorCount&) = delete;
    PerProcessorCount& operator=(const PerProcessorCount&) = delete;
    ~PerProcessorCount() {
        Block* block = blocks_.load(std::memory_order_relaxed);
        while (block) alloc::destroy(std::exchange(block, block->next));
    }

    // A new part, for the processor of the caller: made by the thread that will use it, so that its memory is near.
    Part& join() {
        std::lock_guard guard(lock_);
        if (joined_ % Together == 0) {
            auto* block = alloc::make<Block, alloc::Kind::padded>();
            block->next = blocks_.load(std::memory_order_relaxed);
            blocks_.store(block, std::memory_order_release);  // complete for whoever gathers
        }
        return blocks_.load(std::memory_order_relaxed)->parts[joined_++ % Together];
    }

    // The start and all parts; nothing when that is more than 64 bits.
    std::optional<int64_t> value() const { return gather(std::memory_order_acquire); }
    // The same, ordering nothing.
    std::optional<int64_t> approximate() const { return gather(std::memory_order_relaxed); }

  private:
    struct alignas(runtime::apart) Block {
        std::array<Part, Together> parts{};  // those that nobody has yet count 0
        Block* next = nullptr;
    };

    std::optional<int64_t> gather(std::memory_order order) const {
        __extension__ __int128 sum = start_;
        for (const Block* block = blocks_.load(std::memory_order_acquire); block; block = block->next)
            for (const Part& part : block->parts) sum += part.load(order);
        const auto value = static_cast<int64_t>(sum);
        return value == sum ? std::optional(value) : std::nullopt;
    }

    const int64_t start_;
    std::mutex lock_;  // orders joins: protects joined_ and the changes of blocks_; innermost
    std::size_t joined_ = 0;
    std::atomic<Block*> blocks_{nullptr};
};

using PackedCount = PerProcessorCount<PackedPart, packed>;  // neighbours share lines: false sharing, to be seen
using PaddedCount = PerProcessorCount<PaddedPart, 1>;

}  // namespace k42
