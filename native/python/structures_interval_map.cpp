// k42._native.IntervalMapRep, the interface of native interval maps, and the maps of the core for k42.structures:
// SharedIntervalMap and ReplicatedIntervalMap are what roots hold; their join() makes the representatives,
// SharedIntervalMapRep and IntervalReplica.
//
// The values are objects of Python. A map has one reference to each; a look-up counts another one for its caller, after
// it has let go of the map's lock, or without ever taking it. So the map's own reference to what was removed is
// released only when no look-up can be about to do that: what runs here is a request of the runtime, also where a
// representative is called directly.
//
// All of it runs attached to the interpreter. The lock is held for a walk through a tree, never over a call into
// Python; and the garbage collector, which stops all threads that are attached, finds no map half changed.
#include <iterator>
#include <new>
#include <optional>
#include <vector>

#include "freethreading.hpp"
#include "native_rep.hpp"
#include "runtime/quiescence.hpp"
#include "runtime/retire.hpp"
#include "structures/interval_map.hpp"

namespace k42::edge {

namespace {

PyTypeObject* interval_type = nullptr;  // k42.structures.Interval

using Interval = k42::Interval<PyObject*>;
using Shared = SharedIntervalMap<PyObject*>;
using Replicated = ReplicatedIntervalMap<PyObject*>;

// runtime::retire: no look-up can find the value any more.
void release(void* value) {
    if (!Py_IsInitialized()) return;  // the interpreter is gone, and its objects with it
    Attached attached;
    Py_DECREF(static_cast<PyObject*>(value));
}

// Releases the map's reference to a value that was removed: at once, unless other threads are within calls.
void let_go(PyObject* value) {
    try {
        runtime::Mark mark = runtime::Mark::take();
        mark.forget(here());  // this thread is in no look-up
        if (!mark.elapsed()) return runtime::retire(value, release);
    } catch (const std::bad_alloc&) {
        return;  // better kept for ever than freed too early
    }
    Py_DECREF(value);
}

// Takes the interval's reference to its value over.
PyObject* to_python(const Interval& interval) {
    Ref value = Ref::steal(interval.value);
    Ref start = Ref::steal(PyLong_FromUnsignedLongLong(interval.start));
    Ref end = Ref::steal(PyLong_FromUnsignedLongLong(interval.end));
    PyObject* tuple = start && end ? PyStructSequence_New(interval_type) : nullptr;
    if (!tuple) return nullptr;
    PyStructSequence_SetItem(tuple, 0, start.release());
    PyStructSequence_SetItem(tuple, 1, end.release());
    PyStructSequence_SetItem(tuple, 2, value.release());
    return tuple;
}

// 1: a key. 0: an integer that can be none. -1: an exception is set.
int to_key(PyObject* o, uint64_t& key) {
    Ref number = Ref::steal(PyNumber_Index(o));
    if (!number) return -1;
    key = PyLong_AsUnsignedLongLong(number.get());
    if (key != UINT64_MAX || !PyErr_Occurred()) [[likely]]
        return 1;
    if (!PyErr_ExceptionMatches(PyExc_OverflowError)) return -1;
    PyErr_Clear();
    return 0;
}

// False: an exception is set.
bool to_bound(PyObject* o, const char* name, uint64_t& bound) {
    const int is_key = to_key(o, bound);
    if (is_key == 0) PyErr_Format(PyExc_OverflowError, "%s must be from 0 to 2**64 - 1, not %R", name, o);
    return is_key > 0;
}

// False: an exception is set, and nothing has changed.
template <typename Map>
bool insert_into(Map& map, PyObject* const* args, Py_ssize_t nargs) {
    PyObject *first, *last, *value;
    uint64_t start, end;
    if (!unpack("insert", args, nargs, first, last, value)) return false;
    if (!to_bound(first, "start", start) || !to_bound(last, "end", end)) return false;
    if (start >= end) {
        PyErr_Format(PyExc_ValueError, "[%llu, %llu) is empty: start must be less than end", start, end);
        return false;
    }
    Interval overlapped{};
    Py_INCREF(value);
    try {
        if (map.insert(start, end, value, &overlapped)) return true;
        PyErr_Format(PyExc_ValueError, "[%llu, %llu) overlaps [%llu, %llu), which is there: remove that first", start,
                     end, overlapped.start, overlapped.end);
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    }
    Py_DECREF(value);
    return false;
}

// A list of all intervals at one moment. Within a request.
template <typename Map>
PyObject* list_of(const Map& map) {
    std::vector<Interval> all;
    try {
        all = map.snapshot();
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
    for (const Interval& interval : all) Py_INCREF(interval.value);  // first of all: what is below may run anything
    Ref list = Ref::steal(PyList_New(Py_ssize_t(all.size())));
    for (size_t i = 0; i < all.size(); ++i) {
        PyObject* tuple = list ? to_python(all[i]) : nullptr;
        if (tuple) {
            PyList_SET_ITEM(list.get(), Py_ssize_t(i), tuple);
        } else if (list) {
            list = Ref();
        } else {
            Py_DECREF(all[i].value);
        }
    }
    return list.release();
}

// The interface.
struct Interface {
    static inline PyTypeObject* type = nullptr;
    static constexpr const char* names[] = {"insert",  "find",         "remove",  "__getitem__",
                                            "__len__", "__contains__", "__iter__"};
    enum : size_t { insert, find, remove, getitem, len, contains, iter };
};

// A representative. It keeps the map alive.
template <typename Map_, typename Reader>
struct Rep {
    using Map = Map_;
    Ref owner;
    Map& map;
    Reader& reader;                       // the map itself, or a replica
    const runtime::Processor* processor;  // whose replica it is; nullptr: anyone's
};
using SharedRep = Rep<Shared, Shared>;
using Replica = Rep<Replicated, Replicated::Replica>;

// Its methods on a representative of type R. Arguments have been counted.
template <typename R>
struct Methods {
    static R& of(PyObject* self) { return NativeRep<R>::of(self); }

    // 1: found, and the value counted for the caller, if it wants it. 0: no. -1: an exception is set.
    template <bool wants_value = true>
    static int look_up(PyObject* self, PyObject* o, Interval& found) {
        uint64_t key;
        if (const int is_key = to_key(o, key); is_key <= 0) return is_key;
        R& rep = of(self);
        Request request;
        if (rep.processor && rep.processor != &here()) [[unlikely]] {
            PyErr_SetString(PyExc_RuntimeError,
                            "this representative belongs to another processor: call the reference instead");
            return -1;
        }
        try {
            const std::optional<Interval> interval = rep.reader.lookup(key);
            if (!interval) return 0;
            found = *interval;
        } catch (const std::bad_alloc&) {
            PyErr_NoMemory();
            return -1;
        }
        if constexpr (wants_value) Py_INCREF(found.value);
        return 1;
    }

    static PyObject* insert(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject*) {
        if (!insert_into(of(self).map, args, nargs)) return nullptr;
        Py_RETURN_NONE;
    }

    static PyObject* find(PyObject* self, PyObject* const* args, Py_ssize_t, PyObject*) {
        Interval found;
        const int is_there = look_up(self, args[0], found);
        if (is_there > 0) return to_python(found);
        return is_there < 0 ? nullptr : Py_NewRef(Py_None);
    }

    static PyObject* getitem(PyObject* self, PyObject* const* args, Py_ssize_t, PyObject*) {
        Interval found;
        const int is_there = look_up(self, args[0], found);
        if (is_there > 0) return found.value;
        if (is_there == 0) PyErr_SetObject(PyExc_KeyError, args[0]);
        return nullptr;
    }

    static PyObject* contains(PyObject* self, PyObject* const* args, Py_ssize_t, PyObject*) {
        Interval found;
        const int is_there = look_up<false>(self, args[0], found);
        return is_there < 0 ? nullptr : PyBool_FromLong(is_there);
    }

    static PyObject* remove(PyObject* self, PyObject* const* args, Py_ssize_t, PyObject*) {
        uint64_t start;
        const int is_key = to_key(args[0], start);
        if (is_key < 0) return nullptr;
        const std::optional<PyObject*> value = is_key ? of(self).map.remove(start) : std::nullopt;
        if (!value) {
            PyErr_SetObject(PyExc_KeyError, args[0]);
            return nullptr;
        }
        Py_INCREF(*value);
        let_go(*value);
        return *value;
    }

    static PyObject* len(PyObject* self, PyObject* const*, Py_ssize_t, PyObject*) {
        return PyLong_FromSize_t(of(self).map.size());
    }

    static PyObject* iter(PyObject* self, PyObject* const*, Py_ssize_t, PyObject*) {
        Request request;
        Ref list = Ref::steal(list_of(of(self).map));
        return list ? PyObject_GetIter(list.get()) : nullptr;
    }

    static constexpr NativeMethod table[] = {insert, find, remove, getitem, len, contains, iter};
    static_assert(std::size(table) == std::size(Interface::names));
};

// The methods of the interface, by name and as slots; `self` is a representative or a reference.

template <size_t method>
PyObject* with_none(PyObject* self, PyObject*) {
    return on_rep<Interface, method>(self, nullptr, 0, nullptr);
}

template <size_t method>
PyObject* with_one(PyObject* self, PyObject* argument) {
    return on_rep<Interface, method>(self, &argument, 1, nullptr);
}

PyObject* insert(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    return on_rep<Interface, Interface::insert>(self, args, nargs, nullptr);
}

Py_ssize_t slot_len(PyObject* self) {
    Ref size = Ref::steal(with_none<Interface::len>(self, nullptr));
    return size ? PyLong_AsSsize_t(size.get()) : -1;
}

int slot_contains(PyObject* self, PyObject* key) {
    Ref found = Ref::steal(with_one<Interface::contains>(self, key));
    return found ? PyObject_IsTrue(found.get()) : -1;
}

PyObject* slot_iter(PyObject* self) { return with_none<Interface::iter>(self, nullptr); }

void set_slots(PyHeapTypeObject* type) {
    type->as_mapping.mp_subscript = with_one<Interface::getitem>;
    type->as_mapping.mp_length = type->as_sequence.sq_length = slot_len;
    type->as_sequence.sq_contains = slot_contains;
    type->ht_type.tp_iter = slot_iter;
}

PyMethodDef methods[] = {
    {"insert", fast(insert), METH_FASTCALL,
     PyDoc_STR("insert($self, start, end, value, /)\n--\n\nAdd an interval; see k42.structures.IntervalMap.")},
    {"find", with_one<Interface::find>, METH_O,
     PyDoc_STR("find($self, key, /)\n--\n\nReturn the interval around a key; see k42.structures.IntervalMap.")},
    {"remove", with_one<Interface::remove>, METH_O,
     PyDoc_STR("remove($self, start, /)\n--\n\nRemove an interval; see k42.structures.IntervalMap.")},
    {"__getitem__", with_one<Interface::getitem>, METH_O,
     PyDoc_STR("__getitem__($self, key, /)\n--\n\nReturn the value around a key; see k42.structures.IntervalMap.")},
    {"__len__", with_none<Interface::len>, METH_NOARGS,
     PyDoc_STR("__len__($self, /)\n--\n\nReturn how many intervals there are; see k42.structures.IntervalMap.")},
    {"__contains__", with_one<Interface::contains>, METH_O,
     PyDoc_STR("__contains__($self, key, /)\n--\n\nSee k42.structures.IntervalMap.")},
    {"__iter__", with_none<Interface::iter>, METH_NOARGS,
     PyDoc_STR("__iter__($self, /)\n--\n\nIterate over the intervals; see k42.structures.IntervalMap.")},
    {nullptr, nullptr, 0, nullptr},
};

// What a root holds, and its type and that of its representatives. Both are known to the garbage collector: values may
// refer to the map.
template <typename R>
struct Whole {
    using Map = typename R::Map;

    static Map& of(PyObject* self) { return Holder<Map>::of(self); }

    static PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
        return unpack_new(type->tp_name, args, kwargs) ? Holder<Map>::make(type) : nullptr;
    }

    static PyObject* join(PyObject* self, PyObject*) {
        Map& map = of(self);
        if constexpr (std::is_same_v<R, Replica>) {
            const runtime::Processor& processor = here();
            try {
                return NativeRep<R>::make(Methods<R>::table, Ref::borrow(self), map, map.join(), &processor);
            } catch (const std::bad_alloc&) {
                return PyErr_NoMemory();
            }
        } else {
            return NativeRep<R>::make(Methods<R>::table, Ref::borrow(self), map, map, nullptr);
        }
    }

    static PyObject* insert(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
        if (!insert_into(of(self), args, nargs)) return nullptr;
        Py_RETURN_NONE;
    }

    static PyObject* intervals(PyObject* self, PyObject*) {
        Request request;
        return list_of(of(self));
    }

    static int traverse(PyObject* self, visitproc visit, void* arg) {
        Py_VISIT(Py_TYPE(self));
        return of(self).visit([&](const Interval& interval) { return visit(interval.value, arg); });
    }

    // Nobody has a reference to the object any more.
    static int clear(PyObject* self) {
        Map& map = of(self);
        uint64_t start;
        while (map.visit([&](const Interval& first) { return start = first.start, 1; })) Py_DECREF(*map.remove(start));
        return 0;
    }

    static void dealloc(PyObject* self) {
        PyObject_GC_UnTrack(self);
        clear(self);
        Holder<Map>::dealloc(self);
    }

    static int traverse_rep(PyObject* self, visitproc visit, void* arg) {
        Py_VISIT(Py_TYPE(self));
        Py_VISIT(NativeRep<R>::of(self).owner.get());
        return 0;
    }

    static void dealloc_rep(PyObject* self) {
        PyObject_GC_UnTrack(self);
        NativeRep<R>::dealloc(self);
    }

    static inline PyMethodDef table[] = {
        {"join", join, METH_NOARGS, PyDoc_STR("join($self, /)\n--\n\nReturn a new representative.")},
        {"insert", fast(insert), METH_FASTCALL,
         PyDoc_STR("insert($self, start, end, value, /)\n--\n\nAdd an interval.")},
        {"intervals", intervals, METH_NOARGS, PyDoc_STR("intervals($self, /)\n--\n\nReturn a list of all.")},
        {nullptr, nullptr, 0, nullptr},
    };

    static bool add(PyObject* module, const char* name, const char* rep_name) {
        constexpr unsigned flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE;
        PyType_Slot slots[] = {
            {Py_tp_new, reinterpret_cast<void*>(make)},
            {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
            {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
            {Py_tp_clear, reinterpret_cast<void*>(clear)},
            {Py_tp_methods, table},
            {Py_tp_doc, const_cast<char*>("All intervals of a map.")},
            {0, nullptr},
        };
        PyType_Slot rep_slots[] = {
            {Py_tp_dealloc, reinterpret_cast<void*>(dealloc_rep)},
            {Py_tp_traverse, reinterpret_cast<void*>(traverse_rep)},
            {Py_tp_doc, const_cast<char*>("A processor's way to a map.")},
            {0, nullptr},
        };
        PyType_Spec spec = {name, sizeof(Holder<Map>), 0, flags, slots};
        PyType_Spec rep_spec = {rep_name, sizeof(NativeRep<R>), 0, flags | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                rep_slots};
        return add_type(module, &spec) && (NativeRep<R>::type = add_type(module, &rep_spec, Interface::type));
    }
};

PyStructSequence_Field fields[] = {
    {"start", "the first key"},
    {"end", "the first key after it"},
    {"value", "what the keys lead to"},
    {nullptr, nullptr},
};
PyStructSequence_Desc description = {"k42.structures.Interval", "An interval of keys, and its value.", fields, 3};

}  // namespace

int add_interval_map(PyObject* module) {
    interval_type = PyStructSequence_NewType(&description);
    if (!interval_type || PyModule_AddType(module, interval_type) < 0) return -1;
    share_forever(reinterpret_cast<PyObject*>(interval_type));  // every look-up makes an instance
    Interface::type = add_interface(module, "k42._native.IntervalMapRep", "The interface of native interval maps.",
                                    methods, set_slots);
    if (!Interface::type) return -1;
    set_slots(reinterpret_cast<PyHeapTypeObject*>(Interface::type));  // representatives inherit them
    const bool added =
        Whole<SharedRep>::add(module, "k42._native.SharedIntervalMap", "k42._native.SharedIntervalMapRep") &&
        Whole<Replica>::add(module, "k42._native.ReplicatedIntervalMap", "k42._native.IntervalReplica");
    return added ? 0 : -1;
}

}  // namespace k42::edge
