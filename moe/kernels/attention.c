/* The attention of one new token per sequence, at the speed at which keys and values can be read.
 *
 *   out[b, h] = softmax(scale · q[b, h] · keys[b, h'])ᵀ values[b, h']      h' = h / (heads / kv heads)
 *
 * in float32 or bfloat16; scores, weights and sums are float32 throughout, and rounded once at the end. Keys and values
 * are read once for all heads that share them, ROWS tokens at a time: the largest score so far and the sums that belong
 * to it are carried along and scaled when it grows (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867).
 * One thread does all of a kv head, so that the order of summation does not depend on how many threads there are.
 *
 * `offload_attention` is for keys and values in one piece. `offload_attend` is for parts of them that lie anywhere: it
 * leaves what is carried along to the caller, who may go on with further parts, and divides in the end.
 */
#include "kernels.h"
#include <math.h>

#define WIDTH 256 /* most elements of a value */
#define WAKES (1 << 20) /* bytes of keys and values below which waking other threads takes longer than they save */
#define LINE 64 /* bytes that come from memory together */
#define STEP MOST /* rows between one look ahead and the next */
#define PART 4 /* numbers of a row of the table */

typedef struct {
    const Level *level;
    int type, group; /* heads that share keys and values */
    int64_t batch, kv_heads, key_width, value_width, size;
    int64_t q[2], k[2], v[2]; /* elements from sequence to sequence, head to head; from head to head, token to token */
    const char *queries;
    float scale, cap; /* cap: 0 for none */
    float *wide; /* queries in float32, where the level wants them so */
    /* in one piece: */
    int64_t length, k_sequence, v_sequence; /* elements from sequence to sequence */
    const char *keys, *values;
    char *out;
    /* in parts: */
    const int64_t *table, *first, *order; /* parts of sequence b: table[order[first[b]]] to before first[b + 1] */
    float *largest, *total, *mixed;
    atomic_int_fast64_t next;
} Job;

/* Of the heads that share a kv head. */
typedef struct {
    const void *queries[TOKENS];
    float largest[TOKENS], total[TOKENS], *mixed; /* [group, value width] */
} Sums;

static void begin(const Job *j, int64_t b, int64_t h, Sums *s) {
    for (int g = 0; g < j->group; g++) {
        int64_t at = h * j->group + g;
        s->queries[g] = j->wide ? (const void *)(j->wide + (b * j->kv_heads * j->group + at) * j->key_width)
                                : (const void *)(j->queries + (b * j->q[0] + at * j->q[1]) * j->size);
    }
}

/* What is needed half a block from now: memory is read ahead by itself within a piece only, and a piece may be short. */
INLINE void ahead(const char *at, int64_t row, int64_t width, int rows) {
    for (int r = 0; r < rows; r++, at += row)
        for (int64_t i = 0; i < width; i += LINE)
            __builtin_prefetch(at + i, 0, 3);
}

/* Carries the sums on over `length` tokens. `next`: keys of `coming` tokens that will be wanted after these. */
static void attend(const Job *j, Sums *s, const char *keys, const char *values, int64_t length, const char *next,
                   int64_t coming) {
    float scores[TOKENS * ROWS];
    int64_t key = j->k[1] * j->size, value = j->v[1] * j->size;
    for (int64_t t = 0; t < length; t += ROWS) {
        int64_t left = length - t - ROWS;
        int rows = (int)(left < 0 ? length - t : ROWS);
        const char *k = keys + t * key, *v = values + t * value, *then = left > 0 ? k + ROWS * key : next;
        int64_t soon = left > 0 ? left : coming;
        for (int r = 0; r < rows; r += STEP) {
            int some = rows - r < STEP ? rows - r : STEP;
            ahead(v + r * value, value, j->value_width * j->size, some);
            j->level->dots[j->type](k + r * key, j->k[1], some, s->queries, j->group, j->key_width, scores + r);
        }
        for (int g = 0; g < j->group; g++) {
            float *to = scores + g * ROWS, *m = s->mixed + g * j->value_width, before = s->largest[g];
            if (j->cap > 0)
                j->level->capped(to, rows, j->scale / j->cap, j->cap);
            float here = j->level->softened(to, rows, j->cap > 0 ? 1.0f : j->scale, &s->largest[g]);
            if (s->largest[g] != before) {
                float shrink = expf(before - s->largest[g]);
                s->total[g] *= shrink;
                for (int64_t i = 0; i < j->value_width; i++)
                    m[i] *= shrink;
            }
            s->total[g] += here;
        }
        for (int r = 0; r < rows; r += STEP) {
            int some = rows - r < STEP ? rows - r : STEP;
            if (r < soon)
                ahead(then + r * key, key, j->key_width * j->size, (int)(soon - r < STEP ? soon - r : STEP));
            j->level->mixed(scores + r, v + r * value, j->v[1], some, j->group, j->value_width, j->type, s->mixed);
        }
    }
}

static void whole(const Job *j, int64_t b, int64_t h) {
    float mixed[TOKENS * WIDTH] = {0};
    Sums s = {.mixed = mixed};
    for (int g = 0; g < j->group; g++)
        s.largest[g] = -INFINITY;
    begin(j, b, h, &s);
    attend(j, &s, j->keys + (b * j->k_sequence + h * j->k[0]) * j->size,
           j->values + (b * j->v_sequence + h * j->v[0]) * j->size, j->length, NULL, 0);
    for (int g = 0; g < j->group; g++) {
        float *m = mixed + g * j->value_width;
        for (int64_t i = 0; i < j->value_width; i++)
            m[i] /= s.total[g];
        int64_t at = (b * j->kv_heads + h) * j->group + g;
        for (int64_t i = 0; i < j->value_width; i += ROWS)
            j->level->stored(m + i, (int)(j->value_width - i < ROWS ? j->value_width - i : ROWS), NULL, j->type,
                             j->out + (at * j->value_width + i) * j->size);
    }
}

INLINE const char *at_address(int64_t address) { return (const char *)(uintptr_t)address; }

static void parts(const Job *j, int64_t b, int64_t h) {
    int64_t at = (b * j->kv_heads + h) * j->group;
    size_t bytes = (size_t)j->group * sizeof(float);
    Sums s = {.mixed = j->mixed + at * j->value_width};
    memcpy(s.largest, j->largest + at, bytes);
    memcpy(s.total, j->total + at, bytes);
    begin(j, b, h, &s);
    int64_t keys = h * j->k[0] * j->size, values = h * j->v[0] * j->size;
    for (int64_t i = j->first[b]; i < j->first[b + 1]; i++) {
        const int64_t *part = j->table + j->order[i] * PART;
        const int64_t *next = i + 1 < j->first[b + 1] ? j->table + j->order[i + 1] * PART : part;
        attend(j, &s, at_address(part[1]) + keys, at_address(part[2]) + values, part[3], at_address(next[1]) + keys,
               next == part ? 0 : next[3]);
    }
    memcpy(j->largest + at, s.largest, bytes);
    memcpy(j->total + at, s.total, bytes);
}

static void work(void *job) {
    Job *j = job;
    for (;;) {
        int64_t at = atomic_fetch_add_explicit(&j->next, 1, memory_order_relaxed);
        if (at >= j->batch * j->kv_heads)
            return;
        (j->table ? parts : whole)(j, at / j->kv_heads, at % j->kv_heads);
    }
}

/* Fills in what follows from the rest. Returns the bytes the queries need besides, or -1 if this cannot be done. */
static int64_t prepare(Job *j, int level, int64_t heads) {
    int64_t group = heads / j->kv_heads;
    if (level < 0 || level > offload_level() || group > TOKENS || j->value_width > WIDTH)
        return -1;
    j->level = &levels[level];
    j->group = (int)group;
    j->size = j->type == BFLOAT16 ? 2 : 4;
    return j->type == BFLOAT16 && !j->level->narrowed ? j->batch * heads * j->key_width * 4 : 0;
}

static void run(Job *j, const Turn *turn, int threads, int64_t tokens, float *wide) {
    if (wide) {
        j->wide = wide;
        for (int64_t b = 0; b < j->batch; b++)
            for (int64_t h = 0; h < j->kv_heads * j->group; h++) {
                const bf16 *from = (const bf16 *)j->queries + b * j->q[0] + h * j->q[1];
                for (int64_t i = 0; i < j->key_width; i++)
                    *wide++ = widen(from[i]);
            }
    }
    if (tokens * j->kv_heads * (j->key_width + j->value_width) * j->size < WAKES)
        threads = 1;
    atomic_init(&j->next, 0);
    share(turn, threads, work, j);
}

/* sizes: type, sequences, heads, kv heads, tokens held, elements of a key, of a value; then, in elements, from sequence
 * to sequence and head to head of q, and besides from token to token of k and of v. out [sequences, heads, value] is
 * contiguous. Returns 0, or -1 if memory is short, the level is not there or the shape is too large. */
int offload_attention(int level, int threads, const int64_t *sizes, float scale, const void *q, const void *k,
                      const void *v, void *out) {
    Job j = {.type = (int)sizes[0], .batch = sizes[1], .kv_heads = sizes[3], .length = sizes[4], .key_width = sizes[5],
             .value_width = sizes[6], .q = {sizes[7], sizes[8]}, .k_sequence = sizes[9], .k = {sizes[10], sizes[11]},
             .v_sequence = sizes[12], .v = {sizes[13], sizes[14]}, .queries = q, .keys = k, .values = v, .out = out,
             .scale = scale};
    int64_t need = prepare(&j, level, sizes[2]);
    Turn turn;
    float *memory = need < 0 ? NULL : enter(&turn, (size_t)need);
    if (!memory)
        return -1;
    run(&j, &turn, threads, j.batch * j.length, need ? memory : NULL);
    leave(&turn);
    return 0;
}

/* sizes: type, sequences, heads, kv heads, parts, elements of a key, of a value; then, in elements, from sequence to
 * sequence and head to head of q, and from head to head and token to token of k and of v. table: of each part its
 * sequence, the addresses of its keys and values, its tokens. cap: of scores, 0 for none. largest and total
 * [sequences, heads], mixed [sequences, heads, value], contiguous, are carried along. Parts of a sequence are taken in
 * the table's order, ROWS tokens of one part at a time: what comes out does not depend on how the parts are divided
 * among calls. Returns 0; -1 as above; 1 if the table makes no sense (then nothing has been read or written). */
int offload_attend(int level, int threads, const int64_t *sizes, float scale, float cap, const void *q,
                   const int64_t *table, float *largest, float *total, float *mixed) {
    Job j = {.type = (int)sizes[0], .batch = sizes[1], .kv_heads = sizes[3], .key_width = sizes[5],
             .value_width = sizes[6], .q = {sizes[7], sizes[8]}, .k = {sizes[9], sizes[10]},
             .v = {sizes[11], sizes[12]}, .queries = q, .table = table, .largest = largest, .total = total,
             .mixed = mixed, .scale = scale, .cap = cap};
    int64_t count = sizes[4], tokens = 0, used = 0, need = prepare(&j, level, sizes[2]);
    for (int64_t i = 0; i < count; i++) {
        const int64_t *part = table + i * PART;
        if (part[0] < 0 || part[0] >= j.batch || part[3] < 0)
            return 1;
        tokens += part[3];
        used += part[3] > 0;
    }
    Turn turn;
    char *memory = need < 0 ? NULL : enter(&turn, (size_t)need + (size_t)(j.batch + 2 + used) * sizeof(int64_t));
    if (!memory)
        return -1;
    /* by sequence, each in the table's order: first[b + 1] counts up from the start of b to its end */
    int64_t *first = (int64_t *)(memory + (need + 7) / 8 * 8), *order = first + j.batch + 1;
    memset(first, 0, (size_t)(j.batch + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < count; i++)
        if (table[i * PART + 3] && table[i * PART] + 2 <= j.batch)
            first[table[i * PART] + 2]++;
    for (int64_t b = 2; b <= j.batch; b++)
        first[b] += first[b - 1];
    for (int64_t i = 0; i < count; i++)
        if (table[i * PART + 3])
            order[first[table[i * PART] + 1]++] = i;
    j.first = first;
    j.order = order;
    run(&j, &turn, threads, tokens, need ? (float *)memory : NULL);
    leave(&turn);
    return 0;
}
