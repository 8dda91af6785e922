// The gate of a Region (paper 4.3): every fault on the region enters and leaves; who takes the region away, or its
// windows, stops it or shuts it down. One object to the fault engine, with one of two implementations inside, which can
// be changed while faults pass: one counter, which all faults write (figure 9), or one for each processor (figure 10).
//
// A request enters and leaves on one thread. A processor that comes first while the gate is stopped finds it stopped.
//
// How it is changed: the old gate is stopped; the new one comes into its place, stopped; it is opened, or shut, if
// the region was shut meanwhile; then the old one is shut for ever, so that who waits there, or comes there late, is
// rejected, finds another gate in its place, and tries that.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <variant>

#include "alloc/allocator.hpp"
#include "runtime/retire.hpp"
#include "runtime/within.hpp"
#include "structures/gate.hpp"
#include "structures/per_processor.hpp"
#include "structures/traffic.hpp"

namespace k42::vm {

// On lines of its own: every fault reads the pointer.
class alignas(runtime::apart) RegionGate {
  public:
    enum class Entry { entered, stopped, rejected };
    using Stop = GateControl<SharedGate>::Stop;

  private:
    struct Shared {
        SharedGate gate;
        SharedTraffic traffic;  // on the gate's line
    };
    struct Part {
        explicit Part(DistributedGate::Part& part_) : part(part_) {}
        DistributedGate::Part& part;
        OwnTraffic uses;
    };
    struct Distributed {
        ~Distributed() {
            parts.each([](Part& part) { alloc::destroy(&part); });
        }
        DistributedGate gate;
        PerProcessor<Part> parts;
    };
    struct alignas(runtime::apart) Gate {
        std::variant<Shared, Distributed> kind;
    };

    static Gate* make(bool distributed) {
        Gate* gate = alloc::make<Gate, alloc::Kind::padded>();
        if (distributed) gate->kind.emplace<Distributed>();
        return gate;
    }

    template <class E>
    static Entry entry_of(E entry) {
        return entry == E::entered ? Entry::entered : entry == E::stopped ? Entry::stopped : Entry::rejected;
    }
    static Entry entered(bool entered) { return entered ? Entry::entered : Entry::rejected; }
    template <class E>
    static Entry entered(E entry) {
        return entry_of(entry);
    }

    template <class Try>
    static Entry enter(Gate& gate, const runtime::Processor& here, Try&& attempt) {
        if (auto* shared = std::get_if<Shared>(&gate.kind)) {
            const Entry entry = attempt(shared->gate);
            if (entry == Entry::entered) shared->traffic.pass(here);
            return entry;
        }
        auto& distributed = std::get<Distributed>(gate.kind);
        Part& part = distributed.parts.of(
            here, [&]() -> Part& { return *alloc::make<Part, alloc::Kind::padded>(distributed.gate.join()); });
        const Entry entry = attempt(part.part);
        if (entry == Entry::entered) part.uses.add();
        return entry;
    }

    template <class Operation>
    static auto on(Gate& gate, Operation&& operation) {
        return std::visit([&](auto& kind) { return operation(kind.gate); }, gate.kind);
    }
    static Stop stop_of(Gate& gate) {
        return on(gate, [](auto& kind) { return Stop(int(kind.stop())); });
    }

  public:
    explicit RegionGate(bool distributed = false) : gate_(make(distributed)) {}
    RegionGate(const RegionGate&) = delete;
    RegionGate& operator=(const RegionGate&) = delete;
    ~RegionGate() { alloc::destroy(gate_.load(std::memory_order_relaxed)); }

    // Never waits.
    Entry try_enter() {
        const runtime::Within within;  // what is replaced here is retired: it outlives this request
        for (;;) {
            Gate* gate = gate_.load(std::memory_order_seq_cst);
            const Entry entry = enter(*gate, within.processor(), [](auto& part) { return entry_of(part.try_enter()); });
            // A change that began before the shutdown leaves a stopped gate for a moment, until that is shut, too.
            if (entry == Entry::stopped && shut_.load(std::memory_order_seq_cst)) return Entry::rejected;
            if (entry != Entry::rejected || gate_.load(std::memory_order_seq_cst) == gate) return entry;
        }
    }

    // Waits while the gate is stopped; false when it was shut down.
    bool enter() {
        const runtime::Within within;
        for (;;) {
            Gate* gate = gate_.load(std::memory_order_seq_cst);
            const Entry entry = enter(*gate, within.processor(), [](auto& part) { return entered(part.enter()); });
            if (entry == Entry::entered) return true;
            if (gate_.load(std::memory_order_seq_cst) == gate) return false;
        }
    }

    // Of the thread that entered. False, and nothing changed, when no request is inside; where requests are counted by
    // processor, none of the caller's.
    bool leave() {
        const runtime::Within within;
        Gate& gate = *gate_.load(std::memory_order_acquire);  // the one that was entered: with us inside it stays
        if (auto* shared = std::get_if<Shared>(&gate.kind)) return shared->gate.leave();
        Part* part = std::get<Distributed>(gate.kind).parts.find(within.processor());
        return part && part->part.leave();
    }

    // Blocks newcomers and waits until those inside have left; then the caller is alone until `restart`. One stopper at
    // a time, others wait for its restart. Rejected when the gate is shut.
    Stop stop() {
        const runtime::Within within;
        for (;;) {
            Gate* gate = gate_.load(std::memory_order_seq_cst);
            const Stop stop = stop_of(*gate);
            if (stop != Stop::rejected || gate_.load(std::memory_order_seq_cst) == gate) return stop;
        }
    }

    // By who stopped it: lets newcomers in again. False when it is not stopped.
    bool restart() {
        const runtime::Within within;
        return on(*gate_.load(std::memory_order_seq_cst), [](auto& gate) { return gate.restart(); });
    }

    // Rejects newcomers for ever, and those who wait; waits until those inside have left.
    void shutdown() {
        const runtime::Within within;
        shut_.store(true, std::memory_order_seq_cst);  // before the look at the gate; `distribute` does the reverse
        for (;;) {
            Gate* gate = gate_.load(std::memory_order_seq_cst);
            on(*gate, [](auto& kind) { return kind.shutdown(); });
            if (gate_.load(std::memory_order_seq_cst) == gate) return;
        }
    }

    // Requests inside; exact while it is stopped, and then 0.
    uint32_t inside() const {
        const runtime::Within within;
        return on(*gate_.load(std::memory_order_acquire), [](auto& gate) { return gate.inside(); });
    }

    bool distributed() const {
        const runtime::Within within;
        return std::holds_alternative<Distributed>(gate_.load(std::memory_order_acquire)->kind);
    }

    // Changes the implementation; waits for the requests inside, and for a stopper's restart, which the caller must not
    // be. A gate that is shut stays as it is.
    void distribute(bool distributed) {
        std::lock_guard guard(changing_);
        const runtime::Within within;
        Gate* const old = gate_.load(std::memory_order_relaxed);
        if (std::holds_alternative<Distributed>(old->kind) == distributed) return;
        if (stop_of(*old) != Stop::stopped) return;
        Gate* const next = make(distributed);
        stop_of(*next);
        gate_.store(next, std::memory_order_seq_cst);
        if (!shut_.load(std::memory_order_seq_cst)) on(*next, [](auto& gate) { return gate.restart(); });
        // If it was shut since: newcomers wait at the stopped one until it is, too; nobody is inside.
        if (shut_.load(std::memory_order_seq_cst)) on(*next, [](auto& gate) { return gate.shutdown(); });
        on(*old, [](auto& gate) { return gate.shutdown(); });
        runtime::retire(old, [](void* gate) { alloc::destroy(static_cast<Gate*>(gate)); });
    }

    // How often this processor used it, since it was distributed; 0 while uses are not counted by processor.
    uint64_t uses_by(const runtime::Processor& processor) const {
        const runtime::Within within;
        const auto* distributed = std::get_if<Distributed>(&gate_.load(std::memory_order_acquire)->kind);
        const Part* part = distributed ? distributed->parts.find(processor) : nullptr;
        return part ? part->uses.read() : 0;
    }

    // Who uses it, since its implementation was chosen.
    Traffic traffic() const {
        const runtime::Within within;
        const Gate& gate = *gate_.load(std::memory_order_acquire);
        if (auto* shared = std::get_if<Shared>(&gate.kind)) return shared->traffic.read();
        Traffic traffic{true, {}, 0};
        std::get<Distributed>(gate.kind).parts.each([&](Part& part) { traffic.uses.push_back(part.uses.read()); });
        return traffic;
    }

  private:
    std::atomic<Gate*> gate_;
    std::atomic<bool> shut_{false};
    // One who changes the implementation at a time; held while it waits for those inside. First in the order of locks.
    alignas(runtime::apart) std::mutex changing_;
};

}  // namespace k42::vm
