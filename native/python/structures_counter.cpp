// k42._native.CounterRep, the interface of native counters, and the counters of the core for k42.structures:
// SharedCount, AtomicCount, PackedCount and PaddedCount.
//
// The first two are the one representative of their object. The others are the shared state that a root holds;
// their join() makes the representatives, PackedPart and PaddedPart. A call on a reference touches nothing of the
// interpreter that threads share.
#include <iterator>
#include <new>

#include "native_rep.hpp"
#include "structures/counter.hpp"

namespace k42::edge {

namespace {

// The representative of one processor. It keeps the count alive that its part belongs to.
template <typename Count>
struct Part {
    Ref owner;
    Count* count;
    typename Count::Part* part;
};

// What representatives do. Where one can wait it detaches from the interpreter first.

bool add(SharedCount& count, int64_t k) {
    if (auto added = count.try_add(k)) return *added;
    Detached detached;
    return count.add(k);
}
bool add(AtomicCount& count, int64_t k) { return count.add(k); }
template <typename Count>
bool add(Part<Count>& rep, int64_t k) {
    return rep.part->add(k);
}

std::optional<int64_t> value(SharedCount& count) {
    Detached detached;
    return count.value();
}
std::optional<int64_t> value(AtomicCount& count) { return count.value(); }
template <typename Count>
std::optional<int64_t> value(Part<Count>& rep) {
    return rep.count->value();
}

template <typename Count>
std::optional<int64_t> approximate(Count& count) {
    return count.approximate();
}
template <typename Count>
std::optional<int64_t> approximate(Part<Count>& rep) {
    return rep.count->approximate();
}

// False: an exception is set.
bool to_int64(PyObject* o, const char* name, int64_t& out) {
    if (!PyLong_Check(o) || PyBool_Check(o)) [[unlikely]] {
        PyErr_Format(PyExc_TypeError, "%s must be an int, not %.100s", name, Py_TYPE(o)->tp_name);
        return false;
    }
    int overflow;
    out = PyLong_AsLongLongAndOverflow(o, &overflow);
    if (!overflow) [[likely]]
        return true;
    PyErr_Format(PyExc_OverflowError, "%s must fit 64 bits with a sign", name);
    return false;
}

// The one argument of add(k=1).
bool to_k(PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames, int64_t& k) {
    const Py_ssize_t named = kwnames ? PyTuple_GET_SIZE(kwnames) : 0;
    if (nargs + named == 0) {
        k = 1;
        return true;
    }
    if (nargs + named > 1) {
        PyErr_Format(PyExc_TypeError, "add() takes at most 1 argument, not %zd", nargs + named);
        return false;
    }
    if (named && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(kwnames, 0), "k") != 0) {
        PyErr_Format(PyExc_TypeError, "add() takes no argument %R", PyTuple_GET_ITEM(kwnames, 0));
        return false;
    }
    return to_int64(args[0], "k", k);
}

bool takes_none(const char* function, Py_ssize_t nargs, PyObject* kwnames) {
    if (nargs == 0 && !kwnames) return true;
    PyErr_Format(PyExc_TypeError, "%s() takes no arguments", function);
    return false;
}

PyObject* result(std::optional<int64_t> count) {
    if (count) return PyLong_FromLongLong(*count);
    PyErr_SetString(PyExc_OverflowError, "the count does not fit 64 bits with a sign");
    return nullptr;
}

PyObject* set_full() {
    PyErr_SetString(PyExc_OverflowError, "the count would not fit 64 bits with a sign; nothing was added");
    return nullptr;
}

// The interface.
struct Counter {
    static inline PyTypeObject* type = nullptr;
    static constexpr const char* names[] = {"add", "value", "approximate"};
};

// Its methods on a representative of type Rep.
template <typename Rep>
struct Methods {
    static Rep& of(PyObject* self) { return NativeRep<Rep>::of(self); }

    static PyObject* add(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
        int64_t k;
        if (!to_k(args, nargs, kwnames, k)) return nullptr;
        if (!edge::add(of(self), k)) return set_full();
        Py_RETURN_NONE;
    }

    static PyObject* value(PyObject* self, PyObject* const*, Py_ssize_t nargs, PyObject* kwnames) {
        return takes_none("value", nargs, kwnames) ? result(edge::value(of(self))) : nullptr;
    }

    static PyObject* approximate(PyObject* self, PyObject* const*, Py_ssize_t nargs, PyObject* kwnames) {
        return takes_none("approximate", nargs, kwnames) ? result(edge::approximate(of(self))) : nullptr;
    }

    static constexpr NativeMethod table[] = {add, value, approximate};
    static_assert(std::size(table) == std::size(Counter::names));
};

template <size_t method>
PyMethodDef entry(const char* doc) {
    return {Counter::names[method], native_function(on_rep<Counter, method>), METH_FASTCALL | METH_KEYWORDS, doc};
}

PyMethodDef methods[] = {
    entry<0>(PyDoc_STR("add($self, /, k=1)\n--\n\nCount `k` more; see k42.structures.Counter.")),
    entry<1>(PyDoc_STR("value($self, /)\n--\n\nReturn the count; see k42.structures.Counter.")),
    entry<2>(PyDoc_STR("approximate($self, /)\n--\n\nReturn about the count; see k42.structures.Counter.")),
    {nullptr, nullptr, 0, nullptr},
};

bool to_start(PyTypeObject* type, PyObject* args, PyObject* kwargs, int64_t& start) {
    PyObject* number;
    return unpack_new(type->tp_name, args, kwargs, number) && to_int64(number, "start", start);
}

// A count that is the representative of all processors.
template <typename Count>
PyObject* make_whole(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    int64_t start;
    if (!to_start(type, args, kwargs, start)) return nullptr;
    return NativeRep<Count>::make(Methods<Count>::table, start);
}

// A count whose parts are the representatives.
template <typename Count>
PyObject* make_parts(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    int64_t start;
    if (!to_start(type, args, kwargs, start)) return nullptr;
    return Holder<Count>::make(type, start);
}

template <typename Count>
PyObject* join(PyObject* self, PyObject*) {
    Count& count = Holder<Count>::of(self);
    typename Count::Part* part;
    try {
        Detached detached;
        part = &count.join();
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
    return NativeRep<Part<Count>>::make(Methods<Part<Count>>::table, Ref::borrow(self), &count, part);
}

template <typename Count>
PyObject* parts_value(PyObject* self, PyObject*) {
    return result(Holder<Count>::of(self).value());
}

template <typename Count>
PyMethodDef parts_methods[] = {
    {"join", join<Count>, METH_NOARGS, PyDoc_STR("join($self, /)\n--\n\nReturn a new representative, which counts 0.")},
    {"value", parts_value<Count>, METH_NOARGS, PyDoc_STR("value($self, /)\n--\n\nReturn the start and all parts.")},
    {nullptr, nullptr, 0, nullptr},
};

template <typename Count>
bool add_whole(PyObject* module, const char* name) {
    return add_rep<Count>(module, name, "A count that all processors share.", Counter::type, make_whole<Count>);
}

template <typename Count>
bool add_parts(PyObject* module, const char* name, const char* part_name) {
    PyType_Slot slots[] = {
        {Py_tp_dealloc, reinterpret_cast<void*>(Holder<Count>::dealloc)},
        {Py_tp_methods, parts_methods<Count>},
        {Py_tp_doc, const_cast<char*>("The start of a count, and its parts.")},
        {Py_tp_new, reinterpret_cast<void*>(make_parts<Count>)},
        {0, nullptr},
    };
    PyType_Spec spec = {name, sizeof(Holder<Count>), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, slots};
    return add_type(module, &spec) &&
           add_rep<Part<Count>>(module, part_name, "What one processor has counted.", Counter::type);
}

}  // namespace

int add_counter(PyObject* module) {
    Counter::type = add_interface(module, "k42._native.CounterRep", "The interface of native counters.", methods);
    const bool added = Counter::type && add_whole<SharedCount>(module, "k42._native.SharedCount") &&
                       add_whole<AtomicCount>(module, "k42._native.AtomicCount") &&
                       add_parts<PackedCount>(module, "k42._native.PackedCount", "k42._native.PackedPart") &&
                       add_parts<PaddedCount>(module, "k42._native.PaddedCount", "k42._native.PaddedPart");
    return added ? 0 : -1;
}

}  // namespace k42::edge
