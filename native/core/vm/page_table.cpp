#include "vm/page_table.hpp"

#include <algorithm>

#include "structures/futex.hpp"

namespace k42::vm {

bool SharedPageTable::try_lock(Page* page) {
    uint32_t seen = page->word.load(std::memory_order_relaxed);
    while (!(seen & Page::kLocked)) {
        if (page->word.compare_exchange_weak(seen, seen | Page::kLocked, std::memory_order_acquire)) return true;
    }
    return false;
}

Page* SharedPageTable::find(uint64_t index) const {
    return pages_.find(spread(index), [&](const Page& p) { return p.index == index; });
}

Page* SharedPageTable::find_or_allocate(uint64_t index) {
    if (Page* page = find(index)) return page;
    if (!free_) {
        const size_t count = std::clamp<size_t>(slab_pages_, 16, 256);
        auto slab = std::make_unique<Page[]>(count);
        for (size_t i = count; i-- > 0;) {
            slab[i].next = free_;
            free_ = &slab[i];
        }
        slabs_.push_back(std::move(slab));
        slab_pages_ += count;
    }
    Page* page = free_;
    free_ = page->next;
    page->index = index;
    pages_.insert(page);
    return page;
}

void SharedPageTable::lock(uint64_t first, uint32_t count, Page** out) {
    for (;;) {
        Page* busy = nullptr;
        uint32_t seen = 0;
        uint32_t held = 0;
        {
            std::lock_guard guard(lock_);
            for (; held < count; ++held) {
                Page* page = find_or_allocate(first + held);
                if (!try_lock(page)) {
                    busy = page;
                    break;
                }
                out[held] = page;
            }
            if (!busy) return;
            // Only under lock_ is it sure that the descriptor is still in use, so that an unlock will follow.
            seen = busy->word.load(std::memory_order_relaxed);
            while ((seen & Page::kLocked) &&
                   !busy->word.compare_exchange_weak(seen, seen | Page::kAwaited, std::memory_order_relaxed)) {
            }
        }
        unlock(out, held);
        if (seen & Page::kLocked) futex_wait(busy->word, seen | Page::kAwaited);
    }
}

void SharedPageTable::unlock(Page** pages, uint32_t count) {
    uint32_t absent = 0;
    for (uint32_t i = 0; i < count; ++i) {
        Page* page = pages[i];
        if (page->state() == PageState::absent && !page->waiters) {
            pages[absent++] = page;
            continue;
        }
        const uint32_t seen = page->word.fetch_and(~(Page::kLocked | Page::kAwaited), std::memory_order_release);
        if (seen & Page::kAwaited) futex_wake_all(page->word);
    }
    if (absent == 0) return;
    std::lock_guard guard(lock_);
    for (uint32_t i = 0; i < absent; ++i) {
        Page* page = pages[i];
        pages_.remove(page);
        page->next = free_;
        free_ = page;
        const uint32_t seen = page->word.exchange(0, std::memory_order_release);
        if (seen & Page::kAwaited) futex_wake_all(page->word);
    }
}

PageTable::Run SharedPageTable::lock_around(Page* page, uint64_t first, uint32_t count, Page** out) {
    const uint64_t at = page->index;
    const bool dirty = page->is(Page::kDirty);
    const auto joins = [&](uint64_t index) -> Page* {
        Page* other = find(index);
        if (!other || !try_lock(other)) return nullptr;
        if (other->state() == PageState::resident && other->is(Page::kDirty) == dirty) return other;
        const uint32_t seen = other->word.fetch_and(~(Page::kLocked | Page::kAwaited), std::memory_order_release);
        if (seen & Page::kAwaited) futex_wake_all(other->word);
        return nullptr;
    };
    std::lock_guard guard(lock_);
    uint64_t begin = at;
    uint64_t end = at + 1;
    while (begin > first) {
        Page* other = joins(begin - 1);
        if (!other) break;
        out[--begin - first] = other;
    }
    std::move(out + (begin - first), out + (at - first), out);
    out[at - begin] = page;
    while (end < first + count) {
        Page* other = joins(end);
        if (!other) break;
        out[end++ - begin] = other;
    }
    return {begin, uint32_t(end - begin)};
}

size_t SharedPageTable::size() const {
    std::lock_guard guard(lock_);
    return pages_.size();
}

size_t SharedPageTable::bytes() const {
    std::lock_guard guard(lock_);
    return sizeof(*this) + pages_.bytes() + slab_pages_ * sizeof(Page);
}

void SharedPageTable::each(const std::function<void(const Page&)>& visit) const {
    std::lock_guard guard(lock_);
    pages_.each(visit);
}

std::vector<uint64_t> PageTable::resident() const {
    std::vector<uint64_t> indices;
    each([&](const Page& page) {
        if (page.state() == PageState::resident) indices.push_back(page.index);
    });
    std::sort(indices.begin(), indices.end());
    return indices;
}

}  // namespace k42::vm
