/* The attention of one new token per sequence, at the speed at which keys and values can be read.
 *
 *   out[b, h] = softmax(scale · q[b, h] · keys[b, h'])ᵀ values[b, h']      h' = h / (heads / kv heads)
 *
 * in float32 or bfloat16; scores, weights and sums are float32 throughout, and rounded once at the end. Keys and values
 * are read once for all heads that share them, ROWS tokens at a time: the largest score so far and the sums that belong
 * to it are carried along and scaled when it grows (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867).
 * One thread does all of a kv head, so that the order of summation does not depend on how many threads there are.
 */
#include "kernels.h"
#include <math.h>

#define WIDTH 256 /* most elements of a value */
#define WAKES (1 << 20) /* bytes of keys and values below which waking other threads takes longer than they save */

typedef struct {
    const Level *level;
    int type, group; /* heads that share keys and values */
    int64_t batch, kv_heads, length, key_width, value_width, size;
    int64_t q[2], k[3], v[3]; /* elements from sequence to sequence, head to head, token to token */
    const char *queries, *keys, *values;
    char *out;
    float scale;
    float *wide; /* queries in float32, where the level wants them so */
    atomic_int_fast64_t next;
} Job;

static void head(const Job *j, int64_t b, int64_t h) {
    float sums[TOKENS * ROWS], mixed[TOKENS * WIDTH] = {0}, largest[TOKENS], total[TOKENS] = {0};
    const void *queries[TOKENS];
    const char *keys = j->keys + (b * j->k[0] + h * j->k[1]) * j->size;
    const char *values = j->values + (b * j->v[0] + h * j->v[1]) * j->size;
    for (int g = 0; g < j->group; g++) {
        int64_t at = h * j->group + g;
        largest[g] = -INFINITY;
        queries[g] = j->wide ? (const void *)(j->wide + (b * j->kv_heads * j->group + at) * j->key_width)
                             : (const void *)(j->queries + (b * j->q[0] + at * j->q[1]) * j->size);
    }
    for (int64_t t = 0; t < j->length; t += ROWS) {
        int rows = (int)(j->length - t < ROWS ? j->length - t : ROWS);
        const char *v = values + t * j->v[2] * j->size;
        j->level->dots[j->type](keys + t * j->k[2] * j->size, j->k[2], rows, queries, j->group, j->key_width, sums);
        for (int g = 0; g < j->group; g++) {
            float *s = sums + g * ROWS, *m = mixed + g * j->value_width, before = largest[g];
            float here = j->level->softened(s, rows, j->scale, &largest[g]);
            if (largest[g] != before) {
                float shrink = expf(before - largest[g]);
                total[g] *= shrink;
                for (int64_t i = 0; i < j->value_width; i++)
                    m[i] *= shrink;
            }
            total[g] += here;
        }
        j->level->mixed(sums, v, j->v[2], rows, j->group, j->value_width, j->type, mixed);
    }
    for (int g = 0; g < j->group; g++) {
        float *m = mixed + g * j->value_width;
        for (int64_t i = 0; i < j->value_width; i++)
            m[i] /= total[g];
        int64_t at = (b * j->kv_heads + h) * j->group + g;
        for (int64_t i = 0; i < j->value_width; i += ROWS)
            j->level->stored(m + i, (int)(j->value_width - i < ROWS ? j->value_width - i : ROWS), NULL, j->type,
                             j->out + (at * j->value_width + i) * j->size);
    }
}

static void work(void *job) {
    Job *j = job;
    for (;;) {
        int64_t at = atomic_fetch_add_explicit(&j->next, 1, memory_order_relaxed);
        if (at >= j->batch * j->kv_heads)
            return;
        head(j, at / j->kv_heads, at % j->kv_heads);
    }
}

/* sizes: type, sequences, heads, kv heads, tokens held, elements of a key, of a value; then, in elements, from sequence
 * to sequence and head to head of q, and besides from token to token of k and of v. out [sequences, heads, value] is
 * contiguous. Returns 0, or -1 if memory is short, the level is not there or the shape is too large. */
int offload_attention(int level, int threads, const int64_t *sizes, float scale, const void *q, const void *k,
                      const void *v, void *out) {
    Job j = {.type = (int)sizes[0], .batch = sizes[1], .kv_heads = sizes[3], .length = sizes[4], .key_width = sizes[5],
             .value_width = sizes[6], .q = {sizes[7], sizes[8]}, .k = {sizes[9], sizes[10], sizes[11]},
             .v = {sizes[12], sizes[13], sizes[14]}, .queries = q, .keys = k, .values = v, .out = out, .scale = scale};
    int64_t heads = sizes[2], group = heads / j.kv_heads;
    if (level < 0 || level > offload_level() || group > TOKENS || j.value_width > WIDTH)
        return -1;
    j.level = &levels[level];
    j.group = (int)group;
    j.size = j.type == BFLOAT16 ? 2 : 4;
    if (j.batch * j.kv_heads * j.length * (j.key_width + j.value_width) * j.size < WAKES)
        threads = 1;
    int widened = j.type == BFLOAT16 && !j.level->narrowed;
    Turn turn;
    float *memory = enter(&turn, widened ? (size_t)(j.batch * heads * j.key_width) * 4 : 0);
    if (!memory)
        return -1;
    if (widened) {
        j.wide = memory;
        for (int64_t b = 0; b < j.batch; b++)
            for (int64_t h = 0; h < heads; h++) {
                const bf16 *from = (const bf16 *)q + b * j.q[0] + h * j.q[1];
                for (int64_t i = 0; i < j.key_width; i++)
                    *memory++ = widen(from[i]);
            }
    }
    atomic_init(&j.next, 0);
    share(&turn, threads, work, &j);
    leave(&turn);
    return 0;
}
