// k42._native.Region and RegionMap: where a process's addresses lead (paper 4.1 and 4.3).
#include "vm_variants.hpp"

namespace k42::edge {

VmTypes vm_types;

namespace {

using SelfRegion = Holder<RegionValue>;
using SelfMap = Holder<RegionMapValue>;

vm::Region& region_of(PyObject* self) { return SelfRegion::of(self).region; }

PyObject* make_region(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    PyObject *cache, *hat;
    uint64_t start, pages, first_page;
    uint32_t group, around;
    bool tracked;
    if (!unpack_new("Region", args, kwargs, cache, hat, start, pages, first_page, group, around, tracked))
        return nullptr;
    FileCacheValue* cache_value = checked<FileCacheValue>(cache, vm_types.file_cache);
    HatValue* hat_value = checked<HatValue>(hat, vm_types.hat);
    if (!cache_value || !hat_value) return nullptr;
    if (start % vm::kPageSize || pages == 0 || group == 0 || group > vm::FileCache::kMaxGroup ||
        around > vm::FileCache::kMaxGroup || first_page + pages > cache_value->cache.pages() ||
        first_page + pages < pages) {
        PyErr_SetString(PyExc_ValueError, "a region is whole pages within its file, in groups of 1 to 512 pages");
        return nullptr;
    }
    return SelfRegion::make(type, Ref::borrow(cache), Ref::borrow(hat), start, pages, first_page, group, around,
                            tracked, &cache_value->cache, hat_value->hat);
}

PyObject* enter(PyObject* self, PyObject*) {
    bool entered;
    {
        Detached detached;
        entered = region_of(self).gate.enter();
    }
    return PyBool_FromLong(entered);
}

PyObject* leave(PyObject* self, PyObject*) {
    if (!region_of(self).gate.leave()) {
        PyErr_SetString(PyExc_RuntimeError, "leave without enter");
        return nullptr;
    }
    Py_RETURN_NONE;
}

PyObject* stop(PyObject* self, PyObject*) {
    bool stopped;
    {
        Detached detached;
        stopped = region_of(self).gate.stop() == vm::RegionGate::Stop::stopped;
    }
    return PyBool_FromLong(stopped);
}

PyObject* restart(PyObject* self, PyObject*) { return PyBool_FromLong(region_of(self).gate.restart()); }

PyObject* shutdown(PyObject* self, PyObject*) {
    {
        Detached detached;
        region_of(self).gate.shutdown();
    }
    Py_RETURN_NONE;
}

PyObject* track(PyObject* self, PyObject*) {
    region_of(self).tracked.store(true, std::memory_order_relaxed);
    Py_RETURN_NONE;
}
PyObject* tracked(PyObject* self, PyObject*) {
    return PyBool_FromLong(region_of(self).tracked.load(std::memory_order_relaxed));
}

PyObject* inside(PyObject* self, PyObject*) { return PyLong_FromUnsignedLong(region_of(self).gate.inside()); }

PyObject* group_of(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t canonical;
    if (!unpack("group_of", args, nargs, canonical)) return nullptr;
    const vm::Region& region = region_of(self);
    if (canonical - region.start >= region.pages * vm::kPageSize) {
        PyErr_SetString(PyExc_ValueError, "an address outside the region");
        return nullptr;
    }
    const uint64_t page = region.page_at(canonical);
    const vm::Region::Group group = region.group_of(page);
    return Py_BuildValue("(KKI)", page, group.first, group.count);
}

PyObject* make_map(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    bool replicated;
    if (!unpack_new("RegionMap", args, kwargs, replicated)) return nullptr;
    return SelfMap::make(type, replicated);
}

PyObject* insert(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* o;
    if (!unpack("insert", args, nargs, o)) return nullptr;
    RegionValue* value = checked<RegionValue>(o, vm_types.region);
    if (!value) return nullptr;
    vm::Region& region = value->region;
    return PyBool_FromLong(
        SelfMap::of(self).map.insert(region.start, region.start + region.pages * vm::kPageSize, &region));
}

PyObject* lookup(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t address;
    if (!unpack("lookup", args, nargs, address)) return nullptr;
    const auto found = SelfMap::of(self).map.lookup(address);
    if (!found) Py_RETURN_NONE;
    return PyLong_FromUnsignedLongLong(found->start);
}

PyObject* remove(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t start;
    if (!unpack("remove", args, nargs, start)) return nullptr;
    return PyBool_FromLong(SelfMap::of(self).map.remove(start).has_value());
}

Py_ssize_t length(PyObject* self) { return Py_ssize_t(SelfMap::of(self).map.size()); }

PyObject* distribute(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    return change("distribute", args, nargs, [&](bool is) { region_of(self).gate.distribute(is); });
}
PyObject* distributed(PyObject* self, PyObject*) { return PyBool_FromLong(region_of(self).gate.distributed()); }
PyObject* region_uses_by(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    const runtime::Processor* processor = processor_of("uses_by", args, nargs);
    return processor ? PyLong_FromUnsignedLongLong(region_of(self).gate.uses_by(*processor)) : nullptr;
}
PyObject* region_traffic(PyObject* self, PyObject*) { return to_python(region_of(self).gate.traffic()); }

PyObject* replicate(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    return change("replicate", args, nargs, [&](bool is) { SelfMap::of(self).map.replicate(is); });
}
PyObject* replicated(PyObject* self, PyObject*) { return PyBool_FromLong(SelfMap::of(self).map.replicated()); }
PyObject* map_uses_by(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    const runtime::Processor* processor = processor_of("uses_by", args, nargs);
    return processor ? PyLong_FromUnsignedLongLong(SelfMap::of(self).map.uses_by(*processor)) : nullptr;
}
PyObject* map_traffic(PyObject* self, PyObject*) { return to_python(SelfMap::of(self).map.traffic()); }

PyMethodDef region_methods[] = {
    {"enter", enter, METH_NOARGS, "Enter the gate, waiting while it is stopped; False when it was shut down."},
    {"leave", leave, METH_NOARGS, "Leave the gate."},
    {"stop", stop, METH_NOARGS, "Hold newcomers, wait for those inside; False when shut down."},
    {"restart", restart, METH_NOARGS, "Let newcomers in again; False when it was not stopped."},
    {"shutdown", shutdown, METH_NOARGS, "Reject newcomers for ever, wait for those inside."},
    {"track", track, METH_NOARGS, "Writes to clean pages are faults from now on; while it is stopped."},
    {"tracked", tracked, METH_NOARGS, "Whether they are."},
    {"inside", inside, METH_NOARGS, "Requests inside the gate."},
    {"distribute", fast(distribute), METH_FASTCALL,
     "distribute(distributed): count the requests by processor, or in one word; waits for those inside."},
    {"distributed", distributed, METH_NOARGS, "Whether they are counted by processor."},
    {"uses_by", fast(region_uses_by), METH_FASTCALL,
     "uses_by(processor): how often it entered, since the gate was distributed."},
    {"traffic", region_traffic, METH_NOARGS,
     "(distributed, uses, moves): how often each processor used the gate, or all did, and moves between them."},
    {"group_of", fast(group_of), METH_FASTCALL, "group_of(address): (page, first page of its group, pages in it)."},
    {nullptr, nullptr, 0, nullptr},
};
PyMethodDef map_methods[] = {
    {"insert", fast(insert), METH_FASTCALL, "insert(region): False when it overlaps another."},
    {"lookup", fast(lookup), METH_FASTCALL, "lookup(address): the start of the region there, or None."},
    {"remove", fast(remove), METH_FASTCALL, "remove(start): False when there is none."},
    {"replicate", fast(replicate), METH_FASTCALL, "replicate(replicated): a copy for each processor, or one map."},
    {"replicated", replicated, METH_NOARGS, "Whether there is a copy for each processor."},
    {"uses_by", fast(map_uses_by), METH_FASTCALL,
     "uses_by(processor): how often it looked up, since the map was replicated."},
    {"traffic", map_traffic, METH_NOARGS,
     "(replicated, uses, moves): how often each processor looked up, or all did, and moves between them."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot region_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make_region)},
    {Py_tp_dealloc, reinterpret_cast<void*>(SelfRegion::dealloc)},
    {Py_tp_methods, region_methods},
    {Py_tp_doc, const_cast<char*>("Region(cache, hat, start, pages, first_page, group, /)\n\n"
                                  "A range of addresses that shows part of a file (paper 4.3).")},
    {0, nullptr},
};
PyType_Slot map_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make_map)},
    {Py_tp_dealloc, reinterpret_cast<void*>(SelfMap::dealloc)},
    {Py_tp_methods, map_methods},
    {Py_sq_length, reinterpret_cast<void*>(length)},
    {Py_tp_doc,
     const_cast<char*>("RegionMap(replicated, /)\n\nDisjoint regions by address (paper 4.1). Keeps none alive.")},
    {0, nullptr},
};

constexpr unsigned kFlags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE;
PyType_Spec region_spec = {"k42._native.Region", sizeof(SelfRegion), 0, kFlags, region_slots};
PyType_Spec map_spec = {"k42._native.RegionMap", sizeof(SelfMap), 0, kFlags, map_slots};

}  // namespace

int add_region(PyObject* module) {
    vm_types.region = add_type(module, &region_spec);
    vm_types.region_map = add_type(module, &map_spec);
    return vm_types.region && vm_types.region_map ? 0 : -1;
}

int add_vm(PyObject* module) {
    for (auto add : {add_frame_pool, add_file_cache, add_region, add_hat, add_engine, add_window, add_access}) {
        if (add(module) < 0) return -1;
    }
    return 0;
}

}  // namespace k42::edge
