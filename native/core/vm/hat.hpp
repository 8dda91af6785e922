// Hardware address translation (paper section 4, HAT): one object a client process, its state kept per processor
// as K42 keeps its page tables, so that faults on different processors meet nothing in common here.
//
// Two kinds: UffdHat maps real memory of another process through its userfaultfds, one a CPU; SoftHat keeps the
// mappings in a table, for tests and simulation. All else of the virtual memory system is the same on both.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "structures/interval_map.hpp"
#include "vm/agent.hpp"
#include "vm/status_page.hpp"
#include "vm/uffd.hpp"

namespace k42::vm {

struct Region;
using RegionMap = SharedIntervalMap<Region*>;  // what a Process owns: canonical address to Region

class Hat {
  public:
    // `id` names the client process to Python.
    Hat(uint64_t id, RegionMap* regions, int cpus) : id_(id), regions_(regions), windows_(cpus) {}
    virtual ~Hat() = default;
    Hat(const Hat&) = delete;
    Hat& operator=(const Hat&) = delete;

    // A window is a range of the client's addresses that shows a region; the first one made for a region has the
    // region's own (canonical) addresses. False when it overlaps another window of this CPU.
    bool add_window(int cpu, uint64_t base, uint64_t length, uint64_t canonical) {
        return windows_[cpu].insert(base, base + length, canonical);
    }
    bool remove_window(int cpu, uint64_t base) { return windows_[cpu].remove(base).has_value(); }
    std::optional<uint64_t> canonical(int cpu, uint64_t address) const {
        auto window = windows_[cpu].lookup(address);
        if (!window) return std::nullopt;
        return window->value + (address - window->start);
    }
    uint64_t id() const { return id_; }
    int cpus() const { return int(windows_.size()); }
    RegionMap& regions() { return *regions_; }

    // All addresses below are window addresses, page-aligned; lengths in bytes. The pages' descriptors are locked.
    virtual RangeResult map(int cpu, uint64_t address, uint64_t length) = 0;
    // Makes frames of zeros at `offset` of the memfd, which the window shows at `address`, and maps them.
    virtual RangeResult zero(int cpu, uint64_t address, uint64_t length, int memfd, uint64_t offset) = 0;
    virtual void wake(int cpu, uint64_t address, uint64_t length) = 0;
    // Ends the accesses to the range with SIGBUS; the client prints `reason`.
    virtual void fail(int cpu, uint64_t address, uint64_t length, const std::string& reason) = 0;
    // The frame of this page was taken away (its descriptor is locked).
    virtual void unmapped(const Region& region, uint64_t page) = 0;

    // Counted by whoever may still use the object after its client has gone: queued waiters, events.
    void retain() { references_.fetch_add(1, std::memory_order_relaxed); }
    void release() {
        if (references_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
    }

  private:
    const uint64_t id_;
    RegionMap* const regions_;
    std::vector<SharedIntervalMap<uint64_t>> windows_;  // per CPU: window address to canonical address
    std::atomic<uint32_t> references_{1};
};

class UffdHat final : public Hat {
  public:
    // Takes the status page and the ring over.
    UffdHat(uint64_t id, RegionMap* regions, int cpus, std::unique_ptr<StatusPage> status,
            std::unique_ptr<CommandRing> commands)
        : Hat(id, regions, cpus), fds_(cpus, -1), status_(std::move(status)), commands_(std::move(commands)) {}
    ~UffdHat() override;

    // Takes the descriptor over; false when this CPU has one already.
    bool attach(int cpu, int uffd);
    int descriptor(int cpu) const { return fds_[cpu]; }
    const StatusPage& status() const { return *status_; }
    CommandRing& commands() { return *commands_; }

    RangeResult map(int cpu, uint64_t address, uint64_t length) override;
    RangeResult zero(int cpu, uint64_t address, uint64_t length, int memfd, uint64_t offset) override;
    void wake(int cpu, uint64_t address, uint64_t length) override;
    void fail(int cpu, uint64_t address, uint64_t length, const std::string& reason) override;
    void unmapped(const Region&, uint64_t) override {}  // punching the frame out of the memfd removed the mapping

  private:
    std::vector<int> fds_;  // the client's userfaultfd of each CPU, -1 until the client faults there
    std::unique_ptr<StatusPage> status_;
    std::unique_ptr<CommandRing> commands_;
};

class SoftHat final : public Hat {
  public:
    using Hat::Hat;

    RangeResult map(int cpu, uint64_t address, uint64_t length) override;
    RangeResult zero(int cpu, uint64_t address, uint64_t length, int memfd, uint64_t offset) override;
    void wake(int cpu, uint64_t address, uint64_t length) override;
    void fail(int cpu, uint64_t address, uint64_t length, const std::string& reason) override;
    void unmapped(const Region& region, uint64_t page) override;

    bool is_mapped(uint64_t canonical_address) const;
    std::vector<uint64_t> mapped() const;  // canonical addresses, sorted
    std::map<uint64_t, std::string> failed() const;
    uint64_t wakes() const;

  private:
    void insert(int cpu, uint64_t address, uint64_t length);

    mutable std::mutex lock_;    // protects all below; a leaf
    std::set<uint64_t> mapped_;  // canonical page addresses
    std::map<uint64_t, std::string> failed_;
    uint64_t wakes_ = 0;
};

}  // namespace k42::vm
