/* How vectors of WIDTH bytes notice NaNs: NAN_FLAGS starts as NO_NAN, NOTICE_NAN(flags,
 * a, b) looks at two vectors, HAS_NAN(flags) tells.  Included anew for each width and
 * type; ORDERED_512(flags, a, b), which compares under a mask, is the includer's.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#undef NAN_FLAGS
#undef NO_NAN
#undef NOTICE_NAN
#undef HAS_NAN
#if WIDTH == 64
/* A mask of the lanes that had none: comparing under a mask joins the answers. */
#define NAN_FLAGS unsigned
#define NO_NAN ((1u << LANES) - 1)
#define NOTICE_NAN(flags, a, b) ((flags) = ORDERED_512(flags, a, b))
#define HAS_NAN(flags) __builtin_expect((flags) != NO_NAN, 0)
#else
#define NAN_FLAGS ROWS(flags)
#define NO_NAN \
    {          \
        0      \
    }
#define NOTICE_NAN(flags, a, b) ((flags) |= (NAN_FLAGS)(((a) != (a)) | ((b) != (b))))
#if WIDTH == 32
#define HAS_NAN(flags) \
    __builtin_expect(((flags)[0] | (flags)[1] | (flags)[2] | (flags)[3]) != 0, 0)
#else
#define HAS_NAN(flags) __builtin_expect(((flags)[0] | (flags)[1]) != 0, 0)
#endif
typedef int64_t NAN_FLAGS __attribute__((vector_size(WIDTH)));
#endif
