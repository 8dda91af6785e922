// k42._native.PoolRep, the interface of native pools, and the pools of the core for k42.structures: SharedPool and
// DistributedPool.
//
// Each is the state that a root holds: the items, which it keeps alive, the factory, and the pool of the core. Its
// join() makes the representatives: one for all of a SharedPool, one for each processor of a DistributedPool. No lock
// is held while Python code runs. Who waits for an item does so outside of requests: it holds up nobody who destroys
// or swaps the pool, and asks again when that has happened.
#include <algorithm>
#include <chrono>
#include <iterator>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>

#include "freethreading.hpp"
#include "native_rep.hpp"
#include "structures/pool.hpp"
#include "structures/roster.hpp"

namespace k42::edge {

namespace {

using Root = PoolRoot<Member*>;
using Shared = k42::SharedPool<Member*>;
using Distributed = k42::DistributedPool<Member*>;

PyObject* exhausted_error = nullptr;  // k42.errors.PoolExhausted
PyTypeObject* counts_type = nullptr;
PyTypeObject* lease_type = nullptr;
PyObject *take_name = nullptr, *give_back_name = nullptr;

// The interface.
struct Pool {
    static inline PyTypeObject* type = nullptr;
    static constexpr const char* names[] = {"take", "give_back", "free", "size", "stat"};
};

// What a root holds.
template <typename Core>
struct PoolObject {
    PyObject_HEAD Core core;
    Roster roster;      // has a reference to each of its members
    PyObject* factory;  // or nullptr
    uint64_t capacity;  // as asked for; the core has 0 when there is no factory

    static PoolObject& of(PyObject* self) { return *reinterpret_cast<PoolObject*>(self); }

    // nullptr: it is a member already, or an exception is set.
    Member* insert(PyObject* item, bool free) {
        try {
            Member* member = roster.insert(item, free);
            if (member) Py_INCREF(item);
            return member;
        } catch (const std::bad_alloc&) {
            PyErr_NoMemory();
            return nullptr;
        }
    }
};

// A representative. It keeps the pool alive.
template <typename Core>
struct Part {
    Ref owner;
    PoolObject<Core>* pool;
    typename Core::Part* part;
    const runtime::Processor* processor;  // which alone may use the part; nullptr: all

    int traverse(visitproc visit, void* arg) const {
        Py_VISIT(owner.get());
        return 0;
    }
};

// Somebody who waits, and the pool at which it does.
struct Ticket {
    Ref owner;
    Root* root = nullptr;
    Root::Waiter waiter;
};

// Taking

PyObject* taken(Member* member) {
    member->set_taken();
    return Py_NewRef(static_cast<PyObject*>(member->object));
}

// The core granted the right to make an item.
template <typename Core>
PyObject* make_item(PoolObject<Core>& pool) {
    Ref item = Ref::steal(PyObject_CallNoArgs(pool.factory));
    if (item && pool.insert(item.get(), false)) {
        Detached detached;
        pool.core.made();
    } else {
        if (item && !PyErr_Occurred())
            PyErr_Format(PyExc_ValueError,
                         "the factory returned %R, which the pool has already: it must make new items", item.get());
        item = {};
        SavedError saved;
        Detached detached;
        pool.core.unmade();
    }
    return item.release();
}

template <typename Core>
PyObject* set_exhausted(PoolObject<Core>& pool, bool waited) {
    unsigned long long size;
    {
        Detached detached;
        size = pool.core.size();
    }
    PyErr_Format(exhausted_error,
                 waited ? "all %llu items of the pool stayed taken: give them back earlier, or allow for more of them"
                        : "all %llu items of the pool are taken: give one back, wait with take(timeout=...), or allow "
                          "for more of them",
                 size);
    return nullptr;
}

// An item, or nullptr with an exception. Or, with a ticket, nullptr without one: there is no item, and the ticket has
// a place in the queue.
template <typename Core>
PyObject* attempt(Part<Core>& rep, Ticket* ticket, bool waited) {
    Core& core = rep.pool->core;
    Member* member = nullptr;
    if (core.try_take(*rep.part, member)) [[likely]]
        return taken(member);
    Grant grant;
    try {
        Detached detached;
        grant = core.take(*rep.part, member, ticket ? &ticket->waiter : nullptr);
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
    if (grant == Grant::taken) return taken(member);
    if (grant == Grant::make) return make_item(*rep.pool);
    if (!ticket) return set_exhausted(*rep.pool, waited);
    ticket->owner = Ref::borrow(rep.owner.get());
    ticket->root = &core;
    return nullptr;
}

// Giving back

template <typename Core>
PyObject* give_back(Part<Core>& rep, PyObject* item) {
    Member* member = rep.pool->roster.find(item);
    if (!member) {
        PyErr_Format(PyExc_ValueError, "%R is no item of this pool: give back what its take() returned", item);
        return nullptr;
    }
    if (!member->set_free()) {
        PyErr_Format(PyExc_ValueError, "%R is free already: it was given back before, or never taken", item);
        return nullptr;
    }
    if (!rep.pool->core.try_give(*rep.part, member)) {
        Detached detached;
        rep.pool->core.give(*rep.part, member);
    }
    Py_RETURN_NONE;
}

// Arguments

bool no_arguments(const char* function, Py_ssize_t nargs, PyObject* kwnames) {
    if (nargs == 0 && !kwnames) return true;
    PyErr_Format(PyExc_TypeError, "%s() takes no arguments", function);
    return false;
}

// The one argument `name`, which may be left out: then `o` stays as it is.
bool one_argument(const char* function, const char* name, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames,
                  PyObject*& o) {
    const Py_ssize_t named = kwnames ? PyTuple_GET_SIZE(kwnames) : 0;
    if (nargs + named > 1) {
        PyErr_Format(PyExc_TypeError, "%s() takes at most 1 argument, not %zd", function, nargs + named);
        return false;
    }
    if (named && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(kwnames, 0), name) != 0) {
        PyErr_Format(PyExc_TypeError, "%s() takes no argument %R", function, PyTuple_GET_ITEM(kwnames, 0));
        return false;
    }
    if (nargs + named == 1) o = args[0];
    return true;
}

// How long to wait: until when, `never` for None, and nothing for 0. False: an exception is set.
bool to_deadline(PyObject* timeout, std::optional<Deadline>& deadline) {
    if (!timeout) return true;
    if (timeout == Py_None) {
        deadline = never;
        return true;
    }
    if (PyBool_Check(timeout) || !(PyFloat_Check(timeout) || PyLong_Check(timeout))) {
        PyErr_Format(PyExc_TypeError, "timeout must be a number of seconds or None, not %.100s",
                     Py_TYPE(timeout)->tp_name);
        return false;
    }
    const double seconds = PyFloat_AsDouble(timeout);
    if (seconds == -1 && PyErr_Occurred()) return false;
    if (!(seconds >= 0)) {
        PyErr_Format(PyExc_ValueError, "timeout must not be negative, as %R is; None waits for ever", timeout);
        return false;
    }
    if (seconds > 1e9) {  // 30 years: what a clock of 64 bits in ns can surely add
        deadline = never;
    } else if (seconds > 0) {
        using Clock = std::chrono::steady_clock;
        deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    }
    return true;
}

// The methods of the interface on a representative of Part<Core>; `take` is the interface's own.

template <typename Core>
PyTypeObject* part_type() {
    return NativeRep<Part<Core>>::type;
}

template <typename Core>
struct Methods {
    static Part<Core>& of(PyObject* self) { return NativeRep<Part<Core>>::of(self); }

    // By the representative itself: waits within the request that runs.
    static PyObject* take(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames);

    static PyObject* give_back(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
        PyObject* item = nullptr;
        if (!one_argument("give_back", "item", args, nargs, kwnames, item)) return nullptr;
        if (!item) {
            PyErr_SetString(PyExc_TypeError, "give_back() needs the item");
            return nullptr;
        }
        return edge::give_back(of(self), item);
    }

    static PoolCounts counts_of(PyObject* self) {
        Detached detached;
        return of(self).pool->core.counts();
    }

    static PyObject* free(PyObject* self, PyObject* const*, Py_ssize_t nargs, PyObject* kwnames) {
        if (!no_arguments("free", nargs, kwnames)) return nullptr;
        const PoolCounts counts = counts_of(self);
        return PyLong_FromUnsignedLongLong(counts.local + counts.shared);
    }

    static PyObject* size(PyObject* self, PyObject* const*, Py_ssize_t nargs, PyObject* kwnames) {
        if (!no_arguments("size", nargs, kwnames)) return nullptr;
        uint64_t size;
        {
            Detached detached;
            size = of(self).pool->core.size();
        }
        return PyLong_FromUnsignedLongLong(size);
    }

    static PyObject* stat(PyObject* self, PyObject* const*, Py_ssize_t nargs, PyObject* kwnames) {
        if (!no_arguments("stat", nargs, kwnames)) return nullptr;
        const PoolCounts counts = counts_of(self);
        Ref result = Ref::steal(PyStructSequence_New(counts_type));
        if (!result) return nullptr;
        Py_ssize_t field = 0;
        for (uint64_t count : {counts.size, counts.taken, counts.local, counts.shared}) {
            PyObject* number = PyLong_FromUnsignedLongLong(count);
            if (!number) return nullptr;
            PyStructSequence_SetItem(result.get(), field++, number);
        }
        return result.release();
    }

    static constexpr NativeMethod table[] = {take, give_back, free, size, stat};
    static_assert(std::size(table) == std::size(Pool::names));
};

// Gives an item back that was handed over to who does not want it any more. Keeps the exception that is set.
void return_unwanted(PyObject* pool, Member* member) {
    SavedError saved;
    Ref item = Ref::steal(taken(member));
    PyObject* args[] = {pool, item.get()};
    Ref done = Ref::steal(PyObject_VectorcallMethod(give_back_name, args, 2, nullptr));
    if (!done) PyErr_Clear();  // the pool has been destroyed: nobody misses it
}

// Until there is news for the ticket, the deadline, or an exception (Ctrl-C). An item, or nullptr.
PyObject* wait(PyObject* pool, Ticket& ticket, Deadline deadline) {
    Root::Waiter& waiter = ticket.waiter;
    int interrupted = 0;
    // A signal wakes the main thread; one that comes just before it sleeps waits for the end of the slice.
    while (waiter.waiting() && !(interrupted = PyErr_CheckSignals())) {
        const Deadline now = std::chrono::steady_clock::now();
        if (now >= deadline) break;
        Detached detached;
        waiter.wait(std::min(deadline, now + std::chrono::milliseconds(100)));
    }
    Member* member = nullptr;
    bool granted;
    {
        Detached detached;
        granted = ticket.root->settle(waiter, member);
    }
    if (granted && interrupted) return_unwanted(pool, member);
    return granted && !interrupted ? taken(member) : nullptr;
}

// Repeats `ask(ticket, waited)`, which is an attempt, as long as it has a hope that comes true in time.
template <typename Ask>
PyObject* take_by(PyObject* pool, PyObject* timeout, Ask ask) {
    std::optional<Deadline> deadline;
    if (!to_deadline(timeout, deadline)) return nullptr;
    for (bool waited = false;; waited = true) {
        if (!deadline || (waited && std::chrono::steady_clock::now() >= *deadline)) return ask(nullptr, waited);
        Ticket ticket;
        PyObject* item = ask(&ticket, waited);
        if (!item && !PyErr_Occurred()) item = wait(pool, ticket, *deadline);
        if (item || PyErr_Occurred()) return item;
    }
}

template <typename Core>
PyObject* Methods<Core>::take(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
    PyObject* timeout = nullptr;
    if (!one_argument("take", "timeout", args, nargs, kwnames, timeout)) return nullptr;
    return take_by(self, timeout, [&](Ticket* ticket, bool waited) { return attempt(of(self), ticket, waited); });
}

// The interface's methods

// A representative that is called directly, not by a reference, must be the caller's.
bool check_processor(PyObject* self) {
    if (Py_TYPE(self) != part_type<Distributed>() || Methods<Distributed>::of(self).processor == &here()) return true;
    PyErr_SetString(PyExc_RuntimeError,
                    "this representative belongs to another processor: call the reference, or k42.local() again");
    return false;
}

PyObject* take(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
    if (Py_TYPE(self)->tp_base == Pool::type)
        return check_processor(self) ? on_rep<Pool, 0>(self, args, nargs, kwnames) : nullptr;
    PyObject* timeout = nullptr;
    if (!one_argument("take", "timeout", args, nargs, kwnames, timeout)) return nullptr;
    return take_by(self, timeout, [&](Ticket* ticket, bool waited) -> PyObject* {
        Request request;
        PyObject* rep = request.rep(self);
        if (!rep) return nullptr;
        if (Py_TYPE(rep) == part_type<Distributed>()) return attempt(Methods<Distributed>::of(rep), ticket, waited);
        if (Py_TYPE(rep) == part_type<Shared>()) return attempt(Methods<Shared>::of(rep), ticket, waited);
        return call_other_rep(self, rep, Pool::names[0], args, nargs, kwnames);
    });
}

PyObject* give_back(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
    return check_processor(self) ? on_rep<Pool, 1>(self, args, nargs, kwnames) : nullptr;
}

// An item for a `with`: taken on entry, given back on exit.
struct LeaseObject {
    PyObject_HEAD PyObject* pool;
    PyObject* timeout;
    bool native;                  // the pool's methods are those of the interface
    std::atomic<PyObject*> item;  // atomic for threads that share what they should not

    static LeaseObject& of(PyObject* self) { return *reinterpret_cast<LeaseObject*>(self); }
};

PyObject* take(const LeaseObject& lease) {
    if (lease.native) return take(lease.pool, &lease.timeout, 1, nullptr);
    PyObject* args[] = {lease.pool, lease.timeout};
    return PyObject_VectorcallMethod(take_name, args, 2, nullptr);
}

PyObject* give_back(const LeaseObject& lease, PyObject* item) {
    if (lease.native) return give_back(lease.pool, &item, 1, nullptr);
    PyObject* args[] = {lease.pool, item};
    return PyObject_VectorcallMethod(give_back_name, args, 2, nullptr);
}

PyObject* make_lease(PyObject* pool, PyObject* timeout, bool native) {
    Ref zero = timeout ? Ref::borrow(timeout) : Ref::steal(PyLong_FromLong(0));
    PyObject* self = zero ? lease_type->tp_alloc(lease_type, 0) : nullptr;
    if (!self) return nullptr;
    LeaseObject::of(self).pool = Py_NewRef(pool);
    LeaseObject::of(self).timeout = zero.release();
    LeaseObject::of(self).native = native;
    return self;
}

PyObject* item(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
    PyObject* timeout = nullptr;
    if (!one_argument("item", "timeout", args, nargs, kwnames, timeout)) return nullptr;
    return make_lease(self, timeout, true);
}

PyObject* lease_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    PyObject *pool, *timeout;
    if (!unpack_new(type->tp_name, args, kwargs, pool, timeout)) return nullptr;
    return make_lease(pool, timeout, false);
}

PyObject* lease_enter(PyObject* self, PyObject*) {
    LeaseObject& lease = LeaseObject::of(self);
    PyObject* none = nullptr;
    if (!lease.item.load()) {
        Ref taken = Ref::steal(take(lease));
        if (!taken) return nullptr;
        if (lease.item.compare_exchange_strong(none, taken.get())) return Py_NewRef(taken.release());
        if (!Ref::steal(give_back(lease, taken.get()))) return nullptr;
    }
    PyErr_SetString(PyExc_RuntimeError, "this item is taken already: each `with` needs an item() of its own");
    return nullptr;
}

PyObject* lease_exit(PyObject* self, PyObject* const*, Py_ssize_t) {
    LeaseObject& lease = LeaseObject::of(self);
    Ref item = Ref::steal(lease.item.exchange(nullptr));
    if (!item) {
        PyErr_SetString(PyExc_RuntimeError, "this item has not been taken: it is for a `with`");
        return nullptr;
    }
    return give_back(lease, item.get());
}

int lease_traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(LeaseObject::of(self).pool);
    Py_VISIT(LeaseObject::of(self).timeout);
    Py_VISIT(LeaseObject::of(self).item.load());
    return 0;
}

int lease_clear(PyObject* self) {
    Ref item = Ref::steal(LeaseObject::of(self).item.exchange(nullptr));
    Py_CLEAR(LeaseObject::of(self).timeout);
    Py_CLEAR(LeaseObject::of(self).pool);
    return 0;
}

void lease_dealloc(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    lease_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

PyMethodDef lease_methods[] = {
    {"__enter__", lease_enter, METH_NOARGS, PyDoc_STR("__enter__($self, /)\n--\n\nTake an item and return it.")},
    {"__exit__", fast(lease_exit), METH_FASTCALL, PyDoc_STR("__exit__($self, /, *args)\n--\n\nGive the item back.")},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot lease_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(lease_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(lease_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(lease_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(lease_clear)},
    {Py_tp_methods, lease_methods},
    {Py_tp_doc, const_cast<char*>("An item of a pool for the time of a `with`; see k42.structures.Pool.item.")},
    {0, nullptr},
};

PyType_Spec lease_spec = {"k42._native.PoolItem", sizeof(LeaseObject), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE, lease_slots};

PyMethodDef methods[] = {
    {"take", native_function(take), METH_FASTCALL | METH_KEYWORDS,
     PyDoc_STR("take($self, /, timeout=0)\n--\n\nReturn an item; see k42.structures.Pool.")},
    {"give_back", native_function(give_back), METH_FASTCALL | METH_KEYWORDS,
     PyDoc_STR("give_back($self, /, item)\n--\n\nLet others have an item; see k42.structures.Pool.")},
    {"free", native_function(on_rep<Pool, 2>), METH_FASTCALL | METH_KEYWORDS,
     PyDoc_STR("free($self, /)\n--\n\nReturn how many items are free; see k42.structures.Pool.")},
    {"size", native_function(on_rep<Pool, 3>), METH_FASTCALL | METH_KEYWORDS,
     PyDoc_STR("size($self, /)\n--\n\nReturn how many items there are; see k42.structures.Pool.")},
    {"stat", native_function(on_rep<Pool, 4>), METH_FASTCALL | METH_KEYWORDS,
     PyDoc_STR("stat($self, /)\n--\n\nReturn how many items are where; see k42.structures.Pool.")},
    {"item", native_function(item), METH_FASTCALL | METH_KEYWORDS,
     PyDoc_STR("item($self, /, timeout=0)\n--\n\nReturn an item for a `with`; see k42.structures.Pool.")},
    {nullptr, nullptr, 0, nullptr},
};

// What roots hold

// False: an exception is set.
bool to_number(PyObject* o, const char* name, uint64_t most, uint64_t& out) {
    if (!PyLong_Check(o) || PyBool_Check(o)) {
        PyErr_Format(PyExc_TypeError, "%s must be an int, not %.100s", name, Py_TYPE(o)->tp_name);
        return false;
    }
    int overflow;
    const long long number = PyLong_AsLongLongAndOverflow(o, &overflow);
    if (overflow || number < 1 || uint64_t(number) > most) {
        PyErr_Format(PyExc_ValueError, "%s must be 1 to %llu, not %R", name, static_cast<unsigned long long>(most), o);
        return false;
    }
    out = uint64_t(number);
    return true;
}

constexpr uint64_t unlimited = UINT64_MAX;
constexpr uint64_t most_items = uint64_t{1} << 48;
constexpr uint64_t most_cap = 1 << 16;

// The state of a pool: who makes items, how many there may be, and the items. Into an empty pool; false: an exception
// is set, and the pool is of no use.
template <typename Core>
bool fill(PoolObject<Core>& pool, PyObject* factory, PyObject* capacity, PyObject* free, PyObject* taken) {
    if (factory != Py_None && !PyCallable_Check(factory)) {
        PyErr_Format(PyExc_TypeError, "factory must be callable, not %.100s", Py_TYPE(factory)->tp_name);
        return false;
    }
    uint64_t most = unlimited;
    if (capacity != Py_None && !to_number(capacity, "capacity", most_items, most)) return false;
    if (pool.core.size()) {
        PyErr_SetString(PyExc_ValueError, "the pool has items already: state goes into an empty one");
        return false;
    }
    uint64_t size = 0;
    for (PyObject* items : {free, taken}) {
        Ref sequence = Ref::steal(PySequence_Tuple(items));
        if (!sequence) return false;
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sequence.get()); ++i, ++size) {
            PyObject* item = PyTuple_GET_ITEM(sequence.get(), i);
            Member* member = pool.insert(item, items == free);
            if (!member) {
                if (!PyErr_Occurred()) PyErr_Format(PyExc_ValueError, "%R is twice among the items", item);
                return false;
            }
            try {
                items == free ? pool.core.add(member) : pool.core.add_taken();
            } catch (const std::bad_alloc&) {
                PyErr_NoMemory();
                return false;
            }
        }
    }
    if (size > most) {
        PyErr_Format(PyExc_ValueError, "%llu items are more than the capacity, %llu",
                     static_cast<unsigned long long>(size), static_cast<unsigned long long>(most));
        return false;
    }
    pool.capacity = most;
    Py_XSETREF(pool.factory, factory == Py_None ? nullptr : Py_NewRef(factory));
    pool.core.set_capacity(pool.factory ? most : 0);
    return true;
}

template <typename Core>
int pool_traverse(PyObject* self, visitproc visit, void* arg) {
    const auto& pool = PoolObject<Core>::of(self);
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(pool.factory);
    // Whoever inserts is attached to the interpreter, so nobody does while the collector runs.
    for (const auto& member : pool.roster.members()) Py_VISIT(static_cast<PyObject*>(member->object));
    return 0;
}

// No tp_clear: cycles lead through the reference or the root, which break them, or the factory.
template <typename Core>
void pool_dealloc(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    auto& pool = PoolObject<Core>::of(self);
    pool.core.~Core();
    for (const auto& member : pool.roster.members()) Py_DECREF(static_cast<PyObject*>(member->object));
    pool.roster.~Roster();
    Py_XDECREF(pool.factory);
    type->tp_free(self);
    Py_DECREF(type);
}

template <typename Core, typename... Cap>
PyObject* make_pool(PyTypeObject* type, PyObject* factory, PyObject* items, PyObject* capacity, Cap... cap) {
    PyObject* self = type->tp_alloc(type, 0);
    if (!self) return nullptr;
    auto& pool = PoolObject<Core>::of(self);
    new (&pool.core) Core(0, cap...);
    try {
        new (&pool.roster) Roster();
    } catch (const std::bad_alloc&) {
        pool.core.~Core();
        PyObject_GC_UnTrack(self);
        type->tp_free(self);
        Py_DECREF(type);
        return PyErr_NoMemory();
    }
    Ref made = Ref::steal(self);
    Ref none = Ref::steal(PyTuple_New(0));
    if (!none || !fill(pool, factory, capacity, items, none.get())) return nullptr;
    return made.release();
}

PyObject* make_shared(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    PyObject *factory, *items, *capacity;
    if (!unpack_new(type->tp_name, args, kwargs, factory, items, capacity)) return nullptr;
    return make_pool<Shared>(type, factory, items, capacity);
}

PyObject* make_distributed(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    PyObject *factory, *items, *capacity, *number;
    uint64_t cap;
    if (!unpack_new(type->tp_name, args, kwargs, factory, items, capacity, number)) return nullptr;
    if (!to_number(number, "cap", most_cap, cap)) return nullptr;
    return make_pool<Distributed>(type, factory, items, capacity, uint32_t(cap));
}

template <typename Core>
PyObject* join(PyObject* self, PyObject*) {
    auto& pool = PoolObject<Core>::of(self);
    const runtime::Processor* processor = std::is_same_v<Core, Distributed> ? &here() : nullptr;
    typename Core::Part* part;
    try {
        Detached detached;
        part = &pool.core.join();
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
    return NativeRep<Part<Core>>::make(Methods<Core>::table, Ref::borrow(self), &pool, part, processor);
}

template <typename Core>
PyObject* wake(PyObject* self, PyObject*) {
    Detached detached;
    PoolObject<Core>::of(self).core.wake();
    Py_RETURN_NONE;
}

template <typename Core>
PyObject* export_state(PyObject* self, PyObject*) {
    auto& pool = PoolObject<Core>::of(self);
    std::vector<Member*> members;
    try {
        Detached detached;
        members = pool.core.free_items();
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
    std::sort(members.begin(), members.end());
    Ref free = Ref::steal(PyList_New(0)), taken = Ref::steal(PyList_New(0));
    if (!free || !taken) return nullptr;
    for (const auto& member : pool.roster.members()) {
        const bool is_free = std::binary_search(members.begin(), members.end(), member.get());
        if (PyList_Append((is_free ? free : taken).get(), static_cast<PyObject*>(member->object)) < 0) return nullptr;
    }
    Ref capacity =
        pool.capacity == unlimited ? Ref::borrow(Py_None) : Ref::steal(PyLong_FromUnsignedLongLong(pool.capacity));
    if (!capacity) return nullptr;
    return Py_BuildValue("{s:O,s:O,s:O,s:O}", "factory", pool.factory ? pool.factory : Py_None, "capacity",
                         capacity.get(), "free", free.get(), "taken", taken.get());
}

template <typename Core>
PyObject* import_state(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    PyObject *factory, *capacity, *free, *taken;
    if (!unpack("import_state", args, nargs, factory, capacity, free, taken)) return nullptr;
    if (!fill(PoolObject<Core>::of(self), factory, capacity, free, taken)) return nullptr;
    Py_RETURN_NONE;
}

template <typename Core>
PyMethodDef pool_methods[] = {
    {"join", join<Core>, METH_NOARGS,
     PyDoc_STR("join($self, /)\n--\n\nReturn a new representative, for the calling processor or for all.")},
    {"wake", wake<Core>, METH_NOARGS,
     PyDoc_STR("wake($self, /)\n--\n\nLet those who wait for an item ask their reference again.")},
    {"export_state", export_state<Core>, METH_NOARGS,
     PyDoc_STR("export_state($self, /)\n--\n\nReturn the factory, the capacity, the free and the taken items.")},
    {"import_state", fast(import_state<Core>), METH_FASTCALL,
     PyDoc_STR("import_state($self, factory, capacity, free, taken, /)\n--\n\nFill an empty pool.")},
    {nullptr, nullptr, 0, nullptr},
};

template <typename Core>
bool add(PyObject* module, const char* name, const char* part_name, newfunc create) {
    PyType_Slot slots[] = {
        {Py_tp_new, reinterpret_cast<void*>(create)},
        {Py_tp_dealloc, reinterpret_cast<void*>(pool_dealloc<Core>)},
        {Py_tp_traverse, reinterpret_cast<void*>(pool_traverse<Core>)},
        {Py_tp_methods, pool_methods<Core>},
        {Py_tp_doc, const_cast<char*>("The items of a pool, and who makes more.")},
        {0, nullptr},
    };
    PyType_Spec spec = {name, sizeof(PoolObject<Core>), 0,
                        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE, slots};
    return add_type(module, &spec) &&
           add_rep<Part<Core>>(module, part_name, "A processor's way to a pool.", Pool::type);
}

PyStructSequence_Field counts_fields[] = {
    {"size", "items in all: taken + local + shared"},
    {"taken", "not given back yet"},
    {"local", "free, in the lists of processors"},
    {"shared", "free, in the list of all"},
    {nullptr, nullptr},
};
PyStructSequence_Desc counts_desc = {"k42._native.PoolStat", "How many items of a pool are where.", counts_fields, 4};

}  // namespace

int add_pool(PyObject* module) {
    Ref errors = Ref::steal(PyImport_ImportModule("k42.errors"));
    if (!errors || !(exhausted_error = PyObject_GetAttrString(errors.get(), "PoolExhausted"))) return -1;
    if (!(take_name = PyUnicode_InternFromString("take"))) return -1;
    if (!(give_back_name = PyUnicode_InternFromString("give_back"))) return -1;
    counts_type = PyStructSequence_NewType(&counts_desc);
    if (!counts_type || PyModule_AddType(module, counts_type) < 0) return -1;
    lease_type = add_type(module, &lease_spec);
    if (!lease_type) return -1;
    // What each `with` would count.
    share_forever(reinterpret_cast<PyObject*>(lease_type));
    for (const char* name : {"__enter__", "__exit__"}) {
        Ref method = Ref::steal(PyObject_GetAttrString(reinterpret_cast<PyObject*>(lease_type), name));
        if (!method) return -1;
        share_forever(method.get());
    }
    Pool::type = add_interface(module, "k42._native.PoolRep", "The interface of native pools.", methods);
    const bool added =
        Pool::type && add<Shared>(module, "k42._native.SharedPool", "k42._native.SharedPoolRep", make_shared) &&
        add<Distributed>(module, "k42._native.DistributedPool", "k42._native.PoolPart", make_distributed);
    return added ? 0 : -1;
}

}  // namespace k42::edge
