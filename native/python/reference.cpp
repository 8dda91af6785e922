// The reference to a Clustered Object: an immutable handle, of a type that is generated for each class.
//
// The type's attributes are the native descriptors of method.cpp and attribute.cpp; what is here is what all
// references have in common: identity, life, and the miss.
#include "reference.hpp"

#include <algorithm>
#include <new>

#include "freethreading.hpp"

namespace k42::edge {

PyTypeObject* reference_type = nullptr;

namespace {

PyObject* destroyed_error = nullptr;  // k42.errors.Destroyed

ReferenceObject* cast(PyObject* o) { return reinterpret_cast<ReferenceObject*>(o); }

void set_destroyed(PyObject* reference) {
    PyErr_Format(destroyed_error, "this %s has been destroyed: create a new one", Py_TYPE(reference)->tp_name);
}

// runtime::Release: nobody uses the object any more.
void release(void* object) {
    if (!Py_IsInitialized()) return;  // the interpreter is gone, and its objects with it
    PyGILState_STATE gil = PyGILState_Ensure();
    auto* anchor = static_cast<Anchor*>(object);
    {
        SavedError saved;
        if (!anchor->unreachable) {
            Ref done = Ref::steal(PyObject_CallMethod(anchor->root, "_released", nullptr));
            if (!done) PyErr_WriteUnraisable(anchor->root);
        }
        for (PyObject* rep : anchor->reps) Py_DECREF(rep);
        Py_DECREF(anchor->root);
    }
    delete anchor;
    PyGILState_Release(gil);
}

// False: it was destroyed before.
bool destroy(ReferenceObject* self, bool* deferred) {
    here();  // destruction needs a processor, and Python's hold on it
    self->anchor = nullptr;
    return runtime::destroy(self->reference, release, deferred);
}

// Nobody has the reference any more (the collector's view, or a root that let go of it): nobody can destroy
// it.
void drop(ReferenceObject* self) {
    if (!self->anchor) return;
    self->anchor->unreachable = true;
    bool deferred;
    destroy(self, &deferred);
}

int traverse(PyObject* o, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(o));
    if (Anchor* anchor = cast(o)->anchor) {
        Py_VISIT(anchor->root);
        for (PyObject* rep : anchor->reps) Py_VISIT(rep);
    }
    return 0;
}

int clear(PyObject* o) {
    drop(cast(o));
    return 0;
}

void dealloc(PyObject* o) {
    PyTypeObject* type = Py_TYPE(o);
    PyObject_GC_UnTrack(o);
    if (cast(o)->weakrefs) PyObject_ClearWeakRefs(o);
    drop(cast(o));
    type->tp_free(o);
    Py_DECREF(type);
}

PyObject* repr(PyObject* o) {
    auto coid = cast(o)->reference.coid();
    Ref module = Ref::steal(PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(o)), "__module__"));
    Ref name = Ref::steal(PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(o)), "__qualname__"));
    if (!module || !name) return nullptr;
    if (!coid) return PyUnicode_FromFormat("<reference to %U.%U, destroyed>", module.get(), name.get());
    return PyUnicode_FromFormat("<reference to %U.%U, %u>", module.get(), name.get(),
                                static_cast<runtime::Index>(coid));
}

// Only what the class itself makes settable (a property) can be set: through its descriptor.
int setattro(PyObject* o, PyObject* name, PyObject* value) {
    Ref descriptor = Ref::steal(PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(o)), name));
    if (descriptor) {
        descrsetfunc set = Py_TYPE(descriptor.get())->tp_descr_set;
        if (set && PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, "__class__") != 0)
            return set(descriptor.get(), o, value);
    }
    PyErr_Clear();
    PyErr_Format(PyExc_AttributeError,
                 "cannot set '%U' on a reference to %s: state belongs to the representatives and the root; "
                 "call a method, or use k42.local(ref)",
                 name, Py_TYPE(o)->tp_name);
    return -1;
}

PyObject* refuse_pickle(PyObject* o, PyObject*) {
    PyErr_Format(PyExc_TypeError,
                 "cannot pickle or copy a reference to %s: it names an object of this process; pickle the values "
                 "that its methods return",
                 Py_TYPE(o)->tp_name);
    return nullptr;
}

PyMethodDef methods[] = {
    {"__reduce_ex__", refuse_pickle, METH_O, nullptr},
    {"__reduce__", refuse_pickle, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyMemberDef members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(ReferenceObject, weakrefs), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_doc, const_cast<char*>("The base of the references to Clustered Objects.")},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(clear)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {Py_tp_repr, reinterpret_cast<void*>(repr)},
    {Py_tp_setattro, reinterpret_cast<void*>(setattro)},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, nullptr},
};

PyType_Spec spec = {"k42._native.Reference", sizeof(ReferenceObject), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION |
                        Py_TPFLAGS_IMMUTABLETYPE,
                    slots};

PyObject* create_reference(PyObject*, PyObject* args) {
    PyTypeObject* type;
    PyObject* root;
    if (!PyArg_ParseTuple(args, "O!O:create_reference", &PyType_Type, &type, &root)) return nullptr;
    if (type->tp_base != reference_type) {
        PyErr_SetString(PyExc_TypeError, "the type must derive from Reference directly");
        return nullptr;
    }
    PyObject* o = type->tp_alloc(type, 0);
    if (!o) return nullptr;
    here();
    auto* anchor = new (std::nothrow) Anchor{.root = Py_NewRef(root), .lock = {}, .reps = {}};
    try {
        if (!anchor) throw std::bad_alloc();
        runtime::create(cast(o)->reference, anchor);
    } catch (const std::bad_alloc&) {
        Py_DECREF(root);
        delete anchor;
        Py_DECREF(o);
        return PyErr_NoMemory();
    }
    cast(o)->anchor = anchor;
    share(o);
    return o;
}

bool check_reference(PyObject* o, const char* function) {
    if (is_reference(o)) return true;
    PyErr_Format(PyExc_TypeError, "%s() needs a reference, as create() returns it, not %.100s", function,
                 Py_TYPE(o)->tp_name);
    return false;
}

PyObject* destroy_reference(PyObject*, PyObject* o) {
    if (!check_reference(o, "destroy")) return nullptr;
    bool deferred;
    if (!destroy(cast(o), &deferred)) {
        set_destroyed(o);
        return nullptr;
    }
    return PyBool_FromLong(!deferred);
}

PyObject* local(PyObject*, PyObject* o) {
    if (!check_reference(o, "local")) return nullptr;
    Request request;
    return Py_XNewRef(request.rep(o));
}

PyMethodDef functions[] = {
    {"create_reference", create_reference, METH_VARARGS,
     PyDoc_STR("create_reference(type, root) -> a new reference whose misses go to root.handle_miss()")},
    {"destroy", destroy_reference, METH_O,
     PyDoc_STR("destroy($module, reference, /)\n--\n\n"
               "Destroy a Clustered Object: new calls raise `Destroyed`, calls that run finish.\n\n"
               "Its representatives and its root are released when every request that runs now has ended; allowed\n"
               "inside a call on the object itself.\n\n"
               "Returns True when they have been released already, False when running requests delay it.\n"
               "Raises `Destroyed` when the object was destroyed before, TypeError for anything but a reference.\n"
               "Section 2.2 of the paper.")},
    {"local", local, METH_O,
     PyDoc_STR("local($module, reference, /)\n--\n\n"
               "Return the representative that calls on this processor reach; a miss makes it.\n\n"
               "For use within the request that asks: another thread may have this processor later, and the\n"
               "representative is only this thread's until then.\n\n"
               "Raises `Destroyed` after `destroy`, TypeError for anything but a reference.\n"
               "Section 2.2 of the paper.")},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyObject* Anchor::hold(PyObject* rep) {
    {
        std::lock_guard guard(lock);
        if (std::find(reps.begin(), reps.end(), rep) == reps.end()) {
            reps.push_back(rep);
            return rep;
        }
    }
    Py_DECREF(rep);
    return rep;
}

PyObject* Request::miss(PyObject* reference, runtime::Coid coid) {
    auto* anchor = static_cast<Anchor*>(runtime::begin_miss(processor_, coid));
    if (!anchor) {
        set_destroyed(reference);
        return nullptr;
    }
    PyObject* rep = PyObject_CallMethod(anchor->root, "handle_miss", nullptr);
    if (!rep) return nullptr;
    if (rep == Py_None || is_reference(rep)) {
        PyErr_Format(PyExc_TypeError, "handle_miss() of a root of %s must return a representative, not %R",
                     Py_TYPE(reference)->tp_name, rep);
        Py_DECREF(rep);
        return nullptr;
    }
    rep = anchor->hold(rep);
    runtime::install(processor_, coid, rep);
    return rep;
}

void Request::settle() {
    SavedError saved;
    runtime::collect();
}

int add_reference(PyObject* module) {
    Ref errors = Ref::steal(PyImport_ImportModule("k42.errors"));
    if (!errors) return -1;
    destroyed_error = PyObject_GetAttrString(errors.get(), "Destroyed");
    if (!destroyed_error) return -1;
    reference_type = add_type(module, &spec);
    if (!reference_type || PyModule_AddFunctions(module, functions) < 0) return -1;
    if (add_method(module) < 0 || add_attribute(module) < 0 || add_native_rep(module) < 0) return -1;
    return add_processors(module);
}

}  // namespace k42::edge
