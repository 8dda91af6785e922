// The page descriptors of one file cache (paper 4.4): the hash table of the Map, from page index to descriptor, under
// one lock (the non-distributed FCM), and in each descriptor a lock of its own and the page's state. Mapping and
// unmapping a page happen with its descriptor locked, so that neither can race the other.
//
// The state is ours alone: it is never inferred from what Linux says of the page.
//
// Descriptors live in memory that stays of this type until the table goes, so a thread that waits for a locked
// descriptor needs no count on it: if it was recycled meanwhile, the waiter finds out when it looks again.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "structures/hash_table.hpp"

namespace k42 {

enum class PageState : uint32_t { absent = 0, io = 1, resident = 2 };

// One who waits for the end of a page's I/O; what it is belongs to the user of the table.
struct PageWaiter {
    PageWaiter* next = nullptr;
};

// A page descriptor: 32 bytes. All but `word` is read and written with the descriptor locked, `next` with the
// table locked.
struct Page {
    std::atomic<uint32_t> word{0};  // kLocked | kAwaited | state
    uint64_t index = 0;
    Page* next = nullptr;
    PageWaiter* waiters = nullptr;

    PageState state() const { return PageState(word.load(std::memory_order_relaxed) & kState); }
    void set_state(PageState s) {
        uint32_t seen = word.load(std::memory_order_relaxed);
        while (!word.compare_exchange_weak(seen, (seen & ~kState) | uint32_t(s), std::memory_order_relaxed)) {
        }
    }

    static constexpr uint32_t kState = 3;
    static constexpr uint32_t kLocked = 4;
    static constexpr uint32_t kAwaited = 8;
};

class PageTable {
  public:
    PageTable() = default;
    PageTable(const PageTable&) = delete;
    PageTable& operator=(const PageTable&) = delete;

    // Locks the descriptors of `count` pages from `first`, made (absent) where there are none, into out[]. All at
    // once or none, so that two callers with overlapping ranges cannot deadlock; may wait for other holders.
    void lock(uint64_t first, uint32_t count, Page** out);

    // Unlocks; a descriptor left absent and without waiters is given back. Reorders pages[].
    void unlock(Page** pages, uint32_t count);

    // Marks locked pages resident and appends them to the order of replacement.
    void make_resident(Page** pages, uint32_t count);

    // Takes up to `count` indices from the front of the order of replacement, for the caller alone to evict.
    std::vector<uint64_t> take_oldest(size_t count);

    // Descriptors now in the table, and bytes they take (table, descriptors, order).
    size_t size() const;
    size_t bytes() const;

    // Indices of all resident pages, sorted; for tests and for reports.
    std::vector<uint64_t> resident() const;

  private:
    struct Hash {
        size_t operator()(const Page& page) const { return spread(page.index); }
    };

    Page* find_or_allocate(uint64_t index);  // call with lock_ held
    static bool try_lock(Page* page);

    mutable std::mutex lock_;  // protects all below; taken with descriptors locked only by unlock() and
                               // make_resident(), never waits for a descriptor while held; before the allocator's
    HashTable<Page, Hash> pages_;
    Page* free_ = nullptr;
    std::vector<std::unique_ptr<Page[]>> slabs_;
    size_t slab_pages_ = 0;
    std::deque<uint64_t> order_;  // resident pages, first in first
};

}  // namespace k42
