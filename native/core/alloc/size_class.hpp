// Size classes: powers of two and the sizes halfway between them, 16, 32, 48, 64, 96, 128, 192 … 65536 bytes. So at
// most a third of a block is waste, and any type whose objects a block can hold is aligned in it.
#pragma once

#include <bit>
#include <cstddef>

#include "runtime/processor.hpp"

namespace k42::alloc {

// What shares a block's cache lines.
enum class Kind {
    strict,  // blocks of the same processor alone
    padded,  // nothing: it has whole lines, `runtime::apart` bytes from the next block's
};

inline constexpr unsigned class_count = 24;
inline constexpr std::size_t largest_class = std::size_t{1} << 16;

constexpr std::size_t class_size(unsigned c) {
    if (c < 2) return std::size_t{16} << c;
    const std::size_t half = std::size_t{16} << c / 2;
    return c % 2 ? 2 * half : half + half / 2;
}

// The smallest class for `size`, of at most `largest_class` bytes. From the class of `apart` bytes on a multiple of
// `apart` is in a class of such multiples: so there the two kinds are the same classes.
constexpr unsigned class_of(std::size_t size, Kind kind) {
    if (kind == Kind::padded) size = size ? (size + runtime::apart - 1) & ~(runtime::apart - 1) : runtime::apart;
    if (size <= 32) return size > 16;
    const auto log = static_cast<unsigned>(std::bit_width(size - 1)) - 1;
    return 2 * (log - 4) + ((size - 1) >> (log - 1) & 1);
}

static_assert(class_size(class_count - 1) == largest_class);
static_assert(class_of(largest_class, Kind::strict) == class_count - 1);

// How many blocks move at once between a processor's lists, its slabs and other processors: 8 KiB, but few enough
// to be done soon and enough to be worth it.
constexpr unsigned batch_size(unsigned c) {
    const std::size_t blocks = 8192 / class_size(c);
    return blocks > 64 ? 64 : blocks < 2 ? 2 : static_cast<unsigned>(blocks);
}

}  // namespace k42::alloc
