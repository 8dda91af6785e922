// What the native halves with a shared and a distributed implementation have in common on the edge.
#pragma once

#include "structures/traffic.hpp"
#include "vm.hpp"

namespace k42::edge {

// (distributed, uses: by processor if distributed, moves from processor to processor if not)
inline PyObject* to_python(const Traffic& traffic) {
    Ref uses = Ref::steal(PyTuple_New(Py_ssize_t(traffic.uses.size())));
    if (!uses) return nullptr;
    for (size_t i = 0; i < traffic.uses.size(); ++i) {
        PyObject* number = PyLong_FromUnsignedLongLong(traffic.uses[i]);
        if (!number) return nullptr;
        PyTuple_SET_ITEM(uses.get(), Py_ssize_t(i), number);
    }
    return Py_BuildValue("(OOK)", traffic.distributed ? Py_True : Py_False, uses.get(), traffic.moves);
}

// The processor whose number a caller gives; nullptr with an exception set where there is none.
inline const runtime::Processor* processor_of(const char* name, PyObject* const* args, Py_ssize_t nargs) {
    uint32_t id;
    if (!unpack(name, args, nargs, id)) return nullptr;
    if (id < runtime::processor_count()) return &runtime::processor(id);
    PyErr_SetString(PyExc_ValueError, "no such processor");
    return nullptr;
}

// Changes the implementation of what is in `self`; waits for those inside.
template <class Change>
PyObject* change(const char* name, PyObject* const* args, Py_ssize_t nargs, Change&& to) {
    bool distributed;
    if (!unpack(name, args, nargs, distributed)) return nullptr;
    {
        Detached detached;
        to(distributed);
    }
    Py_RETURN_NONE;
}

}  // namespace k42::edge
