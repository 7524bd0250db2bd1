/* The experts of one layer for a few tokens, at the speed of memory.
 *
 *   out[place] = round(round(down(round(round(act(round(gate(x)))) * round(up(x))))) * weight)
 *
 * for every (token, place) pair of every expert given: gated experts without biases, weights in rows, in float32 or
 * bfloat16. Products accumulate in float32; "round" is to the weights' type, where torch rounds.
 *
 * One list of row blocks (first all of gate and up, then all of down) is shared by all threads: each takes the next
 * block when it is done with its last. A block of down waits until its own expert's gate and up are complete; there
 * is no other barrier. Every dot product is summed in one order that depends on nothing but its length and the level
 * of instructions: not on the other tokens or experts in the call, nor on the threads.
 *
 * Threads are kept between calls, asleep on a futex after a short spin. One call at a time uses them; a second at the
 * same time works alone. Needs Linux and nothing else.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define X86 1
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define X86 0
#define PAUSE() ((void)0)
#endif

#define ABI 1          /* raised with every change to what the functions at the end take */
#define TOKENS 16      /* tokens of an expert computed from one reading of a block */
#define TILE 4         /* rows, and tokens, computed together; the rows after them are prefetched meanwhile */
#define ROWS 64        /* most rows of a block */
#define BLOCK (128 << 10) /* bytes of a block, about: measured */
#define MOST_THREADS 256
#define SPIN 2000      /* pauses before a thread goes to sleep: a few microseconds to tens of them */

enum { FLOAT32, BFLOAT16 };
enum { SILU, GELU_TANH };
enum { PLAIN, AVX2, AVX512, AVX512_BF16 };

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))

INLINE float widen(bf16 h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/* to the nearest, ties to even, as torch */
INLINE bf16 narrow(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
    return (bf16)(f != f ? 0x7fc0u : rounded);
}

INLINE float rounded(float f, int type) { return type == BFLOAT16 ? widen(narrow(f)) : f; }

/* e^x within an ulp or two, in a form that compilers vectorise (Cephes' expf: Moshier, netlib.org/cephes) */
INLINE float exponential(float x) {
    x = x > 89.0f ? 89.0f : x; /* infinite */
    x = x < -87.0f ? -87.0f : x;
    float n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f; /* 1.5 · 2^23: to the nearest integer */
    float r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    /* 2^n in two factors: n = 128 alone would be infinite */
    int32_t half = (int32_t)n >> 1, other = (int32_t)n - half;
    int32_t a = (half + 127) << 23, b = (other + 127) << 23;
    float fa, fb;
    memcpy(&fa, &a, 4);
    memcpy(&fb, &b, 4);
    return p * fa * fb;
}

INLINE float activated(float g, int act) {
    /* x·sigmoid(z): z = x for SiLU; the tanh form of GELU is the same with z = 2·sqrt(2/π)·(x + 0.044715·x³) */
    float z = act == GELU_TANH ? 1.5957691216057308f * (g + 0.044715f * g * g * g) : g;
    return g / (1.0f + exponential(-z));
}

/* Sums of products of `rows` ≤ ROWS rows with `tokens` ≤ TOKENS inputs of length k: sums[t * ROWS + r]. */
typedef void dots_fn(const void *w, int64_t stride, int rows, const void *const *x, int tokens, int64_t k, float *sums);
/* product[r] = act(gate[r]) * up[r], rounded as torch does, stored as the inputs of `dots` are. */
typedef void gated_fn(const float *gate, const float *up, int rows, int act, int type, void *product);
/* out[r] = sums[r] * weight, both rounded. */
typedef void scaled_fn(const float *sums, int rows, float weight, int type, void *out);

INLINE void gated_any(const float *gate, const float *up, int rows, int act, int type, int narrowed, void *product) {
    for (int r = 0; r < rows; r++) {
        float g = rounded(activated(rounded(gate[r], type), act), type);
        float p = g * rounded(up[r], type);
        if (narrowed)
            ((bf16 *)product)[r] = narrow(p);
        else
            ((float *)product)[r] = rounded(p, type);
    }
}

INLINE void gated_all(const float *gate, const float *up, int rows, int act, int type, int narrowed, void *product) {
    if (type == FLOAT32 && act == SILU)
        gated_any(gate, up, rows, SILU, FLOAT32, 0, product);
    else if (type == FLOAT32)
        gated_any(gate, up, rows, GELU_TANH, FLOAT32, 0, product);
    else if (act == SILU)
        gated_any(gate, up, rows, SILU, BFLOAT16, narrowed, product);
    else
        gated_any(gate, up, rows, GELU_TANH, BFLOAT16, narrowed, product);
}

INLINE void scaled_all(const float *sums, int rows, float weight, int type, void *out) {
    if (type == FLOAT32)
        for (int r = 0; r < rows; r++)
            ((float *)out)[r] = sums[r] * weight;
    else
        for (int r = 0; r < rows; r++)
            ((bf16 *)out)[r] = narrow(rounded(sums[r], BFLOAT16) * weight);
}

/* The elementwise parts are the same for each level; the compiler vectorises them for it. */
#define ELEMENTWISE(level, narrowed, attribute)                                                                        \
    attribute static void gated_##level(const float *g, const float *u, int rows, int act, int type, void *product) {  \
        gated_all(g, u, rows, act, type, narrowed, product);                                                           \
    }                                                                                                                  \
    attribute static void scaled_##level(const float *sums, int rows, float weight, int type, void *out) {             \
        scaled_all(sums, rows, weight, type, out);                                                                     \
    }

/* plain C: 16 sums side by side, which any compiler can keep in vectors */

INLINE float dot_plain(const void *w, int type, const float *x, int64_t k) {
    float lane[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= k; i += 16)
        for (int j = 0; j < 16; j++)
            lane[j] += x[i + j] * (type == BFLOAT16 ? widen(((const bf16 *)w)[i + j]) : ((const float *)w)[i + j]);
    for (int j = 0; i < k; i++, j++)
        lane[j] += x[i] * (type == BFLOAT16 ? widen(((const bf16 *)w)[i]) : ((const float *)w)[i]);
    for (int width = 8; width; width /= 2)
        for (int j = 0; j < width; j++)
            lane[j] += lane[j + width];
    return lane[0];
}

#define PLAIN_DOTS(name, type, size)                                                                                   \
    static void name(const void *w, int64_t stride, int rows, const void *const *x, int tokens, int64_t k,             \
                     float *sums) {                                                                                    \
        for (int r = 0; r < rows; r++)                                                                                 \
            for (int t = 0; t < tokens; t++)                                                                           \
                sums[t * ROWS + r] = dot_plain((const char *)w + r * stride * size, type, x[t], k);                    \
    }
PLAIN_DOTS(dots_plain_f32, FLOAT32, 4)
PLAIN_DOTS(dots_plain_bf16, BFLOAT16, 2)
ELEMENTWISE(plain, 0, )

#if X86

/* A tile of R rows and T tokens, both known to the compiler: R·T sums in registers. `step` elements are multiplied at
 * a time; the last ones through a mask (or, in AVX2, by way of a padded copy). */
#define TILE_BODY(R, T, acc_t, zero, step, size, loop, tail)                                                           \
    acc_t acc[TILE][TILE];                                                                                             \
    _Pragma("GCC unroll 4") for (int r = 0; r < R; r++)                                                                \
        _Pragma("GCC unroll 4") for (int t = 0; t < T; t++) acc[r][t] = zero;                                          \
    int64_t i = 0;                                                                                                     \
    for (; i + step <= k; i += step) {                                                                                 \
        if (ahead)                                                                                                     \
            _Pragma("GCC unroll 4") for (int r = 0; r < R; r++)                                                        \
                _mm_prefetch((const char *)w + ((r + TILE) * stride + i) * size, _MM_HINT_T0);                         \
        loop                                                                                                           \
    }                                                                                                                  \
    if (i < k) {                                                                                                       \
        tail                                                                                                           \
    }

/* Calls the tile with constants for every number of rows (TILE or 1) and of tokens (1 to TILE). */
#define DOTS(name, tile, attribute, most, size)                                                                        \
    attribute static void name(const void *w, int64_t stride, int rows, const void *const *x, int tokens, int64_t k,   \
                               float *sums) {                                                                          \
        for (int r = 0; r < rows;) {                                                                                   \
            int n = rows - r >= TILE ? TILE : 1;                                                                       \
            const char *at = (const char *)w + r * stride * size;                                                      \
            for (int t = 0; t < tokens;) {                                                                             \
                int m = tokens - t < most ? tokens - t : most;                                                         \
                float *to = sums + t * ROWS + r;                                                                       \
                int ahead = t == 0; /* past the block, too: somebody needs it */                                       \
                if (n == TILE) {                                                                                       \
                    switch (m) {                                                                                       \
                    case 1: tile(TILE, 1, at, stride, x + t, k, to, ahead); break;                                     \
                    case 2: tile(TILE, 2, at, stride, x + t, k, to, ahead); break;                                     \
                    case 3: tile(TILE, 3, at, stride, x + t, k, to, ahead); break;                                     \
                    default: tile(TILE, 4, at, stride, x + t, k, to, ahead); break;                                    \
                    }                                                                                                  \
                } else {                                                                                               \
                    m = 1;                                                                                             \
                    tile(1, 1, at, stride, x + t, k, to, 0);                                                           \
                }                                                                                                      \
                t += m;                                                                                                \
            }                                                                                                          \
            r += n;                                                                                                    \
        }                                                                                                              \
    }

/* AVX2 and FMA: 8 elements at a time; the last few in a padded copy */

#define T_AVX2 __attribute__((target("avx2,fma")))

T_AVX2 INLINE float sum_avx2(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

T_AVX2 INLINE __m256 widen_avx2(const void *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}

#define AVX2_TILE(name, size, load)                                                                                    \
    T_AVX2 INLINE void name(const int R, const int T, const void *w, int64_t stride, const void *const *x, int64_t k,  \
                            float *sums, int ahead) {                                                                  \
        TILE_BODY(                                                                                                     \
            R, T, __m256, _mm256_setzero_ps(), 8, size,                                                                \
            {                                                                                                          \
                __m256 v[TILE];                                                                                        \
                _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) v[r] =                                             \
                    load((const void *)((const char *)w + (r * stride + i) * size));                                   \
                _Pragma("GCC unroll 4") for (int t = 0; t < T; t++) {                                                  \
                    __m256 y = _mm256_loadu_ps((const float *)x[t] + i);                                               \
                    _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) acc[r][t] =                                    \
                        _mm256_fmadd_ps(v[r], y, acc[r][t]);                                                           \
                }                                                                                                      \
            },                                                                                                         \
            {                                                                                                          \
                float last[8];                                                                                         \
                char row[32];                                                                                          \
                for (int t = 0; t < T; t++) {                                                                          \
                    memset(last, 0, sizeof last);                                                                      \
                    memcpy(last, (const float *)x[t] + i, (size_t)(k - i) * 4);                                        \
                    __m256 y = _mm256_loadu_ps(last);                                                                  \
                    _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) {                                              \
                        memset(row, 0, sizeof row);                                                                    \
                        memcpy(row, (const char *)w + (r * stride + i) * size, (size_t)(k - i) * size);                \
                        acc[r][t] = _mm256_fmadd_ps(load((const void *)row), y, acc[r][t]);                            \
                    }                                                                                                  \
                }                                                                                                      \
            })                                                                                                         \
        _Pragma("GCC unroll 4") for (int t = 0; t < T; t++)                                                            \
            _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) sums[t * ROWS + r] = sum_avx2(acc[r][t]);              \
    }
#define LOAD_AVX2(p) _mm256_loadu_ps((const float *)(p))
AVX2_TILE(tile_avx2_f32, 4, LOAD_AVX2)
AVX2_TILE(tile_avx2_bf16, 2, widen_avx2)
/* 16 registers: two tokens at a time */
DOTS(dots_avx2_f32, tile_avx2_f32, T_AVX2, 2, 4)
DOTS(dots_avx2_bf16, tile_avx2_bf16, T_AVX2, 2, 2)
ELEMENTWISE(avx2, 0, T_AVX2)

/* AVX-512: 16 elements at a time, masked at the end */

#define T_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define AVX512_STEP(acc_op, load_w, load_x, vec)                                                                       \
    {                                                                                                                  \
        vec v[TILE];                                                                                                   \
        _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) v[r] = load_w;                                             \
        _Pragma("GCC unroll 4") for (int t = 0; t < T; t++) {                                                          \
            vec y = load_x;                                                                                            \
            _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) acc[r][t] = acc_op(acc[r][t], v[r], y);                \
        }                                                                                                              \
    }
#define AVX512_TILE(name, attribute, step, size, vec, acc_op, load_w, load_x, mask_t, mask_w, mask_x)                  \
    attribute INLINE void name(const int R, const int T, const void *w, int64_t stride, const void *const *x,          \
                               int64_t k, float *sums, int ahead) {                                                    \
        TILE_BODY(R, T, __m512, _mm512_setzero_ps(), step, size,                                                       \
                  AVX512_STEP(acc_op, load_w((const char *)w + (r * stride + i) * size), load_x(x[t], i), vec), {      \
                      mask_t m = (mask_t)((((uint64_t)1) << (k - i)) - 1);                                             \
                      AVX512_STEP(acc_op, mask_w(m, (const char *)w + (r * stride + i) * size), mask_x(m, x[t], i),    \
                                  vec)                                                                                 \
                  })                                                                                                   \
        _Pragma("GCC unroll 4") for (int t = 0; t < T; t++)                                                            \
            _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) sums[t * ROWS + r] = _mm512_reduce_add_ps(acc[r][t]);  \
    }

#define FMA512(a, v, y) _mm512_fmadd_ps(v, y, a)
#define W32(p) _mm512_loadu_ps((const float *)(p))
#define X32(x, i) _mm512_loadu_ps((const float *)(x) + (i))
#define MW32(m, p) _mm512_maskz_loadu_ps(m, (const float *)(p))
#define MX32(m, x, i) _mm512_maskz_loadu_ps(m, (const float *)(x) + (i))
#define WIDEN512(h) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))
#define W16(p) WIDEN512(_mm256_loadu_si256((const __m256i *)(p)))
#define MW16(m, p) WIDEN512(_mm256_maskz_loadu_epi16(m, p))

AVX512_TILE(tile_avx512_f32, T_AVX512, 16, 4, __m512, FMA512, W32, X32, __mmask16, MW32, MX32)
AVX512_TILE(tile_avx512_bf16, T_AVX512, 16, 2, __m512, FMA512, W16, X32, __mmask16, MW16, MX32)
DOTS(dots_avx512_f32, tile_avx512_f32, T_AVX512, 4, 4)
DOTS(dots_avx512_bf16, tile_avx512_bf16, T_AVX512, 4, 2)
ELEMENTWISE(avx512, 0, T_AVX512)

/* AVX-512 with dot products of bfloat16 pairs: 32 elements at a time, both sides in bfloat16 */

#define T_DPBF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx512bf16")))
#define DP512(a, v, y) _mm512_dpbf16_ps(a, (__m512bh)(v), (__m512bh)(y))
#define WB(p) _mm512_loadu_si512((const void *)(p))
#define XB(x, i) _mm512_loadu_si512((const void *)((const bf16 *)(x) + (i)))
#define MWB(m, p) _mm512_maskz_loadu_epi16(m, (const void *)(p))
#define MXB(m, x, i) _mm512_maskz_loadu_epi16(m, (const void *)((const bf16 *)(x) + (i)))

AVX512_TILE(tile_dpbf16, T_DPBF16, 32, 2, __m512i, DP512, WB, XB, __mmask32, MWB, MXB)
DOTS(dots_dpbf16, tile_dpbf16, T_DPBF16, 4, 2)
ELEMENTWISE(dpbf16, 1, T_DPBF16)

#endif

typedef struct {
    dots_fn *dots[2]; /* by type */
    gated_fn *gated;
    scaled_fn *scaled;
    int narrowed; /* bfloat16 inputs stay bfloat16; otherwise they are widened first */
} Level;

static const Level levels[] = {
    {{dots_plain_f32, dots_plain_bf16}, gated_plain, scaled_plain, 0},
#if X86
    {{dots_avx2_f32, dots_avx2_bf16}, gated_avx2, scaled_avx2, 0},
    {{dots_avx512_f32, dots_avx512_bf16}, gated_avx512, scaled_avx512, 0},
    {{dots_avx512_f32, dots_dpbf16}, gated_dpbf16, scaled_dpbf16, 1},
#endif
};

/* one call's work */

typedef struct {
    int64_t gate_up, down; /* addresses of [2I, H] and [H, I] */
    int64_t first, count;  /* its pairs */
} Expert;

typedef struct {
    const Level *level;
    int type, act, experts;
    int64_t hidden, inner, size; /* H, I, bytes of an element */
    int64_t gate_stride, down_stride; /* elements from row to row */
    const Expert *expert;
    const int64_t *places;
    const void **inputs;   /* per pair, H elements */
    const void **products; /* per pair, I elements */
    const float *weights;  /* by place */
    char *out;
    int64_t out_stride;
    int64_t up_rows, down_rows, up_blocks, down_blocks; /* rows of a block; blocks of an expert */
    atomic_int_fast64_t next;
    atomic_int *left; /* per expert: blocks of gate and up not yet complete */
} Job;

static void relax(int *turns) {
    if (++*turns < 256)
        PAUSE();
    else
        sched_yield(); /* the thread waited for may want this core */
}

static void gate_and_up(const Job *j, const Expert *e, int64_t block) {
    float gate[TOKENS * ROWS], up[TOKENS * ROWS];
    int64_t row = block * j->up_rows;
    int rows = (int)(j->inner - row < j->up_rows ? j->inner - row : j->up_rows);
    const char *w = (const char *)(intptr_t)e->gate_up + row * j->gate_stride * j->size;
    const char *v = w + j->inner * j->gate_stride * j->size;
    int64_t width = j->level->narrowed && j->type == BFLOAT16 ? 2 : 4;
    for (int64_t p = e->first; p < e->first + e->count; p += TOKENS) {
        int64_t left = e->first + e->count - p;
        int n = (int)(left < TOKENS ? left : TOKENS);
        j->level->dots[j->type](w, j->gate_stride, rows, j->inputs + p, n, j->hidden, gate);
        j->level->dots[j->type](v, j->gate_stride, rows, j->inputs + p, n, j->hidden, up);
        for (int t = 0; t < n; t++)
            j->level->gated(gate + t * ROWS, up + t * ROWS, rows, j->act, j->type,
                            (char *)j->products[p + t] + row * width);
    }
}

static void down(const Job *j, const Expert *e, int64_t block) {
    float sums[TOKENS * ROWS];
    int64_t row = block * j->down_rows;
    int rows = (int)(j->hidden - row < j->down_rows ? j->hidden - row : j->down_rows);
    const char *w = (const char *)(intptr_t)e->down + row * j->down_stride * j->size;
    for (int64_t p = e->first; p < e->first + e->count; p += TOKENS) {
        int64_t left = e->first + e->count - p;
        int n = (int)(left < TOKENS ? left : TOKENS);
        j->level->dots[j->type](w, j->down_stride, rows, j->products + p, n, j->inner, sums);
        for (int t = 0; t < n; t++) {
            int64_t place = j->places[p + t];
            j->level->scaled(sums + t * ROWS, rows, j->weights[place], j->type,
                             j->out + (place * j->out_stride + row) * j->size);
        }
    }
}

static void work(Job *j) {
    int64_t ups = j->experts * j->up_blocks, all = ups + j->experts * j->down_blocks;
    for (;;) {
        int64_t at = atomic_fetch_add_explicit(&j->next, 1, memory_order_relaxed);
        if (at >= all)
            return;
        if (at < ups) {
            int64_t e = at / j->up_blocks;
            gate_and_up(j, &j->expert[e], at % j->up_blocks);
            atomic_fetch_sub_explicit(&j->left[e], 1, memory_order_release);
        } else {
            int64_t e = (at - ups) / j->down_blocks;
            int turns = 0;
            while (atomic_load_explicit(&j->left[e], memory_order_acquire))
                relax(&turns);
            down(j, &j->expert[e], (at - ups) % j->down_blocks);
        }
    }
}

/* the threads */

#define OPEN (1 << 30) /* there is a job to join */
#define ROOM (1 << 12) /* bits 12 to 23: how many more may join; below: how many are inside */

static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static atomic_uint epoch;   /* raised with every job; what sleepers sleep on */
static atomic_int door;     /* OPEN, ROOM, inside */
static atomic_int sleepers;
static int helpers;         /* threads there are; under in_use */
static Job *_Atomic current;
static void *kept;          /* the last call's scratch memory; under in_use */
static size_t kept_size;

static void futex(atomic_uint *at, int what, unsigned value) {
    syscall(SYS_futex, at, what | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

static void *help(void *start) {
    unsigned seen = (unsigned)(uintptr_t)start;
    for (;;) {
        unsigned now;
        for (int i = 0; (now = atomic_load(&epoch)) == seen && i < SPIN; i++)
            PAUSE();
        if (now == seen) {
            atomic_fetch_add(&sleepers, 1);
            while (atomic_load(&epoch) == seen)
                futex(&epoch, FUTEX_WAIT, seen);
            atomic_fetch_sub(&sleepers, 1);
            now = atomic_load(&epoch);
        }
        seen = now;
        int d = atomic_load(&door);
        while ((d & OPEN) && ((d / ROOM) & 0xfff))
            if (atomic_compare_exchange_weak(&door, &d, d - ROOM + 1)) {
                work(atomic_load(&current));
                atomic_fetch_sub(&door, 1);
                break;
            }
    }
    return NULL;
}

static void in_child(void) { /* only the thread that forked lives on */
    helpers = 0;
    atomic_store(&door, 0);
    atomic_store(&sleepers, 0);
    pthread_mutex_init(&in_use, NULL);
}

static void at_first(void) { pthread_atfork(NULL, NULL, in_child); }

static void hire(int wanted) {
    sigset_t all, before;
    pthread_attr_t attr;
    if (helpers >= wanted || pthread_attr_init(&attr))
        return;
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attr, 256 << 10);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the threads that were here before */
    while (helpers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, &attr, help, (void *)(uintptr_t)atomic_load(&epoch)))
            break;
        helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
}

static void together(Job *j, int threads) {
    int wanted = (threads < MOST_THREADS ? threads : MOST_THREADS) - 1;
    hire(wanted);
    int others = helpers < wanted ? helpers : wanted;
    atomic_store(&current, j);
    atomic_store(&door, OPEN | others * ROOM);
    atomic_fetch_add(&epoch, 1);
    if (atomic_load(&sleepers))
        futex(&epoch, FUTEX_WAKE, (unsigned)others);
    work(j);
    /* nothing is left to take: let nobody in, and wait for those who are still at their last block */
    int turns = 0;
    atomic_fetch_and(&door, ROOM - 1);
    while (atomic_load(&door))
        relax(&turns);
}

/* what Python calls */

int offload_abi(void) { return ABI; }

/* The best level of instructions here; every lower one works too, where there are any between. */
int offload_level(void) {
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
            return __builtin_cpu_supports("avx512bf16") ? AVX512_BF16 : AVX512;
        return AVX2;
    }
#endif
    return PLAIN;
}

static int64_t block_rows(int64_t width, int64_t size) {
    int64_t rows = BLOCK / (width * size) / TILE * TILE;
    return rows < TILE ? TILE : rows > ROWS ? ROWS : rows;
}

/* sizes: type, activation, H, I, stride of gate_up, of down, of x, of out (in elements), number of experts, of pairs.
 * experts: per expert the addresses of gate_up and down, its first pair, how many it has. tokens and places: of each
 * pair. weights: float32, by place. Returns 0, or -1 if memory is short or the level is not there. */
int offload_experts(int level, int threads, const int64_t *sizes, const int64_t *experts, const int64_t *tokens,
                    const int64_t *places, const void *x, const float *weights, void *out) {
    Job j = {.type = (int)sizes[0], .act = (int)sizes[1], .hidden = sizes[2], .inner = sizes[3],
             .gate_stride = sizes[4], .down_stride = sizes[5], .out_stride = sizes[7], .experts = (int)sizes[8]};
    int64_t x_stride = sizes[6], pairs = sizes[9];
    if (level < 0 || level > offload_level())
        return -1;
    if (j.experts <= 0 || pairs <= 0)
        return 0;
    j.level = &levels[level];
    j.size = j.type == BFLOAT16 ? 2 : 4;
    j.expert = (const Expert *)experts;
    j.places = places;
    j.weights = weights;
    j.out = out;
    j.up_rows = block_rows(2 * j.hidden, j.size);
    j.down_rows = block_rows(j.inner, j.size);
    j.up_blocks = (j.inner + j.up_rows - 1) / j.up_rows;
    j.down_blocks = (j.hidden + j.down_rows - 1) / j.down_rows;

    int widened = j.type == BFLOAT16 && !j.level->narrowed;
    size_t width = j.type == BFLOAT16 && !widened ? 2 : 4;
    size_t product = ((size_t)j.inner * width + 63) / 64 * 64, input = widened ? ((size_t)j.hidden * 4 + 63) / 64 * 64 : 0;
    size_t pointers = ((size_t)pairs * 2 * sizeof(void *) + 63) / 64 * 64;
    size_t counters = ((size_t)j.experts * sizeof(atomic_int) + 63) / 64 * 64;
    size_t need = pointers + counters + (size_t)pairs * (product + input) + 64;

    pthread_once(&once, at_first);
    int alone = pthread_mutex_trylock(&in_use) != 0; /* somebody else's call is under way */
    char *memory;
    if (alone) {
        memory = malloc(need);
    } else {
        if (need > kept_size) {
            free(kept);
            kept = malloc(need);
            kept_size = kept ? need : 0;
        }
        memory = kept;
    }
    if (!memory) {
        if (!alone)
            pthread_mutex_unlock(&in_use);
        return -1;
    }
    char *at = (char *)(((uintptr_t)memory + 63) / 64 * 64);
    j.inputs = (const void **)at;
    j.products = j.inputs + pairs;
    j.left = (atomic_int *)(at += pointers);
    at += counters;
    for (int e = 0; e < j.experts; e++)
        atomic_init(&j.left[e], (int)j.up_blocks);
    for (int64_t p = 0; p < pairs; p++) {
        j.products[p] = at;
        at += product;
        j.inputs[p] = (const char *)x + tokens[p] * x_stride * j.size;
        if (widened) {
            const bf16 *from = j.inputs[p];
            float *to = (float *)at;
            for (int64_t i = 0; i < j.hidden; i++)
                to[i] = widen(from[i]);
            j.inputs[p] = to;
            at += input;
        }
    }
    atomic_init(&j.next, 0);
    if (alone || threads <= 1)
        work(&j);
    else
        together(&j, threads);
    if (alone)
        free(memory);
    else
        pthread_mutex_unlock(&in_use);
    return 0;
}
