// y = x w' (+ bias), and to the rows of each adapter its update, y += scaling (x a') b, for few rows of x.
//
// To generate a token every weight is read once, so what counts is that it is read once however many rows there are, in
// the type it is held in, by all threads. Sums are float32, in an order that does not depend on the number of rows.
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

enum { F32, BF16, F16 };
enum { WIDTH = 8 };  // floats of a vector
typedef float vec __attribute__((vector_size(32), aligned(4)));
typedef uint16_t half_words __attribute__((vector_size(16), aligned(2)));
typedef uint32_t words __attribute__((vector_size(32)));
#define INLINE static inline __attribute__((always_inline))

typedef struct {  // rows start…stop-1 of x belong to an adapter
    const float *a, *b;  // [rank, in], [rank, out]
    int64_t start, stop, rank;
    float scaling;
} Segment;

INLINE vec load(const void *p, int64_t i, int type)
{
    if (type == F32)
        return *(const vec *)((const float *)p + i);
    const uint16_t *q = (const uint16_t *)p + i;
    if (type == BF16)
        return (vec)(__builtin_convertvector(*(const half_words *)q, words) << 16);
#ifdef __F16C__
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)q));
#else
    vec out;
    for (int j = 0; j < WIDTH; j++)
        out[j] = (float)((const _Float16 *)q)[j];
    return out;
#endif
}

INLINE float load_one(const void *p, int64_t i, int type)
{
    if (type == F32)
        return ((const float *)p)[i];
    if (type == F16)
        return (float)((const _Float16 *)p)[i];
    union { uint32_t bits; float value; } u = {(uint32_t)((const uint16_t *)p)[i] << 16};
    return u.value;
}

INLINE float sum(vec v)
{
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

// y[j * width + i] = w[i] · x[j] for n rows of w and m of x, constants wherever this is called.
INLINE void tile(const void *w, const float *x, float *y, int64_t in, int64_t width, int n, int m, int type)
{
    vec acc[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < n; i++)
#pragma GCC unroll 4
        for (int j = 0; j < m; j++)
            acc[i][j] = (vec){0};
    int64_t k = 0;
    for (; k + WIDTH <= in; k += WIDTH) {
        vec row[4];
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            row[i] = load(w, i * in + k, type);
#ifdef __AVX__
            if (m > 1)
                __asm__("" : "+x"(row[i]));  // kept in a register, not read again for each row of x
#endif
        }
#pragma GCC unroll 4
        for (int j = 0; j < m; j++) {
            vec column = load(x, j * in + k, F32);
#pragma GCC unroll 4
            for (int i = 0; i < n; i++)
                acc[i][j] += row[i] * column;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; i++)
#pragma GCC unroll 4
        for (int j = 0; j < m; j++) {
            float total = sum(acc[i][j]);
            for (int64_t rest = k; rest < in; rest++)
                total += load_one(w, i * in + rest, type) * x[j * in + rest];
            y[j * width + i] = total;
        }
}

// Columns from…to-1 of y [rows, width] = x w'.
INLINE void product(const void *w, const float *x, float *y, int64_t rows, int64_t in, int64_t width, int64_t from,
                    int64_t to, int type)
{
    int64_t c = from;
    while (c < to) {
        const char *at = (const char *)w + c * in * (type == F32 ? 4 : 2);
        int64_t r = 0;
        if (rows == 1 && c + 4 <= to) {
            tile(at, x, y + c, in, width, 4, 1, type);
            c += 4;
        } else if (c + 2 <= to) {
            for (; r + 4 <= rows; r += 4)
                tile(at, x + r * in, y + r * width + c, in, width, 2, 4, type);
            for (; r + 2 <= rows; r += 2)
                tile(at, x + r * in, y + r * width + c, in, width, 2, 2, type);
            if (r < rows)
                tile(at, x + r * in, y + r * width + c, in, width, 2, 1, type);
            c += 2;
        } else {
            for (; r < rows; r++)
                tile(at, x + r * in, y + r * width + c, in, width, 1, 1, type);
            c += 1;
        }
    }
}

static void product_f32(const void *w, const float *x, float *y, int64_t rows, int64_t in, int64_t width, int64_t from,
                        int64_t to) { product(w, x, y, rows, in, width, from, to, F32); }
static void product_bf16(const void *w, const float *x, float *y, int64_t rows, int64_t in, int64_t width, int64_t from,
                         int64_t to) { product(w, x, y, rows, in, width, from, to, BF16); }
static void product_f16(const void *w, const float *x, float *y, int64_t rows, int64_t in, int64_t width, int64_t from,
                        int64_t to) { product(w, x, y, rows, in, width, from, to, F16); }

// Columns from…to-1 of y += scaling t b.
static void update(const Segment *s, const float *t, float *y, int64_t width, int64_t from, int64_t to)
{
    int64_t c = from;
    for (; c + WIDTH <= to; c += WIDTH) {
        vec total = {0};
        for (int64_t r = 0; r < s->rank; r++)
            total += t[r] * load(s->b, r * width + c, F32);
        *(vec *)(y + c) += s->scaling * total;
    }
    for (; c < to; c++) {
        float total = 0;
        for (int64_t r = 0; r < s->rank; r++)
            total += t[r] * s->b[r * width + c];
        y[c] += s->scaling * total;
    }
}

// This thread's part of 0…all-1, in fours.
static void part(int64_t all, int64_t *from, int64_t *to)
{
    int64_t threads = omp_get_num_threads(), share = (all + 4 * threads - 1) / (4 * threads) * 4;
    *from = omp_get_thread_num() * share;
    *from = *from < all ? *from : all;
    *to = *from + share < all ? *from + share : all;
}

// `type`: of the weights; all else is float32. Rows are contiguous. `inner` has room for the rows times the highest rank.
void lorry_linear(const float *x, const void *w, const float *bias, float *y, int64_t rows, int64_t in, int64_t out,
                  int type, const Segment *segments, int64_t count, float *inner, int threads)
{
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++)
        most = segments[i].rank > most ? segments[i].rank : most;
#pragma omp parallel num_threads(threads)
    {
        int64_t from, to;
        for (int64_t i = 0; i < count; i++) {
            const Segment *s = segments + i;
            part(s->rank, &from, &to);
            product_f32(s->a, x + s->start * in, inner + s->start * most, s->stop - s->start, in, most, from, to);
        }
        part(out, &from, &to);
        (type == F32 ? product_f32 : type == BF16 ? product_bf16 : product_f16)(w, x, y, rows, in, out, from, to);
        if (bias)
            for (int64_t r = 0; r < rows; r++)
                for (int64_t c = from; c < to; c++)
                    y[r * out + c] += bias[c];
        if (count) {
#pragma omp barrier
            for (int64_t i = 0; i < count; i++)
                for (int64_t r = segments[i].start; r < segments[i].stop; r++)
                    update(segments + i, inner + r * most, y + r * out, out, from, to);
        }
    }
}
