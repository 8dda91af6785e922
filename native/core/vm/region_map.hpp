// The regions of a process by address (paper 4.1, figure 5): the native half of a Process. One object to the fault
// engine, with one of two implementations inside, which can be changed while faults look up: one tree under one lock,
// or a copy for each processor of the regions that it has faulted on.
//
// A look-up may return a region that is being removed: free regions when the requests of the runtime that ran at the
// removal have ended (Engine::synchronize).
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <variant>
#include <vector>

#include "alloc/allocator.hpp"
#include "runtime/retire.hpp"
#include "runtime/within.hpp"
#include "structures/interval_map.hpp"
#include "structures/per_processor.hpp"
#include "structures/traffic.hpp"

namespace k42::vm {

struct Region;

// On lines of its own: every look-up reads the pointer.
class alignas(runtime::apart) RegionMap {
  public:
    using Interval = k42::Interval<Region*>;

    explicit RegionMap(bool replicated = false) : map_(make(replicated)) {}
    RegionMap(const RegionMap&) = delete;
    RegionMap& operator=(const RegionMap&) = delete;
    ~RegionMap() { alloc::destroy(map_.load(std::memory_order_relaxed)); }

    // The region that contains the address.
    std::optional<Interval> lookup(uint64_t address) {
        const runtime::Within within;
        const runtime::Processor& here = within.processor();
        // Acquire: the map is complete; and it is retired after it was replaced here, so it outlives this request.
        Map& map = *map_.load(std::memory_order_acquire);
        if (auto* replicated = std::get_if<Replicated>(&map.implementation)) {
            Replica& replica = replicated->replicas.of(
                here, [&]() -> Replica& { return *alloc::make<Replica, alloc::Kind::padded>(replicated->map.join()); });
            replica.uses.add();
            return replica.replica.lookup(address);
        }
        auto& shared = std::get<Shared>(map.implementation);
        const auto found = shared.map.lookup(address);
        shared.traffic.pass(here);
        return found;
    }

    // False, and nothing changed, when the range is empty or overlaps another.
    bool insert(uint64_t start, uint64_t end, Region* region) {
        std::lock_guard guard(lock_);
        return std::visit([&](auto& kind) { return kind.map.insert(start, end, region); }, implementation());
    }

    // Removes the region that starts at `start`: look-ups that begin after this has returned do not find it.
    std::optional<Region*> remove(uint64_t start) {
        std::lock_guard guard(lock_);
        return std::visit([&](auto& kind) { return kind.map.remove(start); }, implementation());
    }

    size_t size() const {
        std::lock_guard guard(lock_);
        return std::visit([&](auto& kind) { return kind.map.size(); }, implementation());
    }

    // All regions at one moment, in order.
    std::vector<Interval> snapshot() const {
        std::lock_guard guard(lock_);
        return std::visit([&](auto& kind) { return kind.map.snapshot(); }, implementation());
    }

    bool replicated() const {
        std::lock_guard guard(lock_);
        return std::holds_alternative<Replicated>(implementation());
    }

    // Changes the implementation. Look-ups go on: each finds what is there throughout, in the old one or in the new.
    void replicate(bool replicated) {
        std::lock_guard guard(lock_);  // so nothing is added or removed meanwhile
        if (std::holds_alternative<Replicated>(implementation()) == replicated) return;
        Map* const next = make(replicated);
        std::visit(
            [&](auto& from) {
                for (const Interval& interval : from.map.snapshot()) {
                    std::visit([&](auto& to) { to.map.insert(interval.start, interval.end, interval.value); },
                               next->implementation);
                }
            },
            implementation());
        Map* const old = map_.exchange(next, std::memory_order_acq_rel);
        runtime::retire(old, [](void* map) { alloc::destroy(static_cast<Map*>(map)); });
    }

    // How often this processor looked up, since it was replicated; 0 while uses are not counted by processor.
    uint64_t uses_by(const runtime::Processor& processor) const {
        std::lock_guard guard(lock_);
        const auto* replicated = std::get_if<Replicated>(&implementation());
        const Replica* replica = replicated ? replicated->replicas.find(processor) : nullptr;
        return replica ? replica->uses.read() : 0;
    }

    // Who uses it, since its implementation was chosen.
    Traffic traffic() const {
        std::lock_guard guard(lock_);
        const auto* replicated = std::get_if<Replicated>(&implementation());
        if (!replicated) return std::get<Shared>(implementation()).traffic.read();
        Traffic traffic{true, {}, 0};
        replicated->replicas.each([&](const Replica& replica) { traffic.uses.push_back(replica.uses.read()); });
        return traffic;
    }

  private:
    struct Shared {
        SharedIntervalMap<Region*> map;
        SharedTraffic traffic;
    };
    struct Replica {
        explicit Replica(ReplicatedIntervalMap<Region*>::Replica& replica_) : replica(replica_) {}
        ReplicatedIntervalMap<Region*>::Replica& replica;
        OwnTraffic uses;
    };
    struct Replicated {
        ~Replicated() {
            replicas.each([](Replica& replica) { alloc::destroy(&replica); });
        }
        ReplicatedIntervalMap<Region*> map;
        PerProcessor<Replica> replicas;
    };
    struct alignas(runtime::apart) Map {
        std::variant<Shared, Replicated> implementation;
    };

    static Map* make(bool replicated) {
        Map* map = alloc::make<Map, alloc::Kind::padded>();
        if (replicated) map->implementation.emplace<Replicated>();
        return map;
    }
    std::variant<Shared, Replicated>& implementation() const {
        return map_.load(std::memory_order_relaxed)->implementation;
    }

    std::atomic<Map*> map_;
    // Protects changes, so that no look-up takes it; before the locks of the implementations. On a line of its own.
    alignas(runtime::apart) mutable std::mutex lock_;
};

}  // namespace k42::vm
