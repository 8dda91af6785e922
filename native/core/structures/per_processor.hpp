// The parts of an object, one for each processor that has used it, found by the number of the processor. A look-up
// writes nothing and takes no lock: it reads two pointers that change only when a processor uses the object for the
// first time. Whoever makes the parts puts them here, and owns them.
//
// The pointers lie in segments that double and never move, as those of the processors do: no fixed maximum.
#pragma once

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "alloc/allocator.hpp"
#include "runtime/processor.hpp"

namespace k42 {

template <class Part>
class PerProcessor {
  public:
    PerProcessor() = default;
    PerProcessor(const PerProcessor&) = delete;
    PerProcessor& operator=(const PerProcessor&) = delete;
    ~PerProcessor() {
        for (auto& segment : segments_) alloc::deallocate(segment.load(std::memory_order_relaxed));
    }

    // The processor's part, or nullptr while it has none.
    Part* find(const runtime::Processor& processor) const {
        const size_t segment = segment_of(processor.id);
        Slot* slots = segments_[segment].load(std::memory_order_acquire);
        return slots ? slots[processor.id - start(segment)].load(std::memory_order_acquire) : nullptr;
    }

    // By the owner of the processor alone. Throws std::bad_alloc.
    void set(const runtime::Processor& processor, Part* part) {
        const size_t segment = segment_of(processor.id);
        Slot* slots = segments_[segment].load(std::memory_order_acquire);
        if (!slots) slots = make(segment);
        slots[processor.id - start(segment)].store(part, std::memory_order_release);  // complete for who visits
    }

    // The processor's part, made by `make` at its first use.
    template <class Make>
    Part& of(const runtime::Processor& processor, Make&& make) {
        if (Part* part = find(processor)) [[likely]]
            return *part;
        Part& made = make();
        set(processor, &made);
        return made;
    }

    // All parts, by ascending number of their processor.
    template <class Visit>
    void each(Visit&& visit) const {
        for (size_t segment = 0; segment < kSegments; ++segment) {
            Slot* slots = segments_[segment].load(std::memory_order_acquire);
            if (!slots) continue;
            for (size_t i = 0; i < size(segment); ++i) {
                if (Part* part = slots[i].load(std::memory_order_acquire)) visit(*part);
            }
        }
    }

  private:
    using Slot = std::atomic<Part*>;

    static constexpr size_t kFirst = 16;     // pointers of segment 0: two lines; the others are as large as all before
    static constexpr size_t kSegments = 29;  // for 2^32 processors
    static size_t segment_of(uint32_t id) { return size_t(std::bit_width(id / kFirst)); }
    static size_t start(size_t segment) { return segment ? kFirst << (segment - 1) : 0; }
    static size_t size(size_t segment) { return segment ? kFirst << (segment - 1) : kFirst; }

    Slot* make(size_t segment) {
        auto* made = static_cast<Slot*>(alloc::allocate(size(segment) * sizeof(Slot), alloc::Kind::padded));
        for (size_t i = 0; i < size(segment); ++i) new (&made[i]) Slot(nullptr);
        Slot* seen = nullptr;
        if (segments_[segment].compare_exchange_strong(seen, made, std::memory_order_acq_rel)) return made;
        alloc::deallocate(made);
        return seen;
    }

    std::atomic<Slot*> segments_[kSegments] = {};
};

}  // namespace k42
