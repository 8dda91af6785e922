// Python's keys and values for the Map of the core: how they are compared, counted and copied (structures/map.hpp).
#pragma once

#include <chrono>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "edge.hpp"
#include "freethreading.hpp"
#include "runtime/retire.hpp"
#include "structures/map.hpp"

namespace k42::edge {

// A native lock for a scope that runs no Python. Whoever takes or holds it is attached to the interpreter: so neither
// the garbage collector nor a fork, which stop all who are, ever finds a table half changed or its lock held.
class Held {
  public:
    explicit Held(std::mutex& lock) : lock_(lock) {
        if (lock_.try_lock()) [[likely]]
            return;
        // Locks are held for 100 ns, to sleep and detach costs microseconds. With a GIL nobody else ever holds one.
        for (int turns = 1; turns <= 64; turns *= 2) {
            for (int i = 0; i < turns; ++i) relax();
            if (lock_.try_lock()) return;
        }
        // Not lock(): who gets it while detached keeps it while all are stopped, and in the child of a fork for ever.
        for (int turn = 0; !lock_.try_lock(); ++turn) {
            Detached detached;
            if (turn < 16) {
                std::this_thread::yield();
            } else {
                std::this_thread::sleep_for(std::chrono::microseconds(50));
            }
        }
    }
    ~Held() { lock_.unlock(); }
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;

  private:
    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }

    std::mutex& lock_;
};

enum class Same { no, yes, ask };

// Whether two keys of the same hash are the same, as far as that is known without running code of others.
inline Same native_same(PyObject* a, PyObject* b) {
    if (a == b) return Same::yes;
    PyTypeObject* type = Py_TYPE(a);
    if (type == &PyUnicode_Type && Py_TYPE(b) == type) {
        if (PyUnicode_GET_LENGTH(a) != PyUnicode_GET_LENGTH(b) || PyUnicode_KIND(a) != PyUnicode_KIND(b))
            return Same::no;
        const auto bytes = static_cast<size_t>(PyUnicode_GET_LENGTH(a)) * PyUnicode_KIND(a);
        return std::memcmp(PyUnicode_DATA(a), PyUnicode_DATA(b), bytes) == 0 ? Same::yes : Same::no;
    }
    const auto plain = [](PyTypeObject* t) { return t == &PyUnicode_Type || t == &PyLong_Type || t == &PyBytes_Type; };
    if (!plain(type) || !plain(Py_TYPE(b))) {
        if (type != &PyTuple_Type || Py_TYPE(b) != type) return Same::ask;
        const Py_ssize_t size = PyTuple_GET_SIZE(a);
        if (size != PyTuple_GET_SIZE(b)) return Same::no;
        for (Py_ssize_t i = 0; i < size; ++i) {
            PyObject *x = PyTuple_GET_ITEM(a, i), *y = PyTuple_GET_ITEM(b, i);
            // One level: tuples in tuples are asked, with Python's own limit of recursion.
            const Same item = x == y ? Same::yes : PyTuple_CheckExact(x) ? Same::ask : native_same(x, y);
            if (item != Same::yes) return item;
        }
        return Same::yes;
    }
    if (type != Py_TYPE(b)) return Same::no;
    PyObject* equal = type->tp_richcompare(a, b, Py_EQ);  // native, makes nothing
    const Same same = equal == Py_True ? Same::yes : Same::no;
    Py_XDECREF(equal);
    return same;
}

// A key that is looked for. Its hash is computed first; false with an exception when it has none.
class Probe {
  public:
    explicit Probe(PyObject* key) : key_(key) {}
    Probe(const Probe&) = delete;
    Probe& operator=(const Probe&) = delete;
    ~Probe() {
        Py_XDECREF(opened_);
        for (auto& [other, same] : asked_) Py_DECREF(other);
    }

    bool prepare() {
        Py_hash_t hash = -1;
        if (PyUnicode_CheckExact(key_))
            hash = __atomic_load_n(&reinterpret_cast<PyASCIIObject*>(key_)->hash, __ATOMIC_RELAXED);
        if (hash == -1) {
            hash = PyObject_Hash(key_);
            if (hash == -1) return false;
        }
        hash_ = spread(static_cast<uint64_t>(hash));
        return true;
    }

    size_t hash() const { return hash_; }
    PyObject* key() const { return key_; }

    bool same(PyObject* other) {
        if (other == key_) [[likely]]
            return true;
        Same known = native_same(other, key_);
        if (known == Same::ask) {
            for (auto& [asked, same] : asked_) {
                if (asked == other) return same;
            }
            opened_ = Py_NewRef(other);
            return true;
        }
        return known == Same::yes;
    }
    bool open() const { return opened_ != nullptr; }

    bool settle() {
        Ref other = Ref::steal(std::exchange(opened_, nullptr));
        const int same = PyObject_RichCompareBool(other.get(), key_, Py_EQ);
        if (same < 0) return false;
        asked_.emplace_back(other.get(), same != 0);
        other.release();
        return true;
    }

  private:
    PyObject* const key_;  // the caller's
    size_t hash_ = 0;
    PyObject* opened_ = nullptr;
    std::vector<std::pair<PyObject*, bool>> asked_;
};

extern PyObject* map_circle_error;  // k42.errors.Error

struct MapPolicy {
    using Key = PyObject*;
    using Guard = Held;
    using Probe = edge::Probe;

    bool copying;  // whether replicas have copies of immutable values; without a GIL

    void hold(PyObject* key) const { Py_INCREF(key); }
    void drop(PyObject* key) const { Py_DECREF(key); }
    static PyObject* object(const void* value) { return static_cast<PyObject*>(const_cast<void*>(value)); }
    void hold_value(void* value) const { Py_INCREF(object(value)); }
    void drop_value(void* value) const { Py_DECREF(object(value)); }
    void drop_value_later(void* value) const {
        const auto release = [](void* v) {
            if (!Py_IsInitialized()) return;
            // Whoever retires next on this processor may be another structure, without the interpreter.
            Attached attached;
            Py_DECREF(object(v));
        };
        try {
            runtime::retire(value, release);
        } catch (const std::bad_alloc&) {
            // It stays for ever: somebody may be reading it, and there is no memory to find out when not.
        }
    }

    bool copies([[maybe_unused]] const void* value) const {
#ifdef Py_GIL_DISABLED
        size_t room = most_copied;
        return copying && !is_immortal(object(value)) && copyable(object(value), room, 0);
#else
        return false;  // counts are local to whoever has the GIL
#endif
    }
    void* copy(void* value) const {
        PyObject* made = copied(object(value));
        if (!made) PyErr_Clear();  // no memory for it: look-ups go to the master
        return made;
    }

    bool wait(MakingWait& waiting) const {
        if (waiting.endless()) {
            PyErr_SetString(map_circle_error,
                            "the factory asks the map for the key that it makes the value of (or factories of several "
                            "threads ask for each other's keys), which would wait for ever: it must not use "
                            "find_or_allocate() on that key");
            return false;
        }
        {
            Detached detached;
            waiting.sleep();
        }
        return PyErr_CheckSignals() == 0;
    }

  private:
    // A page for each value and processor: beyond, whoever works with the value does not notice its count.
    static constexpr size_t most_copied = 4096;
    static constexpr int deepest = 4;  // of tuples in tuples

    // Whether copies of `o`, of exact types that are immutable all through, are worth their room.
    static bool copyable(PyObject* o, size_t& room, int depth) {
        size_t size;
        if (PyUnicode_CheckExact(o)) {
            size = static_cast<size_t>(PyUnicode_GET_LENGTH(o)) * PyUnicode_KIND(o);
        } else if (PyBytes_CheckExact(o)) {
            size = static_cast<size_t>(PyBytes_GET_SIZE(o));
        } else if (PyLong_CheckExact(o) || PyFloat_CheckExact(o) || PyComplex_CheckExact(o)) {
            size = static_cast<size_t>(Py_TYPE(o)->tp_basicsize);
        } else if (PyTuple_CheckExact(o)) {
            size = static_cast<size_t>(PyTuple_GET_SIZE(o)) * sizeof(PyObject*);
            if (depth == deepest) return false;
            for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(o); ++i) {
                PyObject* item = PyTuple_GET_ITEM(o, i);
                if (!is_immortal(item) && !copyable(item, room, depth + 1)) return false;
            }
        } else if (PyFrozenSet_CheckExact(o)) {
            // Its items are looked at when it is copied: to iterate takes memory, not to be had under a lock.
            size = static_cast<size_t>(PySet_GET_SIZE(o)) * 2 * sizeof(PyObject*);
        } else {
            return false;
        }
        if (size > room) return false;
        room -= size;
        return true;
    }

    // A new reference, to `o` itself where that is better; nullptr with an exception.
    static PyObject* copied(PyObject* o, int depth = 0) {
        if (is_immortal(o) || depth > deepest) return Py_NewRef(o);
        if (PyUnicode_CheckExact(o))
            return PyUnicode_FromKindAndData(PyUnicode_KIND(o), PyUnicode_DATA(o), PyUnicode_GET_LENGTH(o));
        if (PyBytes_CheckExact(o)) return PyBytes_FromStringAndSize(PyBytes_AS_STRING(o), PyBytes_GET_SIZE(o));
        if (PyFloat_CheckExact(o)) return PyFloat_FromDouble(PyFloat_AS_DOUBLE(o));
        if (PyComplex_CheckExact(o)) return PyComplex_FromCComplex(PyComplex_AsCComplex(o));
        if (PyLong_CheckExact(o)) {
            Ref negative = Ref::steal(PyNumber_Negative(o));
            return negative ? PyNumber_Negative(negative.get()) : nullptr;
        }
        if (PyTuple_CheckExact(o)) return copied_tuple(o, depth);
        Ref items = Ref::steal(PySequence_Tuple(o));
        if (!items) return nullptr;
        size_t room = most_copied;
        if (!copyable(items.get(), room, depth)) return Py_NewRef(o);  // and its items are not asked for their hashes
        Ref copies = Ref::steal(copied_tuple(items.get(), depth));
        return copies ? PyFrozenSet_New(copies.get()) : nullptr;
    }
    static PyObject* copied_tuple(PyObject* o, int depth) {
        Ref made = Ref::steal(PyTuple_New(PyTuple_GET_SIZE(o)));
        for (Py_ssize_t i = 0; made && i < PyTuple_GET_SIZE(o); ++i) {
            PyObject* item = copied(PyTuple_GET_ITEM(o, i), depth + 1);
            if (!item) return nullptr;
            PyTuple_SET_ITEM(made.get(), i, item);
        }
        return made.release();
    }
};

using PythonMap = Map<MapPolicy>;

}  // namespace k42::edge
