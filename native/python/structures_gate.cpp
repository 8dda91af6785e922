// k42._native.GateRep, the interface of native gates, and the gates of the core for k42.structures: SharedGate and
// DistributedGate are what roots hold; their join() makes the representatives, SharedGatePart and DistributedGatePart.
//
// A request that waits at a stopped gate waits in slices, each a request of the runtime of its own: so an object that
// is destroyed or swapped meanwhile is found so by the next one, and signals are handled between them.
#include <iterator>
#include <memory>
#include <new>
#include <string_view>

#include "alloc/allocator.hpp"
#include "native_rep.hpp"
#include "structures/gate.hpp"

namespace k42::edge {

namespace {

PyObject* gate_closed = nullptr;  // k42.errors.GateClosed

constexpr uint32_t kDeepest = 1u << 20;  // requests inside on one processor: far below what a count can hold
constexpr std::chrono::milliseconds kSlice{100};

// The representative of one processor. It keeps the gate alive.
struct SharedPart {
    using Gate = SharedGate;
    Ref owner;
    Gate& gate;
    Gate::Part part{gate};
};
struct DistributedPart {
    using Gate = DistributedGate;
    Ref owner;
    Gate& gate;
    Gate::Part& part;
};

PyObject* set_closed() {
    PyErr_SetString(gate_closed, "this gate has been shut down: it admits nobody any more");
    return nullptr;
}

PyObject* set_misused(const char* message) {
    PyErr_SetString(PyExc_RuntimeError, message);
    return nullptr;
}

// Patience::give_up: a signal's handler has raised.
bool interrupted() {
    Attached attached;
    return PyErr_CheckSignals() < 0;
}

// The one argument of stop, shutdown and stopped: timeout=None, in seconds. False: an exception is set.
bool to_patience(const char* function, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames, Patience& out) {
    out = {never, interrupted};
    const Py_ssize_t named = kwnames ? PyTuple_GET_SIZE(kwnames) : 0;
    if (nargs + named > 1) {
        PyErr_Format(PyExc_TypeError, "%s() takes at most 1 argument, not %zd", function, nargs + named);
        return false;
    }
    if (named && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(kwnames, 0), "timeout") != 0) {
        PyErr_Format(PyExc_TypeError, "%s() takes no argument %R", function, PyTuple_GET_ITEM(kwnames, 0));
        return false;
    }
    if (nargs + named == 0 || args[0] == Py_None) return true;
    const double seconds = PyFloat_AsDouble(args[0]);
    if (seconds == -1 && PyErr_Occurred()) return false;
    if (!(seconds >= 0)) {
        PyErr_Format(PyExc_ValueError, "timeout must be None or a number of seconds from 0 up, not %R", args[0]);
        return false;
    }
    if (seconds < 1e9)  // else for ever
        out.deadline = std::chrono::steady_clock::now() +
                       std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(seconds));
    return true;
}

// The interface.
struct Gate {
    static inline PyTypeObject* type = nullptr;
    static constexpr const char* names[] = {"enter", "try_enter", "leave", "stop", "restart", "shutdown", "inside"};
    enum : size_t { enter, try_enter, leave, stop, restart, shutdown, inside };
};

// What a representative's `enter` returns at the end of a slice: the address of nothing that Python knows.
char again_place;
PyObject* const again = reinterpret_cast<PyObject*>(&again_place);

// Its methods on a representative of type Rep.
template <typename Rep>
struct Methods {
    using G = typename Rep::Gate;
    using Entry = typename G::Entry;
    using Stop = typename G::Stop;

    static Rep& of(PyObject* self) { return NativeRep<Rep>::of(self); }

    static bool has_room(Rep& rep) {
        if (rep.part.inside() < kDeepest) [[likely]]
            return true;
        PyErr_SetString(PyExc_OverflowError,
                        "a million requests of this processor are inside the gate: each enter() needs a leave()");
        return false;
    }

    static PyObject* enter(PyObject* self, PyObject* const*, Py_ssize_t, PyObject*) {
        Rep& rep = of(self);
        if (!has_room(rep)) return nullptr;
        Entry entry = rep.part.try_enter();
        if (entry == Entry::entered) [[likely]]
            Py_RETURN_NONE;
        if (entry == Entry::stopped) {
            Detached detached;
            entry = rep.part.enter(std::chrono::steady_clock::now() + kSlice);
        }
        if (entry == Entry::rejected) return set_closed();
        return entry == Entry::entered ? Py_NewRef(Py_None) : again;
    }

    static PyObject* try_enter(PyObject* self, PyObject* const*, Py_ssize_t, PyObject*) {
        Rep& rep = of(self);
        if (!has_room(rep)) return nullptr;
        const Entry entry = rep.part.try_enter();
        return entry == Entry::rejected ? set_closed() : PyBool_FromLong(entry == Entry::entered);
    }

    static PyObject* leave(PyObject* self, PyObject* const*, Py_ssize_t, PyObject*) {
        if (!of(self).part.leave())
            return set_misused("leave() without enter() on this thread: who enters leaves, on the same thread");
        Py_RETURN_NONE;
    }

    static PyObject* stop(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
        Rep& rep = of(self);
        Patience patience;
        if (!to_patience("stop", args, nargs, kwnames, patience)) return nullptr;
        if (rep.part.inside())
            return set_misused("stop() from inside the gate would wait for its own caller: leave() first");
        Stop outcome;
        {
            Detached detached;
            outcome = rep.gate.stop(patience);
        }
        if (outcome == Stop::stopped) Py_RETURN_NONE;
        if (outcome == Stop::rejected) return set_closed();
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TimeoutError,
                            "the gate was not stopped in time, and is as before: requests are inside, or someone else "
                            "has stopped it");
        return nullptr;
    }

    static PyObject* restart(PyObject* self, PyObject* const*, Py_ssize_t, PyObject*) {
        G& gate = of(self).gate;
        if (gate.restart()) Py_RETURN_NONE;
        if (gate.state() == G::State::shutdown) return set_closed();
        return set_misused("restart() of a gate that is not stopped: stop() has to return first");
    }

    static PyObject* shutdown(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
        Rep& rep = of(self);
        Patience patience;
        if (!to_patience("shutdown", args, nargs, kwnames, patience)) return nullptr;
        if (rep.part.inside())
            return set_misused("shutdown() from inside the gate would wait for its own caller: leave() first");
        bool drained;
        {
            Detached detached;
            drained = rep.gate.shutdown(patience);
        }
        if (drained) Py_RETURN_NONE;
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_TimeoutError,
                         "the gate is shut, and %u requests were still inside at the end of the timeout: call "
                         "shutdown() again to wait for them",
                         rep.gate.inside());
        return nullptr;
    }

    static PyObject* inside(PyObject* self, PyObject* const*, Py_ssize_t, PyObject*) {
        return PyLong_FromUnsignedLong(of(self).gate.inside());
    }

    static constexpr NativeMethod table[] = {enter, try_enter, leave, stop, restart, shutdown, inside};
    static_assert(std::size(table) == std::size(Gate::names));
};

// The methods of the interface; `self` is a representative or a reference. Those without arguments are METH_NOARGS, the
// cheapest kind.

template <size_t method>
PyObject* plain(PyObject* self, PyObject*) {
    return on_rep<Gate, method>(self, nullptr, 0, nullptr);
}

// Returns None also in a with statement: a new reference to `self` would be one more count that threads share.
PyObject* enter(PyObject* self, PyObject*) {
    for (;;) {
        PyObject* result = on_rep<Gate, Gate::enter>(self, nullptr, 0, nullptr);
        if (result != again) [[likely]]
            return result;
        if (PyErr_CheckSignals() < 0) return nullptr;
    }
}

PyObject* leave_with(PyObject* self, PyObject* const*, Py_ssize_t) { return plain<Gate::leave>(self, nullptr); }

PyObject* stopped(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
    Patience checked;
    if (!to_patience("stopped", args, nargs, kwnames, checked)) return nullptr;
    Ref module = Ref::steal(PyImport_ImportModule("k42.structures.gate"));
    if (!module) return nullptr;
    PyObject* timeout = nargs || kwnames ? args[0] : Py_None;
    return PyObject_CallMethod(module.get(), "_Stopped", "OO", self, timeout);
}

PyMethodDef methods[] = {
    {"enter", enter, METH_NOARGS, PyDoc_STR("enter($self, /)\n--\n\nEnter; see k42.structures.Gate.")},
    {"__enter__", enter, METH_NOARGS, PyDoc_STR("__enter__($self, /)\n--\n\nEnter; see k42.structures.Gate.")},
    {"__exit__", fast(leave_with), METH_FASTCALL,
     PyDoc_STR("__exit__($self, /, *exc)\n--\n\nLeave; see k42.structures.Gate.")},
    {"try_enter", plain<Gate::try_enter>, METH_NOARGS,
     PyDoc_STR("try_enter($self, /)\n--\n\nEnter, or not; see k42.structures.Gate.")},
    {"leave", plain<Gate::leave>, METH_NOARGS, PyDoc_STR("leave($self, /)\n--\n\nLeave; see k42.structures.Gate.")},
    {"stop", native_function(on_rep<Gate, Gate::stop>), METH_FASTCALL | METH_KEYWORDS,
     PyDoc_STR("stop($self, /, timeout=None)\n--\n\nStop; see k42.structures.Gate.")},
    {"stopped", native_function(stopped), METH_FASTCALL | METH_KEYWORDS,
     PyDoc_STR("stopped($self, /, timeout=None)\n--\n\nStop within a block; see k42.structures.Gate.")},
    {"restart", plain<Gate::restart>, METH_NOARGS,
     PyDoc_STR("restart($self, /)\n--\n\nLet newcomers in again; see k42.structures.Gate.")},
    {"shutdown", native_function(on_rep<Gate, Gate::shutdown>), METH_FASTCALL | METH_KEYWORDS,
     PyDoc_STR("shutdown($self, /, timeout=None)\n--\n\nShut down; see k42.structures.Gate.")},
    {"inside", plain<Gate::inside>, METH_NOARGS,
     PyDoc_STR("inside($self, /)\n--\n\nReturn how many are inside; see k42.structures.Gate.")},
    {nullptr, nullptr, 0, nullptr},
};

// What a root holds.
template <typename Rep>
struct Whole {
    using G = typename Rep::Gate;
    using Owned = std::unique_ptr<G, alloc::Deleter>;  // Python's own memory is not aligned enough

    static G& of(PyObject* self) { return *Holder<Owned>::of(self); }

    static PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
        if (!unpack_new(type->tp_name, args, kwargs)) return nullptr;
        here();  // the allocator needs a processor, and Python's hold on it
        try {
            return Holder<Owned>::make(type, alloc::make<G, alloc::Kind::padded>());
        } catch (const std::bad_alloc&) {
            return PyErr_NoMemory();
        }
    }

    static PyObject* join(PyObject* self, PyObject*) {
        if constexpr (std::is_same_v<Rep, DistributedPart>) {
            typename G::Part* part;
            try {
                Detached detached;
                part = &of(self).join();
            } catch (const std::bad_alloc&) {
                return PyErr_NoMemory();
            }
            return NativeRep<Rep>::make(Methods<Rep>::table, Ref::borrow(self), of(self), *part);
        } else {
            return NativeRep<Rep>::make(Methods<Rep>::table, Ref::borrow(self), of(self));
        }
    }

    static PyObject* inside(PyObject* self, PyObject*) { return PyLong_FromUnsignedLong(of(self).inside()); }

    static PyObject* state(PyObject* self, PyObject*) {
        switch (of(self).state()) {
            case G::State::normal:
                return PyUnicode_FromString("normal");
            case G::State::shutdown:
                return PyUnicode_FromString("shutdown");
            default:
                return PyUnicode_FromString("stopped");
        }
    }

    // Nobody is inside a gate that has just been made: nothing waits.
    static PyObject* set_state(PyObject* self, PyObject* name) {
        const char* text = PyUnicode_AsUTF8(name);
        if (!text) return nullptr;
        const std::string_view state = text;
        if (state == "stopped") {
            of(self).stop({Deadline{}});
        } else if (state == "shutdown") {
            of(self).shutdown({Deadline{}});
        } else if (state != "normal") {
            return PyErr_Format(PyExc_ValueError, "%R is no state of a gate: normal, stopped, shutdown", name);
        }
        Py_RETURN_NONE;
    }

    static inline PyMethodDef table[] = {
        {"join", join, METH_NOARGS, PyDoc_STR("join($self, /)\n--\n\nReturn a new representative.")},
        {"inside", inside, METH_NOARGS, PyDoc_STR("inside($self, /)\n--\n\nReturn how many requests are inside.")},
        {"state", state, METH_NOARGS, PyDoc_STR("state($self, /)\n--\n\nReturn 'normal', 'stopped' or 'shutdown'.")},
        {"set_state", set_state, METH_O, PyDoc_STR("set_state($self, state, /)\n--\n\nOf a gate that is new.")},
        {nullptr, nullptr, 0, nullptr},
    };

    static bool add(PyObject* module, const char* name, const char* part_name) {
        PyType_Slot slots[] = {
            {Py_tp_dealloc, reinterpret_cast<void*>(Holder<Owned>::dealloc)},
            {Py_tp_methods, table},
            {Py_tp_doc, const_cast<char*>("The state of a gate, and who is inside.")},
            {Py_tp_new, reinterpret_cast<void*>(make)},
            {0, nullptr},
        };
        PyType_Spec spec = {name, sizeof(Holder<Owned>), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, slots};
        return add_type(module, &spec) && add_rep<Rep>(module, part_name, "One processor's way in.", Gate::type);
    }
};

}  // namespace

int add_gate(PyObject* module) {
    Ref errors = Ref::steal(PyImport_ImportModule("k42.errors"));
    if (!errors) return -1;
    gate_closed = PyObject_GetAttrString(errors.get(), "GateClosed");
    if (!gate_closed) return -1;
    Gate::type = add_interface(module, "k42._native.GateRep", "The interface of native gates.", methods);
    const bool added =
        Gate::type && Whole<SharedPart>::add(module, "k42._native.SharedGate", "k42._native.SharedGatePart") &&
        Whole<DistributedPart>::add(module, "k42._native.DistributedGate", "k42._native.DistributedGatePart");
    return added ? 0 : -1;
}

}  // namespace k42::edge
