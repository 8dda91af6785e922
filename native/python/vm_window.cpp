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
PyTypeObject* window_type;

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
        hide_unused();
        free();
    }

    static constexpr uint64_t kShown = 1;
    static constexpr uint64_t kBusy = 2;  // for the few instructions of an exchange
    static constexpr uint64_t kAccess = 4;
    static constexpr uint64_t kExport = uint64_t{1} << 32;

    bool shown() const { return settled() & kShown; }
    uint64_t exports() const { return use.load(std::memory_order_relaxed) / kExport; }
    bool accessed() const { return use.load(std::memory_order_acquire) % kExport >= kAccess; }
    uint64_t settled() const {
        for (;;) {
            const uint64_t seen = use.load(std::memory_order_acquire);
            if (!(seen & kBusy)) return seen;
            sched_yield();
        }
    }
    // `what`: kAccess or kExport. False when it is not shown.
    bool try_use(uint64_t what) {
        for (;;) {
            uint64_t seen = settled();
            if (!(seen & kShown)) return false;
            if (use.compare_exchange_weak(seen, seen + what, std::memory_order_acquire)) return true;
        }
    }
    void unuse(uint64_t what) { use.fetch_sub(what, std::memory_order_release); }

    // Hiding in two steps, between which accesses end that were on their way. The first: from now on there is no new
    // one. False, and nothing changed, while buffers are exported. Nothing is left to do where `hiding` stays false.
    bool begin_hide(bool& hiding) {
        for (;;) {
            uint64_t seen = settled();
            if (!(seen & kShown)) return true;
            if (seen >= kExport) return false;
            hiding = use.compare_exchange_weak(seen, seen & ~kShown, std::memory_order_acq_rel);
            if (hiding) return true;
        }
    }
    void undo_hide() { use.fetch_or(kShown, std::memory_order_release); }
    void end_hide() {
        if (pid != getpid()) return;  // a forked child never had the range
        vm::unlist_window(record);
        SelfGuard::of(guard.get()).guard.remove_range(base);
        lead_nowhere();
    }
    void hide_unused() {
        bool hiding = false;
        begin_hide(hiding);
        if (hiding) end_hide();
    }
    // False, and nothing changed, while buffers of either are exported, or accesses on their way.
    bool try_exchange(WindowValue& other) {
        uint64_t seen = kShown;
        if (!use.compare_exchange_strong(seen, kBusy, std::memory_order_acq_rel)) return false;
        seen = kShown;
        if (!other.use.compare_exchange_strong(seen, kBusy, std::memory_order_acq_rel)) {
            use.store(kShown, std::memory_order_release);
            return false;
        }
        other.base = base.exchange(other.base);
        std::swap(size, other.size);
        std::swap(writable, other.writable);
        std::swap(delta, other.delta);
        std::swap(length, other.length);
        std::swap(guard, other.guard);
        std::swap(record, other.record);
        other.use.store(kShown, std::memory_order_release);
        use.store(kShown, std::memory_order_release);
        return true;
    }
    void lead_nowhere() const {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
        mmap(reinterpret_cast<void*>(base.load()), size, PROT_NONE, flags, -1, 0);
    }
    void free() {
        const uint64_t freed = base.exchange(0);
        if (freed && pid == getpid()) munmap(reinterpret_cast<void*>(freed), size);
    }

    std::atomic<uint64_t> base;  // 0 once freed
    uint64_t size;
    pid_t pid;  // whose it is; changes only in a forked child that has one thread, and shows it again
    // Whether it is shown, kAccess for each access of our own that is on its way, and kExport for each exported buffer,
    // in one word: of a thread that hides the window and one that begins to use it, exactly one succeeds.
    std::atomic<uint64_t> use{0};
    // Written before kShown is set, by show() and by an exchange.
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
        window_of(self).hide_unused();
    }
    Self::dealloc(self);
}

constexpr uint32_t kRead = 0, kShared = 1, kPrivate = 2;  // what show() makes of a window, as Windows::Kind

// Has the window show the frames at its addresses; false with an exception set, and it leads nowhere.
bool map_window(const WindowValue& window, int memfd, uint64_t offset, uint32_t mode, int uffd) {
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
        PyErr_SetFromErrno(PyExc_OSError);
        return false;
    }
    return true;
}

// Lists it for those who serve it and who explain its errors.
void list_window(WindowValue& window, int memfd, uint64_t offset, uint32_t mode, PyObject* guard,
                 const std::string& name, uint64_t status) {
    vm::Guard& watcher = SelfGuard::of(guard).guard;
    watcher.add_range({window.base, window.size, memfd, offset, vm::Windows::Kind(mode)});
    window.guard = Ref::borrow(guard);
    window.record = vm::list_window(window.base, window.size, offset, mode == kPrivate, name,
                                    reinterpret_cast<const void*>(status), watcher.abandoned());
}

PyObject* show(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    int memfd, uffd;
    uint64_t offset, delta, length, status;
    uint32_t mode;
    std::string name;
    PyObject* guard = nullptr;
    if (!unpack("show", args, nargs, memfd, offset, mode, delta, length, uffd, guard, name, status)) return nullptr;
    WindowValue& window = window_of(self);
    if (!checked<GuardValue>(guard, guard_type)) return nullptr;
    if (!window.base || window.shown() || delta + length > window.size || delta + length < delta) {
        PyErr_SetString(PyExc_ValueError, "the window is freed, is shown already, or is too small");
        return nullptr;
    }
    if (mode > kPrivate) {
        PyErr_SetString(PyExc_ValueError, "a window is for reading (0), shared (1) or a private copy (2)");
        return nullptr;
    }
    if (!map_window(window, memfd, offset, mode, uffd)) return nullptr;
    list_window(window, memfd, offset, mode, guard, name, status);
    window.writable = mode != kRead;
    window.delta = delta;
    window.length = length;
    window.use.store(WindowValue::kShown, std::memory_order_release);
    Py_RETURN_NONE;
}

// In a forked child, where nothing is at the addresses of the parent's window: it shows the frames there again, served
// by a kernel that knows the child, and the buffers that the parent had exported are the child's, too.
PyObject* show_again(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    int memfd, uffd;
    uint64_t offset, status;
    uint32_t mode;
    std::string name;
    PyObject* guard = nullptr;
    if (!unpack("show_again", args, nargs, memfd, offset, mode, uffd, guard, name, status)) return nullptr;
    WindowValue& window = window_of(self);
    if (!checked<GuardValue>(guard, guard_type)) return nullptr;
    if (window.pid == getpid() || !window.shown() || mode >= kPrivate) {
        PyErr_SetString(PyExc_ValueError, "only what the parent has shown, and without copies, is shown again");
        return nullptr;
    }
    if (!map_window(window, memfd, offset, mode, uffd)) return nullptr;
    window.pid = getpid();
    vm::unlist_window(window.record);
    list_window(window, memfd, offset, mode, guard, name, status);
    // Accesses that were on their way in the parent are of threads that the child does not have.
    window.use.store(window.exports() * WindowValue::kExport | WindowValue::kShown, std::memory_order_release);
    Py_RETURN_NONE;
}

// Calls `attempt` until it returns true, as long as accesses of other threads to the window are on their way; false
// with an exception set where Ctrl-C came first.
template <class Attempt>
bool wait_for_accesses(Attempt attempt) {
    for (int turns = 0;; ++turns) {
        if (attempt()) return true;
        {
            Detached detached;
            turns < 100 ? void(sched_yield()) : void(usleep(1000));
        }
        if (PyErr_CheckSignals() < 0) return false;
    }
}

PyObject* hide(PyObject* self, PyObject*) {
    WindowValue& window = window_of(self);
    bool hiding = false;
    if (!window.begin_hide(hiding)) {
        PyErr_SetString(PyExc_BufferError, "cannot close: an array or memoryview uses the memory of the mapping");
        return nullptr;
    }
    if (!hiding) Py_RETURN_NONE;
    if (!wait_for_accesses([&] { return !window.accessed(); })) {
        window.undo_hide();
        return nullptr;
    }
    {
        Detached detached;
        window.end_hide();
    }
    Py_RETURN_NONE;
}

// Two shown windows change places, at once for whoever takes a buffer: for resizing.
PyObject* exchange(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* with = nullptr;
    if (!unpack("exchange", args, nargs, with)) return nullptr;
    WindowValue* other = checked<WindowValue>(with, window_type);
    if (!other) return nullptr;
    WindowValue& window = window_of(self);
    bool exchanged = false;
    const bool tried = wait_for_accesses([&] {
        exchanged = window.try_exchange(*other);
        return exchanged || window.exports() || other->exports() || !window.shown() || !other->shown();
    });
    if (!tried) return nullptr;
    if (!exchanged) {
        PyErr_SetString(PyExc_BufferError, "cannot resize: an array or memoryview uses the memory of the mapping");
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

bool is_ours(const WindowValue& window) {
    if (window.pid == getpid()) return true;
    PyErr_SetString(PyExc_BufferError, "this mapping belongs to the parent process: open it again in the forked child");
    return false;
}

int get_buffer(PyObject* self, Py_buffer* view, int flags) {
    WindowValue& window = window_of(self);
    if (!is_ours(window)) return -1;
    if (!window.try_use(WindowValue::kExport)) {
        PyErr_SetString(PyExc_ValueError, "mapping closed");
        return -1;
    }
    auto* start = reinterpret_cast<void*>(window.base.load() + window.delta);
    if (PyBuffer_FillInfo(view, self, start, Py_ssize_t(window.length), !window.writable, flags) < 0) {
        window.unuse(WindowValue::kExport);
        return -1;
    }
    return 0;
}

void release_buffer(PyObject* self, Py_buffer*) { window_of(self).unuse(WindowValue::kExport); }

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
    {"show_again", fast(show_again), METH_FASTCALL,
     "show_again(memfd, offset, mode, uffd, guard, name, status): in a forked child, what the parent has shown here."},
    {"hide", hide, METH_NOARGS, "Unmap; the addresses stay reserved. BufferError while buffers are exported."},
    {"exchange", fast(exchange), METH_FASTCALL,
     "exchange(window): change places with it. BufferError while buffers of either are exported."},
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
    window_type = add_type(module, &spec);
    if (!guard_type || !window_type) return -1;
    return PyModule_AddFunctions(module, functions);
}

bool WindowAccess::begin(PyObject* window, bool write) {
    WindowValue* value = checked<WindowValue>(window, window_type);
    if (!value || !is_ours(*value)) return false;
    if (!value->try_use(WindowValue::kAccess)) {
        PyErr_SetString(PyExc_ValueError, "mapping closed");
        return false;
    }
    window_ = Ref::borrow(window);
    start = value->base.load() + value->delta;
    size = value->length;
    record = value->record;
    if (!write || value->writable) return true;
    PyErr_SetString(PyExc_TypeError, "can't modify a read-only mapping");
    return false;
}

WindowAccess::~WindowAccess() {
    if (window_) window_of(window_.get()).unuse(WindowValue::kAccess);
}

}  // namespace k42::edge
