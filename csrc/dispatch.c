/* SPDX-License-Identifier: BSD-3-Clause */
#include "dispatch.h"

#include "isa.h"

const kernel_table *kernels = &kernels_baseline;

#ifdef POSENC_X86_64
/* Feature names that both GCC and clang 14 know; F16C has none there, but every
 * processor with AVX2 has it. */
static bool
has_v3(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

static bool
has_v4(void)
{
    return has_v3() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

int
dispatch_init(const char *wanted)
{
    const kernel_table *available[4];
    int n_available = 0;
#ifdef POSENC_X86_64
    __builtin_cpu_init();
    if (has_v4() && __builtin_cpu_supports("avx512bf16")) {
        available[n_available++] = &kernels_v4_bf16;
    }
    if (has_v4()) {
        available[n_available++] = &kernels_v4;
    }
    if (has_v3()) {
        available[n_available++] = &kernels_v3;
    }
#endif
    available[n_available++] = &kernels_baseline;

    if (wanted == NULL || wanted[0] == '\0') {
        kernels = available[0];
        return 0;
    }
    for (int i = 0; i < n_available; i++) {
        if (strcmp(wanted, available[i]->simd) == 0) {
            kernels = available[i];
            return 0;
        }
    }
    return -1;
}
