#include "structures/page_table.hpp"

#include <algorithm>

#include "structures/futex.hpp"

namespace k42 {

bool PageTable::try_lock(Page* page) {
    uint32_t seen = page->word.load(std::memory_order_relaxed);
    while (!(seen & Page::kLocked)) {
        if (page->word.compare_exchange_weak(seen, seen | Page::kLocked, std::memory_order_acquire)) return true;
    }
    return false;
}

Page* PageTable::find_or_allocate(uint64_t index) {
    if (Page* page = pages_.find(spread(index), [&](const Page& p) { return p.index == index; })) return page;
    if (!free_) {
        const size_t count = std::clamp<size_t>(slab_pages_, 16, 2048);
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

void PageTable::lock(uint64_t first, uint32_t count, Page** out) {
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

void PageTable::unlock(Page** pages, uint32_t count) {
    uint32_t absent = 0;
    for (uint32_t i = 0; i < count; ++i) {
        Page* page = pages[i];
        if (page->state() == PageState::absent && !page->waiters) {
            pages[absent++] = page;
            continue;
        }
        const uint32_t seen = page->word.fetch_and(Page::kState, std::memory_order_release);
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

void PageTable::make_resident(Page** pages, uint32_t count) {
    std::lock_guard guard(lock_);
    for (uint32_t i = 0; i < count; ++i) {
        pages[i]->set_state(PageState::resident);
        order_.push_back(pages[i]->index);
    }
}

std::vector<uint64_t> PageTable::take_oldest(size_t count) {
    std::lock_guard guard(lock_);
    const size_t taken = std::min(count, order_.size());
    std::vector<uint64_t> oldest(order_.begin(), order_.begin() + ptrdiff_t(taken));
    order_.erase(order_.begin(), order_.begin() + ptrdiff_t(taken));
    return oldest;
}

size_t PageTable::size() const {
    std::lock_guard guard(lock_);
    return pages_.size();
}

size_t PageTable::bytes() const {
    std::lock_guard guard(lock_);
    return sizeof(*this) + pages_.bytes() + slab_pages_ * sizeof(Page) + order_.size() * sizeof(uint64_t);
}

std::vector<uint64_t> PageTable::resident() const {
    std::vector<uint64_t> indices;
    {
        std::lock_guard guard(lock_);
        pages_.each([&](const Page& page) {
            if (page.state() == PageState::resident) indices.push_back(page.index);
        });
    }
    std::sort(indices.begin(), indices.end());
    return indices;
}

}  // namespace k42
