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

// Files of the reference; add_reference calls them.
int add_method(PyObject* module);
int add_attribute(PyObject* module);
int add_native_rep(PyObject* module);
int add_processors(PyObject* module);

}  // namespace k42::edge
