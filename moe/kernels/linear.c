/* A linear layer for a few tokens, at the speed of memory.
 *
 *   out[t] = round(w x[t] + bias)
 *
 * with the weights in rows, in float32 or bfloat16; products and the sum with the bias are in float32. Blocks of rows
 * are shared by all threads; the weights are read once for every TOKENS tokens.
 */
#include "kernels.h"

#define WAKES (1 << 20) /* bytes of weights below which waking other threads takes longer than they save */

typedef struct {
    const Level *level;
    int type;
    int64_t tokens, k, n, size; /* inputs, their length, rows, bytes of an element */
    int64_t w_stride, out_stride, rows, blocks;
    const char *w, *bias;
    char *out;
    const void **inputs;
    atomic_int_fast64_t next;
} Job;

static void work(void *job) {
    Job *j = job;
    float sums[TOKENS * ROWS];
    for (;;) {
        int64_t at = atomic_fetch_add_explicit(&j->next, 1, memory_order_relaxed);
        if (at >= j->blocks)
            return;
        int64_t row = at * j->rows;
        int rows = (int)(j->n - row < j->rows ? j->n - row : j->rows);
        const char *w = j->w + row * j->w_stride * j->size;
        for (int64_t t = 0; t < j->tokens; t += TOKENS) {
            int some = (int)(j->tokens - t < TOKENS ? j->tokens - t : TOKENS);
            j->level->dots[j->type](w, j->w_stride, rows, j->inputs + t, some, j->k, sums);
            for (int i = 0; i < some; i++)
                j->level->stored(sums + i * ROWS, rows, j->bias ? j->bias + row * j->size : NULL, j->type,
                                 j->out + ((t + i) * j->out_stride + row) * j->size);
        }
    }
}

/* sizes: type, tokens T, length K, rows N, stride of x, of w, of out (in elements). bias may be NULL.
 * Returns 0, or -1 if memory is short or the level is not there. */
int offload_linear(int level, int threads, const int64_t *sizes, const void *x, const void *w, const void *bias,
                   void *out) {
    Job j = {.type = (int)sizes[0], .tokens = sizes[1], .k = sizes[2], .n = sizes[3], .w_stride = sizes[5],
             .out_stride = sizes[6], .w = w, .bias = bias, .out = out};
    if (level < 0 || level > offload_level())
        return -1;
    if (j.tokens <= 0 || j.n <= 0)
        return 0;
    j.level = &levels[level];
    j.size = j.type == BFLOAT16 ? 2 : 4;
    if (j.n * j.k * j.size < WAKES)
        threads = 1;
    int64_t fair = (j.n / (4 * (int64_t)(threads > 0 ? threads : 1)) + MOST - 1) / MOST * MOST;
    j.rows = block_rows(j.k, j.size);
    j.rows = fair < MOST ? MOST : fair < j.rows ? fair : j.rows;
    j.blocks = (j.n + j.rows - 1) / j.rows;

    int widened = j.type == BFLOAT16 && !j.level->narrowed;
    size_t input = widened ? ((size_t)j.k * 4 + 63) / 64 * 64 : 0;
    size_t pointers = ((size_t)j.tokens * sizeof(void *) + 63) / 64 * 64;
    Turn turn;
    char *at = enter(&turn, pointers + (size_t)j.tokens * input);
    if (!at)
        return -1;
    j.inputs = (const void **)at;
    at += pointers;
    for (int64_t t = 0; t < j.tokens; t++) {
        j.inputs[t] = (const char *)x + t * sizes[4] * j.size;
        if (widened) {
            const bf16 *from = j.inputs[t];
            float *to = (float *)at;
            for (int64_t i = 0; i < j.k; i++)
                to[i] = widen(from[i]);
            j.inputs[t] = to;
            at += input;
        }
    }
    atomic_init(&j.next, 0);
    share(&turn, threads, work, &j);
    leave(&turn);
    return 0;
}
