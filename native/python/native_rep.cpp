// k42._native.NativeRep, the base of the types of native representatives, and the descriptors of their methods in
// the types of references.
#include "freethreading.hpp"
#include "reference.hpp"

namespace k42::edge {

PyTypeObject* native_rep_type = nullptr;

namespace {

PyType_Slot slots[] = {
    {Py_tp_doc, const_cast<char*>("The base of native representatives.")},
    {0, nullptr},
};

PyType_Spec spec = {
    "k42._native.NativeRep", sizeof(PyObject), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE, slots};

PyObject* native_method(PyObject*, PyObject* args) {
    PyTypeObject* type;
    PyObject* method;
    if (!PyArg_ParseTuple(args, "O!O!:native_method", &PyType_Type, &type, &PyMethodDescr_Type, &method))
        return nullptr;
    if (type->tp_base != reference_type || PyDescr_TYPE(method)->tp_base != native_rep_type) {
        PyErr_SetString(PyExc_TypeError, "native_method() takes a type of references, and a method of a NativeRep");
        return nullptr;
    }
    PyObject* descriptor = PyDescr_NewMethod(type, reinterpret_cast<PyMethodDescrObject*>(method)->d_method);
    if (descriptor) share_forever(descriptor);
    return descriptor;
}

PyMethodDef functions[] = {
    {"native_method", native_method, METH_VARARGS,
     PyDoc_STR("native_method(type, method) -> the descriptor that calls it on the local representative")},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_native_rep(PyObject* module) {
    native_rep_type = add_type(module, &spec);
    return native_rep_type ? PyModule_AddFunctions(module, functions) : -1;
}

}  // namespace k42::edge
