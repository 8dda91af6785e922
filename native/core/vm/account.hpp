// Who has how many frames (paper 4.2, the PM of each process): an account for each client, with a limit if it has one,
// and a table of all, in which a page's descriptor names its account by 16 bits.
//
// A page is charged to the client for which it was brought in (to who touches it first, if many do), by way of the pool
// (frame_pool.hpp), which takes and charges frames at one moment. It stays on this account until it goes; what nobody
// is there for any more (pages of a client that has gone, of read-ahead for it, of a kernel before) goes to the next
// client that touches it.
//
// Frames are charged where they are taken and uncharged where they are given back, on whatever processor: both are
// local to it (see quota.hpp), and the limit is exact all the same.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "alloc/allocator.hpp"
#include "runtime/retire.hpp"
#include "runtime/within.hpp"
#include "structures/quota.hpp"

namespace k42::vm {

class alignas(runtime::apart) Account {
  public:
    static constexpr uint64_t kNoLimit = std::numeric_limits<int64_t>::max() / 4;

    Account(uint16_t id, uint64_t limit, bool distributed)
        : id_(id), limit_(limit), quota_({int64_t(limit)}, chunk_of(limit), distributed) {}

    // Counts the frames as this client's; false, and nothing changed, when that is more than its limit, or when the
    // account is closed.
    bool charge(uint64_t frames) { return quota_.take(int64_t(frames), 1, 0).lacks < 0; }
    void uncharge(uint64_t frames) { quota_.put(int64_t(frames), 1, 0); }

    // Exact while nobody charges.
    uint64_t used() const { return uint64_t(quota_.counted(0)); }
    uint64_t limit() const { return limit_; }
    uint16_t id() const { return id_; }
    // Whether its client is there.
    bool open() const { return open_.load(std::memory_order_relaxed); }

    // At one moment: what is charged and what is left are the limit.
    bool check() const {
        const auto balance = quota_.balance();
        return balance.counts[0] >= 0 &&
               balance.counts[0] + balance.at_root[0] + balance.in_parts[0] == int64_t(limit_);
    }

    void distribute(bool distributed) { quota_.distribute(distributed); }

    static int64_t chunk_of(uint64_t total) { return std::clamp<int64_t>(int64_t(total / 256), 1, 64); }

  private:
    friend class Accounts;

    const uint16_t id_;
    const uint64_t limit_;
    std::atomic<bool> open_{true};
    std::atomic<uint64_t> share_{kNoLimit};  // at the last look; 0: it has none
    Quota<1, 1> quota_;
};

// Number 0 is nobody's. A number that was closed is given again once the account is empty and no request of the runtime
// can have read it.
class Accounts {
  public:
    // `shared`: the frames that all shares together are.
    Accounts(uint64_t shared, bool distributed)
        : shared_(shared), accounts_(zeroes<std::atomic<Account*>>()), nobody_(0, Account::kNoLimit, distributed) {
        nobody_.open_.store(false, std::memory_order_relaxed);
        nobody_.share_.store(0, std::memory_order_relaxed);
        accounts_[0].store(&nobody_, std::memory_order_relaxed);
    }
    Accounts(const Accounts&) = delete;
    Accounts& operator=(const Accounts&) = delete;
    ~Accounts() {
        for (size_t id = 1; id < unused_; ++id) alloc::destroy(accounts_[id].load(std::memory_order_relaxed));
    }

    // A new account, until `close`; nullptr when all numbers are taken.
    Account* open(std::optional<uint64_t> limit, bool distributed) {
        sweep();
        std::lock_guard guard(lock_);
        uint16_t id;
        if (const auto freed = freed_->take()) {
            id = *freed;
        } else if (unused_ < kNumbers) {
            id = uint16_t(unused_++);
        } else {
            return nullptr;
        }
        auto* account = alloc::make<Account, alloc::Kind::padded>(id, limit.value_or(Account::kNoLimit), distributed);
        accounts_[id].store(account, std::memory_order_release);
        open_.push_back(account);
        return account;
    }

    // Nothing is charged to it from now on. It stays in the table until all its frames are given back.
    void close(Account* account) {
        account->quota_.close();
        {
            std::lock_guard guard(lock_);
            std::erase(open_, account);
            closed_.push_back(account);
            account->open_.store(false, std::memory_order_relaxed);
            account->share_.store(0, std::memory_order_relaxed);
        }
        sweep();
    }

    // The account with this number, for the request of the runtime that runs; nullptr: no account, now.
    Account* find(uint16_t id) const { return accounts_[id].load(std::memory_order_acquire); }

    // How many frames the account has beyond its share, as `refresh` found that last: so many of its pages may go
    // before others'. Nobody has no share, nor has a client that has gone.
    uint64_t excess(uint16_t id) const {
        const runtime::Within within;
        const Account* account = find(id);
        if (!account) return 0;
        const uint64_t used = account->used();
        const uint64_t share = account->share_.load(std::memory_order_relaxed);
        return used > share ? used - share : 0;
    }
    bool above_share(uint16_t id) const { return id == 0 || excess(id) > 0; }

    // Takes all shares anew, and frees the numbers of those that are closed and empty. Whether anybody has more than
    // his share. By whoever looks for pages to evict, before it does.
    bool refresh() {
        sweep();
        std::lock_guard guard(lock_);
        const uint64_t active = active_locked();
        std::vector<uint16_t> above;
        for (Account* account : open_) {
            const uint64_t share = share_of(*account, active);
            account->share_.store(share, std::memory_order_relaxed);
            if (account->used() > share) above.push_back(account->id());
        }
        for (const Account* account : closed_) above.push_back(account->id());
        if (nobody_.used() > 0) above.push_back(0);
        if (above != above_) {
            above_ = std::move(above);
            version_.fetch_add(1, std::memory_order_relaxed);
        }
        return !above_.empty();
    }
    // Changes when `refresh` finds that others than before have more than their shares.
    uint64_t version() const { return version_.load(std::memory_order_relaxed); }

    // An equal part for each client that has any page, but not more than its limit.
    uint64_t share(const Account& account) const {
        std::lock_guard guard(lock_);
        return share_of(account, active_locked() + (account.used() == 0));
    }

    // Whether all accounts are as their limits say, and how many are open.
    bool check() const {
        std::lock_guard guard(lock_);
        return nobody_.check() &&
               std::all_of(open_.begin(), open_.end(), [](const Account* account) { return account->check(); });
    }
    size_t size() const {
        std::lock_guard guard(lock_);
        return open_.size();
    }

    // What is charged to each account that has anything, or is open; for who sees to it that nobody charges meanwhile.
    std::vector<std::pair<uint16_t, int64_t>> charged() const {
        std::lock_guard guard(lock_);
        std::vector<std::pair<uint16_t, int64_t>> all{{0, nobody_.quota_.balance().counts[0]}};
        for (const auto* accounts : {&open_, &closed_}) {
            for (const Account* account : *accounts) {
                all.emplace_back(account->id(), account->quota_.balance().counts[0]);
            }
        }
        return all;
    }

    // Changes the form of all; charges go on.
    void distribute(bool distributed) {
        std::lock_guard guard(lock_);
        nobody_.distribute(distributed);
        for (Account* account : open_) account->distribute(distributed);
    }

  private:
    static constexpr size_t kNumbers = 65536;

    // Address space for all numbers, which Linux backs where it is used: most kernels have few clients.
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    template <class T>
    using Zeroes = std::unique_ptr<T[], Free>;
    template <class T>
    static Zeroes<T> zeroes() {
        void* memory = std::calloc(kNumbers, sizeof(T));
        if (!memory) throw std::bad_alloc();
        return Zeroes<T>(static_cast<T*>(memory));
    }

    // Outlives the table: retired accounts come back to it at any time.
    struct Freed {
        std::mutex lock;  // protects numbers; a leaf
        std::vector<uint16_t> numbers;
        std::optional<uint16_t> take() {
            std::lock_guard guard(lock);
            if (numbers.empty()) return std::nullopt;
            const uint16_t number = numbers.back();
            numbers.pop_back();
            return number;
        }
    };
    struct Retired {
        Account* account;
        std::shared_ptr<Freed> freed;
    };

    uint64_t active_locked() const {
        return uint64_t(std::count_if(open_.begin(), open_.end(), [](const Account* a) { return a->used() > 0; }));
    }

    uint64_t share_of(const Account& account, uint64_t active) const {
        return std::min(account.limit(), shared_ / std::max<uint64_t>(active, 1));
    }

    void sweep() {
        std::vector<Account*> empty;
        {
            std::lock_guard guard(lock_);
            std::erase_if(closed_, [&](Account* account) {
                if (account->quota_.balance().counts[0] != 0) return false;
                empty.push_back(account);
                return true;
            });
            for (Account* account : empty) accounts_[account->id()].store(nullptr, std::memory_order_release);
        }
        for (Account* account : empty) {
            runtime::retire(new Retired{account, freed_}, [](void* o) {
                const std::unique_ptr<Retired> retired(static_cast<Retired*>(o));
                const uint16_t id = retired->account->id();
                alloc::destroy(retired->account);
                std::lock_guard guard(retired->freed->lock);
                retired->freed->numbers.push_back(id);
            });
        }
        if (!empty.empty()) runtime::flush();
    }

    const uint64_t shared_;
    const Zeroes<std::atomic<Account*>> accounts_;  // by number
    Account nobody_;
    std::atomic<uint64_t> version_{1};  // of above_; written with lock_ held
    mutable std::mutex lock_;           // protects what follows; before the accounts' own
    std::vector<Account*> open_, closed_;
    std::vector<uint16_t> above_;  // who had more than his share at the last `refresh`
    size_t unused_ = 1;
    const std::shared_ptr<Freed> freed_ = std::make_shared<Freed>();
};

}  // namespace k42::vm
