/* Losses and gradients of many logistic heads over the rows of a block, in one pass that reads
   every row once.

   A heads, C classes, c columns of a head (C - 1 for a softmax, whose last class is minus the sum
   of the others; 1 for a sigmoid), P = A c columns in all, head by head; k coordinates of a row
   (the intercept's 1 is one of them), a multiple of 16 by zeros at the end, n rows.

   BLAS would be called twice, on a tall matrix and a sliver of P columns: it copies the tall one
   into its own layout for every product, which costs as much as 40 columns of arithmetic, and the
   decisions between the two products go through memory several times. Here ROWS rows at a time stay
   in the nearer caches for the product with the weights, the losses, and the product back. Weights
   and gradients are packed in panels, mostly of two vectors' columns, (k, columns) each, so that a
   product reads them in order; rows are read as they are. A few columns that would leave most of a
   panel empty are lines instead, (columns, k): vectors run along the coordinates there.

   The file includes itself once per instruction set, with the vector's length L defined; the
   processor is asked which one to run. It needs no header of Python's, so that a C compiler is all
   that building it asks for. */

#ifndef L

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 48   /* at a time; a multiple of every number of rows that a product takes at once */
#define DEPTH 512 /* coordinates at a time: the weights of a panel are 64 kB then */
#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLEVECTOR
#endif
#endif
#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__)
#define L 8
#define NAME(x) x##_8
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "logistic_blocks.c"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef L
#undef NAME
#define L 16
#define NAME(x) x##_16
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#include "logistic_blocks.c"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef L
#undef NAME
#define CALL(function, ...) (lanes == 16 ? function##_16(__VA_ARGS__) : function##_8(__VA_ARGS__))
#define HAS_AVX512 (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && \
                    __builtin_cpu_supports("avx512vl"))
#define HAS_AVX2 (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#define BEST (HAS_AVX512 ? 16 : HAS_AVX2 ? 8 : 0)
#elif defined(__aarch64__)
#define L 4
#define NAME(x) x##_4
#include "logistic_blocks.c"
#undef L
#undef NAME
#define CALL(function, ...) function##_4(__VA_ARGS__)
#define BEST 4
#else
#define CALL(function, ...) 0
#define BEST 0
#endif

/* Length in floats of the processor's vectors; 0: this file cannot run, call nothing else. */
long logistic_lanes(void) { return BEST; }

/* Floats that P columns of k coordinates take when packed. */
long logistic_packed(long lanes, long P, long k)
{
    (void)lanes;
    return CALL(columns, P) * k;
}

/* Packs weights (P, used) into k >= used coordinates that hold zeros. */
void logistic_pack(long lanes, long P, long used, long k, const float *weights, float *packed)
{
    (void)lanes, (void)P, (void)used, (void)k, (void)weights, (void)packed;
    CALL(pack, P, used, k, weights, packed);
}

/* Unpacks gradients of k coordinates into (P, used). */
void logistic_unpack(long lanes, long P, long used, long k, const float *packed, float *gradients)
{
    (void)lanes, (void)P, (void)used, (void)k, (void)packed, (void)gradients;
    CALL(unpack, P, used, k, packed, gradients);
}

/* One pass over rows (n, k). Adds to loss (A,) and to packed gradients. Rows that begin at cache
   lines are read fastest.

   softmax (C > 1): label (n,) is the class. sigmoid (C = 1): label (A, n), `stride` apart, is 0 or
   1 of each head. weight (n,) or NULL: sample weights. class_factor (A, C), or (A, 2) for a
   sigmoid, or NULL: class weights. Returns 0, or -1 without memory for the decisions (nothing is
   changed then). */
long logistic_pass(long lanes, long n, long k, const float *rows, long A, long C,
                   const float *packed, const int32_t *label, long stride, const float *weight,
                   const float *class_factor, double *loss, float *gradients)
{
    long c = C > 1 ? C - 1 : 1, padded = logistic_packed(lanes, A * c, 1);
    /* Decisions in panels, and again with rows last, and room for the last class of a head. */
    float *room = NULL;
    if (posix_memalign((void **)&room, 64, sizeof(float) * ROWS * (2 * padded + 1)) != 0) return -1;
    (void)rows, (void)packed, (void)label, (void)stride, (void)weight, (void)class_factor;
    (void)loss, (void)gradients;
    for (long start = 0; start < n; start += ROWS) {
        long count = n - start < ROWS ? n - start : ROWS;
        CALL(block, count, k, rows + start * k, A, C, packed, label + start, stride,
             weight ? weight + start : NULL, class_factor, loss, gradients, room,
             room + ROWS * padded);
    }
    free(room);
    return 0;
}

/* out (n, k), rows `stride` apart, = rows (n, k) in half precision (IEEE 754 binary16, finite) less
   mean (k,). */
void logistic_centred(long lanes, long n, long k, const uint16_t *rows, const float *mean,
                      long stride, float *out)
{
    (void)lanes, (void)n, (void)k, (void)rows, (void)mean, (void)stride, (void)out;
    for (long r = 0; r < n; r++) CALL(centred, k, rows + r * k, mean, out + r * stride);
}

#else /* once per instruction set */

#define Vector NAME(Vector)
#define Loose NAME(Loose)
#define Integers NAME(Integers)
#define Halves NAME(Halves)
#define Quad NAME(Quad)
/* Rows of a product at a time: 12, 24 (of 32) and 24 (of 32) sums stay in registers. */
#define TALL (L == 8 ? 6 : 12)

typedef float Vector __attribute__((vector_size(4 * L)));
/* A vector at any address. */
typedef float Loose __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * L)));
typedef uint16_t Halves __attribute__((vector_size(2 * L)));
typedef float Quad __attribute__((vector_size(16)));

INLINE Vector NAME(load)(const float *from) { return *(const Loose *)from; }
INLINE void NAME(store)(float *to, Vector value) { *(Loose *)to = value; }
/* Minus, since x + 0 is not x where x is -0. */
INLINE Vector NAME(all)(float value) { return value - (Vector){0}; }
/* Elements of two vectors by turns of s: the first s of both, the third s of both, ...; or the
   second, the fourth, ... */
#define FIRST(i, s) ((i) % (2 * (s)) < (s) ? (i) : L + (i) - (s))
#define SECOND(i, s) ((i) % (2 * (s)) < (s) ? (i) + (s) : L + (i))
#if L == 4
#define LIST(f, s) f(0, s), f(1, s), f(2, s), f(3, s)
#elif L == 8
#define LIST(f, s) f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s)
#else
#define LIST(f, s) f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s), \
                   f(8, s), f(9, s), f(10, s), f(11, s), f(12, s), f(13, s), f(14, s), f(15, s)
#endif
#ifdef SHUFFLEVECTOR
#define MIXED(f, s, a, b) __builtin_shufflevector(a, b, LIST(f, s))
#else
#define MIXED(f, s, a, b) __builtin_shuffle(a, b, (Integers){LIST(f, s)})
#endif
#define EXCHANGE(s) \
    for (int i = 0; i < L; i++) \
        if (!(i & s)) { \
            Vector first = MIXED(FIRST, s, x[i], x[i + s]); \
            Vector second = MIXED(SECOND, s, x[i], x[i + s]); \
            x[i] = first, x[i + s] = second; \
        }

/* x (L, L) becomes its transpose. */
INLINE void NAME(transpose)(Vector *x)
{
#pragma GCC unroll 16
    EXCHANGE(1)
#pragma GCC unroll 16
    EXCHANGE(2)
#if L > 4
#pragma GCC unroll 16
    EXCHANGE(4)
#endif
#if L > 8
#pragma GCC unroll 16
    EXCHANGE(8)
#endif
}

INLINE Vector NAME(choose)(Integers which, Vector a, Vector b)
{
    return (Vector)((which & (Integers)a) | (~which & (Integers)b));
}

/* e^x for x <= 0 within 2 units in the last place (reduction and polynomial of Cephes' expf). */
INLINE Vector NAME(exponential)(Vector x)
{
    x = NAME(choose)(x > -87.0f, x, NAME(all)(-87.0f));
    Integers power = __builtin_convertvector(x * 1.44269504088896341f - 0.5f, Integers);
    Vector whole = __builtin_convertvector(power, Vector);
    x = x - whole * 0.693359375f;
    x = x - whole * -2.12194440e-4f;
    Vector y = NAME(all)(1.9875691500e-4f);
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    return y * (Vector)((power + 127) << 23);
}

/* Natural logarithm of normal positive numbers within 2 units in the last place (Cephes' logf). */
INLINE Vector NAME(logarithm)(Vector x)
{
    Integers bits = (Integers)x;
    Integers power = (bits >> 23) - 126;
    Vector part = (Vector)((bits & 0x007fffff) | 0x3f000000); /* in [1/2, 1) */
    Integers low = part < 0.707106781186547524f;
    power += low; /* minus one where true */
    Vector m = part - 1.0f + (Vector)(low & (Integers)part);
    Vector e = __builtin_convertvector(power, Vector), z = m * m;
    Vector y = NAME(all)(7.0376836292e-2f);
    y = y * m - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    y = y * m * z;
    y = y + e * -2.12194440e-4f - 0.5f * z;
    return m + y + e * 0.693359375f;
}

/* log(1 + x) of x >= 0 without losing what is small (Kahan). */
INLINE Vector NAME(logarithm1)(Vector x)
{
    Vector more = 1.0f + x, rest = more - 1.0f;
    Vector close = NAME(logarithm)(more) * x / NAME(choose)(rest > 0.0f, rest, NAME(all)(1));
    return NAME(choose)(rest > 0.0f, close, x);
}

/* Columns of the next panel, of `rest` that are left, or of the lines that follow the panels, fewer
   than a vector has: 36 columns are a panel of 32 and four lines. */
#define UNIT L
/* More lines cost as much as the panel that they are too few for. */
#define MOST_LINES (L == 4 ? 2 : L == 8 ? 5 : 12)
INLINE long NAME(width)(long rest)
{
    long full = rest % UNIT <= MOST_LINES ? rest - rest % UNIT : rest - rest % UNIT + UNIT;
    if (full == 0) return rest;
    return full > L ? 2 * L : L;
}

static long NAME(columns)(long P)
{
    long first = 0;
    while (first < P) first += NAME(width)(P - first);
    return first;
}

/* Columns (P, used) into panels and lines of k coordinates, or back. */
INLINE void NAME(moved)(long P, long used, long k, float *columns, float *packed, const int in)
{
    for (long first = 0, width; first < P; first += width) {
        width = NAME(width)(P - first);
        float *panel = packed + first * k;
        for (long p = 0, group; p < width && first + p < P; p += group) {
            float *plain = columns + (first + p) * used;
            group = width < UNIT || first + p + L > P ? 1 : L;
            long j = 0;
            for (; group == L && j + L <= used; j += L) {
                Vector square[L];
                for (long i = 0; i < L; i++)
                    square[i] = NAME(load)(in ? plain + i * used + j : panel + (j + i) * width + p);
                NAME(transpose)(square);
                for (long i = 0; i < L; i++)
                    NAME(store)(in ? panel + (j + i) * width + p : plain + i * used + j, square[i]);
            }
            for (long i = 0; i < group; i++)
                for (long d = j; d < used; d++) {
                    float *from = plain + i * used + d;
                    float *to = panel + (width < UNIT ? (p + i) * k + d : d * width + p + i);
                    if (in)
                        *to = *from;
                    else
                        *from = *to;
                }
        }
    }
}

static void NAME(pack)(long P, long used, long k, const float *weights, float *packed)
{
    NAME(moved)(P, used, k, (float *)weights, packed, 1);
}

static void NAME(unpack)(long P, long used, long k, const float *packed, float *gradients)
{
    NAME(moved)(P, used, k, gradients, (float *)packed, 0);
}

/* sums (tall, wide vectors) += a (tall, depth) b (depth, wide vectors); element (i, d) of a is
   a[i * across + d * along]. What lies `ahead` of a is fetched into the caches. */
INLINE void NAME(product)(const int tall, const int wide, long depth, const float *a, long across,
                          long along, const float *b, float *sums, const long ahead)
{
    Vector sum[12][2];
#pragma GCC unroll 12
    for (int i = 0; i < tall; i++)
#pragma GCC unroll 2
        for (int v = 0; v < wide; v++) sum[i][v] = NAME(load)(sums + (i * wide + v) * L);
    for (long d = 0; d < depth; d++) {
        Vector right[2];
        if (ahead) __builtin_prefetch(a + ahead + d * along, 0, 2);
#pragma GCC unroll 2
        for (int v = 0; v < wide; v++) right[v] = NAME(load)(b + (d * wide + v) * L);
#pragma GCC unroll 12
        for (int i = 0; i < tall; i++) {
            Vector left = NAME(all)(a[i * across + d * along]);
#pragma GCC unroll 2
            for (int v = 0; v < wide; v++) sum[i][v] += left * right[v];
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < tall; i++)
#pragma GCC unroll 2
        for (int v = 0; v < wide; v++) NAME(store)(sums + (i * wide + v) * L, sum[i][v]);
}

/* The same for any number of rows of a: as many as fit into registers at a time. */
INLINE void NAME(products)(const int wide, long tall, long depth, const float *a, long across,
                           long along, const float *b, float *sums, const long ahead)
{
    const int most = wide == 1 ? 12 : TALL;
    long i = 0;
    for (; i + most <= tall; i += most)
        NAME(product)(most, wide, depth, a + i * across, across, along, b, sums + i * wide * L,
                      ahead);
    for (; i + 3 <= tall; i += 3)
        NAME(product)(3, wide, depth, a + i * across, across, along, b, sums + i * wide * L, ahead);
    for (; i < tall; i++)
        NAME(product)(1, wide, depth, a + i * across, across, along, b, sums + i * wide * L, ahead);
}

/* The same for a panel of `width` columns. */
INLINE void NAME(panel)(long width, long tall, long depth, const float *a, long across, long along,
                        const float *b, float *sums, const long ahead)
{
    if (width == 2 * L)
        NAME(products)(2, tall, depth, a, across, along, b, sums, ahead);
    else
        NAME(products)(1, tall, depth, a, across, along, b, sums, ahead);
}

/* Lines that go together, with rows or vectors of coordinates: as many sums as registers hold. */
#if L == 8
#define LINES TAKE(1, 8) TAKE(2, 4) TAKE(3, 3)
INLINE long NAME(together)(long left) { return left == 4 ? 2 : left < 3 ? left : 3; }
#else
#define LINES TAKE(1, 12) TAKE(2, 12) TAKE(3, 8) TAKE(4, 6) TAKE(5, 4)
INLINE long NAME(together)(long left)
{
    return left == 6 ? 3 : left < 6 ? left : left < 9 ? 4 : left < 11 ? 5 : 4;
}
#endif

/* The sum of a vector's elements. */
INLINE float NAME(across)(Vector value)
{
    union { Vector whole; Quad parts[L / 4]; } sum = {value};
#pragma GCC unroll 4
    for (int step = L / 8; step > 0; step /= 2)
#pragma GCC unroll 4
        for (int i = 0; i < step; i++) sum.parts[i] += sum.parts[i + step];
    return (sum.parts[0][0] + sum.parts[0][1]) + (sum.parts[0][2] + sum.parts[0][3]);
}

/* sums (lines, ROWS) += lines (lines, k) times rows (tall, k). */
INLINE void NAME(dots)(const int lines, const int tall, long k, const float *rows,
                       const float *weights, float *sums)
{
    Vector sum[5][12];
#pragma GCC unroll 5
    for (int p = 0; p < lines; p++)
#pragma GCC unroll 12
        for (int i = 0; i < tall; i++) sum[p][i] = NAME(all)(0);
    for (long j = 0; j < k; j += L) {
        Vector right[5];
#pragma GCC unroll 5
        for (int p = 0; p < lines; p++) right[p] = NAME(load)(weights + p * k + j);
#pragma GCC unroll 12
        for (int i = 0; i < tall; i++) {
            Vector left = NAME(load)(rows + i * k + j);
#pragma GCC unroll 5
            for (int p = 0; p < lines; p++) sum[p][i] += left * right[p];
        }
    }
#pragma GCC unroll 5
    for (int p = 0; p < lines; p++)
#pragma GCC unroll 12
        for (int i = 0; i < tall; i++) sums[p * ROWS + i] += NAME(across)(sum[p][i]);
}

/* The same for any number of rows, and of lines below UNIT. */
INLINE void NAME(forward_lines)(long lines, long count, long k, const float *rows,
                                const float *weights, float *sums)
{
    for (long p = 0, few; p < lines; p += few) {
        few = NAME(together)(lines - p);
        const float *from = weights + p * k;
        float *to = sums + p * ROWS;
        long i = 0;
#define TAKE(few, tall) \
    case few: \
        for (; i + tall <= count; i += tall) NAME(dots)(few, tall, k, rows + i * k, from, to + i); \
        break;
        switch (few) { LINES }
#undef TAKE
        for (; i < count; i++)
            for (long q = 0; q < few; q++)
                NAME(dots)(1, 1, k, rows + i * k, from + q * k, to + q * ROWS + i);
    }
}

/* gradients (lines, k), from one coordinate on for `wide` vectors, += sums (lines, ROWS) times
   rows (count, k). */
INLINE void NAME(outer)(const int lines, const int wide, long count, long k, const float *rows,
                        const float *sums, float *gradients)
{
    Vector sum[5][12];
#pragma GCC unroll 5
    for (int p = 0; p < lines; p++)
#pragma GCC unroll 12
        for (int v = 0; v < wide; v++) sum[p][v] = NAME(load)(gradients + p * k + v * L);
    for (long r = 0; r < count; r++) {
        Vector left[5];
#pragma GCC unroll 5
        for (int p = 0; p < lines; p++) left[p] = NAME(all)(sums[p * ROWS + r]);
#pragma GCC unroll 12
        for (int v = 0; v < wide; v++) {
            Vector right = NAME(load)(rows + r * k + v * L);
#pragma GCC unroll 5
            for (int p = 0; p < lines; p++) sum[p][v] += left[p] * right;
        }
    }
#pragma GCC unroll 5
    for (int p = 0; p < lines; p++)
#pragma GCC unroll 12
        for (int v = 0; v < wide; v++) NAME(store)(gradients + p * k + v * L, sum[p][v]);
}

/* The same for all coordinates, and any number of lines below UNIT. */
INLINE void NAME(back_lines)(long lines, long count, long k, const float *rows, const float *sums,
                             float *gradients)
{
    for (long p = 0, few; p < lines; p += few) {
        few = NAME(together)(lines - p);
        const float *from = sums + p * ROWS;
        float *to = gradients + p * k;
        long j = 0;
#define TAKE(few, wide) \
    case few: \
        for (; j + wide * L <= k; j += wide * L) \
            NAME(outer)(few, wide, count, k, rows + j, from, to + j); \
        break;
        switch (few) { LINES }
#undef TAKE
        for (; j < k; j += L)
            for (long q = 0; q < few; q++)
                NAME(outer)(1, 1, count, k, rows + j, from + q * ROWS, to + q * k + j);
    }
}

/* Decisions s (C - 1, ROWS) of one head become weight (p - y); returns the weighted loss. `last` is
   room for a class.

   Loss and residuals of a confidently classified row are sums of the wrong classes' probabilities:
   computed as log(total) and 1 - p they would be rounding error. */
INLINE double NAME(softmax)(long count, long C, float *s, float *last, const int32_t *label,
                            const float *weight)
{
    float true_decision[ROWS], losses[ROWS], residual[ROWS];
    int32_t labels[ROWS];
    for (long r = 0; r < ROWS; r += L) {
        Vector sum = NAME(all)(0);
        for (long c = 0; c < C - 1; c++) sum += NAME(load)(s + c * ROWS + r);
        NAME(store)(last + r, -sum);
    }
    for (long r = 0; r < ROWS; r++) {
        labels[r] = r < count ? label[r] : (int32_t)C - 1;
        true_decision[r] = labels[r] == C - 1 ? last[r] : s[labels[r] * ROWS + r];
    }
    for (long r = 0; r < ROWS; r += L) {
        Vector top = NAME(load)(last + r), mine = NAME(load)(true_decision + r), others;
        Vector w = NAME(load)(weight + r);
        Integers which;
        memcpy(&which, labels + r, sizeof which);
        for (long c = 0; c < C - 1; c++) {
            Vector one = NAME(load)(s + c * ROWS + r);
            top = NAME(choose)(one > top, one, top);
        }
        others = NAME(exponential)(NAME(load)(last + r) - top);
        others = (Vector)((Integers)others & (which != (int32_t)C - 1));
        for (long c = 0; c < C - 1; c++) {
            Vector e = NAME(exponential)(NAME(load)(s + c * ROWS + r) - top);
            others += (Vector)((Integers)e & (which != (int32_t)c));
            NAME(store)(s + c * ROWS + r, e);
        }
        Vector total = others + NAME(exponential)(mine - top);
        Vector size =
            NAME(choose)(mine >= top, NAME(logarithm1)(others), NAME(logarithm)(total));
        /* Infinite decisions have no finite loss. */
        NAME(store)(losses + r, w * (size + (top - mine)));
        Vector scale = w / total;
        NAME(store)(residual + r, -scale * others);
        for (long c = 0; c < C - 1; c++)
            NAME(store)(s + c * ROWS + r, scale * NAME(load)(s + c * ROWS + r));
    }
    double loss = 0;
    for (long r = 0; r < count; r++) {
        if (label[r] < C - 1) s[label[r] * ROWS + r] = residual[r];
        loss += losses[r];
    }
    return loss;
}

/* The same for a sigmoid: s (ROWS), label 0 or 1. */
INLINE double NAME(sigmoid)(long count, float *s, const int32_t *label, const float *weight)
{
    float target[ROWS], losses[ROWS];
    for (long r = 0; r < ROWS; r++) target[r] = r < count ? (float)label[r] : 0;
    for (long r = 0; r < ROWS; r += L) {
        Vector x = NAME(load)(s + r), y = NAME(load)(target + r), w = NAME(load)(weight + r);
        Vector one = NAME(all)(1), small = NAME(exponential)(NAME(choose)(x > 0.0f, -x, x));
        Vector positive = NAME(choose)(x > 0.0f, x, NAME(all)(0));
        NAME(store)(losses + r, w * (NAME(logarithm1)(small) + (positive - y * x)));
        /* The numerator of p - y or of its complement, whichever is not rounded against a one. */
        Vector numerator = NAME(choose)(x >= 0.0f, NAME(choose)(y > 0.0f, -small, one),
                                        NAME(choose)(y > 0.0f, -one, small));
        NAME(store)(s + r, w * (numerator / (1.0f + small)));
    }
    double loss = 0;
    for (long r = 0; r < count; r++) loss += losses[r];
    return loss;
}

/* Products of rows with all weights: decisions in panels, (ROWS, width) each, and lines,
   (lines, ROWS). */
INLINE void NAME(forward)(long count, long k, const float *rows, long P, const float *packed,
                          float *panels)
{
    memset(panels, 0, sizeof(float) * ROWS * NAME(columns)(P));
    long first = 0, width;
    for (long from = 0, depth; from < k; from += depth) {
        depth = k - from < DEPTH ? k - from : DEPTH;
        for (first = 0; first < P; first += width) {
            width = NAME(width)(P - first);
            if (width < UNIT) break;
            NAME(panel)(width, count, depth, rows + from, k, 1, packed + first * k + from * width,
                        panels + first * ROWS, 0);
        }
    }
    if (first < P)
        NAME(forward_lines)(P - first, count, k, rows, packed + first * k, panels + first * ROWS);
}

/* gradients += the rows times what the panels and the lines hold by now. */
INLINE void NAME(back)(long count, long k, const float *rows, long P, const float *panels,
                       float *gradients)
{
    long first = 0, width;
    for (long j = 0; j < k; j += 12)
        for (first = 0; first < P; first += width) {
            width = NAME(width)(P - first);
            if (width < UNIT) break;
            long tall = k - j < 12 ? k - j : 12;
            NAME(panel)(width, tall, count, rows + j, 1, k, panels + first * ROWS,
                        gradients + first * k + j * width, first == 0 ? ROWS * k : 0);
        }
    if (first < P)
        NAME(back_lines)(P - first, count, k, rows, panels + first * ROWS, gradients + first * k);
}

/* Decisions in panels and lines to s (P, ROWS), or back. */
INLINE void NAME(turn)(long P, float *panels, float *s, const int out)
{
    for (long first = 0, width; first < P; first += width) {
        width = NAME(width)(P - first);
        if (width < UNIT) {
            if (out)
                memcpy(s + first * ROWS, panels + first * ROWS, sizeof(float) * width * ROWS);
            else
                memcpy(panels + first * ROWS, s + first * ROWS, sizeof(float) * width * ROWS);
            continue;
        }
        for (long p = 0; p < width; p += L)
            for (long r = 0; r < ROWS; r += L) {
                Vector square[L];
                float *panel = panels + first * ROWS + r * width + p;
                float *plain = s + (first + p) * ROWS + r;
                for (long i = 0; i < L; i++)
                    square[i] = NAME(load)(out ? panel + i * width : plain + i * ROWS);
                NAME(transpose)(square);
                for (long i = 0; i < L; i++)
                    NAME(store)(out ? plain + i * ROWS : panel + i * width, square[i]);
            }
    }
}

static void NAME(block)(long count, long k, const float *rows, long A, long C, const float *packed,
                        const int32_t *label, long stride, const float *weight,
                        const float *class_factor, double *loss, float *gradients, float *panels,
                        float *s)
{
    const long c = C > 1 ? C - 1 : 1, P = A * c;
    NAME(forward)(count, k, rows, P, packed, panels);
    NAME(turn)(P, panels, s, 1);
    for (long a = 0; a < A; a++) {
        const int32_t *head_label = C > 1 ? label : label + a * stride;
        float w[ROWS] __attribute__((aligned(64)));
        for (long r = 0; r < ROWS; r++) {
            w[r] = r >= count ? 0 : weight ? weight[r] : 1;
            if (class_factor && r < count)
                w[r] *= class_factor[a * (C > 1 ? C : 2) + head_label[r]];
        }
        if (C > 1)
            loss[a] += NAME(softmax)(count, C, s + a * c * ROWS, s + NAME(columns)(P) * ROWS,
                                     head_label, w);
        else
            loss[a] += NAME(sigmoid)(count, s + a * ROWS, head_label, w);
    }
    NAME(turn)(P, panels, s, 0);
    NAME(back)(count, k, rows, P, panels, gradients);
}

static void NAME(centred)(long k, const uint16_t *row, const float *mean, float *out)
{
    for (long j = 0; j < k; j += L) {
        long count = k - j < L ? k - j : L;
        Halves halves = {0};
        if (count == L)
            memcpy(&halves, row + j, sizeof halves);
        else
            for (long i = 0; i < count; i++) halves[i] = row[j + i];
        Integers bits = __builtin_convertvector(halves, Integers), size = (bits & 0x7fff) << 13;
        /* The exponent's offset goes from 15 to 127; a subnormal is 2^-14 and the rest. */
        Vector normal = (Vector)(size + (112 << 23));
        Vector tiny = (Vector)(size + (113 << 23)) - 6.103515625e-5f;
        Vector value = NAME(choose)(size < 1 << 23, tiny, normal);
        value = (Vector)((Integers)value | (bits & 0x8000) << 16);
        if (count == L)
            NAME(store)(out + j, value - NAME(load)(mean + j));
        else
            for (long i = 0; i < count; i++) out[j + i] = value[i] - mean[j + i];
    }
}

#undef Vector
#undef Loose
#undef Integers
#undef TALL
#undef Halves
#undef Quad
#undef UNIT
#undef MOST_LINES
#undef LINES
#undef MIXED
#undef EXCHANGE
#undef LIST
#undef SECOND
#undef FIRST
#endif
