// Span homing: each 2 MiB of a window are served on the CPU of the threads that fault there. A fault that has to cross
// to another CPU costs 60 to 125 µs, a local one 4 to 6.
//
// What is known of a window's spans, in a table of 12 bytes a span that takes memory as it is used. The CPU that a
// span is homed to is what the client was asked for: a command that was lost shows as faults that still come on the
// other CPU, and is given again.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

namespace k42::vm {

constexpr uint64_t kSpan = 2u << 20;  // bytes: what one page of a page table maps, so that moves split none

struct SpanMove {
    uint64_t address, length;
    int from, to;  // indices of CPUs
};

class Spans {
  public:
    // In units of about a millisecond (see tick()). A span that has moved rests for kRest, twice as long after each
    // further move, up to kRest << kMaxMoves (about four seconds): threads of two CPUs that share it move it that often
    // at most. After eight times its last rest in peace it counts as new.
    static constexpr uint32_t kRest = 4;
    static constexpr uint8_t kMaxMoves = 10;
    // Spans that are moved at once, ahead of a thread that goes through memory: as many as it has behind it, up to
    // this.
    static constexpr uint64_t kMaxRun = 16;
    // A span without a fault for so long can be unmapped.
    static constexpr uint32_t kIdle = 4096;

    static uint32_t tick(uint64_t ns) { return uint32_t(ns >> 20) | 1; }  // never 0

    Spans(uint64_t base, uint64_t length, int home);
    ~Spans();
    Spans(const Spans&) = delete;
    Spans& operator=(const Spans&) = delete;

    // Notes a fault. True when it is the first of its span since the span was unmapped: page tables are made for it.
    bool note(uint64_t address, uint32_t now) {
        Span& span = at(address);
        const uint32_t seen = span.seen.load(std::memory_order_relaxed);
        if (seen == 0) {
            if (span.seen.exchange(now, std::memory_order_relaxed) != 0) return false;
            mapped_.fetch_add(1, std::memory_order_relaxed);
            return true;
        }
        // Seldom written: neighbours, which may be faulting on other CPUs, share the line.
        if (now - seen >= kIdle / 8) span.seen.store(now, std::memory_order_relaxed);
        return false;
    }

    // Whether the span rests, so that follow() would refuse.
    bool rests(uint64_t address, uint32_t now) {
        const Span& span = at(address);
        return span.moves.load(std::memory_order_relaxed) != 0 &&
               int32_t(now - span.until.load(std::memory_order_relaxed)) < 0;
    }

    // The functions below: one at a time, by the HAT's lock.

    // A fault of a thread of CPU `to` came on CPU `from`: the move to ask for, if any. `ranges` counts, for all windows
    // of the client, the ranges into which they are split; it may grow up to `most`.
    std::optional<SpanMove> follow(uint64_t address, int from, int to, uint32_t now, uint64_t& ranges, uint64_t most);

    // Looks at up to `steps` spans, which it counts down, from where it stopped the last time: the first run of idle
    // ones, which are noted as unmapped. Nothing: none up to the window's end; the next call begins anew.
    std::optional<SpanMove> idle(uint32_t now, uint32_t& steps);

    // The window has gone: nothing moves any more.
    void end() { hand_ = count_, ended_ = true; }
    // Ranges that the homes split the window into, beyond one.
    uint64_t splits() const { return splits_; }
    // Spans that have page tables, as far as is known.
    uint64_t mapped() const { return mapped_.load(std::memory_order_relaxed); }

  private:
    struct Span {
        std::atomic<uint32_t> seen;   // tick of a recent fault; 0: none since it was unmapped
        std::atomic<uint32_t> until;  // it rests until this tick, if it has moved
        std::atomic<uint16_t> home;   // index of the CPU, plus 1; 0: the window's own
        std::atomic<uint8_t> moves;   // not long ago
    };

    Span& at(uint64_t address) const { return spans_[address / kSpan - first_]; }
    int home(uint64_t index) const {
        const int stored = spans_[index].home.load(std::memory_order_relaxed);
        return stored ? stored - 1 : home_;
    }
    SpanMove range(uint64_t first, uint64_t last, int from, int to) const;
    uint64_t splits_in(uint64_t first, uint64_t last) const;

    const uint64_t base_, end_;
    const uint64_t first_;  // number of the first span in the address space
    const uint64_t count_;
    const int home_;
    Span* const spans_;
    uint64_t splits_ = 0;
    uint64_t hand_ = 0;
    bool ended_ = false;
    std::atomic<uint64_t> mapped_{0};
};

}  // namespace k42::vm
