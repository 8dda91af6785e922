// What differs between Python with and without a GIL, and between versions, in one place.
#pragma once

#include "edge.hpp"

namespace k42::edge {

// Without a GIL, a reference count that several threads change is a cache line that they all want, even when
// the object is never written: calls through one handle then take longer on two threads than on one. So what
// every call passes through (the handle, its descriptors, the functions that they lead to) is not counted.
//
// 3.13 has deferred counts only inside of the interpreter; a count above 32 bits makes an object immortal
// (object.h, Py_SET_REFCNT), but only its owning thread may do that: from any other it would race with the
// owner's plain increments. An immortal object leaks, and the garbage collector skips it. From 3.14 on
// deferral is public: the interpreter's own references are not counted, and the object is collected. With a
// GIL counts are local to whoever runs, and nothing is done.

// For what lives as long as the program: a descriptor, a function. Call it on the thread that made `o`, at
// once.
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

// For what may come and go: a handle.
inline void share([[maybe_unused]] PyObject* o) {
#if defined(Py_GIL_DISABLED) && PY_VERSION_HEX >= 0x030E0000
    PyUnstable_Object_EnableDeferredRefcount(o);
#else
    share_forever(o);
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
