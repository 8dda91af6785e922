// What differs between Python with and without a GIL, and between versions, in one place.
#pragma once

#include <atomic>

#include "edge.hpp"

namespace k42::edge {

// Without a GIL, a reference count that several threads change is a cache line that they all want, even when
// the object is never written: calls through one handle then take longer on two threads than on one. So what
// every call passes through (the handle, its descriptors, the functions that they lead to) is not counted.
//
// From 3.14 on deferral is public: the interpreter's own references are not counted, and the object is collected. 3.13
// has it only inside of the interpreter; there a count above 32 bits makes an object immortal (object.h,
// Py_SET_REFCNT): it leaks, and the garbage collector skips it. With a GIL counts are local to whoever runs, and
// nothing is done.

// For what lives as long as the program: a descriptor, a function. Call it on the thread that made `o`, at once: from
// any other it would race with the owner's plain increments.
inline void share_forever([[maybe_unused]] PyObject* o) {
#ifdef Py_GIL_DISABLED
#if PY_VERSION_HEX >= 0x030F0000
    if (PyUnstable_SetImmortal(o)) return;
#endif
#if PY_VERSION_HEX >= 0x030E0000
    PyUnstable_Object_EnableDeferredRefcount(o);
#else
    if (_Py_IsOwnedByCurrentThread(o)) Py_SET_REFCNT(o, Py_ssize_t{UINT32_MAX} + 1);
#endif
#endif
}

#if defined(Py_GIL_DISABLED) && PY_VERSION_HEX < 0x030E0000
// How many handles 3.13 may make immortal in the life of the process: 64 bytes each stay for ever, 4 MiB in all. Those
// after them are counted, and scale like any shared object of Python's.
inline constexpr int most_immortal_handles = 1 << 16;
inline std::atomic<int> immortal_handles{0};
#endif

// For what may come and go, a handle: a second processor has begun to use it. Until then its count is its creator's own
// business.
inline void share([[maybe_unused]] PyObject* o) {
#ifdef Py_GIL_DISABLED
#if PY_VERSION_HEX >= 0x030E0000
    PyUnstable_Object_EnableDeferredRefcount(o);
#else
    if (_Py_atomic_load_uint32_relaxed(&o->ob_ref_local) == _Py_IMMORTAL_REFCNT_LOCAL) return;
    if (immortal_handles.fetch_add(1, std::memory_order_relaxed) >= most_immortal_handles) {
        immortal_handles.fetch_sub(1, std::memory_order_relaxed);
        return;
    }
    // Its creator changes the count without atomic operations, so it must not run: this stops all threads between two
    // steps, and visits one object, whichever it is. Counts that are dropped later are not dropped: it lives on.
    PyUnstable_GC_VisitObjects(
        [](PyObject*, void* handle) {
            _Py_atomic_store_uint32_relaxed(&static_cast<PyObject*>(handle)->ob_ref_local, _Py_IMMORTAL_REFCNT_LOCAL);
            return 0;
        },
        o);
#endif
#endif
}

// Whether nobody counts the references to `o`.
inline bool is_immortal([[maybe_unused]] PyObject* o) {
#if PY_VERSION_HEX >= 0x030E0000
    return PyUnstable_IsImmortal(o);
#elif PY_VERSION_HEX >= 0x030C0000
    return _Py_IsImmortal(o);
#else
    return false;
#endif
}

// Keeps the exception that is set, if any, while other Python code runs.
class SavedError {
  public:
#if PY_VERSION_HEX >= 0x030C0000
    SavedError() : error_(PyErr_GetRaisedException()) {}
    ~SavedError() { PyErr_SetRaisedException(error_); }

  private:
    PyObject* error_;
#else
    SavedError() { PyErr_Fetch(&type_, &value_, &traceback_); }
    ~SavedError() { PyErr_Restore(type_, value_, traceback_); }

  private:
    PyObject *type_, *value_, *traceback_;
#endif
  public:
    SavedError(const SavedError&) = delete;
    SavedError& operator=(const SavedError&) = delete;
};

}  // namespace k42::edge
