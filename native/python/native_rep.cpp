// k42._native.NativeRep, the base of the interfaces of native representatives, and how a type of references gets the
// methods and slots of an interface.
#include "native_rep.hpp"

#include <vector>

#include "freethreading.hpp"

namespace k42::edge {

PyTypeObject* native_rep_type = nullptr;

namespace {

struct Interface {
    PyTypeObject* type;
    Slots slots;
};

// Written while the module is made, read afterwards.
std::vector<Interface>& interfaces() {
    static auto* all = new std::vector<Interface>();
    return *all;
}

PyType_Slot slots[] = {
    {Py_tp_doc, const_cast<char*>("The base of the interfaces of native representatives.")},
    {0, nullptr},
};

constexpr unsigned flags =
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE;

PyType_Spec spec = {"k42._native.NativeRep", sizeof(NativeRepObject), 0, flags, slots};

bool check_types(PyTypeObject* type, PyTypeObject* interface) {
    if (type->tp_base == reference_type && interface->tp_base == native_rep_type) return true;
    PyErr_SetString(PyExc_TypeError, "expected a type of references, and an interface of native representatives");
    return false;
}

PyObject* native_method(PyObject*, PyObject* args) {
    PyTypeObject* type;
    PyObject* method;
    if (!PyArg_ParseTuple(args, "O!O!:native_method", &PyType_Type, &type, &PyMethodDescr_Type, &method))
        return nullptr;
    if (!check_types(type, PyDescr_TYPE(method))) return nullptr;
    PyObject* descriptor = PyDescr_NewMethod(type, reinterpret_cast<PyMethodDescrObject*>(method)->d_method);
    if (descriptor) share_forever(descriptor);
    return descriptor;
}

PyObject* native_slots(PyObject*, PyObject* args) {
    PyTypeObject *type, *interface;
    if (!PyArg_ParseTuple(args, "O!O!:native_slots", &PyType_Type, &type, &PyType_Type, &interface)) return nullptr;
    if (!check_types(type, interface)) return nullptr;
    for (const Interface& known : interfaces()) {
        if (known.type == interface && known.slots) known.slots(reinterpret_cast<PyHeapTypeObject*>(type));
    }
    PyType_Modified(type);
    Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"native_method", native_method, METH_VARARGS,
     PyDoc_STR("native_method(type, method) -> the descriptor that calls it on the local representative")},
    {"native_slots", native_slots, METH_VARARGS,
     PyDoc_STR("native_slots(type, interface): gives a type of references the slots of the interface, once it has all "
               "its attributes")},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyObject* call_other_rep(PyObject* reference, PyObject* rep, const char* name, PyObject* const* args, Py_ssize_t nargs,
                         PyObject* kwnames) {
    Ref method = Ref::steal(PyObject_GetAttrString(rep, name));
    if (!method) return nullptr;
    PyObject* result = PyObject_Vectorcall(method.get(), args, static_cast<size_t>(nargs), kwnames);
    if (result == rep) {  // `return self`: to the caller, self is the reference
        Py_DECREF(result);
        result = Py_NewRef(reference);
    }
    return result;
}

PyTypeObject* add_interface(PyObject* module, const char* name, const char* doc, PyMethodDef* methods,
                            Slots interface_slots) {
    PyType_Slot type_slots[] = {
        {Py_tp_doc, const_cast<char*>(doc)},
        {Py_tp_methods, methods},
        {0, nullptr},
    };
    PyType_Spec type_spec = {name, sizeof(NativeRepObject), 0, flags, type_slots};
    PyTypeObject* type = add_type(module, &type_spec, native_rep_type);
    if (type) interfaces().push_back({type, interface_slots});
    return type;
}

int add_native_rep(PyObject* module) {
    native_rep_type = add_type(module, &spec);
    return native_rep_type ? PyModule_AddFunctions(module, functions) : -1;
}

}  // namespace k42::edge
