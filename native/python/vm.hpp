// What the types of the virtual memory system on the edge know of each other: each wraps the native half of one
// object of the paper, and keeps alive what its native half points to.
#pragma once

#include <memory>

#include "arguments.hpp"
#include "vm/engine.hpp"
#include "vm/file_cache.hpp"
#include "vm/frame_pool.hpp"
#include "vm/guard.hpp"
#include "vm/hat.hpp"
#include "vm/region.hpp"

namespace k42::edge {

struct RegionMapValue {
    vm::RegionMap map;
};
struct FramePoolValue {
    explicit FramePoolValue(uint64_t budget) : pool(budget) {}
    vm::FramePool pool;
};
struct FileCacheValue {
    FileCacheValue(Ref pool_, vm::FramePool* frames, int memfd, uint64_t pages, vm::Fill fill, vm::Backing backing)
        : pool(std::move(pool_)), cache(frames, memfd, pages, fill, backing) {}
    Ref pool;
    vm::FileCache cache;
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
                vm::FileCache* native_cache, vm::Hat* native_hat)
        : cache(std::move(cache_)),
          hat(std::move(hat_)),
          region(start, pages, first_page, group, native_cache, native_hat) {}
    Ref cache;
    Ref hat;
    vm::Region region;
};

// Set once, when the module is executed (which happens once a process: sub-interpreters are refused).
struct VmTypes {
    PyTypeObject* region_map;
    PyTypeObject* frame_pool;
    PyTypeObject* file_cache;
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
