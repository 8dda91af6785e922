// The descriptor that makes a call on a reference a call on the local representative.
//
// It stands in the reference's generated type, one for each method of the class. The interpreter treats it
// like a function (METHOD_DESCRIPTOR, immutable type, no tp_descr_set): `ref.add(1)` looks it up by the
// type's cache, makes no bound method, and calls it with the reference as the first argument.
#include "anchor.hpp"
#include "freethreading.hpp"

namespace k42::edge {

namespace {

struct MethodObject {
    PyObject_HEAD vectorcallfunc vectorcall;
    PyTypeObject* rep_type;  // the class that the reference type was generated from
    PyObject* function;      // what the name means in that class
    PyObject* name;          // for representatives of other types
    PyObject* suspend;       // makes what the caller gets of a generator or coroutine, and of its hold
    bool suspends;           // `function` makes such
    bool direct;             // `function` is a Python function: instances of exactly rep_type call it
};

MethodObject* cast(PyObject* o) { return reinterpret_cast<MethodObject*>(o); }

bool is_suspended(PyObject* o) { return PyGen_CheckExact(o) || PyCoro_CheckExact(o) || PyAsyncGen_CheckExact(o); }

// What the caller gets of a generator or coroutine; takes over `result`.
PyObject* suspend(MethodObject* self, Request& request, PyObject* reference, PyObject* result) {
    Ref inner = Ref::steal(result);
    Ref hold = Ref::steal(make_hold(request, reference, self->name));
    PyObject* args[] = {inner.get(), hold.get(), self->suspends ? Py_True : Py_False};
    return hold ? PyObject_Vectorcall(self->suspend, args, 3, nullptr) : nullptr;
}

PyObject* vectorcall(PyObject* callable, PyObject* const* args, size_t nargsf, PyObject* kwnames) {
    MethodObject* self = cast(callable);
    Py_ssize_t nargs = PyVectorcall_NARGS(nargsf);
    if (nargs == 0 || !is_reference(args[0])) [[unlikely]] {
        PyErr_Format(PyExc_TypeError, "%U() needs a reference to %s as its first argument", self->name,
                     self->rep_type->tp_name);
        return nullptr;
    }
    // The arguments are the caller's: self is swapped in a copy, with the free place in front that callees
    // may use.
    constexpr Py_ssize_t small = 8;
    PyObject* stack[1 + small];
    PyObject** copy = stack;
    Py_ssize_t total = nargs + (kwnames ? PyTuple_GET_SIZE(kwnames) : 0);
    if (total > small) [[unlikely]] {
        copy = static_cast<PyObject**>(PyMem_Malloc(static_cast<size_t>(1 + total) * sizeof(PyObject*)));
        if (!copy) return PyErr_NoMemory();
    }
    PyObject* result = nullptr;
    {
        Request request;
        if (PyObject* rep = request.rep(args[0])) {
            copy[1] = rep;
            for (Py_ssize_t i = 1; i < total; ++i) copy[i + 1] = args[i];  // few: no call of memmove
            size_t count = static_cast<size_t>(nargs) | PY_VECTORCALL_ARGUMENTS_OFFSET;
            bool may_suspend = self->suspends;
            if (self->direct && Py_TYPE(rep) == self->rep_type) [[likely]] {
                PyObject* function = self->function;
                result = reinterpret_cast<PyFunctionObject*>(function)->vectorcall(function, copy + 1, count, kwnames);
            } else {
                result = PyObject_VectorcallMethod(self->name, copy + 1, count, kwnames);
                may_suspend = true;  // a method of another class, or an arbiter
            }
            if (may_suspend && result && is_suspended(result)) [[unlikely]]
                result = suspend(self, request, args[0], result);
            if (result == rep) [[unlikely]] {  // `return self`: to the caller, self is the reference
                Py_DECREF(result);
                result = Py_NewRef(args[0]);
            }
        }
    }
    if (copy != stack) PyMem_Free(copy);
    return result;
}

PyObject* descr_get(PyObject* self, PyObject* obj, PyObject*) {
    if (!obj || obj == Py_None) return Py_NewRef(self);
    return PyMethod_New(self, obj);
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    static const char* names[] = {"name", "function", "rep_type", "suspends", "suspend", nullptr};
    PyObject *name, *function, *rep_type, *suspend;
    int suspends;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "UOO!pO:Method", const_cast<char**>(names), &name, &function,
                                     &PyType_Type, &rep_type, &suspends, &suspend))
        return nullptr;
    PyObject* o = type->tp_alloc(type, 0);
    if (!o) return nullptr;
    MethodObject* self = cast(o);
    self->vectorcall = vectorcall;
    self->rep_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(rep_type));
    self->function = Py_NewRef(function);
    self->name = Py_NewRef(name);
    self->suspends = suspends;
    self->suspend = Py_NewRef(suspend);
    self->direct = PyFunction_Check(function);
    if (self->direct) share_forever(function);
    share_forever(o);
    return o;
}

int traverse(PyObject* o, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(o));
    Py_VISIT(cast(o)->rep_type);
    Py_VISIT(cast(o)->function);
    Py_VISIT(cast(o)->suspend);
    return 0;
}

int clear(PyObject* o) {
    cast(o)->direct = false;
    Py_CLEAR(cast(o)->function);
    Py_CLEAR(cast(o)->suspend);
    Py_CLEAR(cast(o)->rep_type);
    return 0;
}

void dealloc(PyObject* o) {
    PyTypeObject* type = Py_TYPE(o);
    PyObject_GC_UnTrack(o);
    clear(o);
    Py_CLEAR(cast(o)->name);
    type->tp_free(o);
    Py_DECREF(type);
}

PyObject* repr(PyObject* o) {
    return PyUnicode_FromFormat("<method '%U' of references to %s>", cast(o)->name, cast(o)->rep_type->tp_name);
}

PyObject* doc(PyObject* o, void*) { return PyObject_GetAttrString(cast(o)->function, "__doc__"); }
PyObject* qualname(PyObject* o, void*) { return PyObject_GetAttrString(cast(o)->function, "__qualname__"); }
PyObject* module_name(PyObject* o, void*) { return PyObject_GetAttrString(cast(o)->function, "__module__"); }

PyGetSetDef getset[] = {
    {"__doc__", doc, nullptr, nullptr, nullptr},
    {"__qualname__", qualname, nullptr, nullptr, nullptr},
    {"__module__", module_name, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(MethodObject, vectorcall), READONLY, nullptr},
    {"__name__", T_OBJECT_EX, offsetof(MethodObject, name), READONLY, nullptr},
    {"__wrapped__", T_OBJECT_EX, offsetof(MethodObject, function), READONLY, nullptr},  // for inspect.signature
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_descr_get, reinterpret_cast<void*>(descr_get)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(clear)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {Py_tp_repr, reinterpret_cast<void*>(repr)},
    {Py_tp_members, members},
    {Py_tp_getset, getset},
    {0, nullptr},
};

PyType_Spec spec = {"k42._native.Method", sizeof(MethodObject), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL |
                        Py_TPFLAGS_METHOD_DESCRIPTOR | Py_TPFLAGS_IMMUTABLETYPE,
                    slots};

}  // namespace

int add_method(PyObject* module) { return add_type(module, &spec) ? 0 : -1; }

}  // namespace k42::edge
