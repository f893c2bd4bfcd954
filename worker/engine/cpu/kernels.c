// For few rows of x: products with matrices that rows' adapters change, and all layers of a Llama-like decoder.
//
// To generate a token every weight is read once, so what counts is that it is read once however many rows there are, in
// the type it is held in, by all threads. Sums are float32.
#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

enum { F32, BF16, F16 };
enum { WIDTH = 8 };     // floats of a vector
enum { BLOCK = 64 };    // rows of x that stay in a core's cache while w passes by
enum { AHEAD = 1024 };  // bytes; w is fetched before it is needed, or half of the time goes into waiting for it
typedef float vec __attribute__((vector_size(32), aligned(4)));
typedef int32_t ints __attribute__((vector_size(32)));
typedef uint16_t half_words __attribute__((vector_size(16), aligned(2)));
typedef uint32_t words __attribute__((vector_size(32)));
#ifdef __AVX__
#define IN_REGISTER(v) __asm__("" : "+x"(v))  // and not read again by each of those who use it
#else
#define IN_REGISTER(v)
#endif
#define INLINE static inline __attribute__((always_inline))

typedef struct {  // an adapter's update of one matrix: y += scaling (x a') b
    const float *a, *b;  // [rank, in], [rank, out]
    int64_t rank;        // 0: it has none
    float scaling;
} Pair;

typedef struct {  // rows start…stop-1 of x belong to an adapter
    int64_t start, stop;
    const Pair *pairs;  // one a matrix
} Segment;

typedef struct {
    const void *w;      // [out, in], rows contiguous
    const float *bias;  // [out] or none
    int64_t in, out, type;
} Matrix;

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
    v += __builtin_shuffle(v, (ints){4, 5, 6, 7, 0, 1, 2, 3});
    v += __builtin_shuffle(v, (ints){2, 3, 0, 1, 6, 7, 4, 5});
    return v[0] + v[1];
}

typedef struct {
    int here, turn;
} Barrier;

// Wait for the other threads. OpenMP's own barrier goes to sleep at once in a process where two threads have called it, and
// takes twice the time of a step to wake up.
static void meet(Barrier *b)
{
    int turn = __atomic_load_n(&b->turn, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&b->here, 1, __ATOMIC_ACQ_REL) == omp_get_num_threads()) {
        __atomic_store_n(&b->here, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&b->turn, turn + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&b->turn, __ATOMIC_ACQUIRE) == turn; spins++) {
        if (spins > 20000)
            sched_yield();  // the one that is waited for may need this core
#ifdef __x86_64__
        else
            __builtin_ia32_pause();
#endif
    }
}

// This thread's part of 0…all-1, in whole units.
INLINE void part(int64_t all, int64_t unit, int64_t *from, int64_t *to)
{
    int64_t threads = omp_get_num_threads(), share = (all + unit * threads - 1) / (unit * threads) * unit;
    *from = omp_get_thread_num() * share;
    *from = *from < all ? *from : all;
    *to = *from + share < all ? *from + share : all;
}

// w · x, of a row of w that stands for itself.
INLINE float line(const void *w, const float *x, int64_t in, int type)
{
    vec acc[4] = {{0}, {0}, {0}, {0}};
    int64_t k = 0, size = type == F32 ? 4 : 2;
    for (; k + 4 * WIDTH <= in; k += 4 * WIDTH) {
        __builtin_prefetch((const char *)w + k * size + AHEAD);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            acc[i] += load(w, k + i * WIDTH, type) * load(x, k + i * WIDTH, F32);
    }
    for (; k + WIDTH <= in; k += WIDTH)
        acc[0] += load(w, k, type) * load(x, k, F32);
    float total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
    for (; k < in; k++)
        total += load_one(w, k, type) * x[k];
    return total;
}

// y[j * width + i] = w[i] · x[j] for n rows of w and m of x, constants wherever this is called. `fetch`: also the next n.
INLINE void tile(const void *w, const float *x, float *y, int64_t in, int64_t width, int n, int m, int type, int fetch)
{
    vec acc[4][4];
    int64_t k = 0, size = type == F32 ? 4 : 2;
#pragma GCC unroll 4
    for (int i = 0; i < n; i++)
#pragma GCC unroll 4
        for (int j = 0; j < m; j++)
            acc[i][j] = (vec){0};
    for (; k + WIDTH <= in; k += WIDTH) {
        vec row[4];
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            row[i] = load(w, i * in + k, type);
            if (fetch)
                __builtin_prefetch((const char *)w + ((n + i) * in + k) * size + AHEAD);
            if (m > 1)
                IN_REGISTER(row[i]);
        }
#pragma GCC unroll 4
        for (int j = 0; j < m; j++) {
            vec column = load(x, j * in + k, F32);
            if (n > 1)
                IN_REGISTER(column);
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

// n rows of w with all of x, of which there are two rows or more.
INLINE void tiles(const void *w, const float *x, float *y, int64_t rows, int64_t in, int64_t width, int n, int type)
{
    int64_t r = rows < 4 ? 2 : 4;
    if (rows < 4)
        tile(w, x, y, in, width, n, 2, type, 1);
    else
        tile(w, x, y, in, width, n, 4, type, 1);
    for (; r + 4 <= rows; r += 4)
        tile(w, x + r * in, y + r * width, in, width, n, 4, type, 0);
    for (; r + 2 <= rows; r += 2)
        tile(w, x + r * in, y + r * width, in, width, n, 2, type, 0);
    if (r < rows)
        tile(w, x + r * in, y + r * width, in, width, n, 1, type, 0);
}

// Columns from…to-1 of y [rows, width] = x w'.
INLINE void product_of(const void *w, const float *x, float *y, int64_t rows, int64_t in, int64_t width, int64_t from,
                       int64_t to, int type)
{
    int64_t size = type == F32 ? 4 : 2, block;
    for (int64_t r = 0; r < rows; r += block) {
        block = rows - r < 2 * BLOCK ? rows - r : BLOCK;  // never a single row that is left over
        const float *at = x + r * in;
        float *to_row = y + r * width;
        int64_t c = from;
        for (; c < to && block == 1; c++)
            to_row[c] = line((const char *)w + c * in * size, at, in, type);
        for (; c + 3 <= to; c += 3)
            tiles((const char *)w + c * in * size, at, to_row + c, block, in, width, 3, type);
        for (; c < to; c++)
            tiles((const char *)w + c * in * size, at, to_row + c, block, in, width, 1, type);
    }
}

#define PRODUCT(name, type)                                                                                               \
    static __attribute__((noinline)) void name(const void *w, const float *x, float *y, int64_t rows, int64_t in,         \
                                               int64_t width, int64_t from, int64_t to)                                   \
    {                                                                                                                     \
        product_of(w, x, y, rows, in, width, from, to, type);                                                             \
    }
PRODUCT(product_f32, F32)
PRODUCT(product_bf16, BF16)
PRODUCT(product_f16, F16)

// This thread's columns of y [rows, out] = x w' + bias; returns which.
static void product(const Matrix *m, const float *x, float *y, int64_t rows, int64_t *from, int64_t *to)
{
    part(m->out, 12, from, to);
    (m->type == F32 ? product_f32 : m->type == BF16 ? product_bf16 : product_f16)(m->w, x, y, rows, m->in, m->out, *from, *to);
    if (m->bias)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = *from; c < *to; c++)
                y[r * m->out + c] += m->bias[c];
}

// This thread's part of every segment's x a', into t [rows, most].
static void narrow(const Segment *s, int64_t count, int64_t site, const float *x, float *t, int64_t in, int64_t most)
{
    for (; count > 0; count--, s++) {
        const Pair *p = s->pairs + site;
        int64_t from, to;
        part(p->rank, 4, &from, &to);
        product_f32(p->a, x + s->start * in, t + s->start * most, s->stop - s->start, in, most, from, to);
    }
}

// Columns from…to-1 of y [rows, width] += scaling t b. Row by row of b, as it lies in memory.
static void widen(const Segment *s, int64_t count, int64_t site, const float *t, float *y, int64_t width, int64_t most,
                  int64_t from, int64_t to)
{
    for (; count > 0; count--, s++) {
        const Pair *p = s->pairs + site;
        for (int64_t r = 0; r < p->rank; r += 4)
            for (int64_t row = s->start; row < s->stop; row++) {
                int64_t n = p->rank - r < 4 ? p->rank - r : 4, c = from;
                const float *b[4];
                float by[4] = {0}, *out = y + row * width;
                for (int64_t i = 0; i < 4; i++) {
                    b[i] = p->b + (r + (i < n ? i : 0)) * width;
                    by[i] = i < n ? p->scaling * t[row * most + r + i] : 0;
                }
                for (; c + WIDTH <= to; c += WIDTH)
                    *(vec *)(out + c) += (by[0] * load(b[0], c, F32) + by[1] * load(b[1], c, F32)) +
                                         (by[2] * load(b[2], c, F32) + by[3] * load(b[3], c, F32));
                for (; c < to; c++)
                    out[c] += (by[0] * b[0][c] + by[1] * b[1][c]) + (by[2] * b[2][c] + by[3] * b[3][c]);
            }
    }
}

static int64_t highest(const Segment *s, int64_t count, int64_t sites)
{
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++)
        for (int64_t site = 0; site < sites; site++)
            most = s[i].pairs[site].rank > most ? s[i].pairs[site].rank : most;
    return most;
}

// y [rows, out] = x w' + bias and updates. All but w is float32. `inner` has room for the rows times the highest rank.
void lorry_linear(const Matrix *m, const float *x, float *y, int64_t rows, const Segment *segments, int64_t count,
                  float *inner, int threads)
{
    int64_t most = highest(segments, count, 1);
    Barrier all = {0, 0};
#pragma omp parallel num_threads(threads)
    {
        int64_t from, to;
        narrow(segments, count, 0, x, inner, m->in, most);
        product(m, x, y, rows, &from, &to);
        if (most) {
            meet(&all);
            widen(segments, count, 0, inner, y, m->out, most, from, to);
        }
    }
}

// Layers of RMSNorm, rotary GQA attention, RMSNorm, SwiGLU

enum { Q, K, V, O, GATE, UP, DOWN, SITES };

typedef struct {
    Matrix m[SITES];
    const float *input_norm, *post_norm, *q_norm, *k_norm;  // the last two [width] or none
    float *keys, *values;                                   // [slots, kv_heads, width]
    int64_t window;                                         // tokens that are seen; 0: all
    float eps, head_eps, scale;
} Layer;

typedef struct {
    int64_t layers, hidden, heads, kv_heads, width, inner, page;
    const float *norm;
    float eps;
} Shape;

typedef struct {
    int64_t rows;
    const int64_t *blocks;  // [rows, most_blocks] where each row's sequence lies, in pages
    const int64_t *lengths; // [rows] of the sequences, with the row's own token, the last
    int64_t most_blocks;
    const float *cosines, *sines;  // [rows, width]
} Step;

INLINE vec either(ints where, vec a, vec b)
{
    return (vec)((where & (ints)a) | (~where & (ints)b));
}

// e^x, within 2e-7 of it (Cephes).
INLINE vec exponential(vec x)
{
    x = either(x < -87.0f, (vec){0} - 87.0f, either(x > 88.0f, (vec){0} + 88.0f, x));
    vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((__builtin_convertvector(n, ints) + 127) << 23);
}

INLINE float dot(const float *a, const float *b, int64_t n)
{
    vec total = {0};
    for (int64_t i = 0; i < n; i += WIDTH)
        total += load(a, i, F32) * load(b, i, F32);
    return sum(total);
}

INLINE void normed(const float *x, const float *weight, float *out, int64_t n, float eps)
{
    float by = 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
    for (int64_t i = 0; i < n; i += WIDTH)
        *(vec *)(out + i) = load(weight, i, F32) * (load(x, i, F32) * by);
}

INLINE void rotated(const float *x, const float *cosines, const float *sines, float *out, int64_t width)
{
    int64_t half = width / 2;
    for (int64_t i = 0; i < half; i++) {
        out[i] = x[i] * cosines[i] - x[i + half] * sines[i];
        out[i + half] = x[i + half] * cosines[i + half] + x[i] * sines[i + half];
    }
}

INLINE int64_t slot(const Step *step, int64_t row, int64_t at, int64_t page)
{
    return step->blocks[row * step->most_blocks + at / page] * page + at % page;
}

// One query head of a row over the keys and values of its sequence. `room`: the longest sequence and a vector, and a head.
static void attend(const Layer *l, const Shape *s, const Step *step, int64_t row, int64_t head, const float *q, float *out,
                   float *room)
{
    int64_t width = s->width, stride = s->kv_heads * width, length = step->lengths[row];
    int64_t from = l->window && length > l->window ? length - l->window : 0, n = length - from;
    int64_t at = head / (s->heads / s->kv_heads) * width;
    float *turned = room, *scores = room + 2 * width, highest = -INFINITY;
    if (l->q_norm) {
        normed(q, l->q_norm, turned + width, width, l->head_eps);
        q = turned + width;
    }
    rotated(q, step->cosines + row * width, step->sines + row * width, turned, width);
    for (int64_t i = 0; i < n; i++) {
        scores[i] = l->scale * dot(turned, l->keys + slot(step, row, from + i, s->page) * stride + at, width);
        highest = scores[i] > highest ? scores[i] : highest;
    }
    for (int64_t i = n; i % WIDTH; i++)
        scores[i] = -INFINITY;
    vec total = {0};
    for (int64_t i = 0; i < n; i += WIDTH) {
        vec e = exponential(load(scores, i, F32) - highest);
        *(vec *)(scores + i) = e;
        total += e;
    }
    float by = 1.0f / sum(total);
    memset(out, 0, width * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        const float *value = l->values + slot(step, row, from + i, s->page) * stride + at;
        float weight = scores[i] * by;
        for (int64_t c = 0; c < width; c += WIDTH)
            *(vec *)(out + c) += weight * load(value, c, F32);
    }
}

// A row's key and value of one head, to where they are kept.
static void keep(const Layer *l, const Shape *s, const Step *step, int64_t row, int64_t head, const float *k,
                 const float *v, float *room)
{
    int64_t width = s->width, stride = s->kv_heads * width;
    int64_t at = slot(step, row, step->lengths[row] - 1, s->page) * stride + head * width;
    if (l->k_norm) {
        normed(k, l->k_norm, room, width, l->head_eps);
        k = room;
    }
    rotated(k, step->cosines + row * width, step->sines + row * width, l->keys + at, width);
    memcpy(l->values + at, v, width * sizeof(float));
}

// x [rows, out] += in w' and updates, for all threads when it returns. `out` [rows, out] and `inner` [rows, most] are room.
static void add_product(const Matrix *m, const Segment *segments, int64_t count, int64_t site, const float *in, float *out,
                        float *inner, int64_t most, float *x, int64_t rows, Barrier *all)
{
    int64_t from, to;
    narrow(segments, count, site, in, inner, m->in, most);
    product(m, in, out, rows, &from, &to);
    if (count) {
        meet(all);
        widen(segments, count, site, inner, out, m->out, most, from, to);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = from; c < to; c++)
            x[r * m->out + c] += out[r * m->out + c];
    meet(all);
}

// Run all layers and the norm over one token of each of several sequences.
//
// x [rows, hidden], overwritten with the result. `shared` has room for rows × (2 hidden + (2 heads + 2 kv_heads) width +
// 2 inner + 3 times the highest rank); `own`, for each thread, for rows × hidden + 2 width + the longest sequence + 8.
void lorry_layers(const Shape *s, const Layer *layers, const Step *step, const Segment *segments, int64_t count, float *x,
                  float *shared, float *own, int64_t own_size, int threads)
{
    int64_t rows = step->rows, width = s->width, q_width = s->heads * width, kv_width = s->kv_heads * width, most = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t rank = highest(segments + i, 1, s->layers * SITES);
        most = rank > most ? rank : most;
    }
    float *q = shared, *k = q + rows * q_width, *v = k + rows * kv_width, *heads = v + rows * kv_width;
    float *out = heads + rows * q_width, *gate = out + rows * s->hidden, *up = gate + rows * s->inner;
    float *inner = up + rows * s->inner, *inner2 = inner + rows * most, *inner3 = inner2 + rows * most;
    count = most ? count : 0;
    Barrier all = {0, 0};
#pragma omp parallel num_threads(threads)
    {
        float *h = own + omp_get_thread_num() * own_size, *room = h + rows * s->hidden;
        int64_t from, to, from2, to2, from3, to3;
        for (int64_t i = 0; i < s->layers; i++) {
            const Layer *l = layers + i;
            const Matrix *m = l->m;
            int64_t site = i * SITES;
            for (int64_t r = 0; r < rows; r++)  // by every thread for itself, rather than wait for one another
                normed(x + r * s->hidden, l->input_norm, h + r * s->hidden, s->hidden, l->eps);
            narrow(segments, count, site + Q, h, inner, s->hidden, most);
            narrow(segments, count, site + K, h, inner2, s->hidden, most);
            narrow(segments, count, site + V, h, inner3, s->hidden, most);
            product(m + Q, h, q, rows, &from, &to);
            product(m + K, h, k, rows, &from2, &to2);
            product(m + V, h, v, rows, &from3, &to3);
            if (count) {
                meet(&all);
                widen(segments, count, site + Q, inner, q, q_width, most, from, to);
                widen(segments, count, site + K, inner2, k, kv_width, most, from2, to2);
                widen(segments, count, site + V, inner3, v, kv_width, most, from3, to3);
            }
            meet(&all);
#pragma omp for nowait
            for (int64_t at = 0; at < rows * s->kv_heads; at++)
                keep(l, s, step, at / s->kv_heads, at % s->kv_heads, k + at * width, v + at * width, room);
            meet(&all);
#pragma omp for schedule(dynamic) nowait
            for (int64_t at = 0; at < rows * s->heads; at++)
                attend(l, s, step, at / s->heads, at % s->heads, q + at * width, heads + at * width, room);
            meet(&all);
            add_product(m + O, segments, count, site + O, heads, out, inner, most, x, rows, &all);
            for (int64_t r = 0; r < rows; r++)
                normed(x + r * s->hidden, l->post_norm, h + r * s->hidden, s->hidden, l->eps);
            narrow(segments, count, site + GATE, h, inner, s->hidden, most);
            narrow(segments, count, site + UP, h, inner2, s->hidden, most);
            product(m + GATE, h, gate, rows, &from, &to);
            product(m + UP, h, up, rows, &from, &to);
            if (count) {
                meet(&all);
                widen(segments, count, site + GATE, inner, gate, s->inner, most, from, to);
                widen(segments, count, site + UP, inner2, up, s->inner, most, from, to);
            }
            for (int64_t r = 0; r < rows; r++) {
                float *g = gate + r * s->inner, *u = up + r * s->inner;
                int64_t c = from;
                for (; c + WIDTH <= to; c += WIDTH) {
                    vec value = load(g, c, F32);
                    *(vec *)(g + c) = value / (1.0f + exponential(-value)) * load(u, c, F32);
                }
                for (; c < to; c++)
                    g[c] = g[c] / (1.0f + exponential((vec){0} - g[c])[0]) * u[c];
            }
            meet(&all);
            add_product(m + DOWN, segments, count, site + DOWN, gate, out, inner3, most, x, rows, &all);
        }
#pragma omp for
        for (int64_t r = 0; r < rows; r++) {
            normed(x + r * s->hidden, s->norm, h, s->hidden, s->eps);
            memcpy(x + r * s->hidden, h, s->hidden * sizeof(float));
        }
    }
}
