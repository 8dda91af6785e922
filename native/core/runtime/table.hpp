// A table that grows without stopping anyone: pages hang from a directory of atomic pointers and never move. A page
// is taken out when all its entries are free, and released when no request can be reading it. The directory is
// address space that the kernel backs where it is touched.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace k42::runtime {

using Index = std::uint32_t;

inline constexpr Index page_bits = 9;  // 512 entries: a page of a local table is one page of memory
inline constexpr Index page_size = Index{1} << page_bits;
inline constexpr Index directory_size = Index{1} << 18;  // 134 million objects; 2 MiB of address space

template <typename Entry>
class Table {
  public:
    struct alignas(64) Page {
        Entry entries[page_size] = {};
    };

    Table() {
        void* memory = std::calloc(directory_size, sizeof(std::atomic<Page*>));
        if (!memory) throw std::bad_alloc();
        directory_ = static_cast<std::atomic<Page*>*>(memory);  // zeroes are null pointers
    }
    Table(const Table&) = delete;
    Table& operator=(const Table&) = delete;

    // The entry, or nullptr where there is no page.
    Entry* find(Index index) const {
        Page* page = directory_[index >> page_bits].load(std::memory_order_seq_cst);
        return page ? &page->entries[index & (page_size - 1)] : nullptr;
    }

    // The entry, whose page is made when it is missing. One thread at a time makes the pages of a range.
    Entry& at(Index index) {
        std::atomic<Page*>& slot = directory_[index >> page_bits];
        Page* page = slot.load(std::memory_order_acquire);
        if (!page) {
            page = new Page();
            slot.store(page, std::memory_order_seq_cst);
        }
        return page->entries[index & (page_size - 1)];
    }

    // Takes the page of this range out, for the caller to release when nobody can be reading it; or nullptr.
    Page* take(Index range) { return directory_[range].exchange(nullptr, std::memory_order_seq_cst); }

  private:
    std::atomic<Page*>* directory_;
};

}  // namespace k42::runtime
