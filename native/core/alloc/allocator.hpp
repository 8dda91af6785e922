// The allocator: memory that is local to the processor that asked for it (K42's, in the tradition of the paper's
// section 3: the representatives of one processor must not share cache lines with those of another).
//
// Each processor has a pool of its own (pool.hpp), so allocating and freeing on one processor shares nothing with
// others. A block may be freed on any processor: it then goes home in a batch. Blocks of one processor never share a
// cache line with those of another, for all their life and the next: that is what `Kind::strict` promises, and what a
// malloc cannot that hands a freed block to whoever asks next.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#include "alloc/pool.hpp"
#include "runtime/processor.hpp"

namespace k42::alloc {

namespace detail {
Pool* make_pool(runtime::Processor& here) noexcept;  // nullptr: no memory
void deallocate_elsewhere(void* p, Slab& slab) noexcept;

inline Pool* pool_or_null() {
    runtime::Processor* here = runtime::current_or_null();
    return here ? here->pool.load(std::memory_order_relaxed) : nullptr;
}

// The calling thread takes a processor when it has none.
inline Pool& pool() {
    runtime::Processor& here = runtime::current();
    Pool* pool = here.pool.load(std::memory_order_relaxed);
    if (!pool) [[unlikely]]
        if (!(pool = make_pool(here))) throw std::bad_alloc();
    return *pool;
}
}  // namespace detail

// A block of at least `size` bytes, aligned for every type of this size. Throws std::bad_alloc.
inline void* allocate(std::size_t size, Kind kind = Kind::strict) {
    Pool& pool = detail::pool();
    if (size > largest_class) [[unlikely]]
        return pool.allocate_large(size);  // pages of its own: padded enough
    void* p = pool.allocate(class_of(size, kind));
    unpoison(p, size);
    return p;
}

// Gives back what `allocate` returned, on any thread; nothing for nullptr.
inline void deallocate(void* p) noexcept {
    if (!p) return;
    Slab& slab = slab_of(p);
    Pool* pool = detail::pool_or_null();
    if (!pool || slab.home != pool) return detail::deallocate_elsewhere(p, slab);
    poison(p, class_size(slab.size_class));
    pool->deallocate(p, slab.size_class);
}

// A new T in a block of its own.
template <class T, Kind kind = Kind::strict, class... Args>
T* make(Args&&... args) {
    static_assert(alignof(T) <= slab_size);
    void* block = allocate(sizeof(T), kind);
    try {
        return new (block) T(std::forward<Args>(args)...);
    } catch (...) {
        deallocate(block);
        throw;
    }
}

// Ends what `make<T>` began; T is the same type, not a base of it.
template <class T>
void destroy(T* object) noexcept {
    if (!object) return;
    object->~T();
    deallocate(object);
}

// For std::unique_ptr<T, alloc::Deleter>.
struct Deleter {
    template <class T>
    void operator()(T* object) const noexcept {
        destroy(object);
    }
};

// Sends home what the calling processor has freed for others and keeps for a batch, and takes in what came home.
// Before a thread goes idle for long, or to count exactly.
void settle() noexcept;

// What one processor did with blocks of one size.
struct Usage {
    std::uint32_t processor;
    std::size_t size;         // of a block in bytes, both kinds; 0: larger than any class, in pages of their own
    std::uint64_t allocated;  // blocks
    std::uint64_t freed;      // of its own
    // Of other processors'. What threads without a processor freed counts here for the processor that it belongs to.
    std::uint64_t sent;
    std::uint64_t returned;  // its own, freed by others and come home
    std::uint64_t held;      // bytes in slabs or pages, free blocks among them
};

struct Statistics {
    std::vector<Usage> usage;    // what was ever used
    std::uint64_t waiting = 0;   // bytes in empty slabs that processors keep for the next need
    std::uint64_t reserved = 0;  // bytes of address space for slabs
};

// Reads the counts of all processors while they go on: exact for those that are quiet. All blocks that live are
// Σ allocated - Σ freed - Σ sent; those on their way home Σ sent - Σ returned.
Statistics statistics();

}  // namespace k42::alloc
