// The extension module k42._native: collects the types of the edge.
#include "edge.hpp"

namespace {

int exec(PyObject* module) {
    using namespace k42::edge;
    // Before 3.12 no slot says it: types and processors belong to the whole process.
    if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
        PyErr_SetString(PyExc_ImportError, "k42 works in the main interpreter alone, not in sub-interpreters");
        return -1;
    }
    if (add_reference(module) < 0) return -1;
    if (add_counter(module) < 0) return -1;
    if (add_pool(module) < 0) return -1;
    if (add_map(module) < 0) return -1;
    if (add_core_experiments(module) < 0) return -1;
    if (add_allocator(module) < 0) return -1;
    if (add_gate(module) < 0) return -1;
    if (add_interval_map(module) < 0) return -1;
    if (add_retype(module) < 0) return -1;
#ifdef __linux__
    if (add_vm(module) < 0) return -1;
    if (add_experiments(module) < 0) return -1;
#endif
    return 0;
}

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(exec)},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "k42._native",
                          "The C++ core of k42, as Python types.",
                          0,
                          nullptr,
                          slots,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&definition); }
