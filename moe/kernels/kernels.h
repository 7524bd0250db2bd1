/* What the kernels share: products of rows with a few inputs, by levels of instructions (`dots.c`), and the threads
 * (`threads.c`). Needs Linux and nothing else. */
#ifndef KERNELS_H
#define KERNELS_H
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define X86 1
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define X86 0
#define PAUSE() ((void)0)
#endif

#define ABI 5          /* raised with every change to what Python calls */
#define TOKENS 16      /* tokens computed from one reading of a block */
#define MOST 4         /* rows computed together; rows of a block are a multiple of it */
#define ROWS 64        /* most rows of a block */
#define BLOCK (128 << 10) /* bytes of a block, about: measured */

enum { FLOAT32, BFLOAT16 };
enum { SILU, GELU_TANH };
enum { PLAIN, AVX2, AVX512, AVX512_BF16 };

#define INLINE static inline __attribute__((always_inline))
#define HIDDEN __attribute__((visibility("hidden")))

typedef uint16_t bf16;

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

/* Sums of products of `rows` ≤ ROWS rows with `tokens` ≤ TOKENS inputs of length k: sums[t * ROWS + r]. */
typedef void dots_fn(const void *w, int64_t stride, int rows, const void *const *x, int tokens, int64_t k, float *sums);
/* product[r] = act(gate[r]) * up[r], rounded as torch does, stored as the inputs of `dots` are. */
typedef void gated_fn(const float *gate, const float *up, int rows, int act, int type, void *product);
/* out[r] = sums[r] * weight, both rounded. */
typedef void scaled_fn(const float *sums, int rows, float weight, int type, void *out);
/* out[r] = sums[r] + bias[r], rounded; `bias` may be NULL. */
typedef void stored_fn(const float *sums, int rows, const void *bias, int type, void *out);
/* s[r] = cap · tanh(s[r] · scale) for `rows` ≤ ROWS. */
typedef void capped_fn(float *s, int rows, float scale, float cap);
/* s[r] = e^(s[r] · scale - largest) for `rows` ≤ ROWS; `largest` is raised first; returns their sum. */
typedef float softened_fn(float *s, int rows, float scale, float *largest);
/* sums[t * k + i] += p[t * ROWS + r] · v[r, i] over all rows. */
typedef void mixed_fn(const float *p, const void *v, int64_t stride, int rows, int tokens, int64_t k, int type,
                      float *sums);

typedef struct {
    dots_fn *dots[2]; /* by type */
    gated_fn *gated;
    scaled_fn *scaled;
    stored_fn *stored;
    capped_fn *capped;
    softened_fn *softened;
    mixed_fn *mixed;
    int narrowed; /* bfloat16 inputs stay bfloat16; otherwise they are widened first */
} Level;

/* rows of a block, for rows of so many elements */
INLINE int64_t block_rows(int64_t width, int64_t size) {
    int64_t rows = BLOCK / (width * size) / MOST * MOST;
    return rows < MOST ? MOST : rows > ROWS ? ROWS : rows;
}

extern HIDDEN const Level levels[];
int offload_level(void);

/* The threads. `enter` takes scratch memory of `need` bytes, aligned to 64, or NULL if there is none; it is given back
 * by `leave`, which must follow. `share` calls `work(job)` on up to `threads` threads, this one included, and returns
 * when all have: `work` takes blocks from the job until none is left. One call at a time has the other threads. */
typedef struct {
    void *memory;
    int alone; /* somebody else's call is under way */
} Turn;

HIDDEN void *enter(Turn *turn, size_t need);
HIDDEN void share(const Turn *turn, int threads, void (*work)(void *), void *job);
HIDDEN void leave(Turn *turn);
HIDDEN void relax(int *turns); /* while waiting for another thread */

#endif
