// The native half of a Region (paper 4.3): which part of which file cache a range of a process's addresses shows,
// and the gate that every fault on it passes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "vm/region_gate.hpp"

namespace k42::vm {

class FileCache;
class Hat;

struct Region {
    static constexpr uint32_t kAround = 16;

    // `around_` 0: kAround, and more where faults follow each other.
    Region(uint64_t start_, uint64_t pages_, uint64_t first_page_, uint32_t group_, uint32_t around_, bool tracked_,
           FileCache* cache_, Hat* hat_)
        : start(start_),
          pages(pages_),
          first_page(first_page_),
          group(group_),
          around(std::max(around_ ? around_ : kAround, group_)),
          widens(around_ == 0),
          tracked(tracked_),
          cache(cache_),
          hat(hat_) {}

    const uint64_t start;       // canonical address
    const uint64_t pages;       // length, in pages of 4 KiB
    const uint64_t first_page;  // the file's page at `start`
    const uint32_t group;       // the region's page size, in pages of 4 KiB: what one fault brings in
    const uint32_t around;      // of so many pages, aligned, those that are resident are mapped by one fault
    const bool widens;          // more of them, where faults follow each other
    // Its windows share the frames and are writable: writes to clean pages are faults. Becomes true with the gate
    // stopped.
    std::atomic<bool> tracked;
    FileCache* const cache;
    Hat* const hat;
    RegionGate gate;

    uint64_t page_at(uint64_t canonical) const { return first_page + (canonical - start) / 4096; }

    // The group of pages that a fault on `page` brings in, clipped to the region.
    struct Group {
        uint64_t first;
        uint32_t count;
    };
    Group group_of(uint64_t page) const { return clipped(page, group); }
    // The pages of which the resident ones are mapped by a fault on `page`, clipped to the region.
    Group around_of(uint64_t page) const { return clipped(page, around); }
    // So many from there on, in the same 2 MiB of the file.
    Group ahead_of(uint64_t page, uint32_t most) const {
        const uint64_t end = std::min({page + most, (page | 511) + 1, first_page + pages});
        return {page, uint32_t(end - page)};
    }

  private:
    Group clipped(uint64_t page, uint32_t size) const {
        uint64_t first = page - page % size;
        uint64_t end = first + size;
        if (first < first_page) first = first_page;
        if (end > first_page + pages) end = first_page + pages;
        return {first, uint32_t(end - first)};
    }
};

}  // namespace k42::vm
