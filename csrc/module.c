/* The module: definition, init, and what it tells of the build.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#define POSENC_IMPORTS_NUMPY
#include "numpy_api.h"

#include <stdlib.h>

#include "dispatch.h"
#include "parallel.h"
#include "view.h"

static PyObject *
build_info(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
#if defined(__clang__)
    const char *compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
    const char *compiler = "gcc " __VERSION__;
#else
    const char *compiler = "unknown";
#endif
    return Py_BuildValue("{s:s, s:O, s:s}", "simd", kernels->simd, "openmp",
                         parallel_has_openmp ? Py_True : Py_False, "compiler",
                         compiler);
}

static PyObject *
get_num_threads(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    return PyLong_FromLong(parallel_n_thread());
}

/* The caller has checked n; 0 means what OpenMP says. */
static PyObject *
set_num_threads(PyObject *Py_UNUSED(module), PyObject *n)
{
    long wanted = PyLong_AsLong(n);
    if (wanted == -1 && PyErr_Occurred()) {
        return NULL;
    }
    parallel_set_n_thread((int)wanted);
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"build_info", build_info, METH_NOARGS, NULL},
    {"get_num_threads", get_num_threads, METH_NOARGS, NULL},
    {"set_num_threads", set_num_threads, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static int
choose_kernels(void)
{
    const char *wanted = getenv("POSENC_SIMD");
    if (dispatch_init(wanted) < 0) {
        PyErr_Format(PyExc_ImportError,
                     "posenc: POSENC_SIMD must name an instruction set of this "
                     "processor, 'baseline', 'v3', 'v4' or 'v4_bf16'; got '%s'",
                     wanted);
        return -1;
    }
    return 0;
}

/* The gufuncs' registration is static, and NumPy itself runs in the main
 * interpreter only. */
static int
refuse_subinterpreter(void)
{
    if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
        PyErr_SetString(PyExc_ImportError,
                        "posenc: posenc._core must be imported in the main "
                        "interpreter; got a sub-interpreter");
        return -1;
    }
    return 0;
}

static int
module_exec(PyObject *module)
{
    if (refuse_subinterpreter() < 0 || PyArray_ImportNumPyAPI() < 0 ||
        PyUFunc_ImportUFuncAPI() < 0 || find_bfloat16() < 0 || choose_kernels() < 0) {
        return -1;
    }
    int error = parallel_init();
    if (error != 0) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    if (PyModule_AddFunctions(module, array_methods) < 0 ||
        PyModule_AddFunctions(module, sinusoidal_methods) < 0 ||
        PyModule_AddFunctions(module, table_rows_methods) < 0 ||
        PyModule_AddFunctions(module, cope_methods) < 0 ||
        PyModule_AddFunctions(module, bias_methods) < 0 ||
        PyModule_AddFunctions(module, cope_attention_methods) < 0 ||
        PyModule_AddFunctions(module, cope_attention_backward_methods) < 0) {
        return -1;
    }
    return add_gufuncs(module);
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#if PY_VERSION_HEX >= 0x030c00f0
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#if PY_VERSION_HEX >= 0x030d00f0
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "posenc._core",
    .m_doc = "Compiled core of posenc: raw gufuncs and fast functions.",
    .m_methods = module_methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__core(void);

PyMODINIT_FUNC
PyInit__core(void)
{
    return PyModuleDef_Init(&module_definition);
}
