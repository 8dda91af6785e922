// The accesses of k42.vm.Mapping to its own memory: copies, moves and searches that let other threads run while a page
// is fetched, can be interrupted by Ctrl-C, and raise k42._native.AccessFailed where a page could not be had.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "vm.hpp"
#include "vm/access.hpp"

namespace k42::edge {

namespace {

PyObject* access_failed;  // the exception type: (offset in the mapping, kernel is gone, page is marked, reason)

constexpr size_t kChunk = 1 << 20;  // bytes between two looks at signals

// Pages that were touched here lately, each in a slot of its own: they are most probably still mapped, so that a small
// access to them keeps the interpreter. Giving it up for every byte would make each a wait for other threads' turns.
std::array<std::atomic<uint64_t>, 4096> touched;

std::atomic<uint64_t>& slot_of(uint64_t page) { return touched[page % touched.size()]; }

bool touched_lately(uint64_t start, size_t length) {
    const uint64_t first = start / vm::kPageSize, last = (start + length - 1) / vm::kPageSize;
    if (last - first > 1) return false;
    return slot_of(first).load(std::memory_order_relaxed) == first &&
           slot_of(last).load(std::memory_order_relaxed) == last;
}

// A buffer of an object, released with its scope.
class View {
  public:
    View() { view_.obj = nullptr; }
    ~View() {
        if (view_.obj) PyBuffer_Release(&view_);
    }
    View(const View&) = delete;
    View& operator=(const View&) = delete;
    bool take(PyObject* o, int flags) { return PyObject_GetBuffer(o, &view_, flags) == 0; }
    size_t size() const { return size_t(view_.len); }
    const char* bytes() const { return static_cast<const char*>(view_.buf); }

  private:
    Py_buffer view_;
};

// A shown window, held open for an access of this scope.
struct Open : WindowAccess {
    bool has(uint64_t offset, uint64_t count) const {
        if (offset <= size && count <= size - offset) return true;
        PyErr_SetString(PyExc_IndexError, "outside the mapping");
        return false;
    }
    const char* bytes() const { return reinterpret_cast<const char*>(start); }
};

bool raise(const Open& open, const vm::AccessFailure& failure) {
    Ref reason = Ref::steal(PyUnicode_DecodeUTF8(failure.reason, Py_ssize_t(std::strlen(failure.reason)), "replace"));
    if (!reason) return false;
    const auto offset = static_cast<long long>(failure.address) - static_cast<long long>(open.start);
    Ref arguments = Ref::steal(Py_BuildValue("(LOOO)", offset, failure.abandoned ? Py_True : Py_False,
                                             failure.marked ? Py_True : Py_False, reason.get()));
    if (arguments) PyErr_SetObject(access_failed, arguments.get());
    return false;
}

// One guarded touch of [start, start + length); false with an exception set. Signals are handled after it where it
// may have waited.
template <class Touch>
bool touch(const Open& open, uint64_t start, size_t length, Touch& work) {
    vm::AccessFailure failure;
    auto run = [&] {
        return vm::touch_guarded(
            *open.record, start, length, [](void* w) { (*static_cast<Touch*>(w))(); }, &work, failure);
    };
    if (touched_lately(start, length)) return run() || raise(open, failure);
    bool done;
    {
        Detached detached;
        vm::lead_bus_handlers();
        done = run();
    }
    if (!done) return raise(open, failure);
    for (uint64_t page = start / vm::kPageSize; page <= (start + length - 1) / vm::kPageSize; ++page) {
        slot_of(page).store(page, std::memory_order_relaxed);
    }
    return PyErr_CheckSignals() == 0;
}

// What a copy is asked to touch: `count` bytes, `step` apart, from the byte `start` of the mapping.
struct Span {
    uint64_t start;
    uint64_t count;
    int64_t step;

    static bool parse(PyObject* start, PyObject* count, PyObject* step, Span& out) {
        if (!convert(start, out.start) || !convert(count, out.count)) return false;
        out.step = PyLong_AsLongLong(step);
        if (out.step == -1 && PyErr_Occurred()) return false;
        if (out.step != 0) return true;
        PyErr_SetString(PyExc_ValueError, "a step is not zero");
        return false;
    }
    uint64_t stride() const { return step < 0 ? -uint64_t(step) : uint64_t(step); }
    uint64_t at(uint64_t i) const { return start + uint64_t(step) * i; }  // modulo 2^64, as signed steps want it
    bool inside(const Open& open) const {
        if (count == 0) return true;
        const uint64_t size = open.size;
        // The second first: then the third cannot wrap around.
        if (start < size && count - 1 <= (size - 1) / stride() && at(count - 1) < size) return true;
        PyErr_SetString(PyExc_IndexError, "outside the mapping");
        return false;
    }
};

// Calls work(memory, done, n) for parts of the span, under guard: `n` bytes from `memory` on, the first of which is
// number `done` of the span.
template <class Work>
bool for_parts(const Open& open, const Span& span, Work work) {
    const uint64_t stride = span.stride();
    const uint64_t most = std::max<uint64_t>(1, kChunk / stride);
    for (uint64_t done = 0; done < span.count;) {
        const uint64_t n = std::min(most, span.count - done);
        const uint64_t first = open.start + span.at(done);
        const uint64_t length = stride * (n - 1) + 1;
        auto part = [&] { work(reinterpret_cast<char*>(first), done, n); };
        if (!touch(open, span.step < 0 ? first - (length - 1) : first, length, part)) return false;
        done += n;
    }
    return true;
}

PyObject* copy_out(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    PyObject *window, *start, *count, *step;
    Span span;
    if (!unpack("copy_out", args, nargs, window, start, count, step) || !Span::parse(start, count, step, span)) {
        return nullptr;
    }
    Open open;
    if (!open.begin(window, false) || !span.inside(open)) return nullptr;
    Ref result = Ref::steal(PyBytes_FromStringAndSize(nullptr, Py_ssize_t(span.count)));
    if (!result) return nullptr;
    char* to = PyBytes_AS_STRING(result.get());
    const bool done = for_parts(open, span, [&](const char* memory, uint64_t at, uint64_t n) {
        if (span.step == 1) {
            std::memcpy(to + at, memory, n);
        } else {
            for (uint64_t i = 0; i < n; ++i) to[at + i] = memory[span.step * int64_t(i)];
        }
    });
    return done ? result.release() : nullptr;
}

PyObject* copy_in(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    PyObject *window, *start, *step, *data;
    if (!unpack("copy_in", args, nargs, window, start, step, data)) return nullptr;
    View source;
    Open open;
    if (!source.take(data, PyBUF_SIMPLE)) return nullptr;
    Ref count = Ref::steal(PyLong_FromSize_t(source.size()));
    Span span;
    if (!count || !Span::parse(start, count.get(), step, span)) return nullptr;
    if (!open.begin(window, true) || !span.inside(open)) return nullptr;
    const bool done = for_parts(open, span, [&](char* memory, uint64_t at, uint64_t n) {
        if (span.step == 1) {
            std::memmove(memory, source.bytes() + at, n);
        } else {
            for (uint64_t i = 0; i < n; ++i) memory[span.step * int64_t(i)] = source.bytes()[at + i];
        }
    });
    if (!done) return nullptr;
    Py_RETURN_NONE;
}

// As memmove, in parts by way of other memory, so that each part can be done again: in the direction in which nothing
// is overwritten before it was read.
PyObject* move_within(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* window;
    uint64_t to, from, count;
    if (!unpack("move_within", args, nargs, window, to, from, count)) return nullptr;
    Open open;
    if (!open.begin(window, true) || !open.has(to, count) || !open.has(from, count)) return nullptr;
    constexpr uint64_t kPart = 1 << 16;
    const std::unique_ptr<char[]> between(new (std::nothrow) char[std::min(kPart, count)]);
    if (!between) return PyErr_NoMemory();
    for (uint64_t done = 0; done < count;) {
        const uint64_t n = std::min(kPart, count - done);
        const uint64_t at = to <= from ? done : count - done - n;
        char* target = reinterpret_cast<char*>(open.start + to + at);
        const char* source = open.bytes() + from + at;
        auto take = [&] { std::memcpy(between.get(), source, n); };
        auto put = [&] { std::memcpy(target, between.get(), n); };
        if (!touch(open, reinterpret_cast<uint64_t>(source), n, take)) return nullptr;
        if (!touch(open, reinterpret_cast<uint64_t>(target), n, put)) return nullptr;
        done += n;
    }
    Py_RETURN_NONE;
}

// The last place of `needle` (not empty) in the text, or nullptr.
const char* find_last(const char* text, size_t size, const char* needle, size_t length) {
    while (size >= length) {
        const auto* last = static_cast<const char*>(memrchr(text, needle[0], size - length + 1));
        if (!last) return nullptr;
        if (std::memcmp(last, needle, length) == 0) return last;
        size = size_t(last - text) + length - 1;
    }
    return nullptr;
}

// The lowest (or highest) offset of the bytes in [start, end) of the mapping; -1 when they are not there.
PyObject* find(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    PyObject *window, *data;
    uint64_t start, end;
    bool backwards;
    if (!unpack("find", args, nargs, window, data, start, end, backwards)) return nullptr;
    View needle;
    Open open;
    if (!needle.take(data, PyBUF_SIMPLE) || !open.begin(window, false)) return nullptr;
    if (start > end) return PyLong_FromLong(-1);
    if (!open.has(start, end - start)) return nullptr;
    const size_t length = needle.size();
    if (length == 0) return PyLong_FromUnsignedLongLong(backwards ? end : start);
    if (length > end - start) return PyLong_FromLong(-1);
    const uint64_t places = end - start - length + 1;  // where it can begin
    for (uint64_t done = 0; done < places;) {
        const uint64_t n = std::min<uint64_t>(kChunk, places - done);
        const char* text = open.bytes() + start + (backwards ? places - done - n : done);
        const size_t size = n + length - 1;
        const char* found = nullptr;
        auto part = [&] {
            const void* at =
                backwards ? find_last(text, size, needle.bytes(), length) : memmem(text, size, needle.bytes(), length);
            found = static_cast<const char*>(at);
        };
        if (!touch(open, reinterpret_cast<uint64_t>(text), size, part)) return nullptr;
        if (found) return PyLong_FromSsize_t(found - open.bytes());
        done += n;
    }
    return PyLong_FromLong(-1);
}

PyMethodDef functions[] = {
    {"copy_out", fast(copy_out), METH_FASTCALL, "copy_out(window, start, count, step): these bytes of the mapping."},
    {"copy_in", fast(copy_in), METH_FASTCALL, "copy_in(window, start, step, data): write them."},
    {"move_within", fast(move_within), METH_FASTCALL, "move_within(window, to, from, count): as memmove."},
    {"find", fast(find), METH_FASTCALL, "find(window, data, start, end, backwards): the offset, or -1."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_access(PyObject* module) {
    access_failed = PyErr_NewExceptionWithDoc(
        "k42._native.AccessFailed",
        "(offset in the mapping, whether the kernel is gone, whether the page is marked from earlier, reason)", nullptr,
        nullptr);
    if (!access_failed || PyModule_AddObjectRef(module, "AccessFailed", access_failed) < 0) return -1;
    return PyModule_AddFunctions(module, functions);
}

}  // namespace k42::edge
