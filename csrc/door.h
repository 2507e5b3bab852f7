/* What the functions on whole arrays share: their arguments' number, the words for
 * arrays that are not as agreed, and the lock of the interpreter while they work.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef POSENC_DOOR_H
#define POSENC_DOOR_H

#include "nest.h"
#include "view.h"

/* Elements above which another Python thread may run meanwhile: below, giving up the
 * lock and taking it back costs too much of the call. */
#define MIN_SIZE_WITHOUT_GIL 65536

#define FASTCALL(function) (PyCFunction)(void (*)(void)) function, METH_FASTCALL

/* False with a TypeError unless the numbers agree. */
bool has_arguments(const char *name, Py_ssize_t n_arg, Py_ssize_t expected);

/* Set the TypeError of arrays that the Python layer ought to have refused; NULL. */
PyObject *refuse(const char *name);

/* Run jobs on so many elements in all; if they are many, other threads of Python may
 * run meanwhile. */
void run_jobs(const nest_job *jobs, int n_job, npy_intp size);

#endif
