/* SPDX-License-Identifier: BSD-3-Clause */
#include "view.h"

#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "dlpack.h"

/* Results of more bytes ask for huge pages: by then the page faults of fresh memory
 * cost more than the arithmetic.  Those that malloc maps anew each time, as glibc does
 * from 32 MB on, also start at one; below that it would keep malloc from using memory
 * again. */
#define MIN_HUGE_SIZE ((size_t)4 << 20)
#define MIN_MAPPED_SIZE ((size_t)32 << 20)
#define HUGE_PAGE ((size_t)2 << 20)
#define PAGE ((size_t)4096)
#define CACHE_LINE ((size_t)64)

/* NumPy's number for ml_dtypes.bfloat16. */
static int bfloat16 = -1;

/* What torch gave us when its first tensor came by; references for good. */
static struct {
    PyTypeObject *tensor, *parameter;
    const DLPackExchangeAPI *exchange;
    PyObject *requires_grad, *is_neg, *is_conj, *increment_version;
    PyObject *forward_mode, *current_level; /* a module's dict, and a name in it */
} torch;

int
find_bfloat16(void)
{
    if (bfloat16 >= 0) {
        return bfloat16;
    }
    PyObject *module = PyImport_ImportModule("ml_dtypes");
    PyObject *kind = module ? PyObject_GetAttrString(module, "bfloat16") : NULL;
    PyArray_Descr *descr = NULL;
    if (kind != NULL && PyArray_DescrConverter(kind, &descr)) {
        bfloat16 = descr->type_num;
    }
    Py_XDECREF(descr);
    Py_XDECREF(kind);
    Py_XDECREF(module);
    return PyErr_Occurred() ? -1 : bfloat16;
}

static int
type_of_array(int number)
{
    switch (number) {
    case NPY_FLOAT:
        return REAL_F32;
    case NPY_DOUBLE:
        return REAL_F64;
    case NPY_HALF:
        return REAL_F16;
    case NPY_CFLOAT:
        return COMPLEX_F32;
    case NPY_CDOUBLE:
        return COMPLEX_F64;
    case NPY_BOOL:
        return BOOL_8;
    }
    if (number == NPY_INT64) {
        return INT_64;
    }
    if (number == NPY_INT32) {
        return INT_32;
    }
    return number == bfloat16 ? REAL_BF16 : OTHER_TYPE;
}

static int
type_of_tensor(DLDataType dtype)
{
    static const struct {
        uint8_t code, bits, type;
    } known[] = {
        {DLPACK_FLOAT, 32, REAL_F32},      {DLPACK_FLOAT, 64, REAL_F64},
        {DLPACK_FLOAT, 16, REAL_F16},      {DLPACK_BFLOAT, 16, REAL_BF16},
        {DLPACK_COMPLEX, 64, COMPLEX_F32}, {DLPACK_COMPLEX, 128, COMPLEX_F64},
        {DLPACK_INT, 32, INT_32},          {DLPACK_INT, 64, INT_64},
    };
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        if (dtype.code == known[i].code && dtype.bits == known[i].bits) {
            return dtype.lanes == 1 ? known[i].type : OTHER_TYPE;
        }
    }
    return OTHER_TYPE;
}

npy_intp
item_size(int type)
{
    static const npy_intp sizes[] = {
        [REAL_F32] = 4,  [REAL_F64] = 8,    [REAL_F16] = 2,
        [REAL_BF16] = 2, [COMPLEX_F32] = 8, [COMPLEX_F64] = 16,
        [INT_32] = 4,    [INT_64] = 8,      [BOOL_8] = 1,
    };
    return sizes[type];
}

npy_intp
size_of(const view *v)
{
    npy_intp size = 1;
    for (int i = 0; i < v->n_axis; i++) {
        size *= v->shape[i];
    }
    return size;
}

static size_t
magnitude(npy_intp step)
{
    return step < 0 ? 0 - (size_t)step : (size_t)step;
}

/* The bytes, from the first to past the last, that the axes with steps below `limit`
 * touch. */
static void
extent_of(const view *v, size_t limit, const char **begin, const char **end)
{
    *begin = v->data;
    *end = v->data + item_size(v->type);
    for (int i = 0; i < v->n_axis; i++) {
        npy_intp span = (v->shape[i] - 1) * v->step[i];
        if (magnitude(v->step[i]) < limit) {
            *(span < 0 ? begin : end) += span;
        }
    }
}

static void
set_extent(view *v)
{
    if (size_of(v) == 0) {
        v->begin = v->end = v->data;
    } else {
        extent_of(v, SIZE_MAX, &v->begin, &v->end);
    }
}

static bool
view_of_array(PyArrayObject *array, view *seen)
{
    if (!PyArray_ISALIGNED(array) || !PyArray_ISNOTSWAPPED(array)) {
        return false;
    }
    seen->data = PyArray_BYTES(array);
    seen->n_axis = PyArray_NDIM(array);
    seen->shape = PyArray_DIMS(array);
    seen->step = PyArray_STRIDES(array);
    seen->type = type_of_array(PyArray_TYPE(array));
    seen->is_writeable = PyArray_ISWRITEABLE(array);
    seen->is_tensor = false;
    if (seen->type == OTHER_TYPE) {
        return false;
    }
    set_extent(seen);
    return true;
}

/* The exchange table of a tensor type, of our major version, or NULL. */
static const DLPackExchangeAPI *
exchange_of(PyObject *type)
{
    PyObject *capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
    const DLPackExchangeAPI *found = NULL;
    if (capsule != NULL) {
        found = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
        Py_DECREF(capsule);
    }
    while (found != NULL && found->version.major != DLPACK_MAJOR) {
        found = found->prev_api;
    }
    bool is_whole = found != NULL && found->dltensor_from_py_object_no_sync != NULL &&
                    found->managed_tensor_to_py_object_no_sync != NULL;
    return is_whole ? found : NULL;
}

/* An attribute; NULL if there is no owner or an error stands already. */
static PyObject *
attribute_of(PyObject *owner, const char *name)
{
    return owner == NULL || PyErr_Occurred() ? NULL
                                             : PyObject_GetAttrString(owner, name);
}

/* Look torch up once it has been imported by somebody.  True if its tensors can be
 * read; without an error. */
static bool
find_torch(void)
{
    PyObject *module = PyDict_GetItemString(PyImport_GetModuleDict(), "torch");
    PyObject *base = attribute_of(module, "_C");
    PyObject *nn = attribute_of(module, "nn");
    PyObject *autograd = attribute_of(module, "autograd");
    PyObject *forward = attribute_of(autograd, "forward_ad");
    PyObject *tensor = attribute_of(module, "Tensor");
    PyObject *parameter = attribute_of(nn, "Parameter");
    torch.requires_grad = attribute_of(tensor, "requires_grad");
    torch.is_neg = attribute_of(tensor, "is_neg");
    torch.is_conj = attribute_of(tensor, "is_conj");
    torch.increment_version = attribute_of(base, "_increment_version");
    torch.forward_mode = attribute_of(forward, "__dict__");
    torch.exchange = PyErr_Occurred() || tensor == NULL ? NULL : exchange_of(tensor);
    if (torch.exchange != NULL) {
        torch.current_level = PyUnicode_InternFromString("_current_level");
    }
    bool is_found = torch.current_level != NULL && PyDict_Check(torch.forward_mode) &&
                    Py_TYPE(torch.requires_grad)->tp_descr_get != NULL;
    PyErr_Clear();
    Py_XDECREF(base);
    Py_XDECREF(nn);
    Py_XDECREF(autograd);
    Py_XDECREF(forward);
    if (!is_found) {
        Py_XDECREF(tensor);
        Py_XDECREF(parameter);
        Py_CLEAR(torch.requires_grad);
        Py_CLEAR(torch.is_neg);
        Py_CLEAR(torch.is_conj);
        Py_CLEAR(torch.increment_version);
        Py_CLEAR(torch.forward_mode);
        Py_CLEAR(torch.current_level);
        return false;
    }
    torch.parameter = (PyTypeObject *)parameter;
    torch.tensor = (PyTypeObject *)tensor;
    return true;
}

/* True if the answer is False; takes the reference, leaves no error. */
static bool
is_no(PyObject *answer)
{
    if (answer == NULL) {
        PyErr_Clear();
        return false;
    }
    Py_DECREF(answer);
    return answer == Py_False;
}

/* True within a level of forward-mode derivatives, or if that cannot be told: tensors
 * may then carry tangents. */
static bool
may_have_tangent(void)
{
    PyObject *level = PyDict_GetItemWithError(torch.forward_mode, torch.current_level);
    long value = level != NULL ? PyLong_AsLong(level) : 0;
    PyErr_Clear();
    return value >= 0;
}

/* What the exchange protocol lets through in silence. */
static bool
is_plain_value(PyObject *tensor, int type)
{
    PyObject *get = torch.requires_grad;
    if (!is_no(Py_TYPE(get)->tp_descr_get(get, tensor, (PyObject *)Py_TYPE(tensor)))) {
        return false;
    }
    bool is_complex = type == COMPLEX_F32 || type == COMPLEX_F64;
    return is_no(PyObject_CallOneArg(torch.is_neg, tensor)) &&
           (!is_complex || is_no(PyObject_CallOneArg(torch.is_conj, tensor)));
}

static bool
view_of_tensor(PyObject *object, view *seen)
{
    DLTensor tensor;
    if (torch.exchange->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
        PyErr_Clear();
        return false;
    }
    seen->type = type_of_tensor(tensor.dtype);
    if (tensor.device.device_type != DLPACK_CPU || tensor.ndim > MAX_TENSOR_AXIS ||
        seen->type == OTHER_TYPE || !is_plain_value(object, seen->type)) {
        return false;
    }
    npy_intp item = item_size(seen->type);
    for (int i = 0; i < tensor.ndim; i++) {
        seen->tensor_shape[i] = tensor.shape[i];
        seen->tensor_step[i] = tensor.strides[i] * item;
    }
    seen->data = (char *)tensor.data + tensor.byte_offset;
    seen->n_axis = tensor.ndim;
    seen->shape = seen->tensor_shape;
    seen->step = seen->tensor_step;
    seen->is_writeable = seen->is_tensor = true;
    if (tensor.data == NULL && size_of(seen) != 0) { /* zeros that torch never made */
        return false;
    }
    set_extent(seen);
    return (uintptr_t)seen->data % (uintptr_t)(item < 8 ? item : 8) == 0;
}

bool
view_of(PyObject *object, view *seen)
{
    if (PyArray_CheckExact(object)) {
        return view_of_array((PyArrayObject *)object, seen);
    }
    if (torch.tensor == NULL && !find_torch()) {
        return false;
    }
    bool is_tensor =
        Py_IS_TYPE(object, torch.tensor) || Py_IS_TYPE(object, torch.parameter);
    return is_tensor && !may_have_tangent() && view_of_tensor(object, seen);
}

PyObject *
ndarray_of(const view *v)
{
    static const int numbers[] = {
        [REAL_F32] = NPY_FLOAT,     [REAL_F64] = NPY_DOUBLE,     [REAL_F16] = NPY_HALF,
        [COMPLEX_F32] = NPY_CFLOAT, [COMPLEX_F64] = NPY_CDOUBLE, [INT_32] = NPY_INT32,
        [INT_64] = NPY_INT64,       [BOOL_8] = NPY_BOOL,
    };
    int number = v->type == REAL_BF16 ? bfloat16 : numbers[v->type];
    return PyArray_New(&PyArray_Type, v->n_axis, v->shape, number, v->step, v->data, 0,
                       v->is_writeable ? NPY_ARRAY_WRITEABLE : 0, NULL);
}

/* A tensor that owns its elements: they follow this header. */
typedef struct {
    DLManagedTensorVersioned managed;
    int64_t shape[MAX_TENSOR_AXIS], strides[MAX_TENSOR_AXIS];
} owned_tensor;

#define HEADER_SIZE ((sizeof(owned_tensor) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE)

static void
free_tensor(DLManagedTensorVersioned *managed)
{
    free(managed);
}

/* Let huge pages back the whole pages of fresh memory. */
static void
ask_for_huge_pages(char *memory, size_t size)
{
#ifdef MADV_HUGEPAGE
    size_t skipped = (0 - (size_t)(uintptr_t)memory) % PAGE;
    if (size >= MIN_HUGE_SIZE) {
        /* A wish, which may fail. */
        (void)madvise(memory + skipped, size - skipped, MADV_HUGEPAGE);
    }
#else
    (void)memory, (void)size;
#endif
}

static owned_tensor *
allocate_tensor(size_t n_byte)
{
    void *memory = NULL;
    size_t size = HEADER_SIZE + n_byte;
    size_t alignment = size >= MIN_MAPPED_SIZE ? HUGE_PAGE : CACHE_LINE;
    if (size < n_byte || posix_memalign(&memory, alignment, size) != 0) {
        return NULL;
    }
    ask_for_huge_pages(memory, size);
    return memory;
}

/* -1 if axis a of v lies within axis b in memory, 1 if around it, 0 if that is open:
 * torch's rule for memory orders. */
static int
compare_axes(const view *v, int a, int b)
{
    if (v->step[a] == 0 || v->step[b] == 0) {
        return 0;
    }
    if (v->step[a] != v->step[b]) {
        return v->step[a] < v->step[b] ? -1 : 1;
    }
    return v->shape[a] > v->shape[b];
}

/* True if v fills its memory without gaps and repeats. */
static bool
is_dense(const view *v, npy_intp item)
{
    if (size_of(v) == 0) {
        return true;
    }
    npy_intp covered = item;
    for (unsigned done = 0;;) {
        int next = -1;
        for (int i = 0; i < v->n_axis; i++) {
            bool is_open = v->shape[i] > 1 && !(done >> i & 1);
            next = is_open && v->step[i] == covered ? i : next;
        }
        if (next < 0) {
            return covered == item * size_of(v);
        }
        done |= 1u << next;
        covered *= v->shape[next];
    }
}

/* Steps, in elements, that torch gives a new tensor like v. */
static void
strides_like(const view *v, npy_intp item, int64_t *strides)
{
    int order[MAX_TENSOR_AXIS], n = v->n_axis;
    if (is_dense(v, item)) {
        for (int i = 0; i < n; i++) {
            strides[i] = v->step[i] / item;
        }
        return;
    }
    for (int i = 0; i < n; i++) {
        order[i] = n - 1 - i;
    }
    for (int i = 1; i < n; i++) {
        for (int here = i, j = i - 1; j >= 0; j--) {
            int found = compare_axes(v, order[j], order[here]);
            if (found < 0) {
                break;
            }
            if (found > 0) {
                int axis = order[here];
                order[here] = order[j];
                order[j] = axis;
                here = j;
            }
        }
    }
    int64_t stride = 1;
    for (int i = 0; i < n; i++) {
        strides[order[i]] = stride;
        stride *= v->shape[order[i]] > 1 ? v->shape[order[i]] : 1;
    }
}

static DLDataType
tensor_type(int type)
{
    return (DLDataType){
        .code = type == REAL_BF16 ? DLPACK_BFLOAT : DLPACK_FLOAT,
        .bits = (uint8_t)(8 * item_size(type)),
        .lanes = 1,
    };
}

static PyObject *
new_tensor_like(const view *x, view *result)
{
    npy_intp item = item_size(x->type), n_byte;
    owned_tensor *tensor = NULL;
    if (!__builtin_mul_overflow(size_of(x), item, &n_byte)) {
        tensor = allocate_tensor((size_t)n_byte);
    }
    if (tensor == NULL) {
        return PyErr_NoMemory();
    }
    strides_like(x, item, tensor->strides);
    for (int i = 0; i < x->n_axis; i++) {
        tensor->shape[i] = result->tensor_shape[i] = x->shape[i];
        result->tensor_step[i] = tensor->strides[i] * item;
    }
    result->data = (char *)tensor + HEADER_SIZE;
    result->n_axis = x->n_axis;
    result->shape = result->tensor_shape;
    result->step = result->tensor_step;
    result->type = x->type;
    result->is_writeable = result->is_tensor = true;
    set_extent(result);
    tensor->managed = (DLManagedTensorVersioned){
        .version = {DLPACK_MAJOR, 0},
        .deleter = free_tensor,
        .dl_tensor = {.data = result->data,
                      .device = {DLPACK_CPU, 0},
                      .ndim = x->n_axis,
                      .dtype = tensor_type(x->type),
                      .shape = tensor->shape,
                      .strides = tensor->strides},
    };
    void *object = NULL;
    if (torch.exchange->managed_tensor_to_py_object_no_sync(&tensor->managed,
                                                            &object)) {
        free(tensor);
        return NULL;
    }
    return object;
}

PyObject *
new_like(PyObject *x, const view *seen, view *result)
{
    if (seen->is_tensor) {
        return new_tensor_like(seen, result);
    }
    PyObject *array = PyArray_NewLikeArray((PyArrayObject *)x, NPY_KEEPORDER, NULL, 0);
    if (array != NULL) {
        view_of_array((PyArrayObject *)array, result);
    }
    return array;
}

int
mark_changed(PyObject *tensors)
{
    PyObject *done = PyObject_CallOneArg(torch.increment_version, tensors);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

npy_intp
last_of(const view *v, const npy_intp *per_axis)
{
    return per_axis[v->n_axis - 1];
}

bool
agree_in_shape(const view *a, const view *b, int n)
{
    for (int i = 0; i < n; i++) {
        if (a->shape[i] != b->shape[i]) {
            return false;
        }
    }
    return true;
}

bool
have_same_shape(const view *a, const view *b)
{
    return a->n_axis == b->n_axis && agree_in_shape(a, b, a->n_axis);
}

/* True if all steps of at least `period` are multiples of it. */
static bool
repeats_every(const view *v, size_t period)
{
    for (int i = 0; i < v->n_axis; i++) {
        size_t step = magnitude(v->step[i]);
        if (v->shape[i] > 1 && step >= period && step % period != 0) {
            return false;
        }
    }
    return true;
}

/* True if the views lie in each other's gaps, as queries and keys in one buffer do:
 * both repeat every so many bytes, and touch different bytes of such a period. */
static bool
take_turns(const view *a, const view *b)
{
    for (int i = 0; i < a->n_axis; i++) {
        size_t period = magnitude(a->step[i]);
        if (a->shape[i] < 2 || period == 0 || !repeats_every(a, period) ||
            !repeats_every(b, period)) {
            continue;
        }
        const char *a_begin, *a_end, *b_begin, *b_end;
        extent_of(a, period, &a_begin, &a_end);
        extent_of(b, period, &b_begin, &b_end);
        size_t a_size = (size_t)(a_end - a_begin), b_size = (size_t)(b_end - b_begin);
        size_t offset =
            ((uintptr_t)b_begin % period + period - (uintptr_t)a_begin % period) %
            period;
        if (a_size <= offset && b_size <= period - offset) {
            return true;
        }
    }
    return false;
}

bool
may_overlap(const view *a, const view *b)
{
    return a->begin < b->end && b->begin < a->end && a->begin < a->end &&
           b->begin < b->end && !take_turns(a, b);
}

bool
are_identical(const view *a, const view *b)
{
    if (a->data != b->data) {
        return false;
    }
    for (int i = 0; i < a->n_axis; i++) {
        if (a->shape[i] > 1 && a->step[i] != b->step[i]) {
            return false;
        }
    }
    return true;
}

/* The axis with the least step of those longer than 1 and not yet done, or -1. */
static int
least_axis(const view *v, unsigned long long done, size_t *step)
{
    int least = -1;
    for (int i = 0; i < v->n_axis; i++) {
        if (v->shape[i] > 1 && !(done >> i & 1)) {
            size_t size = magnitude(v->step[i]);
            if (least < 0 || size < *step) {
                least = i;
                *step = size;
            }
        }
    }
    return least;
}

/* Each step must reach past all that the smaller steps cover. */
bool
has_distinct_elements(const view *v, npy_intp item)
{
    size_t covered = (size_t)item, step = 0;
    unsigned long long done = 0;
    if (size_of(v) == 0) {
        return true;
    }
    for (int i; (i = least_axis(v, done, &step)) >= 0; done |= 1ull << i) {
        if (step < covered) {
            return false;
        }
        covered += (size_t)(v->shape[i] - 1) * step;
    }
    return true;
}
