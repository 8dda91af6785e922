// Rosters: who belongs to a pool, and which of its members are free. Members are known by their address, which must
// stay theirs: whoever has the roster keeps them alive.
//
// A look-up takes no lock and writes nothing, so it is local however many processors make it. Members are never taken
// out before the roster ends, so a table only fills; a larger one replaces it when it is half full, and those that it
// has replaced are kept for who may be reading them: together they are smaller than it.
#pragma once

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "alloc/allocator.hpp"
#include "runtime/processor.hpp"

namespace k42 {

// What a roster knows of a member; on lines of its own, because those who take and give it back write here.
struct alignas(runtime::apart) Member {
    Member(void* it, bool is_free) : object(it), free(is_free) {}

    // Of all who give it back at once one succeeds: true.
    bool set_free() { return !free.exchange(true, std::memory_order_acq_rel); }
    // By who has it from the pool, so by one.
    void set_taken() { free.store(false, std::memory_order_release); }

    void* const object;
    std::atomic<bool> free;
};

class Roster {
  public:
    Roster() : table_(new_table(8)) {}
    Roster(const Roster&) = delete;
    Roster& operator=(const Roster&) = delete;

    // The member with this address, or nullptr.
    Member* find(const void* object) const {
        return find(*table_.load(std::memory_order_acquire), object);  // pairs with the release in `insert`
    }

    // A new member; nullptr when the roster has it already. Throws std::bad_alloc.
    Member* insert(void* object, bool free) {
        std::lock_guard guard(lock_);
        Table* table = table_.load(std::memory_order_relaxed);
        if (find(*table, object)) return nullptr;
        if (2 * (members_.size() + 1) > table->size()) {
            table = new_table(2 * table->size());
            for (const auto& member : members_) place(*table, member.get());
            table_.store(table, std::memory_order_release);
        }
        members_.emplace_back(alloc::make<Member, alloc::Kind::padded>(object, free));
        place(*table, members_.back().get());
        return members_.back().get();
    }

    // All members, while nobody inserts.
    const std::vector<std::unique_ptr<Member, alloc::Deleter>>& members() const { return members_; }

  private:
    using Table = std::vector<std::atomic<Member*>>;  // a power of two of places, a null pointer where nobody is

    Table* new_table(std::size_t size) { return tables_.emplace_back(std::make_unique<Table>(size)).get(); }

    static std::size_t home(const Table& table, const void* object) {
        // Fibonacci hashing: the high bits of the product are well mixed.
        const uint64_t mixed = reinterpret_cast<uintptr_t>(object) * 0x9E3779B97F4A7C15u;
        return mixed >> (64 - std::countr_zero(table.size()));
    }
    static Member* find(const Table& table, const void* object) {
        for (std::size_t i = home(table, object);; i = (i + 1) & (table.size() - 1)) {
            Member* member = table[i].load(std::memory_order_acquire);
            if (!member || member->object == object) return member;
        }
    }
    static void place(Table& table, Member* member) {
        std::size_t i = home(table, member->object);
        while (table[i].load(std::memory_order_relaxed)) i = (i + 1) & (table.size() - 1);
        table[i].store(member, std::memory_order_release);  // complete for who finds it
    }

    std::mutex lock_;  // protects members_, tables_, and the filling of the table; innermost
    std::vector<std::unique_ptr<Member, alloc::Deleter>> members_;
    std::vector<std::unique_ptr<Table>> tables_;
    std::atomic<Table*> table_;
};

}  // namespace k42
