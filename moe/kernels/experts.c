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
 */
#include "kernels.h"

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

static void work(void *job) {
    Job *j = job;
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

/* what Python calls */

int offload_abi(void) { return ABI; }

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
    size_t product = ((size_t)j.inner * width + 63) / 64 * 64;
    size_t input = widened ? ((size_t)j.hidden * 4 + 63) / 64 * 64 : 0;
    size_t pointers = ((size_t)pairs * 2 * sizeof(void *) + 63) / 64 * 64;
    size_t counters = ((size_t)j.experts * sizeof(atomic_int) + 63) / 64 * 64;
    size_t need = pointers + counters + (size_t)pairs * (product + input);

    Turn turn;
    char *at = enter(&turn, need);
    if (!at)
        return -1;
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
    share(&turn, threads, work, &j);
    leave(&turn);
    return 0;
}
