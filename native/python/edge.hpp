// What every file of the edge shares: owning references, errors, the GIL, and the list of types.
// The edge is thin: it parses arguments, calls the core, and builds results.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifdef __linux__
#include <cxxabi.h>
#include <unistd.h>
#endif

#include <utility>

namespace k42::edge {

// An owned reference; nullptr means "an exception is set" when returned by a function.
class Ref {
  public:
    Ref() = default;
    static Ref steal(PyObject* o) {
        Ref r;
        r.object_ = o;
        return r;
    }
    static Ref borrow(PyObject* o) {
        Py_XINCREF(o);
        return steal(o);
    }
    Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
    Ref& operator=(Ref&& other) noexcept {
        std::swap(object_, other.object_);
        return *this;
    }
    Ref(const Ref&) = delete;
    Ref& operator=(const Ref&) = delete;
    ~Ref() { Py_XDECREF(object_); }

    PyObject* get() const { return object_; }
    PyObject* release() { return std::exchange(object_, nullptr); }
    explicit operator bool() const { return object_ != nullptr; }

  private:
    PyObject* object_ = nullptr;
};

// When the interpreter has ended, daemon threads that come back to it end there. Before 3.14 their stacks are unwound,
// which ends the program where it meets a destructor; so they stay for ever instead, as from 3.14 on.
template <typename F>
auto come_back(F attach) {
#if defined(__linux__) && PY_VERSION_HEX < 0x030E0000
    try {
        return attach();
    } catch (abi::__forced_unwind&) {
        for (;;) ::pause();
    }
#else
    return attach();
#endif
}

// Releases the GIL (detaches the thread state) for its scope: around anything that can block.
class Detached {
  public:
    Detached() : state_(PyEval_SaveThread()) {}
    ~Detached() {
        come_back([this] { PyEval_RestoreThread(state_); });
    }
    Detached(const Detached&) = delete;
    Detached& operator=(const Detached&) = delete;

  private:
    PyThreadState* state_;
};

// Takes the GIL (attaches the thread) for its scope, if the thread has not.
class Attached {
  public:
    Attached() : state_(come_back([] { return PyGILState_Ensure(); })) {}
    ~Attached() { PyGILState_Release(state_); }
    Attached(const Attached&) = delete;
    Attached& operator=(const Attached&) = delete;

  private:
    PyGILState_STATE state_;
};

// Adds a heap type made from `spec` to the module; returns the type (borrowed from the module) or nullptr.
inline PyTypeObject* add_type(PyObject* module, PyType_Spec* spec, PyTypeObject* base = nullptr) {
    Ref type = Ref::steal(PyType_FromModuleAndSpec(module, spec, reinterpret_cast<PyObject*>(base)));
    if (!type) return nullptr;
    auto* result = reinterpret_cast<PyTypeObject*>(type.get());
    if (PyModule_AddType(module, result) < 0) return nullptr;
    return result;
}

// One function a file of the edge: adds its type or functions to the module; -1 with an exception set.
int add_reference(PyObject* module);
int add_counter(PyObject* module);
int add_pool(PyObject* module);
int add_map(PyObject* module);
int add_core_experiments(PyObject* module);
int add_allocator(PyObject* module);
int add_gate(PyObject* module);
int add_interval_map(PyObject* module);
int add_retype(PyObject* module);
int add_vm(PyObject* module);           // Linux only
int add_experiments(PyObject* module);  // Linux only

}  // namespace k42::edge
