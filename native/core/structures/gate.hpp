// Gates: the request counter of a Region (paper 4.3). Requests enter and leave; control operations stop newcomers,
// wait until those inside have left, and let newcomers in again or shut the gate for ever.
//
// SharedGate is one word that every request writes (figure 9 shows what that costs), DistributedGate counts by
// processor. The five questions of the paper (section 3.2), of the distributed one:
// - What is local: a part for each processor, the number of requests inside, which its owner alone writes.
// - What is shared: the state, on a line that requests only read; and the list of the parts.
// - How parts are made and join: `join` makes one with nobody inside. One that joins a gate that is stopped or shut
//   finds that out as every request does: it counts itself in, then looks at the state.
// - How local and global operations synchronise: a request counts itself in and looks at the state; a stopper sets the
//   state and looks at the counts. Of the two at least one sees the other: the request then counts itself out again,
//   the stopper waits for it. The barrier that this needs is paid by the stopper (runtime/fence.hpp).
// - How parts are organised: in a list, newest first, each on lines of its own; they live as long as the gate.
//
// Who is inside already may enter again, whatever the state: a stop waits for it anyway, and would wait for ever if it
// had to wait for the stop. A part knows that of its processor; the word of SharedGate alone does not.
//
// Who has waited at a stopped gate comes in before the next stop: stoppers that follow one another starve nobody.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <utility>

#include "alloc/allocator.hpp"
#include "runtime/processor.hpp"
#include "structures/futex.hpp"

namespace k42 {

// How long a control operation waits: until a deadline, or until it is told to give up.
struct Patience {
    Deadline deadline = never;
    bool (*give_up)() = nullptr;  // asked ten times a second, no lock held; true ends the wait

    // Sleeps while `word` holds `expected`; may return early. False: patience has ended.
    bool wait(std::atomic<uint32_t>& word, uint32_t expected) const {
        if (!give_up) return futex_wait(word, expected, deadline);
        const Deadline slice = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
        return futex_wait(word, expected, slice < deadline ? slice : deadline) && !give_up();
    }
};

// What both gates have in common: the state, and who may change it. `Gate` has `drain`.
template <class Gate>
class GateControl {
  public:
    enum class Entry { entered, stopped, rejected };
    enum class Stop { stopped, rejected, gave_up };
    enum class State { normal, stopping, stopped, shutdown };

    // Blocks newcomers and waits until those inside have left: then the caller is alone until it calls `restart`. One
    // stopper at a time, others wait for its restart. Rejected when the gate is shut, also when that happens while it
    // waits; when it gives up, newcomers are let in again.
    Stop stop(const Patience& patience = {}) {
        uint32_t seen = word_.load(std::memory_order_relaxed);
        for (;;) {
            if (seen & kShutdown) return Stop::rejected;
            if (seen & kHeld) {
                if (!patience.wait(word_, seen)) return Stop::gave_up;
            } else if (const uint32_t waiting = waiting_.load(std::memory_order_relaxed)) {
                if (!patience.wait(waiting_, waiting)) return Stop::gave_up;
            } else if (word_.compare_exchange_weak(seen, seen | kStopping, std::memory_order_acquire)) {
                break;
            }
            seen = word_.load(std::memory_order_relaxed);
        }
        if (!self().drain(patience)) {
            word_.fetch_and(~kStopping, std::memory_order_release);
            futex_wake_all(word_);
            return Stop::gave_up;
        }
        seen = word_.load(std::memory_order_relaxed);
        do {
            if (seen & kShutdown) return Stop::rejected;
        } while (!word_.compare_exchange_weak(seen, seen ^ (kStopping | kStopped), std::memory_order_acquire));
        return Stop::stopped;
    }

    // Lets newcomers in again. False, and nothing changed, when the gate is not stopped: also while a stop still waits.
    bool restart() {
        uint32_t seen = word_.load(std::memory_order_relaxed);
        do {
            if (!(seen & kStopped)) return false;
        } while (!word_.compare_exchange_weak(seen, seen & ~kStopped, std::memory_order_release));
        futex_wake_all(word_);
        return true;
    }

    // Rejects newcomers for ever, and those who wait; waits until those inside have left. False: it gave up that wait;
    // the gate stays shut. A stop ends with it: if the stopper works still, to end that first is the caller's affair.
    bool shutdown(const Patience& patience = {}) {
        uint32_t seen = word_.load(std::memory_order_relaxed);
        while (!word_.compare_exchange_weak(seen, (seen & kCount) | kShutdown, std::memory_order_acq_rel)) {
        }
        futex_wake_all(word_);
        return self().drain(patience);
    }

    State state() const {
        const uint32_t seen = word_.load(std::memory_order_acquire);
        if (seen & kShutdown) return State::shutdown;
        return seen & kStopped ? State::stopped : seen & kStopping ? State::stopping : State::normal;
    }

  protected:
    static constexpr uint32_t kShutdown = 1u << 31;
    static constexpr uint32_t kStopped = 1u << 30;
    static constexpr uint32_t kStopping = 1u << 29;  // a stopper waits for those inside
    static constexpr uint32_t kHeld = kStopped | kStopping;
    static constexpr uint32_t kCount = kStopping - 1;

    // Enters by `try_enter`, waiting while the gate is stopped. Stopped: the deadline has passed.
    template <class TryEnter>
    Entry enter_by(TryEnter try_enter, Deadline deadline) {
        Entry entry = try_enter();
        if (entry != Entry::stopped) [[likely]]
            return entry;
        waiting_.fetch_add(1, std::memory_order_relaxed);
        do {
            const uint32_t seen = word_.load(std::memory_order_relaxed);
            if ((seen & kHeld) && !futex_wait(word_, seen, deadline)) break;
        } while ((entry = try_enter()) == Entry::stopped);
        if (waiting_.fetch_sub(1, std::memory_order_relaxed) == 1) futex_wake_all(waiting_);
        return entry;
    }

    // The state in the upper three bits; in the rest, the requests inside a SharedGate.
    std::atomic<uint32_t> word_{0};
    // Requests that wait for a restart, or have been woken by one and are not in yet. Written at stopped gates alone.
    std::atomic<uint32_t> waiting_{0};

  private:
    Gate& self() { return static_cast<Gate&>(*this); }
};

// One word for all.
class SharedGate : public GateControl<SharedGate> {
  public:
    // What a processor that keeps count of its own requests calls; by the owner of the processor alone.
    class Part {
      public:
        explicit Part(SharedGate& gate) : gate_(gate) {}

        Entry try_enter() {
            if (inside_ != 0) {
                gate_.word_.fetch_add(1, std::memory_order_relaxed);
            } else if (const Entry entry = gate_.try_enter(); entry != Entry::entered) {
                return entry;
            }
            ++inside_;
            return Entry::entered;
        }
        Entry enter(Deadline deadline = never) {
            return gate_.enter_by([this] { return try_enter(); }, deadline);
        }
        // False, and nothing changed, when no request of this processor is inside.
        bool leave() {
            if (inside_ == 0) return false;
            --inside_;
            return gate_.leave();
        }
        uint32_t inside() const { return inside_; }

      private:
        SharedGate& gate_;
        uint32_t inside_ = 0;
    };

    // Never waits.
    Entry try_enter() {
        uint32_t seen = word_.load(std::memory_order_relaxed);
        do {
            if (seen & kShutdown) return Entry::rejected;
            if (seen & kHeld) return Entry::stopped;
        } while (!word_.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire));
        return Entry::entered;
    }

    // Waits while the gate is stopped; false when it was shut down.
    bool enter() {
        return enter_by([this] { return try_enter(); }, never) == Entry::entered;
    }

    // False, and nothing changed, when no request is inside.
    bool leave() {
        uint32_t seen = word_.load(std::memory_order_relaxed);
        do {
            if ((seen & kCount) == 0) return false;
        } while (!word_.compare_exchange_weak(seen, seen - 1, std::memory_order_release));
        if ((seen & ~kCount) && (seen & kCount) == 1) futex_wake_all(word_);
        return true;
    }

    uint32_t inside() const { return word_.load(std::memory_order_relaxed) & kCount; }

  private:
    friend GateControl<SharedGate>;

    bool drain(const Patience& patience) {
        for (;;) {
            const uint32_t seen = word_.load(std::memory_order_acquire);
            if ((seen & kCount) == 0) return true;
            if (!patience.wait(word_, seen)) return false;
        }
    }
};

// A count for each processor. It must outlive the calls of `leave`, which look at the state when their request is
// outside already: after a shutdown, free it by `retire`, if they are made within requests of the runtime.
// On lines of its own, because every request reads the word.
class alignas(runtime::apart) DistributedGate : public GateControl<DistributedGate> {
  public:
    // By the owner of the processor alone.
    class alignas(runtime::apart) Part {
      public:
        Part(DistributedGate& gate, Part* next) : gate_(gate), next_(next) {}

        // Never waits.
        Entry try_enter() {
            const uint32_t inside = inside_.load(std::memory_order_relaxed);
            if (inside != 0) {
                inside_.store(inside + 1, std::memory_order_relaxed);
                return Entry::entered;
            }
            inside_.store(kTrying, std::memory_order_relaxed);
            runtime::fence_light();  // "inside" before the look at the state: pairs with the heavy fence in `drain`
            // Acquire: what the last stopper did; pairs with the release in `restart`.
            const uint32_t state = gate_.word_.load(std::memory_order_acquire);
            if (state == 0) [[likely]] {
                inside_.store(1, std::memory_order_relaxed);
                return Entry::entered;
            }
            inside_.store(0, std::memory_order_release);
            futex_wake_all(inside_);  // a stopper may have seen us
            return state & kShutdown ? Entry::rejected : Entry::stopped;
        }
        // Waits while the gate is stopped, until `deadline`.
        Entry enter(Deadline deadline = never) {
            return gate_.enter_by([this] { return try_enter(); }, deadline);
        }
        // False, and nothing changed, when no request of this processor is inside.
        bool leave() {
            const uint32_t inside = inside_.load(std::memory_order_relaxed);
            if (inside == 0) return false;
            inside_.store(inside - 1, std::memory_order_release);  // what we did: pairs with the acquire in `drain`
            if (inside != 1) return true;
            runtime::fence_light();  // "outside" before the look at the state: else both sides could wait
            if (gate_.word_.load(std::memory_order_relaxed) != 0) [[unlikely]]
                futex_wake_all(inside_);
            return true;
        }
        uint32_t inside() const { return inside_.load(std::memory_order_relaxed) & ~kTrying; }

      private:
        friend DistributedGate;
        // Stands for a request that has yet to look at the state: whoever drains waits for it, who counts does not
        // count it.
        static constexpr uint32_t kTrying = 1u << 31;

        std::atomic<uint32_t> inside_{0};
        DistributedGate& gate_;
        Part* const next_;
    };

    DistributedGate() = default;
    DistributedGate(const DistributedGate&) = delete;
    DistributedGate& operator=(const DistributedGate&) = delete;
    ~DistributedGate() {
        Part* part = parts_.load(std::memory_order_relaxed);
        while (part) alloc::destroy(std::exchange(part, part->next_));
    }

    // A new part, for the processor of the caller: made by the thread that will use it, so that its memory is near.
    Part& join() {
        std::lock_guard guard(lock_);
        auto* part = alloc::make<Part, alloc::Kind::padded>(*this, parts_.load(std::memory_order_relaxed));
        parts_.store(part, std::memory_order_release);  // complete for whoever drains or counts
        return *part;
    }

    // Each processor's count at some moment of the call. So 0 between a stop and its restart, and after a shutdown.
    uint32_t inside() const {
        uint32_t sum = 0;
        for (const Part* part = parts_.load(std::memory_order_acquire); part; part = part->next_) sum += part->inside();
        return sum;
    }

  private:
    friend GateControl<DistributedGate>;

    bool drain(const Patience& patience) {
        runtime::fence_heavy();  // the state before the look at the parts, and at their list
        for (Part* part = parts_.load(std::memory_order_acquire); part; part = part->next_) {
            while (const uint32_t inside = part->inside_.load(std::memory_order_acquire)) {
                if (!patience.wait(part->inside_, inside)) return false;
            }
        }
        return true;
    }

    std::mutex lock_;  // orders joins: protects the changes of parts_; innermost
    std::atomic<Part*> parts_{nullptr};
};

}  // namespace k42
