// A processor's pool of blocks: free lists by size, and the slabs that they come from.
//
// Only the processor's owner touches a pool, without locks or atomic operations: except for one list, on which other
// processors return its blocks. When the owner's thread ends the pool waits, with all that is in it and all that still
// comes home, for the next owner.
//
// Each size has a free list, last in, first out, and an auxiliary list of one batch. A batch goes to the slabs only
// when both are full and comes from them only when both are empty: so a program that allocates and frees around any
// number works on the free list alone. An empty slab serves another size, or goes back to the system when the pool has
// enough of them.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "alloc/size_class.hpp"
#include "alloc/slab.hpp"
#include "runtime/processor.hpp"

namespace k42::alloc {

// One writer, many readers.
using Count = std::atomic<std::uint64_t>;
inline void add(Count& count, std::uint64_t k = 1) {
    count.store(count.load(std::memory_order_relaxed) + k, std::memory_order_relaxed);
}
inline void subtract(Count& count, std::uint64_t k) { add(count, -k); }

// The blocks of one size. Of the owner alone, but for the readers of the counts.
struct alignas(64) Bin {
    Block* free = nullptr;
    Block* spare = nullptr;   // the auxiliary list: a batch or nothing
    std::uint32_t count = 0;  // blocks in `free`, at most a batch
    std::uint32_t batch = 0;
    Count allocated{0};
    Count freed{0};     // here, blocks of this pool
    Count sent{0};      // freed here, blocks of other pools
    Count returned{0};  // blocks of this pool that came home
    Count held{0};      // bytes of slabs
};

class alignas(runtime::apart) Pool {
  public:
    explicit Pool(std::uint32_t processor);

    // By the owner: a block of this class.
    void* allocate(unsigned c) {
        Bin& bin = bins_[c];
        Block* block = bin.free;
        if (!block) [[unlikely]]
            block = refill(c);
        bin.free = next(block);
        --bin.count;
        add(bin.allocated);
        return block;
    }

    // By the owner: a block of this pool.
    void deallocate(void* p, unsigned c) noexcept {
        Bin& bin = bins_[c];
        if (bin.count == bin.batch) [[unlikely]]
            spill(bin);
        auto* block = static_cast<Block*>(p);
        set_next(block, bin.free);
        bin.free = block;
        ++bin.count;
        add(bin.freed);
    }

    // By the owner: a block of another pool. It goes home with the next batch.
    void send(void* p, const Slab& slab) noexcept;

    // By a thread without a pool: a block of this one.
    void take_stray(void* p, unsigned c) noexcept;

    // By the owner: a block that is larger than any class.
    void* allocate_large(std::size_t size);
    // By anyone: such a block of any pool. `here` is the caller's pool or nullptr.
    static void deallocate_large(Slab& slab, Pool* here) noexcept;

    // By the owner: sends what waits for a batch, takes in what has come home.
    void settle() noexcept;

    std::uint32_t processor() const { return processor_; }
    // The counts of a class; of the large blocks after the last one.
    const Bin& bin(unsigned c) const { return bins_[c]; }
    std::uint64_t strays(unsigned c) const { return strays_[c].load(std::memory_order_relaxed); }
    // Bytes of empty slabs that wait for use.
    std::size_t waiting() const { return waiting_.load(std::memory_order_relaxed) * slab_size; }

    // In the child of a fork: pools whose owners are gone, in one list.
    Pool* next_lost = nullptr;

  private:
    // Blocks of one home that wait for a batch: so the home's line, which all who free for it change, is taken once a
    // batch. Most processors free for few others: a home has the place of its id modulo the number of places, and
    // whoever comes to a place that is taken sends off what is there. Less than a batch waits for the owner's next
    // free for that home, or for `settle`.
    struct Outbox {
        Pool* home = nullptr;
        Block* first = nullptr;
        Block* last = nullptr;
        std::uint32_t count = 0;
    };

    Block* refill(unsigned c);
    void spill(Bin& bin) noexcept;
    Slab& new_slab(unsigned c);
    void to_slab(Block* block) noexcept;
    void retire(Slab& slab) noexcept;
    void link(Slab& slab) noexcept;
    void unlink(Slab& slab) noexcept;
    void collect() noexcept;
    void take_home(Block* first, Block* last) noexcept;  // by anyone
    static void send_off(Outbox& box) noexcept;

    static constexpr std::uint64_t most_waiting = 4;

    const std::uint32_t processor_;  // read by those who free for it: not beside what the owner changes
    alignas(runtime::apart) std::array<Bin, class_count + 1> bins_;
    std::array<Slab*, class_count> giving_{};  // slabs with blocks to give; those that were full last come first
    std::array<Outbox, 8> outboxes_{};
    std::array<Slab*, most_waiting> empty_{};
    Count waiting_{0};  // how many are in empty_

    // Blocks that came home: others push lists, the owner takes all at once (so there is no ABA problem).
    alignas(runtime::apart) std::atomic<Block*> home_{nullptr};
    // What threads without a pool freed, by class.
    std::array<Count, class_count + 1> strays_{};
};

}  // namespace k42::alloc
