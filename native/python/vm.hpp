// What the types of the virtual memory system on the edge know of each other: each wraps the native half of one
// object of the paper, and keeps alive what its native half points to.
#pragma once

#include <atomic>
#include <memory>

#include "arguments.hpp"
#include "vm/engine.hpp"
#include "vm/file_cache.hpp"
#include "vm/frame_pool.hpp"
#include "vm/guard.hpp"
#include "vm/hat.hpp"
#include "vm/reader.hpp"
#include "vm/region.hpp"

namespace k42::edge {

// Objects of the core that have lines of their own are beside their Python object, not in it.
struct RegionMapValue {
    explicit RegionMapValue(bool replicated) : owned(std::make_unique<vm::RegionMap>(replicated)) {}
    std::unique_ptr<vm::RegionMap> owned;
    vm::RegionMap& map = *owned;
};
struct FramePoolValue {
    FramePoolValue(uint64_t budget, bool distributed) : owned(std::make_unique<vm::FramePool>(budget, distributed)) {}
    std::unique_ptr<vm::FramePool> owned;
    vm::FramePool& pool = *owned;
};
struct AccountValue {
    AccountValue(Ref pool_, vm::Accounts& accounts_, vm::Account& account_)
        : pool(std::move(pool_)), accounts(accounts_), account(&account_), limit(account_.limit()) {}
    ~AccountValue() { close(); }
    void close() {
        if (vm::Account* open = account.exchange(nullptr)) accounts.close(open);
    }
    Ref pool;
    vm::Accounts& accounts;
    std::atomic<vm::Account*> account;  // nullptr: closed; to be used within the request of the runtime that read it
    const uint64_t limit;
};
struct HintQueueValue {
    vm::HintQueue queue;
    vm::Prefetcher prefetcher{queue};
};
struct FileCacheValue {
    FileCacheValue(Ref pool_, vm::FramePool* frames, int memfd, int journal, uint64_t pages, vm::Fill fill,
                   vm::Backing backing, vm::Policy policy, int cpus, vm::Tables tables)
        : pool(std::move(pool_)),
          owned(std::make_unique<vm::FileCache>(frames, memfd, journal, pages, fill, backing, policy, cpus, tables)) {}
    // Before the cache gives hints to this queue; there is one for all.
    void keep(Ref queue) {
        if (!hints) hints = std::move(queue);
    }
    Ref pool;
    Ref hints;
    Ref read_ahead;  // the source's
    std::unique_ptr<vm::FileCache> owned;
    vm::FileCache& cache = *owned;
};
// Waiters and queued faults may need the native HAT after the Python object has gone: it counts its users.
struct HatValue {
    HatValue(Ref regions_, vm::Hat* hat_) : regions(std::move(regions_)), hat(hat_) {}
    ~HatValue() { hat->release(); }
    Ref regions;
    vm::Hat* hat;
};
struct RegionValue {
    RegionValue(Ref cache_, Ref hat_, uint64_t start, uint64_t pages, uint64_t first_page, uint32_t group,
                uint32_t around, bool tracked, vm::FileCache* native_cache, vm::Hat* native_hat)
        : cache(std::move(cache_)),
          hat(std::move(hat_)),
          owned(std::make_unique<vm::Region>(start, pages, first_page, group, around, tracked, native_cache,
                                             native_hat)) {}
    Ref cache;
    Ref hat;
    std::unique_ptr<vm::Region> owned;
    vm::Region& region = *owned;
};

// Set once, when the module is executed (which happens once a process: sub-interpreters are refused).
struct VmTypes {
    PyTypeObject* region_map;
    PyTypeObject* frame_pool;
    PyTypeObject* file_cache;
    PyTypeObject* hint_queue;
    PyTypeObject* read_ahead;
    PyTypeObject* hat;
    PyTypeObject* region;
};
extern VmTypes vm_types;

int add_frame_pool(PyObject* module);
int add_file_cache(PyObject* module);
int add_hat(PyObject* module);
int add_region(PyObject* module);
int add_engine(PyObject* module);
int add_window(PyObject* module);
int add_access(PyObject* module);

// An access of our own to a shown Window: hiding it waits for the end of this scope.
class WindowAccess {
  public:
    WindowAccess() = default;
    ~WindowAccess();
    WindowAccess(const WindowAccess&) = delete;
    WindowAccess& operator=(const WindowAccess&) = delete;

    // False with an exception set unless the window is shown, and writable if need be.
    bool begin(PyObject* window, bool write);

    uint64_t start = 0;  // address of the first byte shown to Python
    uint64_t size = 0;   // bytes shown to Python
    const vm::WindowRecord* record = nullptr;

  private:
    Ref window_;
};

}  // namespace k42::edge
