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
#include <string>
#include <vector>

#include "runtime/processor.hpp"
#include "structures/interval_map.hpp"
#include "vm/agent.hpp"
#include "vm/homing.hpp"
#include "vm/region_map.hpp"
#include "vm/status_page.hpp"
#include "vm/uffd.hpp"

namespace k42::vm {

// A range of a client's addresses that shows a region; the first one made for a region has the region's own (canonical)
// addresses.
struct alignas(runtime::apart) Window {
    Window(int cpu_, uint64_t base_, uint64_t length_, uint64_t canonical_, bool follows)
        : cpu(cpu_),
          base(base_),
          length(length_),
          canonical(canonical_),
          spans(follows ? std::make_unique<Spans>(base_, length_, cpu_) : nullptr) {}

    const int cpu;  // where its faults are served; with `spans`: of spans that are not homed elsewhere
    const uint64_t base, length, canonical;
    // Of a window whose spans follow the threads; nullptr: all of its faults come on `cpu`.
    const std::unique_ptr<Spans> spans;
};

// In a page's record of the CPUs on whose windows it may be mapped.
constexpr uint32_t cpu_bit(int cpu) { return 1u << (uint32_t(cpu) % 32); }

class Hat {
  public:
    // `id` names the client process to Python.
    Hat(uint64_t id, RegionMap* regions, int cpus) : id_(id), regions_(regions), parts_(cpus) {}
    virtual ~Hat();
    Hat(const Hat&) = delete;
    Hat& operator=(const Hat&) = delete;

    // False when it overlaps another window. `follows`: its spans may be homed to other CPUs.
    bool add_window(int cpu, uint64_t base, uint64_t length, uint64_t canonical, bool follows = false);
    bool remove_window(uint64_t base);
    // The window that contains the address. Valid within the caller's request of the runtime. Any CPU finds any window;
    // each in a replica of its own.
    Window* window(int cpu, uint64_t address) const {
        Part& part = parts_[cpu];
        std::lock_guard guard(part.lock);
        if (!part.windows) part.windows = &windows_.join();
        const auto found = part.windows->lookup(address);
        return found ? found->value : nullptr;
    }
    // Which address of its region a window's address shows.
    std::optional<uint64_t> canonical(int cpu, uint64_t address) const;
    uint64_t id() const { return id_; }
    // Whose account the pages stand on that its faults bring in; before the first fault.
    void charge_to(uint16_t account) { account_ = account; }
    uint16_t account() const { return account_; }
    int cpus() const { return int(parts_.size()); }
    RegionMap& regions() { return *regions_; }

    // All addresses below are window addresses, page-aligned; lengths in bytes. The pages' descriptors are locked.
    // Not `writable`: the next write is a fault; only where the window's region tracks writes.
    virtual RangeResult map(int cpu, uint64_t address, uint64_t length, bool writable) = 0;
    // Lets writes to mapped pages pass, and wakes who waits to write there.
    virtual RangeResult allow_write(int cpu, uint64_t address, uint64_t length) = 0;
    // Makes the next write to each of these pages a fault, in all windows of the region that may have them mapped.
    // False: some may be writable still. `used`: the CPUs on which these pages were mapped (see cpu_bit).
    virtual bool protect(const Region& region, uint64_t first_page, uint64_t count, uint32_t used) = 0;
    // Unmaps these pages from the windows of the region, some time soon or never; their frames stay.
    virtual void soft_unmap(const Region& region, uint64_t first_page, uint64_t count, uint32_t used) = 0;
    // Makes frames of zeros at `offset` of the memfd, which the window shows at `address`, and maps them.
    virtual RangeResult zero(int cpu, uint64_t address, uint64_t length, int memfd, uint64_t offset) = 0;
    virtual void wake(int cpu, uint64_t address, uint64_t length) = 0;
    // Whatever CPU serves the fault: those of spans that have moved wait on another than the window's.
    virtual void wake_everywhere(uint64_t address, uint64_t length) = 0;
    // Ends the accesses to the range with SIGBUS; the client prints `reason`.
    virtual void fail(int cpu, uint64_t address, uint64_t length, const std::string& reason) = 0;
    // The frame of this page was taken away (its descriptor is locked).
    virtual void unmapped(const Region& region, uint64_t page) = 0;

    // Counted by whoever may still use the object after its client has gone: queued waiters, events.
    void retain() { references_.fetch_add(1, std::memory_order_relaxed); }
    void release() {
        if (references_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
    }
    // Its client has gone, and what the regions lead to soon will have: who sees it, inside a request, goes no further.
    void retire() { retired_.store(true, std::memory_order_seq_cst); }
    bool retired() const { return retired_.load(std::memory_order_seq_cst); }

  protected:
    // The windows that show the region whose canonical address this is. They stay as long as `listed_lock_` is held.
    template <class Visit>
    void each_window(uint64_t canonical, Visit visit) const {
        std::lock_guard guard(listed_lock_);
        for (auto [it, end] = listed_.equal_range(canonical); it != end; ++it) visit(*it->second);
    }
    virtual void removed(const Window&) {}

    mutable std::mutex listed_lock_;           // protects listed_
    std::multimap<uint64_t, Window*> listed_;  // all windows, by canonical address

  private:
    // What faults on one CPU look windows up with. The lock is for the CPU's workers beside its server.
    struct alignas(runtime::apart) Part {
        std::mutex lock;  // protects `windows`; a leaf but for the map's own
        ReplicatedIntervalMap<Window*>::Replica* windows = nullptr;
    };

    const uint64_t id_;
    uint16_t account_ = 0;
    RegionMap* const regions_;
    mutable ReplicatedIntervalMap<Window*> windows_;  // by address
    mutable std::vector<Part> parts_;                 // per CPU
    std::atomic<uint32_t> references_{1};
    std::atomic<bool> retired_{false};
};

class UffdHat final : public Hat {
  public:
    // Ranges into which all windows of a client may be split by homing: far from vm.max_map_count (65,530), which is
    // for all that the client has.
    static constexpr uint64_t kMostRanges = 4096;

    // Takes the status page and the ring over. `most_spans`: where more are mapped, idle ones are unmapped.
    UffdHat(uint64_t id, RegionMap* regions, int cpus, std::unique_ptr<StatusPage> status,
            std::unique_ptr<CommandRing> commands, uint64_t most_spans = UINT64_MAX)
        : Hat(id, regions, cpus),
          fds_(cpus),
          status_(std::move(status)),
          commands_(std::move(commands)),
          most_spans_(most_spans) {}
    ~UffdHat() override;

    // Takes the descriptor over; false when this CPU has one already.
    bool attach(int cpu, int uffd);
    int descriptor(int cpu) const { return fds_[cpu].fd.load(std::memory_order_acquire); }
    const StatusPage& status() const { return *status_; }
    CommandRing& commands() { return *commands_; }

    // A fault in the window came on `cpu`, at `now` (ns, CLOCK_MONOTONIC). Of a thread that belongs to the CPU `place`,
    // if that is known (else -1): then its span may be asked to move there; true if it is.
    bool follow(const Window& window, int cpu, uint64_t address, int place, uint64_t now);

    RangeResult map(int cpu, uint64_t address, uint64_t length, bool writable) override;
    RangeResult allow_write(int cpu, uint64_t address, uint64_t length) override;
    bool protect(const Region& region, uint64_t first_page, uint64_t count, uint32_t used) override;
    void soft_unmap(const Region& region, uint64_t first_page, uint64_t count, uint32_t used) override;
    RangeResult zero(int cpu, uint64_t address, uint64_t length, int memfd, uint64_t offset) override;
    void wake(int cpu, uint64_t address, uint64_t length) override;
    void wake_everywhere(uint64_t address, uint64_t length) override;
    void fail(int cpu, uint64_t address, uint64_t length, const std::string& reason) override;
    void unmapped(const Region&, uint64_t) override {}  // punching the frame out of the memfd removed the mapping

  private:
    void removed(const Window& window) override;
    // Faults on a window that does not follow come on its CPU alone, so that the bits say exactly which of such windows
    // have a page mapped. One that follows can have faults on any CPU, and is always visited.
    static bool may_have_used(const Window& window, uint32_t used) {
        return window.spans || (used & cpu_bit(window.cpu));
    }
    void unmap_idle(uint32_t now);

    // The client's userfaultfd of each CPU, -1 until it has handed one over. Any of them can map a page anywhere in the
    // client; a thread that waits is woken by the one on which it waits.
    struct Descriptor {
        std::atomic<int> fd{-1};
    };
    std::vector<Descriptor> fds_;
    std::unique_ptr<StatusPage> status_;
    std::unique_ptr<CommandRing> commands_;

    const uint64_t most_spans_;
    std::atomic<uint64_t> spans_{0};  // that are mapped, in all windows; changes once a span
    std::mutex homing_lock_;          // protects what the windows' Spans say, and ranges_; before listed_lock_
    uint64_t ranges_ = 0;             // into which homing has split the windows, beyond one each
    uint64_t idle_hand_ = 0;          // canonical address of the window where the search for idle spans goes on
};

class SoftHat final : public Hat {
  public:
    using Hat::Hat;

    RangeResult map(int cpu, uint64_t address, uint64_t length, bool writable) override;
    RangeResult allow_write(int cpu, uint64_t address, uint64_t length) override;
    bool protect(const Region& region, uint64_t first_page, uint64_t count, uint32_t used) override;
    void soft_unmap(const Region& region, uint64_t first_page, uint64_t count, uint32_t used) override;
    RangeResult zero(int cpu, uint64_t address, uint64_t length, int memfd, uint64_t offset) override;
    void wake(int cpu, uint64_t address, uint64_t length) override;
    void wake_everywhere(uint64_t address, uint64_t length) override;
    void fail(int cpu, uint64_t address, uint64_t length, const std::string& reason) override;
    void unmapped(const Region& region, uint64_t page) override;

    bool is_mapped(uint64_t canonical_address) const;
    bool is_writable(uint64_t canonical_address) const;  // mapped, and a write to it is no fault
    std::vector<uint64_t> mapped() const;                // canonical addresses, sorted
    std::map<uint64_t, std::string> failed() const;
    uint64_t wakes() const;

  private:
    void insert(int cpu, uint64_t address, uint64_t length, bool writable);

    mutable std::mutex lock_;          // protects all below; a leaf
    std::map<uint64_t, bool> mapped_;  // canonical page addresses; whether they are writable
    std::map<uint64_t, std::string> failed_;
    uint64_t wakes_ = 0;
};

}  // namespace k42::vm
