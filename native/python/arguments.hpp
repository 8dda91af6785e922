// Positional arguments of a METH_FASTCALL function into C++ values, with Python's own errors.
#pragma once

#include <cerrno>
#include <cstdint>
#include <new>
#include <string>
#include <system_error>
#include <type_traits>

#include "edge.hpp"

namespace k42::edge {

template <class T>
bool convert(PyObject* o, T& out) {
    if constexpr (std::is_same_v<T, PyObject*>) {
        out = o;
    } else if constexpr (std::is_same_v<T, bool>) {
        const int truth = PyObject_IsTrue(o);
        if (truth < 0) return false;
        out = truth != 0;
    } else if constexpr (std::is_same_v<T, std::string>) {
        Py_ssize_t size = 0;
        const char* text = PyUnicode_AsUTF8AndSize(o, &size);
        if (!text) return false;
        out.assign(text, size_t(size));
    } else if constexpr (std::is_same_v<T, int>) {
        const long value = PyLong_AsLong(o);
        if (value == -1 && PyErr_Occurred()) return false;
        if (value != int(value)) {
            PyErr_SetString(PyExc_OverflowError, "the number does not fit an int");
            return false;
        }
        out = int(value);
    } else {
        static_assert(std::is_unsigned_v<T>);
        const unsigned long long value = PyLong_AsUnsignedLongLong(o);
        if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred()) return false;
        if (value > static_cast<T>(-1)) {
            PyErr_SetString(PyExc_OverflowError, "the number is too large");
            return false;
        }
        out = static_cast<T>(value);
    }
    return true;
}

// unpack("f", args, nargs, a, b): false with a TypeError unless there are exactly the arguments asked for.
template <class... T>
bool unpack(const char* function, PyObject* const* args, Py_ssize_t nargs, T&... out) {
    if (nargs != Py_ssize_t(sizeof...(out))) {
        PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, not %zd", function, Py_ssize_t(sizeof...(out)), nargs);
        return false;
    }
    [[maybe_unused]] Py_ssize_t i = 0;
    return (convert(args[i++], out) && ...);
}

// The same for a constructor's tuple; keywords are refused.
template <class... T>
bool unpack_new(const char* type, PyObject* args, PyObject* kwargs, T&... out) {
    if (kwargs && PyDict_GET_SIZE(kwargs)) {
        PyErr_Format(PyExc_TypeError, "%s() takes no keyword arguments", type);
        return false;
    }
    return unpack(type, &PyTuple_GET_ITEM(args, 0), PyTuple_GET_SIZE(args), out...);
}

using FastMethod = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
inline PyCFunction fast(FastMethod method) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(method));
}

// A Python object that holds one C++ value of type T, made by tp_new and destroyed with it.
template <class T>
struct Holder {
    PyObject_HEAD T value;

    static T& of(PyObject* self) { return reinterpret_cast<Holder*>(self)->value; }

    // What the constructor throws is raised: an OSError, or a MemoryError.
    template <class... Args>
    static PyObject* make(PyTypeObject* type, Args&&... args) {
        PyObject* self = type->tp_alloc(type, 0);
        if (!self) return nullptr;
        try {
            new (&of(self)) T(std::forward<Args>(args)...);
            return self;
        } catch (const std::system_error& error) {
            errno = error.code().value();
            PyErr_SetFromErrnoWithFilename(PyExc_OSError, error.what());
        } catch (const std::bad_alloc&) {
            PyErr_NoMemory();
        }
        // There is no value to destroy yet: not dealloc(), only the memory.
        type->tp_free(self);
        Py_DECREF(type);
        return nullptr;
    }

    static void dealloc(PyObject* self) {
        PyTypeObject* type = Py_TYPE(self);
        of(self).~T();
        type->tp_free(self);
        Py_DECREF(type);
    }
};

// The holder's value when `o` is of `type`, else a TypeError.
template <class T>
T* checked(PyObject* o, PyTypeObject* type) {
    if (PyObject_TypeCheck(o, type)) return &Holder<T>::of(o);
    PyErr_Format(PyExc_TypeError, "expected %s, not %s", type->tp_name, Py_TYPE(o)->tp_name);
    return nullptr;
}

}  // namespace k42::edge
