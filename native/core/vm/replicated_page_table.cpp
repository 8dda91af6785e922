#include "vm/replicated_page_table.hpp"

namespace k42::vm {

ReplicatedPageTable::~ReplicatedPageTable() {
    replicate(false);
    locals_.each([](Local& local) { alloc::destroy(&local); });
}

PageTable::Held ReplicatedPageTable::hold(uint64_t page, uint64_t first, uint32_t count, bool dirty_only,
                                          uint32_t cpus) {
    constexpr Held none{0, 0, false, nullptr};
    Local* local = locals_.find(runtime::current());
    if (!local) return none;
    local->lock.lock();
    const Copy* copy = local->find(page);
    if (!copy || (dirty_only && !copy->dirty) || !(copy->used & cpus)) {
        local->lock.unlock();
        return none;
    }
    const auto joins = [&](uint64_t index) {
        const Copy* other = local->find(index);
        return other && other->dirty == copy->dirty && (other->used & cpus);
    };
    uint64_t begin = page;
    uint64_t end = page + 1;
    while (begin > first && joins(begin - 1)) --begin;
    while (end < first + count && joins(end)) ++end;
    return {begin, uint32_t(end - begin), copy->dirty, local};
}

void ReplicatedPageTable::release(const Held& held) { static_cast<Local*>(held.copies)->lock.unlock(); }

void ReplicatedPageTable::copy(Page* const* pages, uint32_t count) {
    if (!replicated_.load(std::memory_order_relaxed)) return;
    Local& local =
        locals_.of(runtime::current(), []() -> Local& { return *alloc::make<Local, alloc::Kind::padded>(); });
    std::lock_guard guard(records_lock_);
    if (!replicated_.load(std::memory_order_relaxed)) return;  // switched off since
    std::lock_guard own(local.lock);
    for (uint32_t i = 0; i < count; ++i) {
        const uint64_t index = pages[i]->index;
        const uint32_t used = pages[i]->used.load(std::memory_order_relaxed);
        if (Copy* copy = local.find(index)) {
            copy->used = used;
            continue;
        }
        auto* copy = alloc::make<Copy>(index, &local, pages[i]->is(Page::kDirty), used);
        Record* record = records_.find(spread(index), [&](const Record& r) { return r.index == index; });
        if (!record) {
            record = alloc::make<Record>(index, nullptr);
            records_.insert(record);
        }
        copy->others = record->copies;
        record->copies = copy;
        local.copies.insert(copy);
    }
}

// With records_lock_ held, and the page's descriptor locked or all copies going: takes all copies, and the record.
void ReplicatedPageTable::drop(Record* record) {
    for (Copy* copy = record->copies; copy;) {
        Copy* const next = copy->others;
        {
            std::lock_guard guard(copy->local->lock);  // waits where it is held
            copy->local->copies.remove(copy);
        }
        alloc::destroy(copy);
        copy = next;
    }
    records_.remove(record);
    alloc::destroy(record);
}

void ReplicatedPageTable::recall(Page* const* pages, uint32_t count) {
    std::lock_guard guard(records_lock_);
    if (records_.size() == 0) return;
    for (uint32_t i = 0; i < count; ++i) {
        const uint64_t index = pages[i]->index;
        if (Record* record = records_.find(spread(index), [&](const Record& r) { return r.index == index; })) {
            drop(record);
        }
    }
}

void ReplicatedPageTable::replicate(bool replicated) {
    std::lock_guard guard(records_lock_);
    replicated_.store(replicated, std::memory_order_relaxed);
    if (replicated) return;
    size_t cursor = 0;
    while (Record* record = records_.any(cursor)) drop(record);
}

size_t ReplicatedPageTable::copies() const {
    std::lock_guard guard(records_lock_);
    size_t sum = 0;
    locals_.each([&](Local& local) {
        std::lock_guard own(local.lock);
        sum += local.copies.size();
    });
    return sum;
}

size_t ReplicatedPageTable::bytes() const {
    std::lock_guard guard(records_lock_);
    size_t sum = sizeof(*this) + master_.bytes() + records_.bytes() + records_.size() * sizeof(Record);
    locals_.each([&](Local& local) {
        std::lock_guard own(local.lock);
        sum += sizeof(Local) + local.copies.bytes() + local.copies.size() * sizeof(Copy);
    });
    return sum;
}

}  // namespace k42::vm
