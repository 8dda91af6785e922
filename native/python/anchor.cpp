#include "anchor.hpp"

#include <algorithm>
#include <mutex>

#include "freethreading.hpp"

namespace k42::edge {

namespace {

// Locks that anchors share by address, so that an object that nobody calls carries none. Innermost: nothing is called
// and no count is dropped under one.
std::mutex& lock_of(const void* anchor) {
    static std::mutex locks[64];
    return locks[reinterpret_cast<std::uintptr_t>(anchor) / 64 % 64];
}

// Runs the hook of a representative, and drops it. Attached to the interpreter.
void end_rep(PyObject* rep) {
    SavedError saved;
    Ref done = Ref::steal(PyObject_CallMethod(rep, "on_release", nullptr));
    if (!done) PyErr_WriteUnraisable(rep);
    Py_DECREF(rep);
}

void open_end_of_rep(void* rep) {
    if (!Py_IsInitialized()) return;
    PyGILState_STATE gil = PyGILState_Ensure();
    end_rep(static_cast<PyObject*>(rep));
    PyGILState_Release(gil);
}

}  // namespace

Anchor::~Anchor() {
    // The garbage collector may have emptied what refers back to us; what is left is plain references.
    if (lists_) let_go(std::move(lists_->reps));
    Py_XDECREF(arbitration_);
    Py_DECREF(root);
}

Anchor::Lists& Anchor::lists() {
    if (!lists_) lists_ = std::make_unique<Lists>();
    return *lists_;
}

PyObject* Anchor::hold(PyObject* rep, std::uint32_t processor) {
    {
        std::lock_guard guard(lock_of(this));
        auto& reps = lists().reps;
        if (std::none_of(reps.begin(), reps.end(), [&](const Used& used) { return used.rep == rep; })) {
            reps.push_back({rep, processor});
            return rep;
        }
    }
    Py_DECREF(rep);
    return rep;
}

Ref Anchor::handler() {
    std::lock_guard guard(lock_of(this));
    return Ref::borrow(arbitration_ ? arbitration_ : root);
}

void Anchor::arbitrate(PyObject* arbitration) {
    Ref before = Ref::borrow(arbitration);
    std::lock_guard guard(lock_of(this));
    PyObject* mine = before.release();
    before = Ref::steal(std::exchange(arbitration_, mine));
}

Ref Anchor::replace_root(PyObject* new_root) {
    std::vector<Used> old;
    {
        std::lock_guard guard(lock_of(this));
        if (lists_) old = std::exchange(lists_->reps, {});
    }
    let_go(std::move(old));
    return Ref::steal(std::exchange(root, Py_NewRef(new_root)));
}

// Each representative that has a hook gets it run by the owner of the processor that used it first.
void Anchor::let_go(std::vector<Used> reps) {
    for (auto [rep, id] : reps) {
        const int hooked = PyObject_HasAttrString(reinterpret_cast<PyObject*>(Py_TYPE(rep)), "on_release");
        runtime::Processor& p = here();
        if (!hooked) {
            Py_DECREF(rep);
        } else if (p.id == id && p.depth == 0) {
            end_rep(rep);
        } else {
            runtime::post(runtime::processor(id), open_end_of_rep, rep);
        }
    }
}

void Anchor::add(Hold& hold) {
    std::lock_guard guard(lock_of(this));
    lists().holds.push_back(&hold);
}

void Anchor::remove(Hold& hold) {
    std::lock_guard guard(lock_of(this));
    std::erase(lists().holds, &hold);
}

bool Anchor::held() {
    std::lock_guard guard(lock_of(this));
    return lists_ && !lists_->holds.empty();
}

Ref Anchor::names_of_holds() {
    std::vector<Ref> names;
    {
        std::lock_guard guard(lock_of(this));
        if (lists_) {
            for (Hold* hold : lists_->holds) names.push_back(Ref::borrow(hold->name));
        }
    }
    Ref list = Ref::steal(PyList_New(0));
    for (Ref& name : names) {
        if (list && PyList_Append(list.get(), name.get()) < 0) return {};
    }
    return list;
}

int Anchor::traverse(visitproc visit, void* arg) {
    Py_VISIT(root);
    Py_VISIT(arbitration_);
    if (lists_) {
        for (auto& used : lists_->reps) Py_VISIT(used.rep);
    }
    return 0;
}

void Anchor::release(void* object) {
    if (!Py_IsInitialized()) return;  // the interpreter is gone, and its objects with it
    PyGILState_STATE gil = PyGILState_Ensure();
    auto* anchor = static_cast<Anchor*>(object);
    {
        SavedError saved;
        Ref done = Ref::steal(PyObject_CallMethod(anchor->root, "_released", nullptr));
        if (!done) PyErr_WriteUnraisable(anchor->root);
        delete anchor;
    }
    PyGILState_Release(gil);
}

}  // namespace k42::edge
