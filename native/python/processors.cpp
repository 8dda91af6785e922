// Processors, for Python: a thread owns one from its first call on a reference until Python ends the thread.
#include "reference.hpp"

#ifdef __linux__
#include <sched.h>
#endif

namespace k42::edge {

namespace {

PyTypeObject* lease_type = nullptr;

// Lies in the dictionary of the thread state. Python drops it at the end of a thread before join() returns;
// the core's own thread_local destructor runs only when the operating system's thread ends, some time later,
// and a thread started after a join would take a processor more.
struct LeaseObject {
    PyObject_HEAD runtime::Processor* processor;
};

void lease_dealloc(PyObject* o) {
    PyTypeObject* type = Py_TYPE(o);
    // At the interpreter's end and in the child of a fork other threads' dictionaries are dropped here too.
    if (reinterpret_cast<LeaseObject*>(o)->processor == runtime::current_or_null()) {
        Request::settle(*reinterpret_cast<LeaseObject*>(o)->processor);  // what was posted to it since its last request
        runtime::release_current();
    }
    type->tp_free(o);
    Py_DECREF(type);
}

PyType_Slot lease_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(lease_dealloc)},
    {0, nullptr},
};

PyType_Spec lease_spec = {"k42._native.Lease", sizeof(LeaseObject), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
                          lease_slots};

PyObject* current(PyObject*, PyObject*) { return PyLong_FromUnsignedLong(here().id); }

PyObject* count(PyObject*, PyObject*) { return PyLong_FromUnsignedLong(runtime::processor_count()); }

PyObject* open_mail_of_all(PyObject*, PyObject*) {
    runtime::collect();
    runtime::open_mail_of_all();
    Py_RETURN_NONE;
}

PyObject* current_cpu(PyObject*, PyObject*) {
#ifdef __linux__
    const int cpu = sched_getcpu();
    if (cpu < 0) return PyErr_SetFromErrno(PyExc_OSError);
    return PyLong_FromLong(cpu);
#else
    return PyLong_FromLong(0);
#endif
}

PyMethodDef functions[] = {
    {"current_cpu", current_cpu, METH_NOARGS,
     PyDoc_STR("current_cpu($module, /)\n--\n\nReturn the number of the CPU on which the calling thread runs now.")},
    {"open_mail_of_all", open_mail_of_all, METH_NOARGS,
     PyDoc_STR(
         "open_mail_of_all() runs what waits for requests that have ended, and for owners of processors; at the end "
         "of the program")},
    {"current_processor", current, METH_NOARGS,
     PyDoc_STR("current_processor($module, /)\n--\n\n"
               "Return the id of the calling thread's processor, which it takes at its first use.\n\n"
               "Ids are dense: the lowest free one is taken. Sections 2.2 and 3.2 of the paper.")},
    {"processor_count", count, METH_NOARGS,
     PyDoc_STR("processor_count($module, /)\n--\n\n"
               "Return how many processors there are: as many as threads ever used one at the same time.\n\n"
               "Their ids are 0 to count - 1. Section 2.2 of the paper.")},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

runtime::Processor& adopt_processor() {
    runtime::Processor& p = runtime::current();
    PyObject* dictionary = PyThreadState_GetDict();  // borrowed
    if (!dictionary) return p;
    PyObject* lease = lease_type->tp_alloc(lease_type, 0);
    if (lease) reinterpret_cast<LeaseObject*>(lease)->processor = &p;
    // Without a lease the end of the operating system's thread frees the processor.
    if (!lease || PyDict_SetItemString(dictionary, "k42.processor", lease) < 0) PyErr_Clear();
    Py_XDECREF(lease);
    runtime::open_mail(p);  // what was posted to it while nobody owned it
    return p;
}

int add_processors(PyObject* module) {
    lease_type = add_type(module, &lease_spec);
    return lease_type ? PyModule_AddFunctions(module, functions) : -1;
}

}  // namespace k42::edge
