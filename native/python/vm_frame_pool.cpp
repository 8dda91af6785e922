// k42._native.FramePool: the frames of the Global Page Manager.
#include "vm.hpp"

namespace k42::edge {

namespace {

using Self = Holder<FramePoolValue>;

vm::FramePool& pool_of(PyObject* self) { return Self::of(self).pool; }

bool to_backing(uint32_t number, vm::Backing& out) {
    if (number > uint32_t(vm::Backing::overcommitted)) {
        PyErr_SetString(PyExc_ValueError, "no such backing");
        return false;
    }
    out = vm::Backing(number);
    return true;
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    uint64_t budget;
    if (!unpack_new("FramePool", args, kwargs, budget)) return nullptr;
    return Self::make(type, budget);
}

PyObject* reserve(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t frames;
    if (!unpack("reserve", args, nargs, frames)) return nullptr;
    return PyBool_FromLong(pool_of(self).reserve(frames));
}

PyObject* unreserve(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t frames;
    if (!unpack("unreserve", args, nargs, frames)) return nullptr;
    if (frames > pool_of(self).usage().promised_anonymous) {
        PyErr_SetString(PyExc_ValueError, "more frames than were reserved");
        return nullptr;
    }
    pool_of(self).unreserve(frames);
    Py_RETURN_NONE;
}

PyObject* promise_file(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t frames;
    if (!unpack("promise_file", args, nargs, frames)) return nullptr;
    return PyBool_FromLong(pool_of(self).promise_file(frames));
}

PyObject* allocate(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t frames;
    uint32_t number;
    vm::Backing backing;
    if (!unpack("allocate", args, nargs, frames, number) || !to_backing(number, backing)) return nullptr;
    return PyLong_FromLong(long(pool_of(self).allocate(frames, backing)));
}

PyObject* release(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t frames;
    uint32_t number;
    vm::Backing backing;
    if (!unpack("release", args, nargs, frames, number) || !to_backing(number, backing)) return nullptr;
    pool_of(self).release(frames, backing);
    Py_RETURN_NONE;
}

PyObject* changes(PyObject* self, PyObject*) { return PyLong_FromUnsignedLongLong(pool_of(self).changes()); }

PyObject* wait(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t seen;
    uint32_t timeout;
    if (!unpack("wait", args, nargs, seen, timeout)) return nullptr;
    bool changed;
    {
        Detached detached;
        changed = pool_of(self).wait(seen, std::chrono::milliseconds(timeout));
    }
    return PyBool_FromLong(changed);
}

PyObject* usage(PyObject* self, PyObject*) {
    const vm::FramePool::Usage u = pool_of(self).usage();
    return Py_BuildValue("{sKsKsKsKsKsK}", "budget", u.budget, "file", u.file, "reserved", u.reserved, "overcommitted",
                         u.overcommitted, "promised_anonymous", u.promised_anonymous, "promised_file", u.promised_file);
}

PyMethodDef methods[] = {
    {"reserve", fast(reserve), METH_FASTCALL, "Promise frames to anonymous memory; False when they cannot be had."},
    {"unreserve", fast(unreserve), METH_FASTCALL, "Take a promise to anonymous memory back."},
    {"promise_file", fast(promise_file), METH_FASTCALL, "Keep room for a file page of so many frames."},
    {"allocate", fast(allocate), METH_FASTCALL, "Take frames for a backing: 0 granted, 1 reclaim first, 2 exhausted."},
    {"release", fast(release), METH_FASTCALL, "Give frames back."},
    {"changes", changes, METH_NOARGS, "Releases and completions so far, for wait()."},
    {"wait", fast(wait), METH_FASTCALL, "Wait until changes() differs from the number given, or a timeout in ms."},
    {"usage", usage, METH_NOARGS, "Frames in use and promised, by kind."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(Self::dealloc)},
    {Py_tp_methods, methods},
    {Py_tp_doc, const_cast<char*>("FramePool(budget, /)\n\nFrames of 4 KiB under a budget (paper 4.2).")},
    {0, nullptr},
};

PyType_Spec spec = {"k42._native.FramePool", sizeof(Self), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, slots};

}  // namespace

int add_frame_pool(PyObject* module) {
    vm_types.frame_pool = add_type(module, &spec);
    return vm_types.frame_pool ? 0 : -1;
}

}  // namespace k42::edge
