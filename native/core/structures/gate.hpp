// The request counter of a Region (paper 4.3): requests enter and leave; control operations stop newcomers and
// drain those inside. Non-distributed: one word, which every request writes (figure 9 shows what that costs).
#pragma once

#include <atomic>
#include <cstdint>

#include "structures/futex.hpp"

namespace k42 {

class Gate {
  public:
    enum class Entry { entered, stopped, rejected };

    // Never waits.
    Entry try_enter() {
        uint32_t seen = word_.load(std::memory_order_relaxed);
        do {
            if (seen & kShutdown) return Entry::rejected;
            if (seen & kStopped) return Entry::stopped;
        } while (!word_.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire));
        return Entry::entered;
    }

    // Waits while the gate is stopped; false when it was shut down.
    bool enter() {
        for (;;) {
            switch (try_enter()) {
                case Entry::entered:
                    return true;
                case Entry::rejected:
                    return false;
                case Entry::stopped:
                    uint32_t seen = word_.load(std::memory_order_relaxed);
                    if (seen & kStopped) futex_wait(word_, seen);
            }
        }
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

    // Blocks newcomers and waits until those inside have left. False when shut down. One stopper at a time.
    bool stop() {
        uint32_t seen = word_.load(std::memory_order_relaxed);
        for (;;) {
            if (seen & kShutdown) return false;
            if (seen & kStopped) {
                futex_wait(word_, seen);
                seen = word_.load(std::memory_order_relaxed);
            } else if (word_.compare_exchange_weak(seen, seen | kStopped, std::memory_order_acquire)) {
                break;
            }
        }
        drain();
        return true;
    }

    // Lets newcomers in again. False when the gate was not stopped.
    bool restart() {
        const bool was = word_.fetch_and(~kStopped, std::memory_order_release) & kStopped;
        futex_wake_all(word_);
        return was;
    }

    // Rejects newcomers for ever and waits until those inside have left. Who has stopped the gate is not inside: to
    // end its work first is the caller's affair.
    void shutdown() {
        word_.fetch_or(kShutdown, std::memory_order_acquire);
        futex_wake_all(word_);
        drain();
    }

    uint32_t inside() const { return word_.load(std::memory_order_relaxed) & kCount; }

  private:
    static constexpr uint32_t kShutdown = 1u << 31;
    static constexpr uint32_t kStopped = 1u << 30;
    static constexpr uint32_t kCount = kStopped - 1;

    void drain() {
        for (;;) {
            uint32_t seen = word_.load(std::memory_order_acquire);
            if ((seen & kCount) == 0) return;
            futex_wait(word_, seen);
        }
    }

    std::atomic<uint32_t> word_{0};  // state in the upper two bits, requests inside in the rest
};

}  // namespace k42
