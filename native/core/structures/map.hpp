// The Map: the paper's DHash, a hash table whose entries are copied to the processors that look them up.
//
// The five questions of the paper (section 3.2):
// - What is local: a table of replicas for each processor, which its owner alone changes: so a hit there takes no lock
//   and writes nothing that others read.
// - What is shared: the master, in partitions by hash, each a table under a lock of its own.
// - How replicas are made and join: a look-up that misses its local table finds the master's entry, and enters its
//   replica there under the same lock.
// - How local and global operations synchronise: by the replica's pointer to the value. A writer, under the lock of the
//   entry's partition, first takes the values out of all replicas, then changes the master, then unlocks: a reader that
//   finds no value goes to the master, and so waits for the writer. A look-up takes effect at its load of the pointer.
// - How replicas are organised: in the list of their master entry, until a writer empties them. What it emptied is the
//   owner's again, who uses it for the next key or sweeps it out, a bucket at each new replica: so there are never
//   many more of them than are in use.
//
// Without local tables the master alone is a map under one lock, or partitioned: the same operations serve all three.
//
// What keys and values are, the Policy says:
//   Key                        compared by identity here; what is the same key, the probe says
//   Guard(std::mutex&)         holds the lock for its scope
//   hold(Key), hold_value(v)   one user more; under locks, so they run no code of others
//   drop(Key), drop_value(v)   one user less; never under a lock
//   drop_value_later(v)        the same, once the requests that run now have ended
//   copies(v)                  whether each replica has a copy of its own of this value; under locks
//   copy(v)                    that copy, or nullptr; never under a lock
//   wait(MakingWait&)          sleeps once; false when the operation is to fail
//   Probe                      a key that is looked for: hash(), key(); same(key), which may stop the search to ask
//                              code of others, and then is open() until settle() has asked it (false: fail)
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "runtime/processor.hpp"
#include "structures/making.hpp"
#include "structures/map_table.hpp"

namespace k42 {

template <typename Policy>
class Map {
  public:
    using Key = typename Policy::Key;
    using Probe = typename Policy::Probe;
    using Guard = typename Policy::Guard;
    using Entry = MapEntry<Key>;
    using Replica = MapReplica<Key>;
    using Partition = MapPartition<Key>;
    using Local = MapLocal<Key>;

    enum class Status { found, absent, made, failed };
    // A value comes with one user more: the caller.
    struct Result {
        Status status;
        void* value = nullptr;
    };

    // `partitions`: a power of two.
    explicit Map(size_t partitions, Policy policy = {}) : policy_(policy), master_(partitions) {}

    // All functions below are called inside of a request; `local` is the caller's table, or nullptr without one.

    Local& join() { return master_.join(runtime::current().id); }
    size_t size() const { return master_.size(); }

    Result get(Local* local, Probe& probe) {
        if (local) {
            for (;;) {
                void* value = local->find(probe.hash(), [&](const Key& key) { return probe.same(key); });
                if (probe.open()) [[unlikely]] {
                    if (!probe.settle()) return {Status::failed};
                    continue;
                }
                if (!value) break;
                policy_.hold_value(value);
                return {Status::found, value};
            }
        }
        return get_from_master(local, probe);
    }

    // Takes over one user of `value`, whatever comes. Found: there was a value before, which is gone.
    Status set(Probe& probe, void* value) {
        Changed changed(policy_);
        void* added = value;
        Status status = Status::failed;
        try {
            Partition& partition = master_.at(probe.hash());
            locate(partition, probe, [&](Entry* entry) {
                status = entry ? Status::found : Status::absent;
                if (entry) {
                    added = partition.replace(*entry, value, changed.replicas);
                } else {
                    insert(partition, probe, value);
                    added = nullptr;
                }
            });
        } catch (...) {
            policy_.drop_value(added);
            throw;
        }
        changed.value = added;
        return status;
    }

    // The value that is there, or else `value`, with a user more, which is there from then on (made).
    Result set_default(Local* local, Probe& probe, void* value) {
        Result result = get(local, probe);
        if (result.status != Status::absent) return result;
        Partition& partition = master_.at(probe.hash());
        result.status = Status::failed;
        locate(partition, probe, [&](Entry* entry) {
            if (!entry) insert(partition, probe, value);
            result = {entry ? Status::found : Status::made, entry ? entry->value : value};
            policy_.hold_value(result.value);
            if (!entry) policy_.hold_value(value);
        });
        return result;
    }

    // Found: the value, which is there no more.
    Result remove(Probe& probe) {
        Partition* partition = master_.find(probe.hash());
        if (!partition) return {Status::absent};
        Changed changed(policy_);
        Result result{Status::failed};
        locate(*partition, probe, [&](Entry* entry) {
            result.status = entry ? Status::found : Status::absent;
            if (!entry) return;
            changed.entries = partition->remove(*entry, changed.replicas).release();
            policy_.hold_value(result.value = changed.entries->value);
        });
        return result;
    }

    // Takes out any entry, with key and value: one of them whenever there is one all the time. nullptr: none.
    // `start` spreads the callers over the partitions.
    Taken<Entry> remove_any(size_t start) {
        for (size_t i = 0; i < master_.partitions(); ++i) {
            Partition* partition = master_.partition((start + i) & (master_.partitions() - 1));
            if (!partition || partition->size() == 0) continue;
            Changed changed(policy_);
            Guard guard(partition->lock);
            if (Entry* entry = partition->any()) return partition->remove(*entry, changed.replicas);
        }
        return nullptr;
    }

    // If the value is `expected`, itself, it is `value` from now on (found), with a user more; in the replicas, too,
    // except where they have copies: those are gone.
    Status replace(Probe& probe, const void* expected, void* value) {
        Partition* partition = master_.find(probe.hash());
        if (!partition) return Status::absent;
        Changed changed(policy_);
        Status status = Status::failed;
        locate(*partition, probe, [&](Entry* entry) {
            status = entry && entry->value == expected ? Status::found : Status::absent;
            if (status == Status::absent) return;
            policy_.hold_value(value);
            changed.value = policy_.copies(value)
                                ? partition->replace(*entry, value, changed.replicas)
                                : partition->replace_everywhere(*entry, value, changed.replicas,
                                                                [&](void* v) { policy_.hold_value(v); });
        });
        return status;
    }

    // The value; when there is none, the one of `make()`, which is called once for all that ask meanwhile, who wait:
    // exactly one caller sees `made`. `make` returns nullptr to fail; one of those who wait tries next.
    template <typename Make>
    Result find_or_make(Local* local, Probe& probe, Make&& make) {
        for (;;) {
            Result result = get(local, probe);
            if (result.status != Status::absent) return result;
            Partition& partition = master_.at(probe.hash());
            auto mine = std::make_shared<Making>(runtime::current());
            std::shared_ptr<Making> others;
            if (!begin(partition, probe, mine, result, others)) return {Status::failed};
            if (result.status == Status::found) return result;
            if (others) {
                if (!wait(others)) return {Status::failed};
                continue;
            }
            return finish(partition, probe, *mine, make());
        }
    }

    // The values of the master and of the replicas at one moment: visit(value, processor) for each, the master's with
    // `nobody`. They are held; false: there is none. `visit` runs no code of others.
    static constexpr uint32_t nobody = UINT32_MAX;
    template <typename Visit>
    Status gather(Probe& probe, Visit&& visit) {
        Partition* partition = master_.find(probe.hash());
        if (!partition) return Status::absent;
        Status status = Status::failed;
        locate(*partition, probe, [&](Entry* entry) {
            status = entry ? Status::found : Status::absent;
            if (!entry) return;
            const auto take = [&](void* value, uint32_t processor) {
                visit(value, processor);
                policy_.hold_value(value);
            };
            take(entry->value, nobody);
            for (const Replica* r = entry->replicas; r; r = r->sibling) {
                const uintptr_t word = r->value.load(std::memory_order_acquire);
                if (replica::holds_value(word)) take(reinterpret_cast<void*>(word), r->processor);
            }
        });
        return status;
    }

    // Everything is gone, at one moment.
    void empty() {
        Changed changed(policy_);
        empty(changed);
    }

    // Keys and values of partition `i` at one moment: visit(key, value) for each, both held. reserve(n) comes first.
    template <typename Reserve, typename Visit>
    void snapshot(size_t i, Reserve&& reserve, Visit&& visit) {
        const Partition* partition = master_.partition(i);
        if (!partition) return;
        Guard guard(partition->lock);
        reserve(partition->size());
        partition->each([&](const Entry& entry) {
            policy_.hold(entry.key);
            policy_.hold_value(entry.value);
            visit(entry.key, entry.value);
        });
    }
    size_t partitions() const { return master_.partitions(); }

    // All users that the map is: visit_key(key), visit_value(value). While nobody changes it.
    template <typename VisitKey, typename VisitValue>
    void each_user(VisitKey&& visit_key, VisitValue&& visit_value) const {
        for (size_t i = 0; i < master_.partitions(); ++i) {
            const Partition* partition = master_.partition(i);
            if (!partition) continue;
            partition->each([&](const Entry& entry) {
                visit_key(entry.key);
                visit_value(entry.value);
            });
            for (const auto& maker : partition->makers) visit_key(maker.key);
        }
        master_.each_local([&](const Local& local) {
            local.each([&](const Replica& r) {
                visit_key(r.key);
                const uintptr_t word = r.value.load(std::memory_order_relaxed);
                if (replica::holds_value(word)) visit_value(reinterpret_cast<void*>(word));
            });
        });
    }

    // Drops all keys and values. Nobody else uses the map any more.
    void dismantle() {
        {
            Changed changed(policy_);
            changed.alone = true;
            empty(changed);
        }
        master_.each_local([&](Local& local) { drop(local.take_all()); });
    }

  private:
    // What a change has taken out, dropped at the end of the scope: so it is declared before any guard.
    struct Changed {
        explicit Changed(const Policy& p) : policy(p) {}
        Changed(const Changed&) = delete;
        Changed& operator=(const Changed&) = delete;
        ~Changed() {
            replicas.each([&](const Displaced::Item& item) {
                // We are not reading: what was ours goes at once.
                if (alone || item.processor == runtime::current().id) {
                    policy.drop_value(item.value);
                } else {
                    policy.drop_value_later(item.value);
                }
            });
            if (value) policy.drop_value(value);
            while (entries) {
                Taken<Entry> entry(std::exchange(entries, entries->next));
                policy.drop(entry->key);
                policy.drop_value(entry->value);
            }
        }

        const Policy& policy;
        Displaced replicas;
        void* value = nullptr;
        Entry* entries = nullptr;
        bool alone = false;  // nobody else uses the map
    };

    void empty(Changed& changed) {
        std::vector<Partition*> partitions;
        partitions.reserve(master_.partitions());
        for (size_t i = 0; i < master_.partitions(); ++i) {
            if (Partition* partition = master_.partition(i)) partitions.push_back(partition);
        }
        std::sort(partitions.begin(), partitions.end());  // the order of their locks
        std::vector<std::unique_ptr<Guard>> guards;
        guards.reserve(partitions.size());
        size_t replicas = 0;
        for (Partition* partition : partitions) {
            guards.push_back(std::make_unique<Guard>(partition->lock));
            replicas += partition->replicas();
        }
        changed.replicas.reserve(replicas);
        for (Partition* partition : partitions) {
            Entry* emptied = partition->empty(changed.replicas);
            while (emptied) {
                Entry* entry = std::exchange(emptied, emptied->next);
                entry->next = std::exchange(changed.entries, entry);
            }
        }
    }

    // act(entry or nullptr) with the lock held; false: the probe failed.
    template <typename Act>
    static bool locate(Partition& partition, Probe& probe, Act&& act) {
        for (;;) {
            {
                Guard guard(partition.lock);
                Entry* entry = find(partition, probe);
                if (!probe.open()) {
                    act(entry);
                    return true;
                }
            }
            if (!probe.settle()) return false;
        }
    }

    static Entry* find(Partition& partition, Probe& probe) {
        return partition.find(probe.hash(), [&](const Key& key) { return probe.same(key); });
    }

    // Takes over one user of `value`.
    void insert(Partition& partition, Probe& probe, void* value) {
        partition.insert(probe.hash(), probe.key(), value);
        policy_.hold(probe.key());
    }

    [[gnu::noinline]] Result get_from_master(Local* local, Probe& probe) {
        Partition* partition = master_.find(probe.hash());
        if (!partition) return {Status::absent};
        Result result{Status::failed};
        typename Local::Joined joined{.took_word = false};
        uintptr_t drawn = replica::empty;
        locate(*partition, probe, [&](Entry* entry) {
            result = {entry ? Status::found : Status::absent, entry ? entry->value : nullptr};
            if (!entry) return;
            policy_.hold_value(entry->value);
            if (!local) return;
            const bool copies = policy_.copies(entry->value);
            if (copies) drawn = local->draw();
            try {
                joined = local->join(*partition, *entry, copies ? drawn : reinterpret_cast<uintptr_t>(entry->value));
            } catch (const std::bad_alloc&) {
                return;  // a replica is a help, not a need
            }
            if (joined.took_word && !copies) policy_.hold_value(entry->value);
            if (joined.took_key) policy_.hold(entry->key);
        });
        // From here on the replica may be emptied, and so swept out by a call within this one.
        if (joined.took_word && drawn != replica::empty) {
            void* copy = policy_.copy(result.value);
            if (copy && !local->fill(probe.hash(), drawn, copy)) policy_.drop_value(copy);
        }
        if (joined.gave) policy_.drop(*joined.gave);
        if (joined.took_key && !joined.gave) drop(local->sweep());
        return result;
    }

    // What the owner has taken out of its own table.
    void drop(Replica* replicas) {
        while (replicas) {
            Taken<Replica> r(std::exchange(replicas, replicas->next));
            policy_.drop(r->key);
            const uintptr_t word = r->value.load(std::memory_order_relaxed);
            if (replica::holds_value(word)) policy_.drop_value(reinterpret_cast<void*>(word));
        }
    }

    // Finds the value, who makes it now, or leaves it to us (`mine`). False: the probe failed.
    bool begin(Partition& partition, Probe& probe, const std::shared_ptr<Making>& mine, Result& result,
               std::shared_ptr<Making>& others) {
        return locate_maker(partition, probe, [&](Entry* entry, auto maker) {
            if (entry) {
                policy_.hold_value(entry->value);
                result = {Status::found, entry->value};
            } else if (maker != partition.makers.end()) {
                if (maker->making->lost()) {
                    maker->making = mine;
                } else {
                    others = maker->making;
                }
            } else {
                partition.makers.push_back({probe.hash(), probe.key(), mine});
                policy_.hold(probe.key());
            }
        });
    }

    // As locate; act(entry, maker) is told also who makes the value.
    template <typename Act>
    static bool locate_maker(Partition& partition, Probe& probe, Act&& act) {
        for (;;) {
            {
                Guard guard(partition.lock);
                Entry* entry = find(partition, probe);
                auto maker = partition.makers.begin();
                while (!probe.open() && maker != partition.makers.end() &&
                       !(maker->hash == probe.hash() && probe.same(maker->key)))
                    ++maker;
                if (!probe.open()) {
                    act(entry, maker);
                    return true;
                }
            }
            if (!probe.settle()) return false;
        }
    }

    // We have made the value, or failed; if somebody has set one meanwhile, it is found.
    Result finish(Partition& partition, Probe& probe, Making& mine, void* value) {
        Result result{Status::failed};
        try {
            if (value) {
                locate(partition, probe, [&](Entry* entry) {
                    if (!entry) insert(partition, probe, value);
                    result = {entry ? Status::found : Status::made, entry ? entry->value : value};
                    policy_.hold_value(result.value);
                });
            }
        } catch (...) {
            end(partition, mine);
            policy_.drop_value(value);
            throw;
        }
        end(partition, mine);
        if (value && result.status != Status::made) policy_.drop_value(value);
        return result;
    }

    void end(Partition& partition, Making& mine) {
        Key key;
        {
            Guard guard(partition.lock);
            auto maker = partition.makers.begin();
            while (maker->making.get() != &mine) ++maker;
            key = maker->key;
            std::swap(*maker, partition.makers.back());
            partition.makers.pop_back();
        }
        mine.end();
        policy_.drop(key);
    }

    bool wait(const std::shared_ptr<Making>& making) {
        MakingWait waiting(runtime::current(), making);
        while (!making->ended() && !making->lost()) {
            if (!policy_.wait(waiting)) return false;
        }
        return true;
    }

    [[no_unique_address]] const Policy policy_;
    MapMaster<Key> master_;
};

}  // namespace k42
