// k42._native.MapRep, the interface of native maps, and MapTable: the shared state of a map, which a root holds and
// which makes the representatives (structures/map.hpp says what they do).
//
// A representative has a local table (`join`), or goes to the master alone (`whole`). Whatever reads a local table is
// a request, also where the representative is called directly, and only its owner's: others go to the master.
#include <iterator>

#include "map_policy.hpp"
#include "native_rep.hpp"

namespace k42::edge {

PyObject* map_circle_error = nullptr;

namespace {

using Status = PythonMap::Status;
using Result = PythonMap::Result;

// What `use` returns; MemoryError for std::bad_alloc.
template <typename Use>
auto guarded(Use&& use) noexcept -> decltype(use()) {
    try {
        return use();
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
        return {};
    }
}

PyObject* set_key_error(PyObject* key) {
    // Not PyErr_SetObject(KeyError, key): it takes a tuple for the arguments.
    Ref error = Ref::steal(PyObject_CallOneArg(PyExc_KeyError, key));
    if (error) PyErr_SetObject(PyExc_KeyError, error.get());
    return nullptr;
}

using Args = PyObject* const*;

// The arguments by position, the last ones also by name; those after `least` may be missing, and are then null.
bool sort_arguments(const char* function, Args args, Py_ssize_t nargs, PyObject* kwnames, Py_ssize_t least,
                    Py_ssize_t most, const char* const* names, PyObject** out) {
    const Py_ssize_t named = kwnames ? PyTuple_GET_SIZE(kwnames) : 0;
    if (nargs + named < least || nargs + named > most) {
        if (least == most) {
            PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, not %zd", function, most, nargs + named);
        } else {
            PyErr_Format(PyExc_TypeError, "%s() takes from %zd to %zd arguments, not %zd", function, least, most,
                         nargs + named);
        }
        return false;
    }
    for (Py_ssize_t i = 0; i < most; ++i) out[i] = i < nargs ? args[i] : nullptr;
    for (Py_ssize_t i = 0; i < named; ++i) {
        PyObject* name = PyTuple_GET_ITEM(kwnames, i);
        Py_ssize_t at = nargs;
        while (at < most && !(names[at] && PyUnicode_CompareWithASCIIString(name, names[at]) == 0)) ++at;
        if (at == most || out[at]) {
            PyErr_Format(PyExc_TypeError, "%s() takes no argument %R here", function, name);
            return false;
        }
        out[at] = args[nargs + i];
    }
    for (Py_ssize_t i = 0; i < least; ++i) {
        if (out[i]) continue;
        PyErr_Format(PyExc_TypeError, "%s() needs %zd arguments by position", function, least);
        return false;
    }
    return true;
}

template <size_t most>
bool take(const char* function, Args args, Py_ssize_t nargs, PyObject* kwnames, Py_ssize_t least,
          const char* const (&names)[most], PyObject* (&out)[most]) {
    if (nargs != most || kwnames)
        return sort_arguments(function, args, nargs, kwnames, least, Py_ssize_t{most}, names, out);
    for (size_t i = 0; i < most; ++i) out[i] = args[i];
    return true;
}

bool takes_none(const char* function, Py_ssize_t nargs, PyObject* kwnames) {
    if (nargs == 0 && !kwnames) return true;
    PyErr_Format(PyExc_TypeError, "%s() takes no arguments", function);
    return false;
}

// An iteration over snapshots of the partitions, one after the other.

enum class Kind { keys, values, items };

struct Iteration {
    Ref table;
    PythonMap* map;
    Kind kind;
    std::mutex lock{};  // protects the rest; before the partitions' locks
    size_t partition = 0;
    std::vector<std::pair<PyObject*, PyObject*>> rest{};  // of the partition before `partition`

    // A pair, whose references the caller takes over; nulls at the end.
    std::pair<PyObject*, PyObject*> next() {
        Held held(lock);
        while (rest.empty()) {
            if (partition == map->partitions()) return {};
            map->snapshot(
                partition++, [&](size_t n) { rest.reserve(n); },
                [&](PyObject* key, void* value) { rest.emplace_back(key, MapPolicy::object(value)); });
        }
        auto pair = rest.back();
        rest.pop_back();
        return pair;
    }
};

PyTypeObject* iterator_type = nullptr;

PyObject* make_iterator(PyObject* table, PythonMap& map, Kind kind) {
    PyObject* self = iterator_type->tp_alloc(iterator_type, 0);
    if (self) new (&Holder<Iteration>::of(self)) Iteration{Ref::borrow(table), &map, kind};
    return self;
}

PyObject* iterator_next(PyObject* self) {
    Iteration& iteration = Holder<Iteration>::of(self);
    return guarded([&]() -> PyObject* {
        auto pair = iteration.next();
        if (!pair.first) return nullptr;
        Ref key = Ref::steal(pair.first), value = Ref::steal(pair.second);
        if (iteration.kind == Kind::keys) return key.release();
        if (iteration.kind == Kind::values) return value.release();
        return PyTuple_Pack(2, key.get(), value.get());
    });
}

int iterator_traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const Iteration& iteration = Holder<Iteration>::of(self);
    Py_VISIT(iteration.table.get());
    for (auto& [key, value] : iteration.rest) {
        Py_VISIT(key);
        Py_VISIT(value);
    }
    return 0;
}

int iterator_clear(PyObject* self) {
    auto rest = std::exchange(Holder<Iteration>::of(self).rest, {});
    for (auto& [key, value] : rest) {
        Py_DECREF(key);
        Py_DECREF(value);
    }
    return 0;
}

void iterator_dealloc(PyObject* self) {
    PyObject_GC_UnTrack(self);
    iterator_clear(self);
    Holder<Iteration>::dealloc(self);
}

// The representative.

struct Rep {
    Ref table;
    PythonMap* map;
    PythonMap::Local* own;  // of the processor that it was made for; or nullptr

    int traverse(visitproc visit, void* arg) const {
        Py_VISIT(table.get());
        return 0;
    }
    PythonMap::Local* local() const { return own && own->processor() == here().id ? own : nullptr; }
};

Rep& rep(PyObject* self) { return NativeRep<Rep>::of(self); }

struct Interface {
    static inline PyTypeObject* type = nullptr;
    static constexpr const char* names[] = {"get",     "__getitem__", "__setitem__", "__delitem__", "__contains__",
                                            "__len__", "__iter__",    "pop",         "setdefault",  "find_or_allocate",
                                            "popitem", "clear",       "empty",       "gather",      "scatter",
                                            "_values", "_items"};
};
enum Method : size_t { get, getitem, setitem, delitem, contains, len, iter };

// A method of a representative that looks for a key: use(rep, probe), within a request.
template <typename Use>
PyObject* with_key(PyObject* self, PyObject* key, Use&& use) {
    Request request;
    return guarded([&]() -> PyObject* {
        Probe probe(key);
        return probe.prepare() ? use(rep(self), probe) : nullptr;
    });
}

PyObject* found_value(Result result, PyObject* otherwise) {
    if (result.status == Status::found) [[likely]]
        return MapPolicy::object(result.value);
    return result.status == Status::failed ? nullptr : Py_XNewRef(otherwise);
}

PyObject* rep_get(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    PyObject* in[2];
    if (!take("get", args, nargs, kwnames, 1, {nullptr, "default"}, in)) return nullptr;
    return with_key(self, in[0], [&](Rep& r, Probe& probe) {
        return found_value(r.map->get(r.local(), probe), in[1] ? in[1] : Py_None);
    });
}

PyObject* rep_getitem(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    PyObject* in[1];
    if (!take("__getitem__", args, nargs, kwnames, 1, {nullptr}, in)) return nullptr;
    return with_key(self, in[0], [&](Rep& r, Probe& probe) {
        const Result result = r.map->get(r.local(), probe);
        return result.status == Status::absent ? set_key_error(in[0]) : found_value(result, nullptr);
    });
}

PyObject* rep_setitem(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    PyObject* in[2];
    if (!take("__setitem__", args, nargs, kwnames, 2, {nullptr, nullptr}, in)) return nullptr;
    return with_key(self, in[0], [&](Rep& r, Probe& probe) -> PyObject* {
        if (r.map->set(probe, Py_NewRef(in[1])) == Status::failed) return nullptr;
        Py_RETURN_NONE;
    });
}

PyObject* rep_delitem(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    PyObject* in[1];
    if (!take("__delitem__", args, nargs, kwnames, 1, {nullptr}, in)) return nullptr;
    return with_key(self, in[0], [&](Rep& r, Probe& probe) -> PyObject* {
        const Result result = r.map->remove(probe);
        if (result.status == Status::failed) return nullptr;
        if (result.status == Status::absent) return set_key_error(in[0]);
        Py_DECREF(MapPolicy::object(result.value));
        Py_RETURN_NONE;
    });
}

PyObject* rep_contains(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    PyObject* in[1];
    if (!take("__contains__", args, nargs, kwnames, 1, {nullptr}, in)) return nullptr;
    return with_key(self, in[0], [&](Rep& r, Probe& probe) -> PyObject* {
        const Result result = r.map->get(r.local(), probe);
        if (result.status == Status::failed) return nullptr;
        if (result.value) Py_DECREF(MapPolicy::object(result.value));
        return PyBool_FromLong(result.status == Status::found);
    });
}

PyObject* rep_len(PyObject* self, Args, Py_ssize_t nargs, PyObject* kwnames) {
    if (!takes_none("__len__", nargs, kwnames)) return nullptr;
    return PyLong_FromSize_t(rep(self).map->size());
}

template <Kind kind>
PyObject* rep_iter(PyObject* self, Args, Py_ssize_t nargs, PyObject* kwnames) {
    if (!takes_none("__iter__", nargs, kwnames)) return nullptr;
    return make_iterator(rep(self).table.get(), *rep(self).map, kind);
}

PyObject* rep_pop(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    PyObject* in[2];
    if (!take("pop", args, nargs, kwnames, 1, {nullptr, "default"}, in)) return nullptr;
    return with_key(self, in[0], [&](Rep& r, Probe& probe) {
        const Result result = r.map->remove(probe);
        return result.status == Status::absent && !in[1] ? set_key_error(in[0]) : found_value(result, in[1]);
    });
}

PyObject* rep_setdefault(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    PyObject* in[2];
    if (!take("setdefault", args, nargs, kwnames, 1, {nullptr, "default"}, in)) return nullptr;
    return with_key(self, in[0], [&](Rep& r, Probe& probe) {
        const Result result = r.map->set_default(r.local(), probe, in[1] ? in[1] : Py_None);
        return result.status == Status::failed ? nullptr : MapPolicy::object(result.value);
    });
}

PyObject* rep_find_or_allocate(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    PyObject* in[2];
    if (!take("find_or_allocate", args, nargs, kwnames, 2, {nullptr, "factory"}, in)) return nullptr;
    return with_key(self, in[0], [&](Rep& r, Probe& probe) -> PyObject* {
        const Result result =
            r.map->find_or_make(r.local(), probe, [&]() -> void* { return PyObject_CallNoArgs(in[1]); });
        if (result.status == Status::failed) return nullptr;
        Ref value = Ref::steal(MapPolicy::object(result.value));
        return PyTuple_Pack(2, value.get(), result.status == Status::made ? Py_True : Py_False);
    });
}

PyObject* rep_popitem(PyObject* self, Args, Py_ssize_t nargs, PyObject* kwnames) {
    if (!takes_none("popitem", nargs, kwnames)) return nullptr;
    Request request;
    return guarded([&]() -> PyObject* {
        auto entry = rep(self).map->remove_any(here().id);
        if (!entry) {
            PyErr_SetString(PyExc_KeyError, "popitem(): the map is empty");
            return nullptr;
        }
        Ref key = Ref::steal(entry->key), value = Ref::steal(MapPolicy::object(entry->value));
        return PyTuple_Pack(2, key.get(), value.get());
    });
}

PyObject* rep_empty(PyObject* self, Args, Py_ssize_t nargs, PyObject* kwnames) {
    if (!takes_none("empty", nargs, kwnames)) return nullptr;
    Request request;
    return guarded([&]() -> PyObject* {
        rep(self).map->empty();
        Py_RETURN_NONE;
    });
}

PyObject* rep_gather(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    PyObject* in[1];
    if (!take("gather", args, nargs, kwnames, 1, {"key"}, in)) return nullptr;
    return with_key(self, in[0], [&](Rep& r, Probe& probe) -> PyObject* {
        std::vector<std::pair<Ref, uint32_t>> values;
        const Status status = r.map->gather(
            probe, [&](void* value, uint32_t p) { values.emplace_back(Ref::steal(MapPolicy::object(value)), p); });
        if (status == Status::failed) return nullptr;
        if (status == Status::absent) return set_key_error(in[0]);
        Ref replicas = Ref::steal(PyDict_New());
        for (auto value = values.begin() + 1; replicas && value != values.end(); ++value) {
            Ref processor = Ref::steal(PyLong_FromUnsignedLong(value->second));
            if (!processor || PyDict_SetItem(replicas.get(), processor.get(), value->first.get()) < 0) return nullptr;
        }
        return replicas ? PyTuple_Pack(2, values.front().first.get(), replicas.get()) : nullptr;
    });
}

PyObject* rep_scatter(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    PyObject* in[2];
    if (!take("scatter", args, nargs, kwnames, 2, {nullptr, "fn"}, in)) return nullptr;
    return with_key(self, in[0], [&](Rep& r, Probe& probe) -> PyObject* {
        for (;;) {
            const Result before = r.map->get(nullptr, probe);  // the master's own value
            if (before.status == Status::absent) return set_key_error(in[0]);
            if (before.status == Status::failed) return nullptr;
            Ref old = Ref::steal(MapPolicy::object(before.value));
            Ref value = Ref::steal(PyObject_CallOneArg(in[1], old.get()));
            if (!value) return nullptr;
            const Status status = r.map->replace(probe, old.get(), value.get());
            if (status == Status::failed) return nullptr;
            if (status == Status::found) return value.release();
        }
    });
}

constexpr NativeMethod table[] = {
    rep_get,
    rep_getitem,
    rep_setitem,
    rep_delitem,
    rep_contains,
    rep_len,
    rep_iter<Kind::keys>,
    rep_pop,
    rep_setdefault,
    rep_find_or_allocate,
    rep_popitem,
    rep_empty,
    rep_empty,
    rep_gather,
    rep_scatter,
    rep_iter<Kind::values>,
    rep_iter<Kind::items>,
};
static_assert(std::size(table) == std::size(Interface::names));

template <size_t method>
PyMethodDef entry(const char* doc) {
    return {Interface::names[method], native_function(on_rep<Interface, method>), METH_FASTCALL | METH_KEYWORDS, doc};
}

// What collections.abc does well enough, with the reference itself as self: views know the map by its reference, which
// any thread may use, and which follows a swap.
PyObject* mixins[4] = {};

template <size_t mixin>
PyObject* by_mixin(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    const size_t named = kwnames ? static_cast<size_t>(PyTuple_GET_SIZE(kwnames)) : 0;
    return guarded([&]() -> PyObject* {
        std::vector<PyObject*> all{self};
        all.insert(all.end(), args, args + static_cast<size_t>(nargs) + named);
        return PyObject_Vectorcall(mixins[mixin], all.data(), static_cast<size_t>(nargs) + 1, kwnames);
    });
}

template <size_t mixin>
PyMethodDef mixed_in(const char* name, const char* doc) {
    return {name, native_function(by_mixin<mixin>), METH_FASTCALL | METH_KEYWORDS, doc};
}

PyMethodDef methods[] = {
    entry<0>(PyDoc_STR("get($self, key, default=None, /)\n--\n\nReturn the value of a key, or the default.")),
    entry<1>(PyDoc_STR("__getitem__($self, key, /)\n--\n\nReturn the value of a key.")),
    entry<2>(PyDoc_STR("__setitem__($self, key, value, /)\n--\n\nSet the value of a key.")),
    entry<3>(PyDoc_STR("__delitem__($self, key, /)\n--\n\nRemove a key.")),
    entry<4>(PyDoc_STR("__contains__($self, key, /)\n--\n\nWhether there is such a key.")),
    entry<5>(PyDoc_STR("__len__($self, /)\n--\n\nThe number of keys.")),
    entry<6>(PyDoc_STR("__iter__($self, /)\n--\n\nIterate over the keys.")),
    entry<7>(PyDoc_STR("pop($self, key, default=<unset>, /)\n--\n\nRemove a key and return its value.")),
    entry<8>(PyDoc_STR("setdefault($self, key, default=None, /)\n--\n\nReturn the value, set if there was none.")),
    entry<9>(PyDoc_STR("find_or_allocate($self, key, factory, /)\n--\n\nSee k42.structures.Map.")),
    entry<10>(PyDoc_STR("popitem($self, /)\n--\n\nRemove any key and return it with its value.")),
    entry<11>(PyDoc_STR("clear($self, /)\n--\n\nThe same as empty().")),
    entry<12>(PyDoc_STR("empty($self, /)\n--\n\nRemove all keys in one step.")),
    entry<13>(PyDoc_STR("gather($self, key, /)\n--\n\nSee k42.structures.Map.")),
    entry<14>(PyDoc_STR("scatter($self, key, fn, /)\n--\n\nSee k42.structures.Map.")),
    entry<15>(PyDoc_STR("_values($self, /)\n--\n\nIterate over the values.")),
    entry<16>(PyDoc_STR("_items($self, /)\n--\n\nIterate over keys and values.")),
    mixed_in<0>("keys", PyDoc_STR("keys($self, /)\n--\n\nReturn a view of the keys.")),
    mixed_in<1>("values", PyDoc_STR("values($self, /)\n--\n\nReturn a view of the values.")),
    mixed_in<2>("items", PyDoc_STR("items($self, /)\n--\n\nReturn a view of keys and values.")),
    mixed_in<3>("update", PyDoc_STR("update($self, other=(), /, **kwds)\n--\n\nSet many keys, one after the other.")),
    {nullptr, nullptr, 0, nullptr},
};

// Slots, of references and of representatives alike.

PyObject* slot_subscript(PyObject* self, PyObject* key) { return on_rep<Interface, getitem>(self, &key, 1, nullptr); }

int slot_ass_subscript(PyObject* self, PyObject* key, PyObject* value) {
    PyObject* args[] = {key, value};
    Ref done = Ref::steal(value ? on_rep<Interface, setitem>(self, args, 2, nullptr)
                                : on_rep<Interface, delitem>(self, args, 1, nullptr));
    return done ? 0 : -1;
}

Py_ssize_t slot_length(PyObject* self) {
    Ref length = Ref::steal(on_rep<Interface, len>(self, nullptr, 0, nullptr));
    return length ? PyLong_AsSsize_t(length.get()) : -1;
}

int slot_contains(PyObject* self, PyObject* key) {
    Ref there = Ref::steal(on_rep<Interface, contains>(self, &key, 1, nullptr));
    return there ? PyObject_IsTrue(there.get()) : -1;
}

PyObject* slot_iter(PyObject* self) { return on_rep<Interface, iter>(self, nullptr, 0, nullptr); }

void set_slots(PyHeapTypeObject* type) {
    type->as_mapping.mp_subscript = slot_subscript;
    type->as_mapping.mp_ass_subscript = slot_ass_subscript;
    type->as_mapping.mp_length = slot_length;
    type->as_sequence.sq_length = slot_length;
    type->as_sequence.sq_contains = slot_contains;
    type->ht_type.tp_iter = slot_iter;
}

PyType_Slot rep_slots[] = {
    {Py_tp_doc, const_cast<char*>("What one processor has of a map, or all of them.")},
    {Py_tp_dealloc, reinterpret_cast<void*>(NativeRep<Rep>::dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(NativeRep<Rep>::traverse)},
    {Py_mp_subscript, reinterpret_cast<void*>(slot_subscript)},
    {Py_mp_ass_subscript, reinterpret_cast<void*>(slot_ass_subscript)},
    {Py_mp_length, reinterpret_cast<void*>(slot_length)},
    {Py_sq_contains, reinterpret_cast<void*>(slot_contains)},
    {Py_tp_iter, reinterpret_cast<void*>(slot_iter)},
    {0, nullptr},
};
PyType_Spec rep_spec = {
    "k42._native.NativeMap", sizeof(NativeRep<Rep>), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION, rep_slots};

PyType_Slot iterator_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(iterator_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(iterator_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(iterator_clear)},
    {Py_tp_iter, reinterpret_cast<void*>(PyObject_SelfIter)},
    {Py_tp_iternext, reinterpret_cast<void*>(iterator_next)},
    {0, nullptr},
};
PyType_Spec iterator_spec = {
    "k42._native.MapIterator", sizeof(Holder<Iteration>), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    iterator_slots};

// MapTable

using Table = Holder<PythonMap>;

PyObject* make_table(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    uint64_t partitions;
    bool copying;
    if (!unpack_new("MapTable", args, kwargs, partitions, copying)) return nullptr;
    if (!std::has_single_bit(partitions) || partitions > UINT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "partitions must be a power of two");
        return nullptr;
    }
    return Table::make(type, static_cast<size_t>(partitions), MapPolicy{copying});
}

PyObject* make_rep(PyObject* self, PythonMap::Local* local) {
    return NativeRep<Rep>::make(table, Ref::borrow(self), &Table::of(self), local);
}

PyObject* table_join(PyObject* self, PyObject*) {
    here();
    return guarded([&] { return make_rep(self, &Table::of(self).join()); });
}
PyObject* table_whole(PyObject* self, PyObject*) { return make_rep(self, nullptr); }
PyObject* table_items(PyObject* self, PyObject*) { return make_iterator(self, Table::of(self), Kind::items); }

PyMethodDef table_methods[] = {
    {"join", table_join, METH_NOARGS,
     PyDoc_STR("join($self, /)\n--\n\nReturn a representative with a local table, for the calling processor.")},
    {"whole", table_whole, METH_NOARGS, PyDoc_STR("whole($self, /)\n--\n\nReturn a representative without replicas.")},
    {"items", table_items, METH_NOARGS, PyDoc_STR("items($self, /)\n--\n\nIterate over keys and values.")},
    {nullptr, nullptr, 0, nullptr},
};

int table_traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    int result = 0;
    const auto see = [&](const void* object) {
        if (result == 0) result = visit(MapPolicy::object(object), arg);
    };
    Table::of(self).each_user(see, see);
    return result;
}

int table_clear(PyObject* self) {
    here();
    SavedError saved;
    guarded([&] {
        Table::of(self).dismantle();
        return 0;
    });
    PyErr_Clear();
    return 0;
}

void table_dealloc(PyObject* self) {
    PyObject_GC_UnTrack(self);
    table_clear(self);
    Table::dealloc(self);
}

PyType_Slot table_slots[] = {
    {Py_tp_doc, const_cast<char*>("MapTable(partitions, copies, /): the master of a map, and its local tables.")},
    {Py_tp_new, reinterpret_cast<void*>(make_table)},
    {Py_tp_dealloc, reinterpret_cast<void*>(table_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(table_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(table_clear)},
    {Py_tp_methods, table_methods},
    {0, nullptr},
};
PyType_Spec table_spec = {"k42._native.MapTable", sizeof(Table), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE, table_slots};

PyObject* map_mixins(PyObject*, PyObject* args) {
    PyObject* given[std::size(mixins)];
    if (!PyArg_ParseTuple(args, "OOOO:map_mixins", &given[0], &given[1], &given[2], &given[3])) return nullptr;
    for (size_t i = 0; i < std::size(mixins); ++i) Py_XSETREF(mixins[i], Py_NewRef(given[i]));
    Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"map_mixins", map_mixins, METH_VARARGS,
     PyDoc_STR("map_mixins(keys, values, items, update): what these methods of maps call, with the map")},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_map(PyObject* module) {
    Ref errors = Ref::steal(PyImport_ImportModule("k42.errors"));
    if (!errors) return -1;
    map_circle_error = PyObject_GetAttrString(errors.get(), "Error");
    if (!map_circle_error || PyModule_AddFunctions(module, functions) < 0) return -1;
    Interface::type = add_interface(module, "k42._native.MapRep", "The interface of native maps.", methods, set_slots);
    if (!Interface::type) return -1;
    NativeRep<Rep>::type = add_type(module, &rep_spec, Interface::type);
    iterator_type = add_type(module, &iterator_spec);
    return NativeRep<Rep>::type && iterator_type && add_type(module, &table_spec) ? 0 : -1;
}

}  // namespace k42::edge
