// k42._native.Window and Guard: the client's side. A Window is a range of this process's addresses that shows part
// of a file cache; its faults are served by the kernel process. A Guard watches the connection to that kernel.
#include <errno.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <system_error>

#include "vm.hpp"
#include "vm/guard.hpp"

namespace k42::edge {

namespace {

struct GuardValue {
    GuardValue(int socket, int grace_ms) : guard(socket, grace_ms) {}
    vm::Guard guard;
};
using SelfGuard = Holder<GuardValue>;
PyTypeObject* guard_type;

PyObject* make_guard(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    int socket, grace_ms;
    if (!unpack_new("Guard", args, kwargs, socket, grace_ms)) return nullptr;
    return SelfGuard::make(type, socket, grace_ms);
}

void dealloc_guard(PyObject* self) {
    {
        Detached detached;
        SelfGuard::of(self).guard.stop();
    }
    SelfGuard::dealloc(self);
}

PyObject* guard_watch(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint32_t cpu;
    int uffd;
    if (!unpack("watch", args, nargs, cpu, uffd)) return nullptr;
    SelfGuard::of(self).guard.watch(cpu, uffd);
    Py_RETURN_NONE;
}

PyObject* guard_obey(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    int memfd;
    if (!unpack("obey", args, nargs, memfd)) return nullptr;
    try {
        SelfGuard::of(self).guard.obey(memfd);
    } catch (const std::system_error& error) {
        errno = error.code().value();
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

PyObject* guard_forget(PyObject* self, PyObject*) {
    SelfGuard::of(self).guard.forget_in_child();
    Py_RETURN_NONE;
}

PyObject* guard_stop(PyObject* self, PyObject*) {
    {
        Detached detached;
        SelfGuard::of(self).guard.stop();
    }
    Py_RETURN_NONE;
}

// A range of addresses: reserved from the start, shown and hidden again, freed at the end.
struct WindowValue {
    WindowValue(uint64_t base_, uint64_t size_) : base(base_), size(size_), pid(getpid()) {}
    ~WindowValue() {
        try_hide();
        free();
    }

    static constexpr uint64_t kShown = 1;
    static constexpr uint64_t kExport = 2;

    bool shown() const { return use.load(std::memory_order_acquire) & kShown; }
    uint64_t exports() const { return use.load(std::memory_order_relaxed) / kExport; }
    bool try_export() {
        uint64_t seen = use.load(std::memory_order_relaxed);
        do {
            if (!(seen & kShown)) return false;
        } while (!use.compare_exchange_weak(seen, seen + kExport, std::memory_order_acquire));
        return true;
    }

    // The addresses lead nowhere, but stay this object's. False, and nothing changed, while buffers are exported.
    bool try_hide() {
        uint64_t seen = kShown;
        if (!use.compare_exchange_strong(seen, 0, std::memory_order_acq_rel)) return (seen & kShown) == 0;
        if (pid != getpid()) return true;  // a forked child never had the range
        vm::unlist_window(record);
        SelfGuard::of(guard.get()).guard.remove_range(base);
        lead_nowhere();
        return true;
    }
    void lead_nowhere() {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
        mmap(reinterpret_cast<void*>(base.load()), size, PROT_NONE, flags, -1, 0);
    }
    void free() {
        const uint64_t freed = base.exchange(0);
        if (freed && pid == getpid()) munmap(reinterpret_cast<void*>(freed), size);
    }

    std::atomic<uint64_t> base;  // 0 once freed
    const uint64_t size;
    const pid_t pid;
    // Whether it is shown, and kExport for each exported buffer, in one word: of a thread that hides the window and
    // one that exports a buffer of it, exactly one succeeds.
    std::atomic<uint64_t> use{0};
    // Written by show() alone, before kShown is set.
    bool writable = false;
    uint64_t delta = 0;   // of the first byte shown to Python, from base
    uint64_t length = 0;  // bytes shown to Python
    Ref guard;
    vm::WindowRecord* record = nullptr;
};
using Self = Holder<WindowValue>;

WindowValue& window_of(PyObject* self) { return Self::of(self); }

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    uint64_t size;
    if (!unpack_new("Window", args, kwargs, size)) return nullptr;
    if (size == 0 || size % vm::kPageSize) {
        PyErr_SetString(PyExc_ValueError, "a window is whole pages");
        return nullptr;
    }
    void* base = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return PyErr_SetFromErrno(PyExc_OSError);
    return Self::make(type, reinterpret_cast<uint64_t>(base), size);
}

void dealloc(PyObject* self) {
    {
        Detached detached;  // hiding can wait for the kernel
        window_of(self).try_hide();
    }
    Self::dealloc(self);
}
constexpr uint32_t kRead = 0, kShared = 1, kPrivate = 2;  // what show() makes of a window, as Windows::Kind

PyObject* show(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    int memfd, uffd;
    uint64_t offset, delta, length, status;
    uint32_t mode;
    std::string name;
    PyObject* guard = nullptr;
    if (!unpack("show", args, nargs, memfd, offset, mode, delta, length, uffd, guard, name, status)) return nullptr;
    WindowValue& window = window_of(self);
    GuardValue* watcher = checked<GuardValue>(guard, guard_type);
    if (!watcher) return nullptr;
    if (!window.base || window.shown() || delta + length > window.size || delta + length < delta) {
        PyErr_SetString(PyExc_ValueError, "the window is freed, is shown already, or is too small");
        return nullptr;
    }
    if (mode > kPrivate) {
        PyErr_SetString(PyExc_ValueError, "a window is for reading (0), shared (1) or a private copy (2)");
        return nullptr;
    }
    // A reader's mapping is private: Linux refuses to register a shared one of a read-only descriptor, and even an
    // mprotect() would give it only copies.
    const int protection = mode == kRead ? PROT_READ : PROT_READ | PROT_WRITE;
    const int flags = (mode == kShared ? MAP_SHARED : MAP_PRIVATE) | MAP_NORESERVE | MAP_FIXED;
    void* base = reinterpret_cast<void*>(window.base.load());
    // Not inherited by children: an absent page touched there would put a page of zeros into the shared cache. Until
    // that is sure, and the kernel asked for every page, nobody can touch it, here or in a child forked meanwhile.
    int error = 0;
    if (mmap(base, window.size, PROT_NONE, flags, memfd, off_t(offset)) == MAP_FAILED ||
        madvise(base, window.size, MADV_DONTFORK) < 0) {
        error = errno;
    } else {
        error = vm::register_range(uffd, window.base, window.size, mode == kShared);
    }
    if (error == 0 && mprotect(base, window.size, protection) < 0) error = errno;
    if (error) {
        window.lead_nowhere();
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    watcher->guard.add_range({window.base, window.size, memfd, offset, vm::Windows::Kind(mode)});
    window.guard = Ref::borrow(guard);
    window.record = vm::list_window(window.base, window.size, offset, name, reinterpret_cast<const void*>(status),
                                    watcher->guard.abandoned());
    window.writable = mode != kRead;
    window.delta = delta;
    window.length = length;
    window.use.store(WindowValue::kShown, std::memory_order_release);
    Py_RETURN_NONE;
}

PyObject* hide(PyObject* self, PyObject*) {
    bool hidden;
    {
        Detached detached;
        hidden = window_of(self).try_hide();
    }
    if (!hidden) {
        PyErr_SetString(PyExc_BufferError, "cannot close: an array or memoryview uses the memory of the mapping");
        return nullptr;
    }
    Py_RETURN_NONE;
}

PyObject* free_window(PyObject* self, PyObject*) {
    if (window_of(self).shown()) {
        PyErr_SetString(PyExc_ValueError, "the window is shown: hide it first");
        return nullptr;
    }
    window_of(self).free();
    Py_RETURN_NONE;
}

int get_buffer(PyObject* self, Py_buffer* view, int flags) {
    WindowValue& window = window_of(self);
    if (window.pid != getpid()) {
        PyErr_SetString(PyExc_BufferError,
                        "this mapping belongs to the parent process: open it again in the forked child");
        return -1;
    }
    if (!window.try_export()) {
        PyErr_SetString(PyExc_ValueError, "mapping closed");
        return -1;
    }
    auto* start = reinterpret_cast<void*>(window.base.load() + window.delta);
    if (PyBuffer_FillInfo(view, self, start, Py_ssize_t(window.length), !window.writable, flags) < 0) {
        window.use.fetch_sub(WindowValue::kExport, std::memory_order_release);
        return -1;
    }
    return 0;
}

void release_buffer(PyObject* self, Py_buffer*) {
    window_of(self).use.fetch_sub(WindowValue::kExport, std::memory_order_release);
}

Py_ssize_t length(PyObject* self) {
    const WindowValue& window = window_of(self);
    if (!window.shown()) {
        PyErr_SetString(PyExc_ValueError, "mapping closed");
        return -1;
    }
    return Py_ssize_t(window.length);
}

PyObject* get_base(PyObject* self, void*) { return PyLong_FromUnsignedLongLong(window_of(self).base.load()); }
PyObject* get_exports(PyObject* self, void*) { return PyLong_FromUnsignedLongLong(window_of(self).exports()); }
PyObject* get_shown(PyObject* self, void*) { return PyBool_FromLong(window_of(self).shown()); }

PyObject* open_userfaultfd(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    bool user_mode_only;
    if (!unpack("open_userfaultfd", args, nargs, user_mode_only)) return nullptr;
    const int fd = vm::open_userfaultfd(user_mode_only);
    if (fd >= 0) return PyLong_FromLong(fd);
    errno = -fd;
    return PyErr_SetFromErrno(PyExc_OSError);
}

// Maps the kernel's status page, for good: the SIGBUS handler may read it at any time.
PyObject* map_status(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    int memfd;
    if (!unpack("map_status", args, nargs, memfd)) return nullptr;
    void* page = mmap(nullptr, vm::StatusPage::kBytes, PROT_READ, MAP_SHARED, memfd, 0);
    if (page == MAP_FAILED) return PyErr_SetFromErrno(PyExc_OSError);
    return PyLong_FromUnsignedLongLong(reinterpret_cast<uint64_t>(page));
}

PyMethodDef guard_methods[] = {
    {"watch", fast(guard_watch), METH_FASTCALL,
     "watch(cpu, uffd): takes it over; its faults, too, when the kernel is given up."},
    {"obey", fast(guard_obey), METH_FASTCALL, "obey(memfd): execute the kernel's commands in a thread; once."},
    {"forget", guard_forget, METH_NOARGS, "In a forked child: close its copies of the userfaultfds."},
    {"stop", guard_stop, METH_NOARGS, "End the watching thread."},
    {nullptr, nullptr, 0, nullptr},
};
PyMethodDef methods[] = {
    {"show", fast(show), METH_FASTCALL,
     "show(memfd, offset, mode, delta, length, uffd, guard, name, status): map the file cache here."},
    {"hide", hide, METH_NOARGS, "Unmap; the addresses stay reserved. BufferError while buffers are exported."},
    {"free", free_window, METH_NOARGS, "Give the addresses back."},
    {nullptr, nullptr, 0, nullptr},
};
PyMethodDef functions[] = {
    {"open_userfaultfd", fast(open_userfaultfd), METH_FASTCALL, "open_userfaultfd(user_mode_only): its descriptor."},
    {"map_status", fast(map_status), METH_FASTCALL, "map_status(memfd): the address of the kernel's status page."},
    {nullptr, nullptr, 0, nullptr},
};
PyGetSetDef properties[] = {
    {"base", get_base, nullptr, "The window's first address; 0 once freed.", nullptr},
    {"exports", get_exports, nullptr, "How many buffers are exported.", nullptr},
    {"shown", get_shown, nullptr, "Whether it shows a file cache.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot guard_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make_guard)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc_guard)},
    {Py_tp_methods, guard_methods},
    {Py_tp_doc, const_cast<char*>("Guard(socket, grace_ms, /)\n\nWatches the connection to a kernel.")},
    {0, nullptr},
};
PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {Py_bf_getbuffer, reinterpret_cast<void*>(get_buffer)},
    {Py_bf_releasebuffer, reinterpret_cast<void*>(release_buffer)},
    {Py_sq_length, reinterpret_cast<void*>(length)},
    {Py_tp_doc, const_cast<char*>("Window(size, /)\n\nA range of addresses that can show a file cache.")},
    {0, nullptr},
};

PyType_Spec guard_spec = {"k42._native.Guard", sizeof(SelfGuard), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                          guard_slots};
PyType_Spec spec = {"k42._native.Window", sizeof(Self), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_BASETYPE, slots};

}  // namespace

int add_window(PyObject* module) {
    guard_type = add_type(module, &guard_spec);
    if (!guard_type || !add_type(module, &spec)) return -1;
    return PyModule_AddFunctions(module, functions);
}

}  // namespace k42::edge
