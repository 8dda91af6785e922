// Requests that span calls: k42.request(), and the hold of a generator or coroutine on its object.
#include "anchor.hpp"

namespace k42::edge {

namespace {

// --- request()

struct ScopeObject {
    PyObject_HEAD runtime::Processor* processor;  // while it is entered
};

PyTypeObject* scope_type = nullptr;

void end_request(runtime::Processor& p) {
    if (runtime::leave(p)) Request::settle(p);
}

PyObject* scope_enter(PyObject* o, PyObject*) {
    auto* self = reinterpret_cast<ScopeObject*>(o);
    if (self->processor) {
        PyErr_SetString(PyExc_RuntimeError, "this request has begun already: call k42.request() for each");
        return nullptr;
    }
    self->processor = &here();
    runtime::enter(*self->processor);
    return Py_NewRef(o);
}

PyObject* scope_exit(PyObject* o, PyObject*) {
    auto* self = reinterpret_cast<ScopeObject*>(o);
    if (!self->processor || self->processor != runtime::current_or_null()) {
        PyErr_SetString(PyExc_RuntimeError, "a request ends on the thread that began it");
        return nullptr;
    }
    end_request(*std::exchange(self->processor, nullptr));
    Py_RETURN_NONE;
}

void scope_dealloc(PyObject* o) {
    PyTypeObject* type = Py_TYPE(o);
    // Entered by hand and dropped: on its own thread it ends here; else with the thread.
    auto* self = reinterpret_cast<ScopeObject*>(o);
    if (self->processor && self->processor == runtime::current_or_null()) end_request(*self->processor);
    type->tp_free(o);
    Py_DECREF(type);
}

PyMethodDef scope_methods[] = {
    {"__enter__", scope_enter, METH_NOARGS, nullptr},
    {"__exit__", scope_exit, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot scope_slots[] = {
    {Py_tp_doc, const_cast<char*>("A request that spans calls.")},
    {Py_tp_methods, scope_methods},
    {Py_tp_dealloc, reinterpret_cast<void*>(scope_dealloc)},
    {0, nullptr},
};

PyType_Spec scope_spec = {"k42._native.RequestScope", sizeof(ScopeObject), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
                          scope_slots};

PyObject* request(PyObject*, PyObject*) { return scope_type->tp_alloc(scope_type, 0); }

// --- Hold

PyTypeObject* hold_type = nullptr;

Hold* cast(PyObject* o) { return reinterpret_cast<Hold*>(o); }

void end(Hold* hold) {
    Anchor* anchor = std::exchange(hold->anchor, nullptr);
    if (!anchor) return;
    anchor->remove(*hold);
    runtime::collect();  // a destruction may have waited for us
}

PyObject* hold_end(PyObject* o, PyObject*) {
    end(cast(o));
    Py_RETURN_NONE;
}

PyObject* hold_enter(PyObject*, PyObject*) {
    runtime::enter(here());
    Py_RETURN_NONE;
}

PyObject* hold_exit(PyObject*, PyObject*) {
    end_request(here());
    Py_RETURN_NONE;
}

int hold_traverse(PyObject* o, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(o));
    Py_VISIT(cast(o)->reference);
    return 0;
}

int hold_clear(PyObject* o) {
    end(cast(o));
    Py_CLEAR(cast(o)->reference);
    return 0;
}

void hold_dealloc(PyObject* o) {
    PyTypeObject* type = Py_TYPE(o);
    PyObject_GC_UnTrack(o);
    hold_clear(o);
    Py_CLEAR(cast(o)->name);
    type->tp_free(o);
    Py_DECREF(type);
}

PyMethodDef hold_methods[] = {
    {"end", hold_end, METH_NOARGS, PyDoc_STR("end($self, /)\n--\n\nThe generator or coroutine has ended.")},
    {"__enter__", hold_enter, METH_NOARGS, PyDoc_STR("It goes on: a request begins on the calling thread.")},
    {"__exit__", hold_exit, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyMemberDef hold_members[] = {
    {"reference", T_OBJECT_EX, offsetof(Hold, reference), READONLY, nullptr},
    {"name", T_OBJECT_EX, offsetof(Hold, name), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot hold_slots[] = {
    {Py_tp_doc, const_cast<char*>("The hold of a generator or coroutine on the object whose method it is.")},
    {Py_tp_methods, hold_methods},
    {Py_tp_members, hold_members},
    {Py_tp_traverse, reinterpret_cast<void*>(hold_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(hold_clear)},
    {Py_tp_dealloc, reinterpret_cast<void*>(hold_dealloc)},
    {0, nullptr},
};

PyType_Spec hold_spec = {
    "k42._native.Hold", sizeof(Hold), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE, hold_slots};

PyMethodDef functions[] = {
    {"request", request, METH_NOARGS,
     PyDoc_STR("request($module, /)\n--\n\n"
               "Return a context manager whose body is one request on the calling thread.\n\n"
               "Calls within it are part of that request: a representative that `k42.local(ref)` returned stays the\n"
               "calling thread's own, and valid, until its end; and destructions and swaps wait for it. Its body\n"
               "stays on its thread, and should be short: no await, no yield.\n\n"
               "Raises RuntimeError at the end when another thread ends it. Section 2.2 of the paper.")},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyObject* make_hold(Request& request, PyObject* reference, PyObject* name) {
    Anchor* anchor = request.anchor_of_rep();
    PyObject* o = hold_type->tp_alloc(hold_type, 0);
    if (!o) return nullptr;
    cast(o)->reference = Py_NewRef(reference);
    cast(o)->name = Py_NewRef(name);
    cast(o)->anchor = anchor;
    anchor->add(*cast(o));
    return o;
}

int add_request(PyObject* module) {
    scope_type = add_type(module, &scope_spec);
    hold_type = add_type(module, &hold_spec);
    return scope_type && hold_type ? PyModule_AddFunctions(module, functions) : -1;
}

}  // namespace k42::edge
