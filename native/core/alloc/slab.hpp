// Slabs: 64 KiB of memory that one processor cuts into blocks of one size, and the depot where empty ones wait.
//
// Slabs lie in chunks of 2 MiB, which begin with the headers of their slabs: so the header of any block is found from
// its address, and a slab is nothing but blocks. The depot keeps a few slabs with their memory, and of the others the
// address space alone: their memory goes back to the system, and whoever takes such a slab next finds fresh pages, near
// to him.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "runtime/processor.hpp"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace k42::alloc {

class Pool;

// A free block, in one list.
struct Block {
    Block* next;
};

inline constexpr std::size_t slab_size = std::size_t{1} << 16;
inline constexpr std::size_t chunk_size = std::size_t{1} << 21;

// The header of a slab.
struct alignas(runtime::apart) Slab {
    // Read by whoever frees a block; these change only while nobody has one.
    Pool* home = nullptr;  // the pool of the blocks; nullptr: the chunk is one large block
    unsigned size_class = 0;

    // Of the home's owner alone; a line further, so that he does not slow down those who free. `fresh` blocks have
    // been cut; the others behind them have never been touched.
    alignas(64) Block* free = nullptr;
    std::uint32_t used = 0;  // blocks that are neither in `free` nor behind `fresh`
    std::uint32_t fresh = 0;
    Slab* previous = nullptr;  // in the pool's list of slabs with blocks to give
    Slab* next = nullptr;

    // Of a large block.
    Pool* owner = nullptr;   // who allocated it
    std::size_t mapped = 0;  // bytes of its chunk
};

inline Slab& slab_of(const void* p) {
    const auto address = reinterpret_cast<std::uintptr_t>(p);
    auto* chunk = reinterpret_cast<Slab*>(address & ~(chunk_size - 1));
    return chunk[address % chunk_size / slab_size];
}

inline char* memory_of(Slab& slab) {
    const auto address = reinterpret_cast<std::uintptr_t>(&slab);
    return reinterpret_cast<char*>(address & ~(chunk_size - 1)) + address % chunk_size / sizeof(Slab) * slab_size;
}

// An empty slab, from the depot or from a new chunk. Throws std::bad_alloc.
Slab& take_slab();
// Gives an empty slab to the depot and, when that has enough, its memory to the system.
void give_slab(Slab& slab) noexcept;

// A chunk of its own for a block of `size` bytes: the first after the headers. Throws std::bad_alloc.
Slab& map_large(std::size_t size);
void unmap_large(Slab& slab) noexcept;

// Bytes of address space taken for slabs.
std::size_t mapped_for_slabs();

// For AddressSanitizer a block that nobody has is poisoned, all of it: so its link is read and written behind the
// sanitizer's back.
#ifdef __SANITIZE_ADDRESS__
inline void poison(const void* p, std::size_t size) { __asan_poison_memory_region(p, size); }
inline void unpoison(const void* p, std::size_t size) { __asan_unpoison_memory_region(p, size); }
#else
inline void poison(const void*, std::size_t) {}
inline void unpoison(const void*, std::size_t) {}
#endif
[[gnu::no_sanitize("address")]] inline Block* next(const Block* block) { return block->next; }
[[gnu::no_sanitize("address")]] inline void set_next(Block* block, Block* to) { block->next = to; }

}  // namespace k42::alloc
