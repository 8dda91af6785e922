// k42._native.Block and allocator_stat: the core's allocator as Python sees it, to look at where blocks lie and how
// much memory each processor has. The structures allocate in the core.
#include <new>

#include "alloc/allocator.hpp"
#include "arguments.hpp"
#include "reference.hpp"

namespace k42::edge {

namespace {

// What a Python object holds of the allocator; it goes back when the object does, or before.
struct Held {
    std::atomic<void*> block;
    size_t size;

    ~Held() { free(); }
    // False: it has been freed before.
    bool free() {
        void* p = block.exchange(nullptr, std::memory_order_acq_rel);
        alloc::deallocate(p);
        return p;
    }
};

using Self = Holder<Held>;

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    size_t size;
    bool padded;
    if (!unpack_new("Block", args, kwargs, size, padded)) return nullptr;
    here();  // the block is of the caller's processor
    void* p;
    try {
        p = alloc::allocate(size, padded ? alloc::Kind::padded : alloc::Kind::strict);
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
    PyObject* self = Self::make(type, p, size);
    if (!self) alloc::deallocate(p);
    return self;
}

PyObject* free(PyObject* self, PyObject*) {
    if (Self::of(self).free()) Py_RETURN_NONE;
    PyErr_SetString(PyExc_ValueError, "the block has been freed already");
    return nullptr;
}

PyObject* address(PyObject* self, void*) {
    if (void* p = Self::of(self).block.load(std::memory_order_acquire)) return PyLong_FromVoidPtr(p);
    PyErr_SetString(PyExc_ValueError, "the block has been freed: it has no address");
    return nullptr;
}

PyObject* size(PyObject* self, void*) { return PyLong_FromSize_t(Self::of(self).size); }

PyMethodDef methods[] = {
    {"free", free, METH_NOARGS, PyDoc_STR("free($self, /)\n--\n\nGive the block back, on any thread.")},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef attributes[] = {
    {"address", address, nullptr, PyDoc_STR("Where the block lies."), nullptr},
    {"size", size, nullptr, PyDoc_STR("The bytes that were asked for."), nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(Self::dealloc)},
    {Py_tp_methods, methods},
    {Py_tp_getset, attributes},
    {Py_tp_doc, const_cast<char*>(PyDoc_STR("Block(size, padded, /)\n--\n\n"
                                            "A block of the calling processor's memory, of `size` bytes.\n\n"
                                            "It shares cache lines with blocks of the same processor alone, and when "
                                            "it is padded with none."))},
    {0, nullptr},
};

PyType_Spec spec = {"k42._native.Block", sizeof(Self), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, slots};

PyObject* to_python(const alloc::Usage& u) {
    return Py_BuildValue("{sIsnsKsKsKsKsK}", "processor", u.processor, "size", Py_ssize_t(u.size), "allocated",
                         u.allocated, "freed", u.freed, "sent", u.sent, "returned", u.returned, "held", u.held);
}

PyObject* stat(PyObject*, PyObject*) {
    alloc::Statistics statistics;
    try {
        statistics = alloc::statistics();
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
    Ref usage = Ref::steal(PyList_New(0));
    if (!usage) return nullptr;
    for (const alloc::Usage& each : statistics.usage) {
        Ref one = Ref::steal(to_python(each));
        if (!one || PyList_Append(usage.get(), one.get()) < 0) return nullptr;
    }
    return Py_BuildValue("{sOsKsK}", "usage", usage.get(), "waiting", statistics.waiting, "reserved",
                         statistics.reserved);
}

PyObject* settle(PyObject*, PyObject*) {
    alloc::settle();
    Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"allocator_stat", stat, METH_NOARGS,
     PyDoc_STR("allocator_stat($module, /)\n--\n\n"
               "Return what the processors did with blocks of the core's allocator, by processor and size.\n\n"
               "'usage': for each processor and 'size' of blocks in bytes (0: larger than any class) the blocks\n"
               "'allocated', 'freed' of its own, 'sent' (freed, of other processors), 'returned' (freed by others and\n"
               "come home), and the bytes 'held'. 'waiting': bytes of empty slabs; 'reserved': of address space for\n"
               "slabs. Exact for processors that are quiet.")},
    {"allocator_settle", settle, METH_NOARGS,
     PyDoc_STR("allocator_settle($module, /)\n--\n\n"
               "Send home what the calling processor has freed for others; take in what has come home to it.")},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_allocator(PyObject* module) { return add_type(module, &spec) ? PyModule_AddFunctions(module, functions) : -1; }

}  // namespace k42::edge
