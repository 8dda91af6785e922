// What a coid names for Python: the root, and the representatives that local tables point to. It owns them, so it is
// they who outlive every request that may use them: the tables' pointers are borrowed from here.
#pragma once

#include <memory>
#include <vector>

#include "reference.hpp"

namespace k42::edge {

struct Hold;

struct Anchor {
    explicit Anchor(PyObject* root_) : root(Py_NewRef(root_)) {}
    Anchor(const Anchor&) = delete;
    Anchor& operator=(const Anchor&) = delete;
    ~Anchor();

    // Takes over `rep`, which `processor` is the first to use; returns it borrowed.
    PyObject* hold(PyObject* rep, std::uint32_t processor);

    // Whom misses go to: the root, or what arbitrates while the object is interposed.
    Ref handler();
    void arbitrate(PyObject* arbitration);  // nullptr: nobody any more

    // Replaces the root, while nobody is inside the object; the old representatives go.
    Ref replace_root(PyObject* new_root);

    // Suspended requests: generators and coroutines that have not ended.
    void add(Hold& hold);
    void remove(Hold& hold);
    bool held();
    Ref names_of_holds();  // a list

    int traverse(visitproc visit, void* arg);

    // runtime::Ending
    static void release(void* anchor);
    static bool held(void* anchor) { return static_cast<Anchor*>(anchor)->held(); }

  private:
    struct Used {
        PyObject* rep;
        std::uint32_t processor;
    };
    // What an object has once it is called.
    struct Lists {
        std::vector<Used> reps;  // each once
        std::vector<Hold*> holds;
    };

    Lists& lists();
    static void let_go(std::vector<Used> reps);

    PyObject* root;  // changed while nobody is inside the object; else by nobody
    // The rest is protected by a lock that anchors share (in anchor.cpp), held for moments.
    PyObject* arbitration_ = nullptr;
    std::unique_ptr<Lists> lists_;

  public:
    PyObject* root_of_caller() const { return root; }  // inside a request, or a switch
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
