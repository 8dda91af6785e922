// The replicated page table (paper 4.4, the DHash): a master table, and for each processor a table of copies of the
// descriptors of resident pages that it has mapped. A fault that finds a copy touches nothing of the master.
//
// The five questions of the paper (section 3.2):
// - What is local: a table of copies for each processor, with a lock that its owner takes for each fault, and others to
//   take copies away. It grows and shrinks by itself.
// - What is shared: the master, a SharedPageTable, and the records of who has copies of what.
// - How local tables are made and join: the first copy on a processor makes its table. Copies are made when a page is
//   mapped by way of the master, whose descriptor is locked then; so one caller alone ever finds a page absent.
// - How local and global operations synchronise: what takes a page away, or changes whether it is dirty, has its
//   descriptor locked in the master and recalls the copies, processor by processor, waiting where one is held. A fault
//   holds its copy until the page is mapped; so nothing is mapped that is being taken away. A fault that finds no copy
//   goes to the master, and waits there for the descriptor.
// - How local tables are organised: the record of a page lists its copies. Locks: the descriptor, the records', a local
//   table's, one of them at a time.
//
// Copies can be switched on and off at any time: off, it is a SharedPageTable. Where a page may be
// mapped is noted when it is copied; so a copy serves faults on the CPUs that were noted by then.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "alloc/allocator.hpp"
#include "structures/hash_table.hpp"
#include "structures/per_processor.hpp"
#include "vm/page_table.hpp"

namespace k42::vm {

class alignas(runtime::apart) ReplicatedPageTable final : public PageTable {
  public:
    explicit ReplicatedPageTable(Policy policy, bool replicated) : master_(policy), replicated_(replicated) {}
    ~ReplicatedPageTable() override;

    // Of the master.
    void lock(uint64_t first, uint32_t count, Page** out) override { master_.lock(first, count, out); }
    void unlock(Page** pages, uint32_t count) override { master_.unlock(pages, count); }
    Run lock_around(Page* page, uint64_t first, uint32_t count, Page** out) override {
        return master_.lock_around(page, first, count, out);
    }
    size_t parts() const override { return master_.parts(); }
    Replacement& replacement(size_t part) override { return master_.replacement(part); }
    size_t part_of(uint64_t index) const override { return master_.part_of(index); }
    size_t size() const override { return master_.size(); }
    size_t bytes() const override;
    void each(const std::function<void(const Page&)>& visit) const override { master_.each(visit); }

    Held hold(uint64_t page, uint64_t first, uint32_t count, bool dirty_only, uint32_t cpus) override;
    void release(const Held& held) override;
    void copy(Page* const* pages, uint32_t count) override;
    void recall(Page* const* pages, uint32_t count) override;

    // Switches the copies on or off, while faults come.
    void replicate(bool replicated);
    bool replicated() const { return replicated_.load(std::memory_order_relaxed); }

    // Copies there are now.
    size_t copies() const;

  private:
    struct Local;

    struct Copy {
        uint64_t index;
        Local* local;
        bool dirty;
        uint32_t used;           // the page's, when it was copied
        Copy* next = nullptr;    // in the local table
        Copy* others = nullptr;  // of the same page; protected by records_lock_
    };
    struct Record {
        uint64_t index;
        Copy* copies;
        Record* next = nullptr;
    };
    struct ByIndex {
        template <class Node>
        size_t operator()(const Node& node) const {
            return spread(node.index);
        }
    };

    struct alignas(runtime::apart) Local {
        std::mutex lock;  // protects copies; held by its owner from hold() to release()
        HashTable<Copy, ByIndex> copies;

        Copy* find(uint64_t index) const {
            return copies.find(spread(index), [&](const Copy& copy) { return copy.index == index; });
        }
    };

    void drop(Record* record);

    SharedPageTable master_;
    std::atomic<bool> replicated_;
    PerProcessor<Local> locals_;

    alignas(runtime::apart) mutable std::mutex records_lock_;  // protects what follows; taken with descriptors locked,
                                                               // before a local table's
    HashTable<Record, ByIndex> records_;
};

}  // namespace k42::vm
