// Who uses an object of the fault path, counted where it costs nothing that is not paid already: by a shared object on
// the line that all its users write, by a distributed one in the part that its processor alone writes. It is what the
// decision between the two is made from (k42.vm.adapt).
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "runtime/processor.hpp"

namespace k42 {

struct Traffic {
    bool distributed;
    std::vector<uint64_t> uses;  // of a distributed object: by each processor; else one number
    uint64_t moves;              // of a shared object: uses by another processor than the use before
};

// On a line that its users write anyway. Uses that race may be lost: this is a measure, not an account.
class SharedTraffic {
  public:
    void pass(const runtime::Processor& here) {
        uses_.store(uses_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
        if (last_.load(std::memory_order_relaxed) == here.id) return;
        last_.store(here.id, std::memory_order_relaxed);
        moves_.store(moves_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    }
    Traffic read() const {
        return {false, {uses_.load(std::memory_order_relaxed)}, moves_.load(std::memory_order_relaxed)};
    }

  private:
    std::atomic<uint64_t> uses_{0}, moves_{0};
    std::atomic<uint32_t> last_{UINT32_MAX};
};

// In a processor's part.
class OwnTraffic {
  public:
    void add() { uses_.store(uses_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed); }
    uint64_t read() const { return uses_.load(std::memory_order_relaxed); }

  private:
    std::atomic<uint64_t> uses_{0};
};

}  // namespace k42
