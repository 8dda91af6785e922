// Quotas: so many of each kind of a thing, which are taken and put back, never more than there are. What is taken is
// counted by a tag (for whom). The counts of the Global Page Manager (paper 4.2, figure 7) are made of it.
//
// Shared: all under one lock. Distributed, the five questions of the paper (section 3.2):
// - What is local: a part for each processor, with a stock that is taken from and put back to under a lock of its own,
//   which no other processor takes while there is enough.
// - What is shared: the root: what is in no part's stock. An empty part fetches a chunk from it, an overfull one brings
//   back all but a chunk.
// - How parts are made and join: at the first use on a processor, empty. A part belongs to the processor, not to the
//   thread; what a processor leaves in its stock is not lost, since others fetch it:
// - How local and global operations synchronise: whoever finds too little in the root takes it from all the other
//   parts' stocks. So a request fails only if there is not enough of it anywhere, and a quota of one is used to the
//   full. Counting holds all locks at once: at every moment what is taken and what is in stock add up to what there is.
// - How parts are organised: by the number of the processor. Order of locks: the root's, then parts by this number.
//
// The two forms are one class, because who changes from one to the other must move the stocks only.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include "alloc/allocator.hpp"
#include "structures/per_processor.hpp"
#include "structures/traffic.hpp"

namespace k42 {

template <size_t Kinds, size_t Tags>
class Quota {
  public:
    using Amounts = std::array<int64_t, Kinds>;
    using Mask = unsigned;  // a bit for each kind

    // `chunk`: what a part fetches at once; it keeps twice as much at most.
    Quota(const Amounts& total, int64_t chunk, bool distributed) : chunk_(chunk), distributed_(distributed) {
        for (size_t kind = 0; kind < Kinds; ++kind) root_.stock[kind].store(total[kind], std::memory_order_relaxed);
    }
    Quota(const Quota&) = delete;
    Quota& operator=(const Quota&) = delete;
    ~Quota() {
        parts_.each([](Part& part) { alloc::destroy(&part); });
    }

    struct Taken {
        int lacks = -1;       // the first kind of which there is not enough; -1: taken
        bool at_root = true;  // the root was asked: what is left may have come below something
    };

    // Takes `n` of each kind of the mask, or nothing.
    Taken take(int64_t n, Mask kinds, size_t tag) {
        Part* part = nullptr;
        if (distributed_.load(std::memory_order_relaxed)) [[likely]] {
            part = parts_.find(runtime::current());
            if (part && part->take(n, kinds, tag)) return {-1, false};
        }
        return take_at_root(n, kinds, tag);
    }

    // Puts back what was taken; true when it went to the root. Where it was taken does not matter.
    bool put(int64_t n, Mask kinds, size_t tag) {
        if (distributed_.load(std::memory_order_relaxed)) [[likely]] {
            Part* part = parts_.find(runtime::current());  // none: it has taken nothing yet
            switch (part ? part->put(n, kinds, tag, 2 * chunk_) : Put::not_local) {
                case Put::done:
                    return false;
                case Put::too_much:
                    bring_back(*part);
                    return true;
                case Put::not_local:
                    break;
            }
        }
        std::lock_guard guard(lock_);
        traffic_.pass(runtime::current());
        root_.put(n, kinds, tag);
        return true;
    }

    // Takes of one kind without counting it, or puts it there.
    bool withdraw(size_t kind, int64_t n) {
        std::lock_guard guard(lock_);
        if (root_.of(kind) < n) gather(1u << kind, nullptr);
        if (root_.of(kind) < n) return false;
        root_.add(-n, 1u << kind);
        return true;
    }
    void deposit(size_t kind, int64_t n) {
        std::lock_guard guard(lock_);
        root_.add(n, 1u << kind);
    }

    // From now on nothing is taken; what was can be put back.
    void close() {
        distribute(false);
        std::lock_guard guard(lock_);
        closed_ = true;
    }

    // Counts a change that is none of what there is: see `changes`.
    void announce() { put(0, 0, 0); }

    // How often something was put back or announced. Who then takes and fails has not seen what comes later, alone.
    uint64_t changes() const {
        uint64_t sum = root_.changes.load(std::memory_order_acquire);
        parts_.each([&](const Part& part) { sum += part.changes.load(std::memory_order_acquire); });
        return sum;
    }
    // The same after all that was put back before the call, on any processor.
    uint64_t changes_now() const {
        std::lock_guard guard(lock_);
        uint64_t sum = root_.changes.load(std::memory_order_relaxed);
        parts_.each([&](Part& part) {
            std::lock_guard own(part.lock);
            sum += part.changes.load(std::memory_order_relaxed);
        });
        return sum;
    }

    // What is left of a kind, as good as one can know it while others take and put.
    int64_t left(size_t kind) const {
        int64_t sum = root_.of(kind);
        parts_.each([&](const Part& part) { sum += part.of(kind); });
        return std::max<int64_t>(sum, 0);
    }
    // The same of what is counted under a tag.
    int64_t counted(size_t tag) const {
        int64_t sum = root_.counts[tag].load(std::memory_order_relaxed);
        parts_.each([&](const Part& part) { sum += part.counts[tag].load(std::memory_order_relaxed); });
        return std::max<int64_t>(sum, 0);
    }

    // All of it at one moment.
    struct Balance {
        Amounts at_root{}, in_parts{};
        std::array<int64_t, Tags> counts{};
    };
    Balance balance() const {
        std::lock_guard guard(lock_);
        parts_.each([](Part& part) { part.lock.lock(); });
        Balance balance;
        for (size_t kind = 0; kind < Kinds; ++kind) balance.at_root[kind] = root_.of(kind);
        for (size_t tag = 0; tag < Tags; ++tag) balance.counts[tag] = root_.counts[tag].load(std::memory_order_relaxed);
        parts_.each([&](const Part& part) {
            for (size_t kind = 0; kind < Kinds; ++kind) balance.in_parts[kind] += part.of(kind);
            for (size_t tag = 0; tag < Tags; ++tag) {
                balance.counts[tag] += part.counts[tag].load(std::memory_order_relaxed);
            }
        });
        parts_.each([](Part& part) { part.lock.unlock(); });
        return balance;
    }

    bool distributed() const { return distributed_.load(std::memory_order_relaxed); }

    // Changes the form, while others take and put.
    void distribute(bool distributed) {
        std::lock_guard guard(lock_);
        if (closed_) return;
        distributed_.store(distributed, std::memory_order_relaxed);
        parts_.each([&](Part& part) {
            std::lock_guard own(part.lock);
            part.local = distributed;
        });
        if (!distributed) gather(~Mask{0}, nullptr);
    }

    // How often this processor took, since it was first distributed.
    uint64_t uses_by(const runtime::Processor& processor) const {
        const Part* part = parts_.find(processor);
        return part ? part->uses.read() : 0;
    }

    // Who uses it.
    Traffic traffic() const {
        if (!distributed()) return traffic_.read();
        Traffic traffic{true, {}, 0};
        parts_.each([&](const Part& part) { traffic.uses.push_back(part.uses.read()); });
        return traffic;
    }

  private:
    // Written with the lock of its owner held; read without it by who asks for an estimate.
    struct Stock {
        std::array<std::atomic<int64_t>, Kinds> stock{};
        std::array<std::atomic<int64_t>, Tags> counts{};  // negative where less was taken than put
        std::atomic<uint64_t> changes{0};

        int64_t of(size_t kind) const { return stock[kind].load(std::memory_order_relaxed); }
        bool has(int64_t n, Mask kinds) const {
            for (size_t kind = 0; kind < Kinds; ++kind) {
                if ((kinds >> kind & 1) && of(kind) < n) return false;
            }
            return true;
        }
        void add(int64_t n, Mask kinds) {
            for (size_t kind = 0; kind < Kinds; ++kind) {
                if (kinds >> kind & 1) stock[kind].store(of(kind) + n, std::memory_order_relaxed);
            }
        }
        void count(size_t tag, int64_t n) {
            counts[tag].store(counts[tag].load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
        }
        void put(int64_t n, Mask kinds, size_t tag) {
            add(n, kinds);
            count(tag, -n);
            change();
        }
        void change() { changes.store(changes.load(std::memory_order_relaxed) + 1, std::memory_order_release); }
    };

    enum class Put { done, too_much, not_local };

    struct alignas(runtime::apart) Part : Stock {
        std::mutex lock;     // protects the stock; after the root's
        bool local = false;  // the quota is distributed, as far as this part knows
        OwnTraffic uses;

        bool take(int64_t n, Mask kinds, size_t tag) {
            std::lock_guard guard(lock);
            uses.add();
            if (!local || !this->has(n, kinds)) return false;
            this->add(-n, kinds);
            this->count(tag, n);
            return true;
        }
        Put put(int64_t n, Mask kinds, size_t tag, int64_t most) {
            std::lock_guard guard(lock);
            if (!local) return Put::not_local;
            Stock::put(n, kinds, tag);
            for (size_t kind = 0; kind < Kinds; ++kind) {
                if ((kinds >> kind & 1) && this->of(kind) > most) return Put::too_much;
            }
            return Put::done;
        }
    };

    Taken take_at_root(int64_t n, Mask kinds, size_t tag) {
        std::lock_guard guard(lock_);
        if (closed_) return {0, true};
        traffic_.pass(runtime::current());
        Part* part = own_part();
        // Nobody but this thread adds to its part, and nobody takes from it without lock_.
        std::array<int64_t, Kinds> fetched{};
        for (size_t kind = 0; kind < Kinds; ++kind) {
            if (!(kinds >> kind & 1)) continue;
            fetched[kind] = std::max<int64_t>(n - (part ? part->of(kind) : 0), 0);
            if (root_.of(kind) < fetched[kind]) gather(1u << kind, part);
            if (root_.of(kind) < fetched[kind]) return {int(kind), true};
        }
        if (!part) {
            root_.add(-n, kinds);
            root_.count(tag, n);
            return {};
        }
        std::lock_guard own(part->lock);
        for (size_t kind = 0; kind < Kinds; ++kind) {
            if (!(kinds >> kind & 1)) continue;
            // A chunk for the next ones, where there is plenty: near the end all would take from each other for ever.
            const int64_t plenty = (root_.of(kind) - fetched[kind]) / (4 * int64_t(part_count_));
            const int64_t moved = fetched[kind] + std::clamp<int64_t>(plenty, 0, chunk_);
            root_.add(-moved, 1u << kind);
            part->add(moved - n, 1u << kind);
        }
        part->count(tag, n);
        return {};
    }

    // A part that has too much keeps a chunk.
    void bring_back(Part& part) {
        std::lock_guard guard(lock_);
        std::lock_guard own(part.lock);
        for (size_t kind = 0; kind < Kinds; ++kind) {
            const int64_t back = part.of(kind) - chunk_;
            if (back <= 0) continue;
            part.add(-back, 1u << kind);
            root_.add(back, 1u << kind);
        }
    }

    // With lock_ held, all stocks come to the root, but that of `except`.
    void gather(Mask kinds, const Part* except) {
        parts_.each([&](Part& part) {
            if (&part == except) return;
            std::lock_guard own(part.lock);
            for (size_t kind = 0; kind < Kinds; ++kind) {
                if (!(kinds >> kind & 1)) continue;
                root_.add(part.of(kind), 1u << kind);
                part.add(-part.of(kind), 1u << kind);
            }
        });
    }

    // With lock_ held: the calling processor's part, made if there is none; nullptr while the quota is shared.
    Part* own_part() {
        if (!distributed_.load(std::memory_order_relaxed)) return nullptr;
        return &parts_.of(runtime::current(), [&]() -> Part& {
            Part* part = alloc::make<Part, alloc::Kind::padded>();
            part->local = true;
            ++part_count_;
            return *part;
        });
    }

    const int64_t chunk_;
    std::atomic<bool> distributed_;  // written with lock_ held; a part's `local` is what holds
    PerProcessor<Part> parts_;

    alignas(runtime::apart) mutable std::mutex lock_;  // protects what follows, and the making of parts; before theirs
    Stock root_;
    SharedTraffic traffic_;
    size_t part_count_ = 0;
    bool closed_ = false;
};

}  // namespace k42
