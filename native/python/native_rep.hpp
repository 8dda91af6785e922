// Native representatives: objects of C++ behind a reference, called at the lowest cost that the interpreter knows.
//
// An interface is a type of Python's, derived from NativeRep, with a table of names. The types of representatives that
// implement it derive from it directly, and each instance has a table of functions, one for each name. The methods of
// the interface are C functions made by `on_rep`: they are called on a representative or on a reference to its object,
// and the generated types of references get them as they are. So a call finds the local representative and its
// function whatever the implementation is now: a swap changes nothing in the reference.
#pragma once

#include <new>
#include <utility>

#include "arguments.hpp"
#include "reference.hpp"

namespace k42::edge {

extern PyTypeObject* native_rep_type;  // the base of the interfaces

using NativeMethod = PyObject* (*)(PyObject* rep, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames);

inline PyCFunction native_function(NativeMethod method) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(method));
}

struct NativeRepObject {
    PyObject_HEAD const NativeMethod* methods;  // in the order of the interface's names
};

// A representative that holds one C++ value. Values that have `traverse` take part in garbage collection.
template <typename T>
struct NativeRep : NativeRepObject {
    T value;

    static inline PyTypeObject* type = nullptr;
    static constexpr bool collected = requires(T& v, visitproc visit, void* arg) { v.traverse(visit, arg); };

    static T& of(PyObject* self) { return reinterpret_cast<NativeRep*>(self)->value; }

    template <typename... Args>
    static PyObject* make(const NativeMethod* methods, Args&&... args) {
        PyObject* self = type->tp_alloc(type, 0);
        if (!self) return nullptr;
        reinterpret_cast<NativeRep*>(self)->methods = methods;
        new (&of(self)) T(std::forward<Args>(args)...);
        return self;
    }

    static void dealloc(PyObject* self) {
        PyTypeObject* of_self = Py_TYPE(self);
        if constexpr (collected) PyObject_GC_UnTrack(self);
        of(self).~T();
        of_self->tp_free(self);
        Py_DECREF(of_self);
    }

    static int traverse(PyObject* self, visitproc visit, void* arg)
        requires collected
    {
        Py_VISIT(Py_TYPE(self));
        return of(self).traverse(visit, arg);
    }
};

// The representative is none of the interface's own: calls its method of this name.
PyObject* call_other_rep(PyObject* reference, PyObject* rep, const char* name, PyObject* const* args, Py_ssize_t nargs,
                         PyObject* kwnames);

// `Interface` has the type of the interface and `names`; this is its method number `method`.
template <typename Interface, size_t method>
PyObject* on_rep(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
    if (Py_TYPE(self)->tp_base == Interface::type)
        return reinterpret_cast<NativeRepObject*>(self)->methods[method](self, args, nargs, kwnames);
    Request request;
    PyObject* rep = request.rep(self);
    if (!rep) return nullptr;
    if (Py_TYPE(rep)->tp_base == Interface::type) [[likely]]
        return reinterpret_cast<NativeRepObject*>(rep)->methods[method](rep, args, nargs, kwnames);
    return call_other_rep(self, rep, Interface::names[method], args, nargs, kwnames);
}

// Puts C functions into the slots of a type of references, for the special methods of an interface: faster than by
// way of their names. `self` is a reference there.
using Slots = void (*)(PyHeapTypeObject* type);

// Adds an interface to the module: `methods` are those made by on_rep, with their docstrings, ended by a null.
PyTypeObject* add_interface(PyObject* module, const char* name, const char* doc, PyMethodDef* methods,
                            Slots slots = nullptr);

// Adds the type of the representatives NativeRep<T> of an interface; `create` is for those that Python makes.
template <typename T>
PyTypeObject* add_rep(PyObject* module, const char* name, const char* doc, PyTypeObject* interface,
                      newfunc create = nullptr) {
    PyType_Slot slots[5] = {
        {Py_tp_dealloc, reinterpret_cast<void*>(NativeRep<T>::dealloc)},
        {Py_tp_doc, const_cast<char*>(doc)},
    };
    PyType_Slot* next = slots + 2;  // zeroes end the list
    unsigned long flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE;
    if (create) {
        *next++ = {Py_tp_new, reinterpret_cast<void*>(create)};
    } else {
        flags |= Py_TPFLAGS_DISALLOW_INSTANTIATION;
    }
    if constexpr (NativeRep<T>::collected) {
        *next++ = {Py_tp_traverse, reinterpret_cast<void*>(NativeRep<T>::traverse)};
        flags |= Py_TPFLAGS_HAVE_GC;
    }
    PyType_Spec spec = {name, sizeof(NativeRep<T>), 0, static_cast<unsigned>(flags), slots};
    return NativeRep<T>::type = add_type(module, &spec, interface);
}

}  // namespace k42::edge
