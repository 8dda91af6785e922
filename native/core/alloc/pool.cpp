#include "alloc/pool.hpp"

#include <algorithm>
#include <utility>

namespace k42::alloc {

Pool::Pool(std::uint32_t processor) : processor_(processor) {
    for (unsigned c = 0; c < class_count; ++c) bins_[c].batch = batch_size(c);
}

// The free list is empty: makes it a batch, or less rather than begin another slab. Returns its first block.
Block* Pool::refill(unsigned c) {
    Bin& bin = bins_[c];
    if (bin.spare) {
        bin.free = std::exchange(bin.spare, nullptr);
        bin.count = bin.batch;
        return bin.free;
    }
    collect();
    if (!giving_[c]) new_slab(c);
    const std::size_t size = class_size(c);
    const auto capacity = static_cast<std::uint32_t>(slab_size / size);
    while (bin.count < bin.batch && giving_[c]) {
        Slab& slab = *giving_[c];
        const std::uint32_t before = bin.count;
        for (; bin.count < bin.batch && slab.free; ++bin.count) {
            Block* block = slab.free;
            slab.free = next(block);
            set_next(block, bin.free);
            bin.free = block;
        }
        const std::uint32_t cut = std::min(bin.batch - bin.count, capacity - slab.fresh);
        for (std::uint32_t i = cut; i-- > 0;) {  // from behind, so that they are used in the order of addresses
            auto* block = reinterpret_cast<Block*>(memory_of(slab) + (slab.fresh + i) * size);
            set_next(block, bin.free);
            bin.free = block;
        }
        slab.fresh += cut;
        bin.count += cut;
        slab.used += bin.count - before;
        if (slab.used == capacity) unlink(slab);
    }
    return bin.free;
}

// The free list is full: makes it empty.
void Pool::spill(Bin& bin) noexcept {
    for (Block* block = bin.spare; block;) to_slab(std::exchange(block, next(block)));
    bin.spare = std::exchange(bin.free, nullptr);
    bin.count = 0;
}

Slab& Pool::new_slab(unsigned c) {
    const std::uint64_t waiting = waiting_.load(std::memory_order_relaxed);
    Slab& slab = waiting ? *empty_[waiting - 1] : take_slab();
    if (waiting) subtract(waiting_, 1);
    slab.home = this;
    slab.size_class = c;
    slab.free = nullptr;
    slab.fresh = 0;
    link(slab);
    add(bins_[c].held, slab_size);
    return slab;
}

void Pool::to_slab(Block* block) noexcept {
    Slab& slab = slab_of(block);
    if (slab.used == slab_size / class_size(slab.size_class)) link(slab);
    set_next(block, slab.free);
    slab.free = block;
    if (--slab.used == 0) retire(slab);
}

void Pool::retire(Slab& slab) noexcept {
    unlink(slab);
    subtract(bins_[slab.size_class].held, slab_size);
    const std::uint64_t waiting = waiting_.load(std::memory_order_relaxed);
    if (waiting == most_waiting) return give_slab(slab);
    empty_[waiting] = &slab;
    add(waiting_);
}

// First in the list: the slabs at its end get time to become empty.
void Pool::link(Slab& slab) noexcept {
    Slab*& first = giving_[slab.size_class];
    slab.previous = nullptr;
    slab.next = first;
    if (first) first->previous = &slab;
    first = &slab;
}

void Pool::unlink(Slab& slab) noexcept {
    (slab.previous ? slab.previous->next : giving_[slab.size_class]) = slab.next;
    if (slab.next) slab.next->previous = slab.previous;
}

// Takes in what has come home.
void Pool::collect() noexcept {
    if (!home_.load(std::memory_order_relaxed)) return;
    Block* block = home_.exchange(nullptr, std::memory_order_acquire);  // pairs with the release in take_home
    while (block) {
        Block* returned = std::exchange(block, next(block));
        add(bins_[slab_of(returned).size_class].returned);
        to_slab(returned);
    }
}

void Pool::take_home(Block* first, Block* last) noexcept {
    Block* head = home_.load(std::memory_order_relaxed);
    do {
        set_next(last, head);
        // Release: what was done with the blocks happens before what their next users do.
    } while (!home_.compare_exchange_weak(head, first, std::memory_order_release, std::memory_order_relaxed));
}

void Pool::send(void* p, const Slab& slab) noexcept {
    Outbox& box = outboxes_[slab.home->processor_ % outboxes_.size()];
    if (box.home != slab.home) {
        send_off(box);
        box.home = slab.home;
    }
    auto* block = static_cast<Block*>(p);
    set_next(block, box.first);
    box.first = block;
    if (!box.last) box.last = block;
    add(bins_[slab.size_class].sent);
    if (++box.count >= batch_size(slab.size_class)) send_off(box);
}

void Pool::send_off(Outbox& box) noexcept {
    if (box.count) box.home->take_home(box.first, box.last);
    box = {};
}

void Pool::take_stray(void* p, unsigned c) noexcept {
    strays_[c].fetch_add(1, std::memory_order_relaxed);
    auto* block = static_cast<Block*>(p);
    take_home(block, block);
}

void* Pool::allocate_large(std::size_t size) {
    Slab& slab = map_large(size);
    slab.owner = this;
    Bin& bin = bins_[class_count];
    add(bin.allocated);
    bin.held.fetch_add(slab.mapped, std::memory_order_relaxed);
    return memory_of(slab);
}

void Pool::deallocate_large(Slab& slab, Pool* here) noexcept {
    Bin& bin = slab.owner->bins_[class_count];
    bin.held.fetch_sub(slab.mapped, std::memory_order_relaxed);
    if (here == slab.owner) {
        add(bin.freed);
    } else {
        if (here) {
            add(here->bins_[class_count].sent);
        } else {
            slab.owner->strays_[class_count].fetch_add(1, std::memory_order_relaxed);
        }
        bin.returned.fetch_add(1, std::memory_order_relaxed);
    }
    unmap_large(slab);
}

void Pool::settle() noexcept {
    for (Outbox& box : outboxes_) send_off(box);
    collect();
}

}  // namespace k42::alloc
