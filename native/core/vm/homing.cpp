#include "vm/homing.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace k42::vm {

Spans::Spans(uint64_t base, uint64_t length, int home)
    : base_(base),
      end_(base + length),
      first_(base / kSpan),
      count_((end_ - 1) / kSpan - first_ + 1),
      home_(home),
      spans_([this] {
          // Zeros without memory until touched: a window may have millions of spans.
          void* table = mmap(nullptr, count_ * sizeof(Span), PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
          if (table == MAP_FAILED) throw std::bad_alloc();
          return static_cast<Span*>(table);
      }()) {}

Spans::~Spans() { munmap(spans_, count_ * sizeof(Span)); }

SpanMove Spans::range(uint64_t first, uint64_t last, int from, int to) const {
    const uint64_t start = std::max(base_, (first_ + first) * kSpan);
    const uint64_t end = std::min(end_, (first_ + last) * kSpan);
    return {start, end - start, from, to};
}

uint64_t Spans::splits_in(uint64_t first, uint64_t last) const {
    uint64_t splits = 0;
    for (uint64_t i = std::max<uint64_t>(first, 1); i < std::min(last + 1, count_); ++i) {
        splits += home(i) != home(i - 1);
    }
    return splits;
}

std::optional<SpanMove> Spans::follow(uint64_t address, int from, int to, uint32_t now, uint64_t& ranges,
                                      uint64_t most) {
    if (ended_ || rests(address, now)) return std::nullopt;
    Span& span = at(address);
    const uint64_t first = address / kSpan - first_;
    uint64_t behind = 0;
    while (behind < kMaxRun && behind < first && home(first - 1 - behind) == to) ++behind;
    uint64_t last = first + 1;
    while (last < count_ && last - first < behind && home(last) == from &&
           spans_[last].seen.load(std::memory_order_relaxed) == 0) {
        ++last;
    }
    const uint64_t before = splits_in(first, last);
    uint16_t homes[kMaxRun];
    for (uint64_t i = first; i < last; ++i) {
        homes[i - first] = spans_[i].home.load(std::memory_order_relaxed);
        spans_[i].home.store(uint16_t(to + 1), std::memory_order_relaxed);
    }
    const uint64_t after = splits_in(first, last);
    if (after > before && ranges + (after - before) > most) {
        for (uint64_t i = first; i < last; ++i) spans_[i].home.store(homes[i - first], std::memory_order_relaxed);
        return std::nullopt;
    }
    ranges += after - before;
    splits_ += after - before;
    uint8_t moves = span.moves.load(std::memory_order_relaxed);
    const uint32_t at_peace = now - span.until.load(std::memory_order_relaxed);
    if (moves && at_peace > 8 * (kRest << (moves - 1))) moves = 0;
    span.until.store(now + (kRest << moves), std::memory_order_relaxed);
    span.moves.store(std::min<uint8_t>(uint8_t(moves + 1), kMaxMoves), std::memory_order_relaxed);
    return range(first, last, from, to);
}

std::optional<SpanMove> Spans::idle(uint32_t now, uint32_t& steps) {
    const auto is_idle = [&](uint64_t i) {
        const uint32_t seen = spans_[i].seen.load(std::memory_order_relaxed);
        return seen != 0 && now - seen >= kIdle;
    };
    while (hand_ < count_ && steps > 0 && !is_idle(hand_)) ++hand_, --steps;
    const uint64_t first = hand_;
    while (hand_ < count_ && steps > 0 && is_idle(hand_) && home(hand_) == home(first)) {
        spans_[hand_].seen.store(0, std::memory_order_relaxed);
        mapped_.fetch_sub(1, std::memory_order_relaxed);
        ++hand_, --steps;
    }
    const uint64_t last = hand_;
    if (hand_ == count_ && first == last) hand_ = 0;
    if (first == last) return std::nullopt;
    return range(first, last, home(first), home(first));
}

}  // namespace k42::vm
