// The page descriptors of one file cache (paper 4.4): from page index to descriptor, and in each descriptor a lock of
// its own and the page's state. Mapping and unmapping a page happen with its descriptor locked, so that neither can
// race the other.
//
// `PageTable` is the interface; `SharedPageTable` is the non-distributed one: the hash table of the Map under one lock.
//
// The state is ours alone: it is never inferred from what Linux says of the page.
//
// Descriptors live in memory that stays of this type until the table goes, so a thread that waits for a locked
// descriptor needs no count on it: if it was recycled meanwhile, the waiter finds out when it looks again.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "structures/hash_table.hpp"
#include "vm/replacement.hpp"

namespace k42::vm {

enum class PageState : uint32_t { absent = 0, io = 1, resident = 2 };

// One who waits for the end of a page's I/O; what it is belongs to the user of the table.
struct PageWaiter {
    PageWaiter* next = nullptr;
};

// A page descriptor: 32 bytes. All but the lock in `word` is read and written with the descriptor locked, `next` with
// the table locked.
struct Page {
    std::atomic<uint32_t> word{0};  // kLocked | kAwaited | state | flags | uses | owner
    std::atomic<uint32_t> used{0};  // the CPUs, modulo 32, on whose windows it may be mapped
    uint64_t index = 0;
    Page* next = nullptr;
    PageWaiter* waiters = nullptr;

    PageState state() const { return PageState(word.load(std::memory_order_relaxed) & kState); }
    void set_state(PageState s) {
        if (s == PageState::absent) {
            word.fetch_and(kLocked | kAwaited, std::memory_order_relaxed);
            used.store(0, std::memory_order_relaxed);
            return;
        }
        change(kState, uint32_t(s));
    }

    bool is(uint32_t flag) const { return word.load(std::memory_order_relaxed) & flag; }
    void set(uint32_t flag) { word.fetch_or(flag, std::memory_order_relaxed); }
    void clear(uint32_t flag) { word.fetch_and(~flag, std::memory_order_relaxed); }

    // Uses that were seen since the last look of the replacement: 0 to 3.
    uint32_t uses() const { return (word.load(std::memory_order_relaxed) & kUses) / kOneUse; }
    void use() {
        if (uses() < 3) word.fetch_add(kOneUse, std::memory_order_relaxed);
        if (is(kProbed)) clear(kProbed);
    }

    // Whose account its frame stands on.
    uint16_t owner() const { return uint16_t(word.load(std::memory_order_relaxed) >> 16); }
    // The same, of a page that is resident, for who has not locked it.
    std::optional<uint16_t> resident_owner() const {
        const uint32_t seen = word.load(std::memory_order_relaxed);
        if (PageState(seen & kState) != PageState::resident) return std::nullopt;
        return uint16_t(seen >> 16);
    }
    void set_owner(uint16_t owner) { change(0xffff0000u, uint32_t(owner) << 16); }

    static constexpr uint32_t kState = 3;
    static constexpr uint32_t kLocked = 4;
    static constexpr uint32_t kAwaited = 8;
    static constexpr uint32_t kDirty = 16;    // the frame has what the store has not
    static constexpr uint32_t kWriting = 32;  // its write-back is under way
    static constexpr uint32_t kPinned = 64;   // its frame must stay
    static constexpr uint32_t kProbed = 128;  // unmapped softly at the last look of the replacement
    static constexpr uint32_t kOneUse = 256;
    static constexpr uint32_t kUses = 3 * kOneUse;
    static constexpr uint32_t kLaundry = 1024;  // stands in line for its write-back
    static constexpr uint32_t kAllowed = 2048;  // its cache's heir has it, so writes to it pass

  private:
    void change(uint32_t mask, uint32_t value) {
        uint32_t seen = word.load(std::memory_order_relaxed);
        while (!word.compare_exchange_weak(seen, (seen & ~mask) | value, std::memory_order_relaxed)) {
        }
    }
};
static_assert(sizeof(Page) == 32);

class PageTable {
  public:
    PageTable() = default;
    PageTable(const PageTable&) = delete;
    PageTable& operator=(const PageTable&) = delete;
    virtual ~PageTable() = default;

    // Locks the descriptors of `count` pages from `first`, made (absent) where there are none, into out[]. All at
    // once or none, so that two callers with overlapping ranges cannot deadlock; may wait for other holders.
    virtual void lock(uint64_t first, uint32_t count, Page** out) = 0;

    // Unlocks; a descriptor left absent and without waiters is given back. Reorders pages[].
    virtual void unlock(Page** pages, uint32_t count) = 0;

    // Adds to a locked resident page those of its neighbours within the range that are resident, as dirty as it is or
    // not, and not locked: the run, and its descriptors, locked, in out[].
    struct Run {
        uint64_t first;
        uint32_t count;
    };
    virtual Run lock_around(Page* page, uint64_t first, uint32_t count, Page** out) = 0;

    // Copies of descriptors that a processor may keep, for resident pages. A held copy keeps the page as it is: what
    // takes it away or changes whether it is dirty calls `recall` first, with the descriptors locked.
    struct Held {
        uint64_t first;  // the resident run around the page that was asked for
        uint32_t count;  // 0: the processor has no copy, go to the descriptors
        bool dirty;
        void* copies;  // the table's own
    };
    // Of pages that are noted as used on one of these CPUs.
    virtual Held hold(uint64_t page, uint64_t first, uint32_t count, bool dirty_only, uint32_t cpus) {
        (void)page, (void)first, (void)count, (void)dirty_only, (void)cpus;
        return {0, 0, false, nullptr};
    }
    virtual void release(const Held&) {}
    // The calling processor gets copies of these descriptors, which are locked and resident.
    virtual void copy(Page* const*, uint32_t) {}
    // Takes all copies of these locked descriptors away, waiting for those that are held.
    virtual void recall(Page* const*, uint32_t) {}

    // The orders of replacement, one for each part of the table, and the one that a page belongs to.
    virtual size_t parts() const = 0;
    virtual Replacement& replacement(size_t part) = 0;
    virtual size_t part_of(uint64_t index) const = 0;

    // Descriptors now in the table, and bytes they take (table and descriptors, without the replacement).
    virtual size_t size() const = 0;
    virtual size_t bytes() const = 0;

    // Visits all descriptors, while none comes or goes; they are not locked. For reports, and for what may be a moment
    // late.
    virtual void each(const std::function<void(const Page&)>& visit) const = 0;

    // Indices of all resident pages, sorted; for tests and for reports.
    std::vector<uint64_t> resident() const;
};

class SharedPageTable final : public PageTable {
  public:
    explicit SharedPageTable(Policy policy = Policy::fifo) : replacement_(policy) {}

    void lock(uint64_t first, uint32_t count, Page** out) override;
    void unlock(Page** pages, uint32_t count) override;
    Run lock_around(Page* page, uint64_t first, uint32_t count, Page** out) override;
    size_t parts() const override { return 1; }
    Replacement& replacement(size_t) override { return replacement_; }
    size_t part_of(uint64_t) const override { return 0; }
    size_t size() const override;
    size_t bytes() const override;
    void each(const std::function<void(const Page&)>& visit) const override;

  private:
    struct Hash {
        size_t operator()(const Page& page) const { return spread(page.index); }
    };

    // Both with lock_ held.
    Page* find(uint64_t index) const;
    Page* find_or_allocate(uint64_t index);
    static bool try_lock(Page* page);

    mutable std::mutex lock_;  // protects all below but replacement_; taken with descriptors locked only by unlock(),
                               // never waits for a descriptor while held; before the allocator's
    HashTable<Page, Hash> pages_;
    Page* free_ = nullptr;
    std::vector<std::unique_ptr<Page[]>> slabs_;
    size_t slab_pages_ = 0;

    Replacement replacement_;  // has a lock of its own
};

}  // namespace k42::vm
