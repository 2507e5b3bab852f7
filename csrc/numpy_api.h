/* NumPy's C API, imported once for all files (by module.c).
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef POSENC_NUMPY_API_H
#define POSENC_NUMPY_API_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_1_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL posenc_array_api
#define PY_UFUNC_UNIQUE_SYMBOL posenc_ufunc_api
#ifndef POSENC_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#define NO_IMPORT_UFUNC
#endif
#include <numpy/arrayobject.h>
#include <numpy/ufuncobject.h>

/* Add the gufuncs to the module (gufuncs.c).  Returns 0, or -1 with an error. */
int add_gufuncs(PyObject *module);

/* The fast functions on arrays (arrays.c), ended by a NULL name. */
extern PyMethodDef array_methods[];
extern PyMethodDef cope_attention_methods[];
extern PyMethodDef cope_attention_backward_methods[];

/* The same of CoPE (cope_arrays.c). */
extern PyMethodDef cope_methods[];

/* Sinusoidal tables, and rows of tables added to arrays (table_rows_arrays.c). */
extern PyMethodDef sinusoidal_methods[];
extern PyMethodDef table_rows_methods[];

/* The same of relative biases (bias_arrays.c). */
extern PyMethodDef bias_methods[];

#endif
