// What the experiments measure with: k42._native.BareWindow, touch(), visit_pages() and dontneed().
#include <sys/mman.h>

#include "arguments.hpp"
#include "edge.hpp"
#include "vm/bare.hpp"

namespace k42::edge {

namespace {

constexpr std::size_t page = 4096;

using Self = Holder<vm::BareWindow>;

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    int cpu;
    std::size_t bytes, block;
    bool resident;
    if (!unpack_new("BareWindow", args, kwargs, cpu, bytes, block, resident)) return nullptr;
    if (cpu < 0 || cpu >= CPU_SETSIZE || bytes == 0 || bytes % page || block == 0 || block % page) {
        PyErr_SetString(PyExc_ValueError, "a bare window has a CPU, and whole pages in all and a fault");
        return nullptr;
    }
    return Self::make(type, cpu, bytes, block, resident);
}

int get_buffer(PyObject* self, Py_buffer* view, int flags) {
    const vm::BareWindow& window = Self::of(self);
    return PyBuffer_FillInfo(view, self, window.data(), Py_ssize_t(window.size()), 0, flags);
}

PyObject* get_faults(PyObject* self, void*) { return PyLong_FromUnsignedLongLong(Self::of(self).faults()); }

// A view of some object's memory, for a scope.
class Memory {
  public:
    Memory(PyObject* object, bool writable) {
        held_ = PyObject_GetBuffer(object, &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) == 0;
    }
    ~Memory() {
        if (held_) PyBuffer_Release(&view_);
    }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    explicit operator bool() const { return held_; }  // false: an exception is set
    std::byte* data() const { return static_cast<std::byte*>(view_.buf); }
    std::size_t size() const { return std::size_t(view_.len); }

  private:
    Py_buffer view_;
    bool held_;
};

PyObject* touch(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* buffer;
    std::size_t stride;
    bool write;
    std::uint64_t start;
    if (!unpack("touch", args, nargs, buffer, stride, write, start)) return nullptr;
    if (stride == 0) {
        PyErr_SetString(PyExc_ValueError, "the stride must be at least one byte");
        return nullptr;
    }
    const Memory memory(buffer, write);
    if (!memory) return nullptr;
    double seconds;
    {
        Detached detached;
        seconds = vm::touch(memory.data(), memory.size(), stride, write, start);
    }
    return PyFloat_FromDouble(seconds);
}

PyObject* visit_pages(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* buffer;
    std::uint64_t count, seed, stamp;
    if (!unpack("visit_pages", args, nargs, buffer, count, seed, stamp)) return nullptr;
    const Memory memory(buffer, stamp != 0);
    if (!memory) return nullptr;
    if (memory.size() < page) {
        PyErr_SetString(PyExc_ValueError, "there is not one whole page");
        return nullptr;
    }
    vm::Visit visit;
    {
        Detached detached;
        visit = vm::visit_pages(memory.data(), memory.size(), count, seed, stamp);
    }
    return Py_BuildValue("(dK)", visit.seconds, visit.wrong);
}

PyObject* dontneed(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* buffer;
    if (!unpack("dontneed", args, nargs, buffer)) return nullptr;
    const Memory memory(buffer, false);
    if (!memory) return nullptr;
    if (madvise(memory.data(), memory.size(), MADV_DONTNEED) < 0) return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

PyGetSetDef properties[] = {
    {"faults", get_faults, nullptr, "Faults served so far.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};
PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(Self::dealloc)},
    {Py_tp_getset, properties},
    {Py_bf_getbuffer, reinterpret_cast<void*>(get_buffer)},
    {Py_tp_doc, const_cast<char*>("BareWindow(cpu, nbytes, block, resident, /)\n\n"
                                  "Memory whose faults a native thread on `cpu` takes, `block` bytes at a time.")},
    {0, nullptr},
};
PyType_Spec spec = {"k42._native.BareWindow", sizeof(Self), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, slots};

PyMethodDef functions[] = {
    {"touch", fast(touch), METH_FASTCALL,
     "touch(buffer, stride, write, start): wait for `start` (monotonic ns), touch a byte every `stride`; "
     "seconds."},
    {"visit_pages", fast(visit_pages), METH_FASTCALL,
     "visit_pages(buffer, count, seed, stamp): check the numbers that pages begin with, in order or at random, and "
     "write "
     "the stamp behind them unless it is 0; (seconds, pages that are wrong)."},
    {"dontneed", fast(dontneed), METH_FASTCALL, "dontneed(buffer): unmap its pages; shared frames stay."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_experiments(PyObject* module) {
    if (!add_type(module, &spec)) return -1;
    return PyModule_AddFunctions(module, functions);
}

}  // namespace k42::edge
