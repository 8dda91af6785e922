// The partitioned page table (paper 4.4): parts of the file, spans of 2 MiB in turn, each with a table of its own, its
// own lock and its own order of replacement, on its own lines. Faults on different parts meet in nothing here.
//
// What lies across spans is locked span by span in ascending order, as all callers do: so nobody waits in a circle.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "runtime/processor.hpp"
#include "vm/page_table.hpp"

namespace k42::vm {

class PartitionedPageTable final : public PageTable {
  public:
    static constexpr unsigned kShift = 9;  // pages of a span: 2 MiB, as the spans that follow their processor

    explicit PartitionedPageTable(Policy policy, size_t parts = 16) {
        for (size_t i = 0; i < parts; ++i) parts_.push_back(std::make_unique<Part>(policy));
    }

    void lock(uint64_t first, uint32_t count, Page** out) override {
        for (uint32_t done = 0; done < count;) {
            const uint32_t length = std::min(count - done, rest_of_span(first + done));
            table(first + done).lock(first + done, length, out + done);
            done += length;
        }
    }
    void unlock(Page** pages, uint32_t count) override {
        for (uint32_t done = 0; done < count;) {
            const size_t part = part_of(pages[done]->index);
            uint32_t end = done + 1;
            while (end < count && part_of(pages[end]->index) == part) ++end;
            parts_[part]->table.unlock(pages + done, end - done);
            done = end;
        }
    }
    // Within the page's span.
    Run lock_around(Page* page, uint64_t first, uint32_t count, Page** out) override {
        const uint64_t span = page->index >> kShift << kShift;
        const uint64_t begin = std::max(first, span);
        const uint64_t end = std::min(first + count, span + (uint64_t{1} << kShift));
        return table(page->index).lock_around(page, begin, uint32_t(end - begin), out);
    }

    size_t parts() const override { return parts_.size(); }
    Replacement& replacement(size_t part) override { return parts_[part]->table.replacement(0); }
    size_t part_of(uint64_t index) const override { return (index >> kShift) % parts_.size(); }
    size_t size() const override {
        size_t sum = 0;
        for (const auto& part : parts_) sum += part->table.size();
        return sum;
    }
    size_t bytes() const override {
        size_t sum = sizeof(*this);
        for (const auto& part : parts_) sum += part->table.bytes();
        return sum;
    }
    void each(const std::function<void(const Page&)>& visit) const override {
        for (const auto& part : parts_) part->table.each(visit);
    }

  private:
    struct alignas(runtime::apart) Part {
        explicit Part(Policy policy) : table(policy) {}
        SharedPageTable table;
    };

    static uint32_t rest_of_span(uint64_t index) {
        return uint32_t((uint64_t{1} << kShift) - (index & ((uint64_t{1} << kShift) - 1)));
    }
    SharedPageTable& table(uint64_t index) { return parts_[part_of(index)]->table; }

    std::vector<std::unique_ptr<Part>> parts_;
};

}  // namespace k42::vm
