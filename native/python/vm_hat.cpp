// k42._native.UffdHat and SoftHat: address translation of one client process.
#include <unistd.h>

#include "vm.hpp"

namespace k42::edge {

namespace {

using Self = Holder<HatValue>;

vm::Hat& hat_of(PyObject* self) { return *Self::of(self).hat; }

bool valid_hat(PyObject* regions, uint32_t cpus) {
    if (!checked<RegionMapValue>(regions, vm_types.region_map)) return false;
    if (cpus == 0 || cpus > 65536) {
        PyErr_SetString(PyExc_ValueError, "the number of CPUs must be 1 to 65536");
        return false;
    }
    return true;
}

PyObject* make_uffd(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    uint64_t id, most_spans;
    PyObject* regions;
    uint32_t cpus;
    int old_status, old_commands;
    if (!unpack_new("UffdHat", args, kwargs, id, regions, cpus, most_spans, old_status, old_commands)) return nullptr;
    if (!valid_hat(regions, cpus)) return nullptr;
    auto status = old_status < 0 ? vm::StatusPage::create() : vm::StatusPage::adopt(old_status);
    if (!status) return PyErr_SetFromErrno(PyExc_OSError);
    auto commands = old_commands < 0 ? vm::CommandRing::create() : vm::CommandRing::adopt(old_commands);
    if (!commands) return PyErr_SetFromErrno(PyExc_OSError);
    auto* map = &Holder<RegionMapValue>::of(regions).map;
    return Self::make(type, Ref::borrow(regions),
                      new vm::UffdHat(id, map, int(cpus), std::move(status), std::move(commands), most_spans));
}

PyObject* make_soft(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    uint64_t id;
    PyObject* regions;
    uint32_t cpus;
    if (!unpack_new("SoftHat", args, kwargs, id, regions, cpus) || !valid_hat(regions, cpus)) return nullptr;
    auto* map = &Holder<RegionMapValue>::of(regions).map;
    return Self::make(type, Ref::borrow(regions), new vm::SoftHat(id, map, int(cpus)));
}

bool valid_cpu(PyObject* self, int cpu) {
    if (cpu >= 0 && cpu < hat_of(self).cpus()) return true;
    PyErr_SetString(PyExc_ValueError, "no such CPU");
    return false;
}

PyObject* add_window(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    int cpu;
    uint64_t base, length, canonical;
    bool follows;
    if (!unpack("add_window", args, nargs, cpu, base, length, canonical, follows) || !valid_cpu(self, cpu))
        return nullptr;
    if (base % vm::kPageSize || length == 0 || length % vm::kPageSize || base + length < base) {
        PyErr_SetString(PyExc_ValueError, "a window is whole pages");
        return nullptr;
    }
    return PyBool_FromLong(hat_of(self).add_window(cpu, base, length, canonical, follows));
}

PyObject* charge_to(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint16_t account;
    if (!unpack("charge_to", args, nargs, account)) return nullptr;
    hat_of(self).charge_to(account);
    Py_RETURN_NONE;
}

PyObject* remove_window(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t base;
    if (!unpack("remove_window", args, nargs, base)) return nullptr;
    return PyBool_FromLong(hat_of(self).remove_window(base));
}

PyObject* canonical(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    int cpu;
    uint64_t address;
    if (!unpack("canonical", args, nargs, cpu, address) || !valid_cpu(self, cpu)) return nullptr;
    const auto found = hat_of(self).canonical(cpu, address);
    if (!found) Py_RETURN_NONE;
    return PyLong_FromUnsignedLongLong(*found);
}

PyObject* fail(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    int cpu;
    uint64_t address, length;
    std::string reason;
    if (!unpack("fail", args, nargs, cpu, address, length, reason) || !valid_cpu(self, cpu)) return nullptr;
    {
        Detached detached;
        hat_of(self).fail(cpu, address, length, reason);
    }
    Py_RETURN_NONE;
}

PyObject* wake(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    int cpu;
    uint64_t address, length;
    if (!unpack("wake", args, nargs, cpu, address, length) || !valid_cpu(self, cpu)) return nullptr;
    {
        Detached detached;
        hat_of(self).wake(cpu, address, length);
    }
    Py_RETURN_NONE;
}

PyObject* wake_everywhere(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    uint64_t address, length;
    if (!unpack("wake_everywhere", args, nargs, address, length)) return nullptr;
    {
        Detached detached;
        hat_of(self).wake_everywhere(address, length);
    }
    Py_RETURN_NONE;
}

PyObject* attach_uffd(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
    int cpu, uffd;
    if (!unpack("attach_uffd", args, nargs, cpu, uffd) || !valid_cpu(self, cpu)) return nullptr;
    return PyBool_FromLong(static_cast<vm::UffdHat&>(hat_of(self)).attach(cpu, uffd));
}

PyObject* status_descriptor(PyObject* self, PyObject*) {
    return PyLong_FromLong(static_cast<vm::UffdHat&>(hat_of(self)).status().descriptor());
}

PyObject* commands_descriptor(PyObject* self, PyObject*) {
    return PyLong_FromLong(static_cast<vm::UffdHat&>(hat_of(self)).commands().descriptor());
}

// SoftHat's record of what was done to it.
PyObject* record(PyObject* self, PyObject*) {
    auto& hat = static_cast<vm::SoftHat&>(hat_of(self));
    Ref mapped = Ref::steal(PySet_New(nullptr));
    Ref failed = Ref::steal(PyDict_New());
    if (!mapped || !failed) return nullptr;
    for (uint64_t address : hat.mapped()) {
        Ref number = Ref::steal(PyLong_FromUnsignedLongLong(address));
        if (!number || PySet_Add(mapped.get(), number.get()) < 0) return nullptr;
    }
    for (const auto& [address, reason] : hat.failed()) {
        Ref number = Ref::steal(PyLong_FromUnsignedLongLong(address));
        Ref text = Ref::steal(PyUnicode_FromStringAndSize(reason.data(), Py_ssize_t(reason.size())));
        if (!number || !text || PyDict_SetItem(failed.get(), number.get(), text.get()) < 0) return nullptr;
    }
    return Py_BuildValue("{sOsOsK}", "mapped", mapped.get(), "failed", failed.get(), "wakes", hat.wakes());
}

PyMethodDef base_methods[] = {
    {"add_window", fast(add_window), METH_FASTCALL,
     "add_window(cpu, base, length, canonical, follows): False when it overlaps another."},
    {"charge_to", fast(charge_to), METH_FASTCALL, "charge_to(account): whose the pages are that its faults bring in."},
    {"remove_window", fast(remove_window), METH_FASTCALL, "remove_window(base): False when there is none."},
    {"canonical", fast(canonical), METH_FASTCALL,
     "canonical(cpu, address): which address of its region a window address shows, or None."},
    {"fail", fast(fail), METH_FASTCALL, "fail(cpu, address, length, reason): accesses end in SIGBUS."},
    {"wake", fast(wake), METH_FASTCALL, "wake(cpu, address, length): faults happen again."},
    {"wake_everywhere", fast(wake_everywhere), METH_FASTCALL,
     "wake_everywhere(address, length): the same, whichever CPU serves them."},
    {nullptr, nullptr, 0, nullptr},
};
PyMethodDef uffd_methods[] = {
    {"attach_uffd", fast(attach_uffd), METH_FASTCALL,
     "attach_uffd(cpu, descriptor): takes the descriptor over; False when the CPU has one."},
    {"status_descriptor", status_descriptor, METH_NOARGS, "The memfd in which the client reads why an access failed."},
    {"commands_descriptor", commands_descriptor, METH_NOARGS, "The memfd in which the client's agent reads commands."},
    {nullptr, nullptr, 0, nullptr},
};
PyMethodDef soft_methods[] = {
    {"record", record, METH_NOARGS, "What is mapped, what failed and why, and how often faults were woken."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot base_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(Self::dealloc)},
    {Py_tp_methods, base_methods},
    {Py_tp_doc, const_cast<char*>("What the two kinds of HAT have in common.")},
    {0, nullptr},
};
PyType_Slot uffd_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make_uffd)},
    {Py_tp_dealloc, reinterpret_cast<void*>(Self::dealloc)},
    {Py_tp_methods, uffd_methods},
    {Py_tp_doc,
     const_cast<char*>("UffdHat(id, region_map, cpus, most_spans, status, commands, /)\n\nMaps real memory through "
                       "userfaultfds. status, commands: descriptors that a kernel left which has gone, or -1.")},
    {0, nullptr},
};
PyType_Slot soft_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make_soft)},
    {Py_tp_dealloc, reinterpret_cast<void*>(Self::dealloc)},
    {Py_tp_methods, soft_methods},
    {Py_tp_doc, const_cast<char*>("SoftHat(id, region_map, cpus, /)\n\nKeeps the mappings in a table.")},
    {0, nullptr},
};

constexpr unsigned kFlags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE;
PyType_Spec base_spec = {"k42._native.Hat", sizeof(Self), 0,
                         kFlags | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION, base_slots};
PyType_Spec uffd_spec = {"k42._native.UffdHat", sizeof(Self), 0, kFlags, uffd_slots};
PyType_Spec soft_spec = {"k42._native.SoftHat", sizeof(Self), 0, kFlags, soft_slots};

int add_derived(PyObject* module, PyType_Spec* spec) {
    Ref type = Ref::steal(PyType_FromModuleAndSpec(module, spec, reinterpret_cast<PyObject*>(vm_types.hat)));
    if (!type) return -1;
    return PyModule_AddType(module, reinterpret_cast<PyTypeObject*>(type.get()));
}

}  // namespace

int add_hat(PyObject* module) {
    vm_types.hat = add_type(module, &base_spec);
    if (!vm_types.hat) return -1;
    if (add_derived(module, &uffd_spec) < 0) return -1;
    return add_derived(module, &soft_spec);
}

}  // namespace k42::edge
