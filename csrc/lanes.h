/* Fixed permutations of vector lanes, by the number of lanes.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 */
#ifndef POSENC_LANES_H
#define POSENC_LANES_H

/* (0 1 2 3) -> (1 0 3 2) */
#define SWAP_2(v) __builtin_shufflevector(v, v, 1, 0)
#define SWAP_4(v) __builtin_shufflevector(v, v, 1, 0, 3, 2)
#define SWAP_8(v) __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6)
#define SWAP_16(v) \
    __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)

/* Each lane of the lower half of v twice. */
#define TWICE_LOW_2(v) __builtin_shufflevector(v, v, 0, 0)
#define TWICE_LOW_4(v) __builtin_shufflevector(v, v, 0, 0, 1, 1)
#define TWICE_LOW_8(v) __builtin_shufflevector(v, v, 0, 0, 1, 1, 2, 2, 3, 3)
#define TWICE_LOW_16(v) \
    __builtin_shufflevector(v, v, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7)

/* Each lane of the upper half of v twice. */
#define TWICE_HIGH_2(v) __builtin_shufflevector(v, v, 1, 1)
#define TWICE_HIGH_4(v) __builtin_shufflevector(v, v, 2, 2, 3, 3)
#define TWICE_HIGH_8(v) __builtin_shufflevector(v, v, 4, 4, 5, 5, 6, 6, 7, 7)
#define TWICE_HIGH_16(v)                                                              \
    __builtin_shufflevector(v, v, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, \
                            15, 15)

/* (0 1 2 3) -> (0 0 2 2) and (1 1 3 3) */
#define EVEN_2(v) __builtin_shufflevector(v, v, 0, 0)
#define EVEN_4(v) __builtin_shufflevector(v, v, 0, 0, 2, 2)
#define EVEN_8(v) __builtin_shufflevector(v, v, 0, 0, 2, 2, 4, 4, 6, 6)
#define EVEN_16(v) \
    __builtin_shufflevector(v, v, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14)
#define ODD_2(v) __builtin_shufflevector(v, v, 1, 1)
#define ODD_4(v) __builtin_shufflevector(v, v, 1, 1, 3, 3)
#define ODD_8(v) __builtin_shufflevector(v, v, 1, 1, 3, 3, 5, 5, 7, 7)
#define ODD_16(v) \
    __builtin_shufflevector(v, v, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15)

/* Every second lane of a and then of b, from the first or from the second on. */
#define EVENS_4(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6)
#define ODDS_4(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7)
#define EVENS_8(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#define ODDS_8(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15)
#define EVENS_16(a, b)                                                               \
    __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, \
                            28, 30)
#define ODDS_16(a, b)                                                                \
    __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, \
                            29, 31)

/* (0 1 ... 4 5 ...) -> (0 4 1 5 ...), the halves by turns. */
#define ZIP_8(v) __builtin_shufflevector(v, v, 0, 4, 1, 5, 2, 6, 3, 7)
#define ZIP_16(v) \
    __builtin_shufflevector(v, v, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15)
#define ZIP_32(v)                                                                     \
    __builtin_shufflevector(v, v, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, \
                            23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, \
                            15, 31)

/* The lanes of two vectors by turns: (0 1), (2 3) -> (0 2 1 3) */
#define INTERLEAVE_2(a, b) __builtin_shufflevector(a, b, 0, 2, 1, 3)
#define INTERLEAVE_4(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5, 2, 6, 3, 7)
#define INTERLEAVE_8(a, b) \
    __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15)

/* The lanes of the lower halves of two vectors by turns, and of their upper halves. */
#define MERGE_LOW_2(a, b) __builtin_shufflevector(a, b, 0, 2)
#define MERGE_LOW_4(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define MERGE_LOW_8(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define MERGE_LOW_16(a, b)                                                            \
    __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, \
                            23)
#define MERGE_HIGH_2(a, b) __builtin_shufflevector(a, b, 1, 3)
#define MERGE_HIGH_4(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define MERGE_HIGH_8(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define MERGE_HIGH_16(a, b)                                                         \
    __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, \
                            30, 15, 31)

/* Lanes from the first, second or fourth after it on, then those of b. */
#define FROM_1_2(a, b) __builtin_shufflevector(a, b, 1, 2)
#define FROM_1_4(a, b) __builtin_shufflevector(a, b, 1, 2, 3, 4)
#define FROM_1_8(a, b) __builtin_shufflevector(a, b, 1, 2, 3, 4, 5, 6, 7, 8)
#define FROM_2_4(a, b) __builtin_shufflevector(a, b, 2, 3, 4, 5)
#define FROM_2_8(a, b) __builtin_shufflevector(a, b, 2, 3, 4, 5, 6, 7, 8, 9)
#define FROM_4_8(a, b) __builtin_shufflevector(a, b, 4, 5, 6, 7, 8, 9, 10, 11)

/* The first lane everywhere. */
#define FIRST_2(v) __builtin_shufflevector(v, v, 0, 0)
#define FIRST_4(v) __builtin_shufflevector(v, v, 0, 0, 0, 0)
#define FIRST_8(v) __builtin_shufflevector(v, v, 0, 0, 0, 0, 0, 0, 0, 0)

/* Halves of a vector, and two vectors as one. */
#define LOWER_4(v) __builtin_shufflevector(v, v, 0, 1)
#define UPPER_4(v) __builtin_shufflevector(v, v, 2, 3)
#define LOWER_8(v) __builtin_shufflevector(v, v, 0, 1, 2, 3)
#define UPPER_8(v) __builtin_shufflevector(v, v, 4, 5, 6, 7)
#define LOWER_16(v) __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7)
#define UPPER_16(v) __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)
#define JOIN_2(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3)
#define JOIN_4(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7)
#define JOIN_8(a, b) \
    __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)

#define LANES_JOIN_(name, lanes) name##lanes
#define LANES_JOIN(name, lanes) LANES_JOIN_(name, lanes)

#endif
