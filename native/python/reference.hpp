// The reference as the descriptors see it: who is called, on which representative, within a request.
#pragma once

#include <mutex>
#include <vector>

#include "edge.hpp"
// Needs Python.h before it.
#include <structmember.h>

#include "runtime/translation.hpp"

namespace k42::edge {

// What a coid names for Python: the root, and the representatives that local tables point to. It owns them,
// so it is they who outlive every request that may use them: the tables' pointers are borrowed from here.
struct Anchor {
    PyObject* root;
    bool unreachable = false;     // the garbage collector found the object: it breaks the cycles itself
    std::mutex lock;              // protects reps; innermost, nothing is called under it
    std::vector<PyObject*> reps;  // each once

    // Takes over `rep`; returns it borrowed.
    PyObject* hold(PyObject* rep);
};

struct ReferenceObject {
    PyObject_HEAD runtime::Reference reference;
    Anchor* anchor;  // for the garbage collector alone; nullptr once destroyed. Calls find it by the coid.
    PyObject* weakrefs;
};

extern PyTypeObject* reference_type;  // the base of the types that are generated per class

// Every generated type derives from the base directly.
inline bool is_reference(PyObject* o) { return Py_TYPE(o)->tp_base == reference_type; }

// The calling thread's processor; taken for the life of the thread at the first call.
runtime::Processor& adopt_processor();
inline runtime::Processor& here() {
    runtime::Processor* p = runtime::current_or_null();
    return p ? *p : adopt_processor();
}

// Its scope is a request, or part of the request that runs already.
class Request {
  public:
    Request() : processor_(here()) { runtime::enter(processor_); }
    ~Request() {
        if (runtime::leave(processor_)) [[unlikely]]
            settle();
    }
    Request(const Request&) = delete;
    Request& operator=(const Request&) = delete;

    // The local representative, borrowed for this request; or nullptr with an exception.
    PyObject* rep(PyObject* reference) {
        auto* self = reinterpret_cast<ReferenceObject*>(reference);
        runtime::Coid coid = self->reference.coid();
        void* rep = runtime::translate(processor_, coid);
        return rep ? static_cast<PyObject*>(rep) : miss(reference, coid);
    }

  private:
    PyObject* miss(PyObject* reference, runtime::Coid coid);
    static void settle();

    runtime::Processor& processor_;
};

// Representatives may be native, of a type that derives from this base directly. All its methods are made by
// `on_rep`, as METH_FASTCALL | METH_KEYWORDS: a C function that is called on the representative or on a reference to
// its object. So the interpreter calls it as it calls any native method, at the lowest cost that it knows.
extern PyTypeObject* native_rep_type;

using NativeMethod = PyObject* (*)(PyObject* rep, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames);

inline PyCFunction native_function(NativeMethod method) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(method));
}

// `T` has the type of the representatives and its table of methods, of which `method` is one.
template <typename T, NativeMethod method>
PyObject* on_rep(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
    if (Py_TYPE(self) == T::type) return method(self, args, nargs, kwnames);
    Request request;
    PyObject* rep = request.rep(self);
    if (!rep) return nullptr;
    if (Py_TYPE(rep) == T::type) [[likely]]
        return method(rep, args, nargs, kwnames);
    // The root has a representative of another kind: its method of the same name.
    const PyMethodDef* def = T::table;
    while (def->ml_meth != native_function(on_rep<T, method>)) ++def;
    Ref other = Ref::steal(PyObject_GetAttrString(rep, def->ml_name));
    if (!other) return nullptr;
    PyObject* result = PyObject_Vectorcall(other.get(), args, static_cast<size_t>(nargs), kwnames);
    if (result == rep) {  // `return self`: to the caller, self is the reference
        Py_DECREF(result);
        result = Py_NewRef(self);
    }
    return result;
}

// Files of the reference; add_reference calls them.
int add_method(PyObject* module);
int add_attribute(PyObject* module);
int add_native_rep(PyObject* module);
int add_processors(PyObject* module);

}  // namespace k42::edge
