// k42._native.retype: gives a built-in container the class of a subclass that adds nothing to its layout, or takes it
// back. What `__class__` refuses for types that are not made in Python; k42.sim charges accesses by it.
#include "edge.hpp"

namespace k42::edge {

namespace {

bool is_heap(const PyTypeObject* type) {
    return PyType_HasFeature(const_cast<PyTypeObject*>(type), Py_TPFLAGS_HEAPTYPE);
}

bool alike(const PyTypeObject* one, const PyTypeObject* other) {
    constexpr unsigned long layout = Py_TPFLAGS_HAVE_GC
#ifdef Py_TPFLAGS_MANAGED_DICT
                                     | Py_TPFLAGS_MANAGED_DICT
#endif
#ifdef Py_TPFLAGS_MANAGED_WEAKREF
                                     | Py_TPFLAGS_MANAGED_WEAKREF
#endif
        ;
    return one->tp_basicsize == other->tp_basicsize && one->tp_itemsize == other->tp_itemsize &&
           one->tp_dictoffset == other->tp_dictoffset && one->tp_weaklistoffset == other->tp_weaklistoffset &&
           (one->tp_flags & layout) == (other->tp_flags & layout) && one->tp_free == other->tp_free;
}

PyObject* retype(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != 2 || !PyType_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "retype() takes an object and a type");
        return nullptr;
    }
    PyObject* object = args[0];
    PyTypeObject* from = Py_TYPE(object);
    auto* to = reinterpret_cast<PyTypeObject*>(args[1]);
    if (!(PyType_IsSubtype(to, from) || PyType_IsSubtype(from, to)) || !alike(from, to)) {
        PyErr_Format(PyExc_TypeError, "%.100s and %.100s are not laid out alike", from->tp_name, to->tp_name);
        return nullptr;
    }
    // An object keeps its type alive if that is not static.
    if (is_heap(to)) Py_INCREF(to);
    Py_SET_TYPE(object, to);
    if (is_heap(from)) Py_DECREF(from);
    Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"retype", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(retype)), METH_FASTCALL,
     PyDoc_STR("retype($module, object, type, /)\n--\n\nExchange the object's class for a sub- or superclass.")},
    {},
};

}  // namespace

int add_retype(PyObject* module) { return PyModule_AddFunctions(module, functions); }

}  // namespace k42::edge
