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
    Attached attached;
    end_rep(static_cast<PyObject*>(rep));
}

}  // namespace

Anchor::~Anchor() {
    Py_XDECREF(arbitration_);
    Py_XDECREF(root_);
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

Ref Anchor::root() {
    std::lock_guard guard(lock_of(this));
    return Ref::borrow(root_);
}

Ref Anchor::handler() {
    std::lock_guard guard(lock_of(this));
    return Ref::borrow(arbitrating_ ? arbitration_ : root_);
}

Ref Anchor::arbitration() {
    std::lock_guard guard(lock_of(this));
    return Ref::borrow(arbitration_);
}

void Anchor::arbitrate(PyObject* arbitration, bool active) {
    Ref before = Ref::borrow(arbitration);
    std::lock_guard guard(lock_of(this));
    PyObject* mine = before.release();
    before = Ref::steal(std::exchange(arbitration_, mine));
    arbitrating_ = active;
}

std::vector<Anchor::Used> Anchor::take_reps() {
    std::lock_guard guard(lock_of(this));
    return lists_ ? std::exchange(lists_->reps, {}) : std::vector<Used>();
}

Anchor::Left Anchor::replace_root(PyObject* new_root) {
    Left left{Ref::borrow(new_root), take_reps()};
    std::lock_guard guard(lock_of(this));
    PyObject* mine = left.root.release();
    left.root = Ref::steal(std::exchange(root_, mine));
    return left;
}

void Anchor::inherit(Left&& left) {
    if (left.reps.empty()) return;
    std::lock_guard guard(lock_of(this));
    lists().reps = std::move(left.reps);
}

// Each representative that has a hook gets it run by the owner of the processor that used it first, or of that which
// the root names where no processor has used it directly.
void Anchor::end(Left&& left) {
    auto& [root, reps] = left;
    SavedError saved;
    Ref known = Ref::steal(PyObject_CallMethod(root.get(), "_released", nullptr));
    if (!known || !PyList_Check(known.get())) {
        PyErr_WriteUnraisable(root.get());
    } else {
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(known.get()); ++i) {
            PyObject* rep;
            unsigned id;
            if (!PyArg_ParseTuple(PyList_GET_ITEM(known.get(), i), "OI", &rep, &id)) {
                PyErr_WriteUnraisable(root.get());
                continue;
            }
            if (std::none_of(reps.begin(), reps.end(), [&](const Used& used) { return used.rep == rep; }))
                reps.push_back({Py_NewRef(rep), id < runtime::processor_count() ? id : here().id});
        }
    }
    for (auto [rep, id] : std::exchange(reps, {})) {
        runtime::Processor& p = here();
        if (!PyObject_HasAttrString(reinterpret_cast<PyObject*>(Py_TYPE(rep)), "on_release")) {
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
    Py_VISIT(root_);
    Py_VISIT(arbitration_);
    if (lists_) {
        for (auto& used : lists_->reps) Py_VISIT(used.rep);
    }
    return 0;
}

void Anchor::release(void* object) {
    if (!Py_IsInitialized()) return;  // the interpreter is gone, and its objects with it
    Attached attached;
    auto* anchor = static_cast<Anchor*>(object);
    end({anchor->root(), anchor->take_reps()});
    SavedError saved;
    delete anchor;
}

}  // namespace k42::edge
