// The descriptor for what a class has besides methods: a property, a constant. It reads, and where the class
// makes it settable sets, the attribute of the local representative.
#include "reference.hpp"

namespace k42::edge {

namespace {

struct AttributeObject {
    PyObject_HEAD PyObject* name;
    int settable;
};

AttributeObject* cast(PyObject* o) { return reinterpret_cast<AttributeObject*>(o); }

PyObject* descr_get(PyObject* self, PyObject* obj, PyObject*) {
    if (!obj || !is_reference(obj)) return Py_NewRef(self);
    Request request;
    PyObject* rep = request.rep(obj);
    return rep ? PyObject_GetAttr(rep, cast(self)->name) : nullptr;
}

int descr_set(PyObject* self, PyObject* obj, PyObject* value) {
    if (!is_reference(obj) || !cast(self)->settable) {
        PyErr_Format(PyExc_AttributeError, "'%U' of %s cannot be set through a reference", cast(self)->name,
                     Py_TYPE(obj)->tp_name);
        return -1;
    }
    Request request;
    PyObject* rep = request.rep(obj);
    return rep ? PyObject_SetAttr(rep, cast(self)->name, value) : -1;
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    static const char* names[] = {"name", "settable", nullptr};
    PyObject* name;
    int settable;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Up:Attribute", const_cast<char**>(names), &name, &settable))
        return nullptr;
    PyObject* o = type->tp_alloc(type, 0);
    if (!o) return nullptr;
    cast(o)->name = Py_NewRef(name);
    cast(o)->settable = settable;
    return o;
}

void dealloc(PyObject* o) {
    PyTypeObject* type = Py_TYPE(o);
    Py_CLEAR(cast(o)->name);
    type->tp_free(o);
    Py_DECREF(type);
}

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_descr_get, reinterpret_cast<void*>(descr_get)},
    {Py_tp_descr_set, reinterpret_cast<void*>(descr_set)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {0, nullptr},
};

PyType_Spec spec = {"k42._native.Attribute", sizeof(AttributeObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                    slots};

}  // namespace

int add_attribute(PyObject* module) { return add_type(module, &spec) ? 0 : -1; }

}  // namespace k42::edge
