// k42._native.Switch: the moments in which a live object has no caller, for k42.swap().
#include "runtime/switch.hpp"

#include "anchor.hpp"
#include "arguments.hpp"

namespace k42::edge {

namespace {

struct State {
    runtime::Switch core;
    Ref reference;
    Anchor::Left left;  // once the object has another root
    bool quiet = false;

    void end() {
        quiet = false;
        core.end();
        if (left.root) Anchor::end(std::move(left));
    }
};

using SwitchObject = Holder<State>;

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    PyObject* reference;
    if (!unpack_new("Switch", args, kwargs, reference) || !check_reference(reference, "swap")) return nullptr;
    PyObject* self = SwitchObject::make(type);
    if (self) SwitchObject::of(self).reference = Ref::borrow(reference);
    return self;
}

PyObject* begin(PyObject* self, PyObject* timeout) {
    State& state = SwitchObject::of(self);
    const double seconds = PyFloat_AsDouble(timeout);
    if (seconds == -1 && PyErr_Occurred()) return nullptr;
    if (state.quiet) {
        PyErr_SetString(PyExc_RuntimeError, "this switch has begun already");
        return nullptr;
    }
    here();
    using Outcome = runtime::Switch::Outcome;
    Outcome outcome;
    {
        Detached detached;
        const auto limit = std::chrono::duration<double>(std::min(seconds, 1e9));
        outcome =
            state.core.begin(reinterpret_cast<ReferenceObject*>(state.reference.get())->reference,
                             std::chrono::duration_cast<std::chrono::nanoseconds>(limit), Anchor::held, check_signals);
    }
    switch (outcome) {
        case Outcome::quiet:
            state.quiet = true;
            return PyUnicode_FromString("quiet");
        case Outcome::destroyed:
            set_destroyed(state.reference.get());
            return nullptr;
        case Outcome::interrupted:
            return nullptr;  // check_signals has set what a handler raised
        case Outcome::in_request:
            return PyUnicode_FromString("in request");
        case Outcome::busy:
            return PyUnicode_FromString("busy");
        default:
            return PyUnicode_FromString("timeout");
    }
}

bool check_quiet(const State& state) {
    if (!state.quiet) PyErr_SetString(PyExc_RuntimeError, "this switch has not begun, or has ended");
    return state.quiet;
}

PyObject* root(PyObject* self, PyObject*) {
    State& state = SwitchObject::of(self);
    if (!check_quiet(state)) return nullptr;
    return static_cast<Anchor*>(state.core.object())->root().release();
}

PyObject* replace(PyObject* self, PyObject* new_root) {
    State& state = SwitchObject::of(self);
    if (!check_quiet(state)) return nullptr;
    state.left = static_cast<Anchor*>(state.core.object())->replace_root(new_root);
    Py_RETURN_NONE;
}

PyObject* keep(PyObject* self, PyObject* args) {
    State& state = SwitchObject::of(self);
    PyObject *new_root, *kept;
    if (!check_quiet(state) || !PyArg_ParseTuple(args, "OO:keep", &new_root, &kept) || !check_reference(kept, "keep"))
        return nullptr;
    auto* anchor = static_cast<Anchor*>(state.core.object());
    Request request;
    Anchor* heir = request.anchor(kept);
    // First what can fail.
    if (!heir || PyObject_SetAttrString(anchor->root().get(), "ref", kept) < 0) return nullptr;
    heir->inherit(anchor->replace_root(new_root));
    Py_RETURN_NONE;
}

PyObject* end(PyObject* self, PyObject*) {
    State& state = SwitchObject::of(self);
    if (!check_quiet(state)) return nullptr;
    state.end();
    Py_RETURN_NONE;
}

PyObject* enter(PyObject* self, PyObject*) {
    State& state = SwitchObject::of(self);
    if (!check_quiet(state)) return nullptr;
    here();
    state.core.add_worker();
    Py_RETURN_NONE;
}

PyObject* exit(PyObject* self, PyObject*) {
    SwitchObject::of(self).core.remove_worker();
    Py_RETURN_NONE;
}

PyObject* end_root(PyObject*, PyObject* root) {
    Anchor::end({Ref::borrow(root), {}});
    Py_RETURN_NONE;
}

PyObject* suspended(PyObject*, PyObject* o) {
    if (!check_reference(o, "suspended")) return nullptr;
    Request request;
    Anchor* anchor = request.anchor(o);
    return anchor ? anchor->names_of_holds().release() : nullptr;
}

void dealloc(PyObject* self) {
    State& state = SwitchObject::of(self);
    if (state.quiet) state.end();
    SwitchObject::dealloc(self);
}

PyMethodDef methods[] = {
    {"begin", begin, METH_O,
     PyDoc_STR("begin($self, timeout, /)\n--\n\nWait until nobody is inside; 'quiet', or why not after `timeout` s.")},
    {"root", root, METH_NOARGS, PyDoc_STR("root($self, /)\n--\n\nThe object's root.")},
    {"replace", replace, METH_O,
     PyDoc_STR("replace($self, root, /)\n--\n\nGive it another; the old one is released after the end.")},
    {"keep", keep, METH_VARARGS,
     PyDoc_STR("keep($self, root, reference, /)\n--\n\n"
               "Give it another; `reference`, which was made for the old one, gets that with its representatives.")},
    {"__enter__", enter, METH_NOARGS,
     PyDoc_STR("The calling thread works on the transfer: it cannot call the object.")},
    {"__exit__", exit, METH_VARARGS, nullptr},
    {"end", end, METH_NOARGS, PyDoc_STR("end($self, /)\n--\n\nLet the calls go on.")},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_doc, const_cast<char*>("The moments in which a live object has no caller.")},
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_methods, methods},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {0, nullptr},
};

PyType_Spec spec = {"k42._native.Switch", sizeof(SwitchObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                    slots};

PyMethodDef functions[] = {
    {"end_root", end_root, METH_O,
     PyDoc_STR("end_root(root): the root and its representatives are not used any more; their hooks run")},
    {"suspended", suspended, METH_O,
     PyDoc_STR("suspended(reference) -> the names of its generators and coroutines that have not ended")},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_switch(PyObject* module) { return add_type(module, &spec) ? PyModule_AddFunctions(module, functions) : -1; }

}  // namespace k42::edge
