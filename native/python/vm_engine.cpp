// k42._native.Engine: the fault engine, and the queue of what it hands up to Python.
#include <unordered_map>

#include "vm.hpp"

namespace k42::edge {

namespace {

struct EngineValue {
    EngineValue(std::vector<int> cpus, bool sticky, bool homing)
        : engine(std::move(cpus), sticky, homing), hats(Ref::steal(PySet_New(nullptr))) {}
    vm::Engine engine;
    Ref hats;  // the set of UffdHats that the server threads may use: kept alive here
};
using Self = Holder<EngineValue>;

vm::Engine& engine_of(PyObject* self) { return Self::of(self).engine; }

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    PyObject* numbers;
    bool sticky, homing;
    if (!unpack_new("Engine", args, kwargs, numbers, sticky, homing)) return nullptr;
    Ref sequence = Ref::steal(PySequence_Tuple(numbers));
    if (!sequence) return nullptr;
    std::vector<int> cpus;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sequence.get()); ++i) {
        int cpu;
        if (!convert(PyTuple_GET_ITEM(sequence.get(), i), cpu)) return nullptr;
        if (cpu < 0 || cpu >= CPU_SETSIZE) {
            PyErr_SetString(PyExc_ValueError, "no such CPU");
            return nullptr;
        }
        cpus.push_back(cpu);
    }
    Ref self = Ref::steal(Self::make(type, std::move(cpus), sticky, homing));
    if (!self || !Self::of(self.get()).hats) return nullptr;
    return self.release();
}

void dealloc(PyObject* self) {
    {
        // The server threads never need the interpreter, but the join may take a moment.
        Detached detached;
        engine_of(self).stop();
    }
    Self::dealloc(self);
}

PyObject* start(PyObject* self, PyObject*) {
    engine_of(self).start();
    Py_RETURN_NONE;
}

PyObject* keep_records(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    int memfd;
    if (!unpack("keep_records", args, nargs, memfd)) return nullptr;
    const int given_back = engine_of(self).keep_records(memfd);
    return given_back < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(given_back);
}

PyObject* stop(PyObject* self, PyObject*) {
    {
        Detached detached;
        engine_of(self).stop();
    }
    Py_RETURN_NONE;
}

PyObject* add(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* hat;
    int cpu, pid;
    bool sticky, homing;
    if (!unpack("add", args, nargs, hat, cpu, pid, sticky, homing)) return nullptr;
    HatValue* value = checked<HatValue>(hat, vm_types.hat);
    if (!value) return nullptr;
    auto* uffd = dynamic_cast<vm::UffdHat*>(value->hat);
    if (!uffd || cpu < 0 || cpu >= int(engine_of(self).cpus().size()) || uffd->descriptor(cpu) < 0) {
        PyErr_SetString(PyExc_ValueError, "a UffdHat with a userfaultfd on a CPU of the engine is needed");
        return nullptr;
    }
    if (PySet_Add(Self::of(self).hats.get(), hat) < 0) return nullptr;
    bool added;
    {
        Detached detached;
        added = engine_of(self).add(uffd, cpu, pid, sticky, homing);
    }
    if (!added) return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

PyObject* remove(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* hat;
    if (!unpack("remove", args, nargs, hat)) return nullptr;
    HatValue* value = checked<HatValue>(hat, vm_types.hat);
    if (!value) return nullptr;
    if (auto* uffd = dynamic_cast<vm::UffdHat*>(value->hat)) {
        Detached detached;
        engine_of(self).remove(uffd);
    }
    if (PySet_Discard(Self::of(self).hats.get(), hat) < 0) return nullptr;
    Py_RETURN_NONE;
}

PyObject* synchronize(PyObject* self, PyObject*) {
    {
        Detached detached;
        engine_of(self).synchronize();
    }
    Py_RETURN_NONE;
}

PyObject* handle(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    PyObject* hat;
    int cpu;
    uint64_t address;
    bool write;
    if (!unpack("handle", args, nargs, hat, cpu, address, write)) return nullptr;
    HatValue* value = checked<HatValue>(hat, vm_types.hat);
    if (!value) return nullptr;
    if (cpu < 0 || cpu >= value->hat->cpus()) {
        PyErr_SetString(PyExc_ValueError, "no such CPU");
        return nullptr;
    }
    bool done;
    {
        Detached detached;
        done = vm::Engine::handle({value->hat, cpu, address & ~(vm::kPageSize - 1), write});
    }
    (void)self;
    return PyBool_FromLong(done);
}

PyObject* next(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    int cpu;
    if (!unpack("next", args, nargs, cpu)) return nullptr;
    if (cpu < 0 || cpu >= int(engine_of(self).cpus().size())) {
        PyErr_SetString(PyExc_ValueError, "no such CPU");
        return nullptr;
    }
    std::optional<vm::HandedUp> fault;
    uint64_t id = 0;
    {
        Detached detached;
        fault = engine_of(self).next(cpu);
        if (fault) {
            id = fault->hat->id();
            fault->hat->release();
        }
    }
    if (!fault) Py_RETURN_NONE;
    return Py_BuildValue("(KiKKO)", id, fault->cpu, fault->address, fault->canonical,
                         fault->write ? Py_True : Py_False);
}

PyObject* counts(PyObject* self, PyObject*) {
    const vm::Engine::Counts c = engine_of(self).counts();
    return Py_BuildValue("{sKsKsKsKsKsKsKsK}", "faults", c.faults, "finished", c.finished, "read", c.read, "handed_up",
                         c.handed_up, "kept", c.kept, "local", c.local, "remote", c.remote, "rehomed", c.rehomed);
}

PyObject* processors(PyObject* self, PyObject*) {
    const vm::Engine& engine = engine_of(self);
    Ref list = Ref::steal(PyList_New(0));
    for (size_t cpu = 0; list && cpu < engine.cpus().size(); ++cpu) {
        const runtime::Processor* processor = engine.processor(int(cpu));
        Ref id = processor ? Ref::steal(PyLong_FromUnsignedLong(processor->id)) : Ref::borrow(Py_None);
        if (!id || PyList_Append(list.get(), id.get()) < 0) return nullptr;
    }
    return list.release();
}

PyMethodDef methods[] = {
    {"start", start, METH_NOARGS, "Start one server thread a CPU."},
    {"keep_records", fast(keep_records), METH_FASTCALL,
     "keep_records(memfd): keep on record there which threads are held on a CPU; first give the masks back that are "
     "on record. How many."},
    {"stop", stop, METH_NOARGS, "End the server threads; next() returns None from then on."},
    {"add", fast(add), METH_FASTCALL,
     "add(hat, cpu, pid, sticky, homing): serve this client's userfaultfd of the CPU."},
    {"remove", fast(remove), METH_FASTCALL, "remove(hat): serve this client no more."},
    {"synchronize", synchronize, METH_NOARGS, "Wait until what was unlinked before is used by no server thread."},
    {"handle", fast(handle), METH_FASTCALL,
     "handle(hat, cpu, address, write): resolve one fault here; False: it is Python's."},
    {"next", fast(next), METH_FASTCALL,
     "next(cpu): wait for a fault handed up: (id of the HAT, cpu, window address, canonical address, write), or None."},
    {"processors", processors, METH_NOARGS,
     "The processors of the server threads, by index of the CPU; None for one that does not run yet."},
    {"counts", counts, METH_NOARGS,
     "Faults read, finished natively, reads of files, faults handed up; bursts kept on a CPU; faults by where their "
     "threads belong; moves."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {Py_tp_methods, methods},
    {Py_tp_doc, const_cast<char*>("Engine(cpus, sticky, homing, /)\n\nOne pinned fault server a CPU.")},
    {0, nullptr},
};

PyType_Spec spec = {"k42._native.Engine", sizeof(Self), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, slots};

}  // namespace

int add_engine(PyObject* module) { return add_type(module, &spec) ? 0 : -1; }

}  // namespace k42::edge
