// The reference to a Clustered Object: an immutable handle, of a type that is generated for each class.
//
// The type's attributes are the native descriptors of method.cpp and attribute.cpp; what is here is what all
// references have in common: identity, life, and the miss.
#include "reference.hpp"

#include <chrono>
#include <new>
#include <vector>

#include "anchor.hpp"
#include "freethreading.hpp"
#include "runtime/switch.hpp"

namespace k42::edge {

PyTypeObject* reference_type = nullptr;

namespace {

PyObject* error = nullptr;            // k42.errors.Error
PyObject* destroyed_error = nullptr;  // k42.errors.Destroyed
PyTypeObject* uninstalled_type = nullptr;
PyObject* watcher = nullptr;  // see watch(); set before there is anything to watch, and never changed while there is

// Representatives that were returned without being installed: theirs until the request ends that uses them.
thread_local std::vector<PyObject*> passing;

// What handle_miss() returns to have a representative used for one call and not installed.
struct Uninstalled {
    PyObject_HEAD PyObject* rep;
};

ReferenceObject* cast(PyObject* o) { return reinterpret_cast<ReferenceObject*>(o); }

// False: it was destroyed before.
bool destroy(ReferenceObject* self, bool* deferred) {
    here();  // destruction needs a processor, and Python's hold on it
    self->anchor = nullptr;
    return runtime::destroy(self->reference, {Anchor::release, Anchor::held}, deferred);
}

int traverse(PyObject* o, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(o));
    Anchor* anchor = cast(o)->anchor;
    return anchor ? anchor->traverse(visit, arg) : 0;
}

// What it refers to goes in finalize(), where it may still run code.
int clear(PyObject*) { return 0; }

// Nobody has the reference any more: nobody can destroy the object.
void finalize(PyObject* o) {
    if (!cast(o)->anchor) return;
    SavedError saved;
    bool deferred;
    destroy(cast(o), &deferred);
}

void dealloc(PyObject* o) {
    PyTypeObject* type = Py_TYPE(o);
    PyObject_GC_UnTrack(o);
    if (cast(o)->weakrefs) PyObject_ClearWeakRefs(o);
    finalize(o);
    type->tp_free(o);
    Py_DECREF(type);
}

// The class of the object's representatives now; where that cannot be told, what the reference type knows.
Ref class_now(PyObject* o, PyObject* otherwise) {
    if (cast(o)->reference.coid()) {
        Request request;
        if (Anchor* anchor = request.anchor(o)) {
            if (Ref now = Ref::steal(PyObject_GetAttrString(anchor->root().get(), "rep_class"))) return now;
        }
        PyErr_Clear();
    }
    return Ref::borrow(otherwise);
}

PyObject* repr(PyObject* o) {
    const auto coid = cast(o)->reference.coid();
    const Ref named = class_now(o, reinterpret_cast<PyObject*>(Py_TYPE(o)));
    const Ref module = Ref::steal(PyObject_GetAttrString(named.get(), "__module__"));
    const Ref name = module ? Ref::steal(PyObject_GetAttrString(named.get(), "__qualname__")) : Ref();
    if (!name) return nullptr;
    if (!coid) return PyUnicode_FromFormat("<reference to %S.%S, destroyed>", module.get(), name.get());
    return PyUnicode_FromFormat("<reference to %S.%S, %u>", module.get(), name.get(),
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
    {Py_tp_finalize, reinterpret_cast<void*>(finalize)},
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

// --- Uninstalled.

PyObject* uninstalled_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    static const char* names[] = {"rep", nullptr};
    PyObject* rep;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:uninstalled", const_cast<char**>(names), &rep)) return nullptr;
    PyObject* o = type->tp_alloc(type, 0);
    if (o) reinterpret_cast<Uninstalled*>(o)->rep = Py_NewRef(rep);
    return o;
}

void uninstalled_dealloc(PyObject* o) {
    PyTypeObject* type = Py_TYPE(o);
    Py_CLEAR(reinterpret_cast<Uninstalled*>(o)->rep);
    type->tp_free(o);
    Py_DECREF(type);
}

PyMemberDef uninstalled_members[] = {
    {"rep", T_OBJECT_EX, offsetof(Uninstalled, rep), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot uninstalled_slots[] = {
    {Py_tp_members, uninstalled_members},
    {Py_tp_doc, const_cast<char*>("uninstalled(rep)\n--\n\n"
                                  "What `handle_miss()` returns to have `rep` used for one call and not installed:\n"
                                  "the next call on the processor misses again. Section 2.2.1 of the paper.")},
    {Py_tp_new, reinterpret_cast<void*>(uninstalled_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(uninstalled_dealloc)},
    {0, nullptr},
};

PyType_Spec uninstalled_spec = {"k42._native.uninstalled", sizeof(Uninstalled), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, uninstalled_slots};

// --- Functions.

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
    cast(o)->creator = here().id;
    Anchor* anchor = nullptr;
    try {
        anchor = new Anchor(root);
        runtime::create(cast(o)->reference, anchor);
    } catch (const std::bad_alloc&) {
        delete anchor;
        Py_DECREF(o);
        return PyErr_NoMemory();
    }
    cast(o)->anchor = anchor;
    if (watcher) [[unlikely]] {
        if (!Ref::steal(PyObject_CallMethod(watcher, "created", "O", o))) {
            Py_DECREF(o);
            return nullptr;
        }
    }
    return o;
}

PyObject* destroy_reference(PyObject*, PyObject* o) {
    if (!check_reference(o, "destroy")) return nullptr;
    if (watcher && !Ref::steal(PyObject_CallMethod(watcher, "ending", "O", o))) return nullptr;
    Ref suspended;
    {
        Request request;
        const runtime::Miss miss = runtime::begin_miss(here(), cast(o)->reference.coid());
        suspended = miss.object ? static_cast<Anchor*>(miss.object)->names_of_holds() : Ref::steal(PyList_New(0));
        if (!suspended) return nullptr;
    }
    bool deferred;
    if (!destroy(cast(o), &deferred)) {
        set_destroyed(o);
        return nullptr;
    }
    if (!deferred || PyList_GET_SIZE(suspended.get()) == 0) return PyBool_FromLong(!deferred);
    Ref comma = Ref::steal(PyUnicode_FromString(", "));
    Ref names = comma ? Ref::steal(PyUnicode_Join(comma.get(), suspended.get())) : Ref();
    if (!names ||
        PyErr_WarnFormat(
            PyExc_RuntimeWarning, 1,
            "the release of this %s waits until its suspended generators or coroutines finish or are closed: %U",
            Py_TYPE(o)->tp_name, names.get()) < 0)
        return nullptr;
    Py_RETURN_FALSE;
}

PyObject* local(PyObject*, PyObject* o) {
    if (!check_reference(o, "local")) return nullptr;
    Request request;
    return Py_XNewRef(request.rep(o));
}

PyObject* root_of(PyObject*, PyObject* o) {
    if (!check_reference(o, "root_of")) return nullptr;
    Request request;
    Anchor* anchor = request.anchor(o);
    return anchor ? anchor->root().release() : nullptr;
}

PyObject* arbitrate(PyObject*, PyObject* args) {
    PyObject *o, *arbitration;
    int active;
    if (!PyArg_ParseTuple(args, "OOp:arbitrate", &o, &arbitration, &active) || !check_reference(o, "arbitrate"))
        return nullptr;
    Request request;
    Anchor* anchor = request.anchor(o);
    if (!anchor) return nullptr;
    anchor->arbitrate(arbitration, active);
    runtime::empty_everywhere(cast(o)->reference.coid());
    Py_RETURN_NONE;
}

PyObject* arbitration_of(PyObject*, PyObject* o) {
    if (!check_reference(o, "interpose")) return nullptr;
    Request request;
    Anchor* anchor = request.anchor(o);
    if (!anchor) return nullptr;
    Ref arbitration = anchor->arbitration();
    return arbitration ? arbitration.release() : Py_NewRef(Py_None);
}

// Never fails because of the object: isinstance() asks it of any reference.
PyObject* class_of(PyObject*, PyObject* args) {
    PyObject *o, *otherwise;
    if (!PyArg_ParseTuple(args, "OO:class_of", &o, &otherwise) || !check_reference(o, "class_of")) return nullptr;
    return class_now(o, otherwise).release();
}

PyObject* watch(PyObject*, PyObject* o) {
    Py_XSETREF(watcher, o == Py_None ? nullptr : Py_NewRef(o));
    Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"watch", watch, METH_O,
     PyDoc_STR("watch(watcher): from now on watcher.created(reference) is called when an object is made, before its\n"
               "root's __init__, and watcher.ending(reference) before it is destroyed; None: nobody. To be set while\n"
               "no other thread makes or destroys objects.")},
    {"arbitration_of", arbitration_of, METH_O,
     PyDoc_STR("arbitration_of(reference) -> the handler that `arbitrate` was given, or None")},
    {"class_of", class_of, METH_VARARGS,
     PyDoc_STR("class_of(reference, otherwise) -> the class of its representatives now; `otherwise` once destroyed")},
    {"create_reference", create_reference, METH_VARARGS,
     PyDoc_STR("create_reference(type, root) -> a new reference whose misses go to root.handle_miss()")},
    {"root_of", root_of, METH_O, PyDoc_STR("root_of(reference) -> the root of its object")},
    {"arbitrate", arbitrate, METH_VARARGS,
     PyDoc_STR(
         "arbitrate(reference, handler, active): from now on misses go to handler.handle_miss(), or to the root")},
    {"destroy", destroy_reference, METH_O,
     PyDoc_STR("destroy($module, reference, /)\n--\n\n"
               "Destroy a Clustered Object: new calls raise `Destroyed`, calls that run finish.\n\n"
               "Its representatives and its root are released when every request has ended that runs now on a\n"
               "processor that has used it; allowed inside a call on the object itself. A generator or coroutine\n"
               "of the object that is suspended is such a request, and a RuntimeWarning names it. A representative\n"
               "with a method `on_release` has it called once then, by the owner of the processor that used it\n"
               "first: between two of its calls or at its end, or by the next owner.\n\n"
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

void set_destroyed(PyObject* reference) {
    PyErr_Format(destroyed_error, "this %s has been destroyed: create a new one", Py_TYPE(reference)->tp_name);
}

bool check_reference(PyObject* o, const char* function) {
    if (is_reference(o)) return true;
    PyErr_Format(PyExc_TypeError, "%s() needs a reference, as create() returns it, not %.100s", function,
                 Py_TYPE(o)->tp_name);
    return false;
}

bool check_signals() {
    using Clock = std::chrono::steady_clock;
    thread_local Clock::time_point last;
    const auto now = Clock::now();
    if (now - last < std::chrono::milliseconds(20)) return true;
    last = now;
    Attached attached;
    return PyErr_CheckSignals() == 0;
}

Anchor* Request::anchor(PyObject* reference) {
    const runtime::Miss miss = runtime::begin_miss(processor_, cast(reference)->reference.coid());
    if (miss.outcome == runtime::Miss::Outcome::destroyed) set_destroyed(reference);
    return static_cast<Anchor*>(miss.object);
}

bool Request::await_switch(PyObject* reference) {
    runtime::Wait wait;
    {
        Detached detached;
        wait = runtime::await_switch(processor_, coid_, check_signals);
    }
    if (wait == runtime::Wait::circle) {
        PyErr_Format(error,
                     "this %s is being swapped, and the transfer of its state waits for this call: use self and "
                     "self.root there, not the reference",
                     Py_TYPE(reference)->tp_name);
    }
    return wait == runtime::Wait::over;
}

PyObject* Request::miss(PyObject* reference) {
    runtime::Miss miss;
    for (;;) {
        miss = runtime::begin_miss(processor_, coid_);
        if (miss.outcome == runtime::Miss::Outcome::destroyed) {
            set_destroyed(reference);
            return nullptr;
        }
        if (miss.outcome != runtime::Miss::Outcome::switching) break;
        if (!await_switch(reference)) return nullptr;
        coid_ = cast(reference)->reference.coid();
        if (void* rep = runtime::translate(processor_, coid_)) return static_cast<PyObject*>(rep);
    }
    auto* anchor = static_cast<Anchor*>(miss.object);
    if (processor_.id != cast(reference)->creator) share(reference);
    Ref handler = anchor->handler();
    PyObject* rep = PyObject_CallMethod(handler.get(), "handle_miss", nullptr);
    if (!rep) return nullptr;
    bool lasting = miss.outcome == runtime::Miss::Outcome::found;
    if (Py_TYPE(rep) == uninstalled_type) {
        PyObject* inner = Py_NewRef(reinterpret_cast<Uninstalled*>(rep)->rep);
        Py_DECREF(rep);
        rep = inner;
        lasting = false;
    }
    if (rep == Py_None || is_reference(rep)) {
        PyErr_Format(PyExc_TypeError, "handle_miss() of a root of %s must return a representative, not %R",
                     Py_TYPE(reference)->tp_name, rep);
        Py_DECREF(rep);
        return nullptr;
    }
    if (!lasting) {
        if (!passing.empty() && passing.back() == rep) {
            Py_DECREF(rep);
        } else {
            passing.push_back(rep);
        }
        processor_.watched.store(true, std::memory_order_relaxed);
        return rep;
    }
    rep = anchor->hold(rep, processor_.id);
    runtime::install(processor_, coid_, rep);
    // Who empties all entries after a change of the handler has seen ours, or we see the change.
    if (anchor->handler().get() != handler.get()) runtime::uninstall(processor_, coid_);
    return rep;
}

void Request::settle(runtime::Processor& p) {
    // A daemon thread whose stack the interpreter unwinds, at its own end: see `come_back`.
    if (!PyGILState_Check()) return;
    SavedError saved;
    if (p.depth == 0) {
        while (!passing.empty()) {
            PyObject* rep = passing.back();
            passing.pop_back();
            Py_DECREF(rep);
        }
    }
    runtime::collect();
}

int add_reference(PyObject* module) {
    Ref errors = Ref::steal(PyImport_ImportModule("k42.errors"));
    if (!errors) return -1;
    error = PyObject_GetAttrString(errors.get(), "Error");
    if (!error) return -1;
    destroyed_error = PyObject_GetAttrString(errors.get(), "Destroyed");
    if (!destroyed_error) return -1;
    reference_type = add_type(module, &spec);
    if (!reference_type) return -1;
    uninstalled_type = add_type(module, &uninstalled_spec);
    if (!uninstalled_type || PyModule_AddFunctions(module, functions) < 0) return -1;
    for (auto add : {add_method, add_attribute, add_native_rep, add_processors, add_request, add_switch}) {
        if (add(module) < 0) return -1;
    }
    return 0;
}

}  // namespace k42::edge
