// What a coid names for Python: the root, and the representatives that local tables point to. It owns them, so it is
// they who outlive every request that may use them: the tables' pointers are borrowed from here.
#pragma once

#include <memory>
#include <vector>

#include "reference.hpp"

namespace k42::edge {

struct Hold;

struct Anchor {
    explicit Anchor(PyObject* root) : root_(Py_NewRef(root)) {}
    Anchor(const Anchor&) = delete;
    Anchor& operator=(const Anchor&) = delete;
    ~Anchor();

    // Takes over `rep`, which `processor` is the first to use; returns it borrowed.
    PyObject* hold(PyObject* rep, std::uint32_t processor);

    // The root at this moment; a request that is older than a switch keeps its own.
    Ref root();

    // Whom misses go to: the root, or what arbitrates while the object is interposed.
    Ref handler();

    // What arbitrates, or has arbitrated before: it stays, so that a representative of its own is there for all calls
    // that may still use it. An object has one in its life.
    Ref arbitration();
    void arbitrate(PyObject* arbitration, bool active);

    // A root without an object, and the representatives of which we know.
    struct Left;

    // While nobody is inside the object.
    Left replace_root(PyObject* new_root);
    void inherit(Left&& left);

    // Nobody uses them any more: hooks run, cycles are broken.
    static void end(Left&& left);

    // Suspended requests: generators and coroutines that have not ended.
    void add(Hold& hold);
    void remove(Hold& hold);
    bool held();
    Ref names_of_holds();  // a list

    int traverse(visitproc visit, void* arg);

    // runtime::Ending
    static void release(void* anchor);
    static bool held(void* anchor) { return static_cast<Anchor*>(anchor)->held(); }

    struct Used {
        PyObject* rep;  // owned
        std::uint32_t processor;
    };

  private:
    // What an object has once it is called.
    struct Lists {
        std::vector<Used> reps;  // each once
        std::vector<Hold*> holds;
    };

    Lists& lists();
    std::vector<Used> take_reps();

    // Protected by a lock that anchors share (in anchor.cpp), held for moments.
    PyObject* root_;
    PyObject* arbitration_ = nullptr;
    std::unique_ptr<Lists> lists_;
    bool arbitrating_ = false;
};

struct Anchor::Left {
    Ref root;
    std::vector<Used> reps;
};

// A suspended request on an object: a generator or a coroutine of one of its methods.
struct Hold {
    PyObject_HEAD PyObject* reference;
    Anchor* anchor;  // nullptr once it has ended
    PyObject* name;
};

// Makes the hold of a request that is called `name`; within the call. nullptr with an exception.
PyObject* make_hold(Request& request, PyObject* reference, PyObject* name);

}  // namespace k42::edge
