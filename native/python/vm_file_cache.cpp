// k42._native.FileCache: the pages of one file, the native half of an FCM.
#include "vm.hpp"

namespace k42::edge {

namespace {

using Self = Holder<FileCacheValue>;

vm::FileCache& cache_of(PyObject* self) { return Self::of(self).cache; }

bool to_range(const vm::FileCache& cache, uint64_t page, uint64_t first, uint32_t count) {
    if (count == 0 || count > vm::FileCache::kMaxGroup || first + count > cache.pages() || page < first ||
        page >= first + count) {
        PyErr_SetString(PyExc_ValueError, "a page range outside the file, or too long");
        return false;
    }
    return true;
}

bool to_fault(PyObject* hat, int cpu, uint64_t address, vm::FaultAt& out) {
    HatValue* value = checked<HatValue>(hat, vm_types.hat);
    if (!value) return false;
    if (cpu < 0 || cpu >= value->hat->cpus() || address % vm::kPageSize) {
        PyErr_SetString(PyExc_ValueError, "no such CPU, or an address that is not a page's");
        return false;
    }
    out = {value->hat, cpu, address};
    return true;
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    PyObject* pool;
    int memfd;
    uint64_t pages;
    uint32_t fill;
    uint32_t backing;
    if (!unpack_new("FileCache", args, kwargs, pool, memfd, pages, fill, backing)) return nullptr;
    FramePoolValue* frames = checked<FramePoolValue>(pool, vm_types.frame_pool);
    if (!frames) return nullptr;
    if (fill > uint32_t(vm::Fill::store) || backing > uint32_t(vm::Backing::overcommitted) || pages == 0) {
        PyErr_SetString(PyExc_ValueError, "no such fill or backing, or no pages");
        return nullptr;
    }
    return Self::make(type, Ref::borrow(pool), &frames->pool, memfd, pages, vm::Fill(fill), vm::Backing(backing));
}

PyObject* resolve(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* hat;
    int cpu;
    uint64_t address, page, first;
    uint32_t count;
    vm::FaultAt fault;
    if (!unpack("resolve", args, nargs, hat, cpu, address, page, first, count) ||
        !to_range(cache_of(self), page, first, count) || !to_fault(hat, cpu, address, fault)) {
        return nullptr;
    }
    vm::Outcome outcome;
    {
        Detached detached;
        outcome = cache_of(self).resolve(fault, page, first, count);
    }
    return PyLong_FromLong(long(outcome));
}

PyObject* begin_io(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t page, first;
    uint32_t count;
    if (!unpack("begin_io", args, nargs, page, first, count) || !to_range(cache_of(self), page, first, count)) {
        return nullptr;
    }
    vm::FileCache::Run run;
    {
        Detached detached;
        run = cache_of(self).begin_io(page, first, count);
    }
    return Py_BuildValue("(KI)", run.first, run.count);
}

PyObject* complete_io(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* hat;
    int cpu;
    uint64_t address, page, first, begin, end;
    uint32_t count;
    vm::FaultAt fault;
    if (!unpack("complete_io", args, nargs, hat, cpu, address, page, first, count, begin, end) ||
        !to_range(cache_of(self), page, first, count) || !to_fault(hat, cpu, address, fault)) {
        return nullptr;
    }
    if (page < begin || page >= end) {
        PyErr_SetString(PyExc_ValueError, "the faulting page is not among those that the region shows");
        return nullptr;
    }
    vm::Outcome outcome;
    {
        Detached detached;
        outcome = cache_of(self).complete_io(fault, page, {first, count}, begin, end);
    }
    return PyLong_FromLong(long(outcome));
}

PyObject* abort_io(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t first;
    uint32_t count;
    if (!unpack("abort_io", args, nargs, first, count) || !to_range(cache_of(self), first, first, count))
        return nullptr;
    {
        Detached detached;
        cache_of(self).abort_io({first, count});
    }
    Py_RETURN_NONE;
}

PyObject* give_back(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t count;
    if (!unpack("give_back", args, nargs, count)) return nullptr;
    uint64_t given;
    {
        Detached detached;
        given = cache_of(self).give_back(count);
    }
    return PyLong_FromUnsignedLongLong(given);
}

PyObject* attach(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* region;
    if (!unpack("attach", args, nargs, region)) return nullptr;
    RegionValue* value = checked<RegionValue>(region, vm_types.region);
    if (!value) return nullptr;
    cache_of(self).attach(&value->region);
    Py_RETURN_NONE;
}

PyObject* detach(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* region;
    if (!unpack("detach", args, nargs, region)) return nullptr;
    RegionValue* value = checked<RegionValue>(region, vm_types.region);
    if (!value) return nullptr;
    Detached detached;
    cache_of(self).detach(&value->region);
    return Py_NewRef(Py_None);
}

PyObject* counts(PyObject* self, PyObject*) {
    const vm::FileCache::Counts c = cache_of(self).counts();
    return Py_BuildValue("{sKsKsKsKsK}", "mapped", c.mapped, "zero_filled", c.zero_filled, "filled", c.filled, "queued",
                         c.queued, "evicted", c.evicted);
}

PyObject* memfd(PyObject* self, PyObject*) { return PyLong_FromLong(cache_of(self).memfd()); }

PyObject* resident(PyObject* self, PyObject*) {
    std::vector<uint64_t> pages;
    {
        Detached detached;
        pages = cache_of(self).table().resident();
    }
    Ref list = Ref::steal(PyList_New(Py_ssize_t(pages.size())));
    if (!list) return nullptr;
    for (size_t i = 0; i < pages.size(); ++i) {
        PyObject* number = PyLong_FromUnsignedLongLong(pages[i]);
        if (!number) return nullptr;
        PyList_SET_ITEM(list.get(), Py_ssize_t(i), number);
    }
    return list.release();
}

PyObject* sizes(PyObject* self, PyObject*) {
    const PageTable& table = cache_of(self).table();
    return Py_BuildValue("(nn)", Py_ssize_t(table.size()), Py_ssize_t(table.bytes()));
}

PyMethodDef methods[] = {
    {"resolve", fast(resolve), METH_FASTCALL,
     "resolve(hat, cpu, address, page, first, count): finish a fault with what is at hand; the Outcome."},
    {"begin_io", fast(begin_io), METH_FASTCALL,
     "begin_io(page, first, count): mark the absent run around page as in I/O; its (first, count), or (page, 0)."},
    {"complete_io", fast(complete_io), METH_FASTCALL,
     "complete_io(hat, cpu, address, page, first, count, begin, end): the run is filled: resident, waiters woken, and "
     "what of it lies in pages [begin, end) mapped."},
    {"abort_io", fast(abort_io), METH_FASTCALL, "abort_io(first, count): the run is absent again, waiters woken."},
    {"give_back", fast(give_back), METH_FASTCALL, "give_back(count): evict up to so many pages, oldest first."},
    {"attach", fast(attach), METH_FASTCALL, "A region shows this file."},
    {"detach", fast(detach), METH_FASTCALL, "A region shows it no more."},
    {"counts", counts, METH_NOARGS, "Faults and pages so far, by what became of them."},
    {"memfd", memfd, METH_NOARGS, "The descriptor of the frames; stays this object's."},
    {"resident", resident, METH_NOARGS, "The resident pages' indices, sorted."},
    {"sizes", sizes, METH_NOARGS, "(descriptors, bytes they take)."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(Self::dealloc)},
    {Py_tp_methods, methods},
    {Py_tp_doc, const_cast<char*>("FileCache(pool, memfd, pages, fill, backing, /)\n\n"
                                  "The pages of one file, their frames in a memfd, which it takes over (paper 4.4).")},
    {0, nullptr},
};

PyType_Spec spec = {"k42._native.FileCache", sizeof(Self), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, slots};

}  // namespace

int add_file_cache(PyObject* module) {
    vm_types.file_cache = add_type(module, &spec);
    return vm_types.file_cache ? 0 : -1;
}

}  // namespace k42::edge
