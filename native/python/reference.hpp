// The reference as the descriptors see it: who is called, on which representative, within a request.
#pragma once

#include "edge.hpp"
// Needs Python.h before it.
#include <structmember.h>

#include "runtime/translation.hpp"

namespace k42::edge {

struct Anchor;

struct ReferenceObject {
    PyObject_HEAD runtime::Reference reference;
    Anchor* anchor;  // for the garbage collector alone; nullptr once destroyed. Calls find it by the coid.
    PyObject* weakrefs;
    std::uint32_t creator;  // the processor that created the object
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
            settle(processor_);
    }
    Request(const Request&) = delete;
    Request& operator=(const Request&) = delete;

    // The local representative, borrowed for this request; or nullptr with an exception.
    PyObject* rep(PyObject* reference) {
        auto* self = reinterpret_cast<ReferenceObject*>(reference);
        coid_ = self->reference.coid();
        void* rep = runtime::translate(processor_, coid_);
        return rep ? static_cast<PyObject*>(rep) : miss(reference);
    }

    // What the reference named when rep() found a representative.
    Anchor* anchor_of_rep() const { return static_cast<Anchor*>(runtime::object_of(coid_)); }

    // What the reference names, whether or not it is being switched; it outlives this request. nullptr with an
    // exception.
    Anchor* anchor(PyObject* reference);

    // What is left to do at the end of a request that was watched. Keeps the exception that is set.
    static void settle(runtime::Processor& p);

  private:
    PyObject* miss(PyObject* reference);

    // Waits until the object is not being switched; false with an exception.
    bool await_switch(PyObject* reference);

    runtime::Processor& processor_;
    runtime::Coid coid_;
};

// A pause in a long wait, while detached: false when a signal's handler raised. The main thread alone gets signals.
bool check_signals();

// Raises Destroyed.
void set_destroyed(PyObject* reference);

// False with a TypeError when `o` is no reference.
bool check_reference(PyObject* o, const char* function);

// Files of the reference; add_reference calls them.
int add_method(PyObject* module);
int add_attribute(PyObject* module);
int add_native_rep(PyObject* module);
int add_processors(PyObject* module);
int add_request(PyObject* module);
int add_switch(PyObject* module);

}  // namespace k42::edge
