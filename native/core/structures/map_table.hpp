// What a map is made of: entries in partitions (the master), and their replicas in local tables. How they are kept the
// same, and why, says map.hpp.
//
// Keys and values are the caller's: plain words here. What a change takes out it hands over, to be released when no
// lock is held; the values of replicas only after the requests that run then, for their owners may be reading them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "alloc/allocator.hpp"
#include "runtime/processor.hpp"
#include "structures/hash_table.hpp"
#include "structures/making.hpp"

namespace k42 {

// What a replica's pointer says besides a value, which is even and not null.
namespace replica {
inline constexpr uintptr_t empty = 0;     // in no list; its owner may do with it what it likes
inline constexpr uintptr_t changing = 1;  // a writer puts a value in soon
// Other odd numbers: its owner, who has drawn this number, puts a value in unless a writer comes first.
inline bool holds_value(uintptr_t word) { return word != empty && !(word & 1); }
}  // namespace replica

template <typename Key>
struct MapReplica {
    MapReplica(size_t h, Key k, uint32_t p) : hash(h), key(k), processor(p) {}

    MapReplica* next = nullptr;     // in the local table
    MapReplica* sibling = nullptr;  // in the entry's list; by whoever holds the lock of its partition
    const size_t hash;
    Key key;
    std::atomic<uintptr_t> value{replica::empty};
    const uint32_t processor;
};

template <typename Key>
struct MapEntry {
    MapEntry(size_t h, Key k, void* v) : hash(h), key(k), value(v) {}

    MapEntry* next = nullptr;
    const size_t hash;
    const Key key;
    void* value;
    MapReplica<Key>* replicas = nullptr;
    size_t replica_count = 0;
};

template <typename Node>
using Taken = std::unique_ptr<Node, alloc::Deleter>;

struct HashOfNode {
    size_t operator()(const auto& node) const { return node.hash; }
};

// The values that a change has taken out of replicas.
class Displaced {
  public:
    struct Item {
        void* value;
        uint32_t processor;  // the reader that may still be at it
    };

    // Room for so many more: asked for before anything changes.
    void reserve(size_t more) {
        if (more > few - std::min(count_, few)) rest_.reserve(rest_.size() + more);
    }
    void add(void* value, uint32_t processor) noexcept {
        if (count_ < few) {
            first_[count_++] = {value, processor};
        } else {
            rest_.push_back({value, processor});  // there is room
        }
    }
    template <typename Visit>
    void each(Visit&& visit) const {
        for (size_t i = 0; i < count_; ++i) visit(first_[i]);
        for (const Item& item : rest_) visit(item);
    }

  private:
    static constexpr size_t few = 8;
    Item first_[few];
    size_t count_ = 0;
    std::vector<Item> rest_;
};

// A part of the master.
template <typename Key>
class alignas(runtime::apart) MapPartition {
  public:
    using Entry = MapEntry<Key>;
    using Replica = MapReplica<Key>;

    // A key whose value a thread makes.
    struct Maker {
        size_t hash;
        Key key;
        std::shared_ptr<Making> making;
    };

    MapPartition() = default;
    MapPartition(const MapPartition&) = delete;
    MapPartition& operator=(const MapPartition&) = delete;
    ~MapPartition() {
        for (Entry* entry = entries_.take_all(); entry;) alloc::destroy(std::exchange(entry, entry->next));
    }

    // Protects the entries, their lists of replicas, and `makers`. Order: partitions by
    // address (who empties a map holds all of its); then the allocator's. No code of others runs under it.
    mutable std::mutex lock;
    std::vector<Maker> makers;

    // Without the lock: about, while others change it.
    size_t size() const { return size_.load(std::memory_order_relaxed); }

    // All below: with the lock held.

    // The entry of a key: the one with this hash that is `same(key)`.
    template <typename Same>
    Entry* find(size_t hash, Same&& same) const {
        return entries_.find(hash, [&](const Entry& entry) { return entry.hash == hash && same(entry.key); });
    }

    Entry& insert(size_t hash, Key key, void* value) {
        auto* entry = alloc::make<Entry>(hash, key, value);
        entries_.insert(entry);
        count();
        return *entry;
    }

    // Takes the values out of all replicas, which are then no longer the entry's.
    void invalidate(Entry& entry, Displaced& displaced) {
        displaced.reserve(entry.replica_count);
        drop_replicas(entry, displaced);
    }

    // The value is another one from now on; returns the old one.
    void* replace(Entry& entry, void* value, Displaced& displaced) {
        invalidate(entry, displaced);
        return std::exchange(entry.value, value);
    }

    // The same, and the replicas have the new value, too, each as one more user of it: `hold(value)`.
    template <typename Hold>
    void* replace_everywhere(Entry& entry, void* value, Displaced& displaced, Hold&& hold) {
        displaced.reserve(entry.replica_count);
        // First no replica has a value: so whoever sees the new one is followed by nobody who sees the old one.
        for (Replica* r = entry.replicas; r; r = r->sibling) displace(*r, replica::changing, displaced);
        for (Replica* r = entry.replicas; r; r = r->sibling) {
            hold(value);
            r->value.store(reinterpret_cast<uintptr_t>(value), std::memory_order_seq_cst);
        }
        return std::exchange(entry.value, value);
    }

    // Takes out the entry, which is then the caller's, with its key and value.
    Taken<Entry> remove(Entry& entry, Displaced& displaced) {
        invalidate(entry, displaced);
        entries_.remove(&entry);
        entry.next = nullptr;
        count();
        return Taken<Entry>(&entry);
    }

    // Any entry, or nullptr.
    Entry* any() { return entries_.any(cursor_); }

    // Takes out all entries, linked by next, which are then the caller's. Room for `replicas()` is there.
    Entry* empty(Displaced& displaced) noexcept {
        Entry* all = entries_.take_all();
        for (Entry* entry = all; entry; entry = entry->next) drop_replicas(*entry, displaced);
        count();
        return all;
    }
    size_t replicas() const { return replicas_; }

    template <typename Visit>
    void each(Visit&& visit) const {
        entries_.each(visit);
    }

    // Enters a replica that is in no list; `word` is its value or the number that its owner has drawn.
    void enter(Entry& entry, Replica& r, uintptr_t word) {
        r.sibling = entry.replicas;
        entry.replicas = &r;
        ++entry.replica_count;
        ++replicas_;
        r.value.store(word, std::memory_order_seq_cst);
    }

  private:
    void count() { size_.store(entries_.size(), std::memory_order_relaxed); }

    static void displace(Replica& r, uintptr_t word, Displaced& displaced) {
        const uint32_t processor = r.processor;
        const uintptr_t old = r.value.exchange(word, std::memory_order_seq_cst);
        if (replica::holds_value(old)) displaced.add(reinterpret_cast<void*>(old), processor);
    }

    void drop_replicas(Entry& entry, Displaced& displaced) noexcept {
        for (Replica* r = std::exchange(entry.replicas, nullptr); r;) {
            Replica* sibling = r->sibling;
            displace(*r, replica::empty, displaced);  // and from here on it is its owner's
            r = sibling;
        }
        replicas_ -= std::exchange(entry.replica_count, 0);
    }

    HashTable<Entry, HashOfNode> entries_;
    size_t replicas_ = 0;  // in all entries' lists
    size_t cursor_ = 0;    // where any() goes on
    std::atomic<size_t> size_{0};
};

// The replicas of one processor. All functions are for its owner.
template <typename Key>
class alignas(runtime::apart) MapLocal {
  public:
    using Entry = MapEntry<Key>;
    using Replica = MapReplica<Key>;

    explicit MapLocal(uint32_t processor) : processor_(processor) {}
    MapLocal(const MapLocal&) = delete;
    MapLocal& operator=(const MapLocal&) = delete;
    ~MapLocal() {
        for (Replica* r = replicas_.take_all(); r;) alloc::destroy(std::exchange(r, r->next));
    }

    uint32_t processor() const { return processor_; }

    // The value of a key, or nullptr; good for the request that asks. A replica without a value is not asked.
    template <typename Same>
    void* find(size_t hash, Same&& same) const {
        uintptr_t word = replica::empty;
        const Replica* found = replicas_.find(hash, [&](const Replica& r) {
            if (r.hash != hash) return false;
            word = r.value.load(std::memory_order_seq_cst);
            return replica::holds_value(word) && same(r.key);
        });
        return found ? reinterpret_cast<void*>(word) : nullptr;
    }

    // What `join` did with words and keys, which are counted by the caller.
    struct Joined {
        bool took_word = true;      // it has the word that it was given
        bool took_key = false;      // it has the entry's key now
        std::optional<Key> gave{};  // and no longer this one
    };

    // The replica of this entry, in its list, with the lock of its partition held. It keeps the value that it has;
    // else it gets `word`.
    Joined join(MapPartition<Key>& partition, Entry& entry, uintptr_t word) {
        Replica* unused = nullptr;
        Replica* found = replicas_.find(entry.hash, [&](Replica& r) {
            if (r.hash != entry.hash) return false;
            if (r.value.load(std::memory_order_acquire) != replica::empty) return r.key == entry.key;
            unused = &r;
            return false;
        });
        if (found) {
            // Else a number that was drawn before, perhaps by a call that this one interrupts: ours is newer.
            const bool has_value = replica::holds_value(found->value.load(std::memory_order_relaxed));
            if (!has_value) found->value.store(word, std::memory_order_seq_cst);
            return {.took_word = !has_value};
        }
        Joined joined{.took_key = true};
        if (unused) {
            joined.gave = std::exchange(unused->key, entry.key);
        } else {
            unused = alloc::make<Replica>(entry.hash, entry.key, processor_);
            replicas_.insert(unused);
        }
        partition.enter(entry, *unused, word);
        return joined;
    }

    // A number for a replica whose value is not made yet.
    uintptr_t draw() { return drawn_ += 2; }

    // The value for the number that was drawn; false when a writer came first, and the replica may be gone.
    bool fill(size_t hash, uintptr_t drawn, void* value) {
        Replica* found =
            replicas_.find(hash, [&](const Replica& r) { return r.value.load(std::memory_order_relaxed) == drawn; });
        return found && found->value.compare_exchange_strong(drawn, reinterpret_cast<uintptr_t>(value),
                                                             std::memory_order_seq_cst);
    }

    // Takes replicas without a value out of the next bucket; linked by next, they are the caller's.
    Replica* sweep() {
        return replicas_.sweep(
            cursor_, [](const Replica& r) { return r.value.load(std::memory_order_acquire) == replica::empty; });
    }
    // The same with all replicas, whatever they have. Nobody uses the map any more.
    Replica* take_all() { return replicas_.take_all(); }

    size_t size() const { return replicas_.size(); }

    template <typename Visit>
    void each(Visit&& visit) const {
        replicas_.each(visit);
    }

  private:
    template <typename>
    friend class MapMaster;

    HashTable<Replica, HashOfNode> replicas_;
    size_t cursor_ = 0;
    uintptr_t drawn_ = replica::changing;
    const uint32_t processor_;
    MapLocal* next_ = nullptr;  // of the master's list
};

// The partitions and the local tables of a map; none of them is made before it is needed.
template <typename Key>
class MapMaster {
  public:
    using Partition = MapPartition<Key>;
    using Local = MapLocal<Key>;

    // `partitions`: a power of two.
    explicit MapMaster(size_t partitions) : mask_(partitions - 1) {}
    MapMaster(const MapMaster&) = delete;
    MapMaster& operator=(const MapMaster&) = delete;
    ~MapMaster() {
        if (Slot* slots = slots_.load(std::memory_order_relaxed)) {
            for (size_t i = 0; i <= mask_; ++i) alloc::destroy(slots[i].load(std::memory_order_relaxed));
            delete[] slots;
        }
        Local* local = locals_.load(std::memory_order_relaxed);
        while (local) alloc::destroy(std::exchange(local, local->next_));
    }

    // Where a key of this hash is, if anywhere; nullptr while nothing was ever there.
    Partition* find(size_t hash) const {
        Slot* slots = slots_.load(std::memory_order_acquire);
        return slots ? slots[index(hash)].load(std::memory_order_acquire) : nullptr;
    }
    Partition& at(size_t hash) {
        Slot* slots = slots_.load(std::memory_order_acquire);
        if (!slots) {
            auto made = std::make_unique<Slot[]>(mask_ + 1);
            if (slots_.compare_exchange_strong(slots, made.get())) slots = made.release();
        }
        Slot& slot = slots[index(hash)];
        Partition* partition = slot.load(std::memory_order_acquire);
        if (!partition) {
            Taken<Partition> made(alloc::make<Partition, alloc::Kind::padded>());
            if (slot.compare_exchange_strong(partition, made.get())) partition = made.release();
        }
        return *partition;
    }

    size_t partitions() const { return mask_ + 1; }
    // Number i of them, or nullptr while nothing was ever there.
    Partition* partition(size_t i) const {
        Slot* slots = slots_.load(std::memory_order_acquire);
        return slots ? slots[i].load(std::memory_order_acquire) : nullptr;
    }

    // Of all partitions, one after the other; exact when nobody changes anything meanwhile, or there is only one.
    size_t size() const {
        size_t sum = 0;
        for (size_t i = 0; i <= mask_; ++i) {
            if (const Partition* p = partition(i)) sum += p->size();
        }
        return sum;
    }

    // A local table for that processor: made by its owner, in memory near to it. It lives as long as the map.
    Local& join(uint32_t processor) {
        auto* local = alloc::make<Local, alloc::Kind::padded>(processor);
        local->next_ = locals_.load(std::memory_order_relaxed);
        while (!locals_.compare_exchange_weak(local->next_, local, std::memory_order_release)) {
        }
        return *local;
    }

    template <typename Visit>
    void each_local(Visit&& visit) const {
        for (Local* local = locals_.load(std::memory_order_acquire); local; local = local->next_) visit(*local);
    }

  private:
    using Slot = std::atomic<Partition*>;

    // By the high half: the low bits choose the bucket.
    size_t index(size_t hash) const { return hash >> 32 & mask_; }

    const size_t mask_;
    std::atomic<Slot*> slots_{nullptr};
    std::atomic<Local*> locals_{nullptr};
};

}  // namespace k42
