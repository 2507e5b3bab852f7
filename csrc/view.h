/* Arrays as the doors see them: where the elements are, not who owns them.
 *
 * ndarrays, and torch's CPU tensors by the DLPack exchange protocol.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef POSENC_VIEW_H
#define POSENC_VIEW_H

#include "numpy_api.h"

#include <stdbool.h>

#include "posenc.h"

/* Element types beyond the real ones of posenc.h. */
enum { COMPLEX_F32 = N_REAL, COMPLEX_F64, INT_32, INT_64, BOOL_8, OTHER_TYPE };

/* Tensors of more axes are declined. */
enum { MAX_TENSOR_AXIS = 8 };

typedef struct {
    char *data;
    int n_axis;
    const npy_intp *shape, *step; /* bytes */
    int type;                     /* REAL_F32, ... */
    bool is_writeable, is_tensor;
    const char *begin, *end; /* all bytes it touches; equal if there are none */
    npy_intp tensor_shape[MAX_TENSOR_AXIS], tensor_step[MAX_TENSOR_AXIS];
} view;

/* Describe an aligned ndarray in native byte order, or a plain torch tensor in this
 * process's memory that neither needs gradients nor is lazily negated or conjugated.
 * False for everything else, without an error.  The view refers to itself or to the
 * object: neither may move. */
bool view_of(PyObject *object, view *seen);

/* An ndarray on the same memory, which the caller keeps alive; or NULL. */
PyObject *ndarray_of(const view *v);

/* A new array or tensor of x's shape, type and memory order, as x's library would
 * make it, and its view; or NULL. */
PyObject *new_like(PyObject *x, const view *seen, view *result);

/* Tell torch that the elements of a tuple's tensors are changed behind its back.
 * Returns 0, or -1 with an error. */
int mark_changed(PyObject *tensors);

npy_intp item_size(int type);
npy_intp size_of(const view *v);
npy_intp last_of(const view *v, const npy_intp *per_axis);

/* True if the first n axes of both have the same sizes; there may be none. */
bool agree_in_shape(const view *a, const view *b, int n);
bool have_same_shape(const view *a, const view *b);

/* False only if no byte is in both. */
bool may_overlap(const view *a, const view *b);

/* The same elements at the same places; the shapes are known to be equal. */
bool are_identical(const view *a, const view *b);

/* False if two indices may lead to one element. */
bool has_distinct_elements(const view *v, npy_intp item);

/* Learn NumPy's number for ml_dtypes.bfloat16.  Returns it, or -1 with an error. */
int find_bfloat16(void);

#endif
