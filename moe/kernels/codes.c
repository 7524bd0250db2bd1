/* Keys and values of a chunk out of codes of 8 or 4 bits: x = round(low + step · code), in float32 (`kvstore.codecs`).
 *
 * A key's low and step (float16) are its channel's, for a group of tokens; a value's are its token's, for a group of
 * channels. Product and sum are rounded one after the other, as torch does, whatever the level.
 */
#ifndef __x86_64__
#pragma STDC FP_CONTRACT OFF
#pragma GCC optimize("fp-contract=off") /* for compilers that do not know the line above */
#endif
#include "kernels.h"

#define WAKES (1 << 17) /* elements below which waking other threads takes longer than they save */
#define WIDEST 1024     /* channels */

typedef struct {
    int type, bits;
    int64_t group, heads, tokens, key_width, value_width, blocks; /* blocks of `group` tokens */
    const uint16_t *key_low, *key_step, *value_low, *value_step;
    const uint8_t *key_codes, *value_codes;
    char *keys, *values;
    void (*some)(const void *job, int64_t head, int64_t block);
    atomic_int_fast64_t next;
} Job;

/* a finite float16 */
INLINE float from_half(uint16_t h) {
    uint32_t u = (uint32_t)(h & 0x7fff) << 13;
    float f;
    memcpy(&f, &u, 4);
    f *= 0x1p112f;
    memcpy(&u, &f, 4);
    u |= (uint32_t)(h & 0x8000) << 16;
    memcpy(&f, &u, 4);
    return f;
}

/* the codes of one token: those of channels c and c + half share a byte */
INLINE const uint8_t *unpacked(const uint8_t *codes, int bits, int64_t width, uint8_t *room) {
    if (bits == 8)
        return codes;
    int64_t half = (width + 1) / 2;
    for (int64_t c = 0; c < half; c++)
        room[c] = codes[c] & 15;
    for (int64_t c = half; c < width; c++)
        room[c] = codes[c - half] >> 4;
    return room;
}

INLINE void store(int type, char *out, const uint8_t *code, const float *low, const float *step, int64_t width) {
    if (type == BFLOAT16)
        for (int64_t c = 0; c < width; c++)
            ((bf16 *)out)[c] = narrow((float)code[c] * step[c] + low[c]);
    else
        for (int64_t c = 0; c < width; c++)
            ((float *)out)[c] = (float)code[c] * step[c] + low[c];
}

INLINE void decode(const Job *j, int type, int bits, int64_t head, int64_t block) {
    float low[WIDEST], step[WIDEST];
    uint8_t room[WIDEST];
    int64_t size = type == BFLOAT16 ? 2 : 4, start = block * j->group;
    int64_t stop = start + j->group < j->tokens ? start + j->group : j->tokens;
    int64_t k = j->key_width, v = j->value_width, groups = (v + j->group - 1) / j->group;
    int64_t k_bytes = bits == 8 ? k : (k + 1) / 2, v_bytes = bits == 8 ? v : (v + 1) / 2;
    for (int64_t c = 0; c < k; c++) {
        low[c] = from_half(j->key_low[(head * j->blocks + block) * k + c]);
        step[c] = from_half(j->key_step[(head * j->blocks + block) * k + c]);
    }
    for (int64_t t = head * j->tokens + start; t < head * j->tokens + stop; t++)
        store(type, j->keys + t * k * size, unpacked(j->key_codes + t * k_bytes, bits, k, room), low, step, k);
    for (int64_t t = head * j->tokens + start; t < head * j->tokens + stop; t++) {
        for (int64_t g = 0; g < groups; g++) {
            float l = from_half(j->value_low[t * groups + g]), s = from_half(j->value_step[t * groups + g]);
            int64_t end = (g + 1) * j->group < v ? (g + 1) * j->group : v;
            for (int64_t c = g * j->group; c < end; c++) {
                low[c] = l;
                step[c] = s;
            }
        }
        store(type, j->values + t * v * size, unpacked(j->value_codes + t * v_bytes, bits, v, room), low, step, v);
    }
}

#define DECODES(name, target)                                                                                          \
    target static void name(const void *job, int64_t head, int64_t block) {                                            \
        const Job *j = job;                                                                                            \
        if (j->type == BFLOAT16 && j->bits == 8)                                                                       \
            decode(j, BFLOAT16, 8, head, block);                                                                       \
        else if (j->type == BFLOAT16)                                                                                  \
            decode(j, BFLOAT16, 4, head, block);                                                                       \
        else if (j->bits == 8)                                                                                         \
            decode(j, FLOAT32, 8, head, block);                                                                        \
        else                                                                                                           \
            decode(j, FLOAT32, 4, head, block);                                                                        \
    }

DECODES(decode_plain, )
#if X86
DECODES(decode_avx2, __attribute__((target("avx2")))) /* without fma, which would round once */
#else
#define decode_avx2 decode_plain
#endif

static void work(void *job) {
    Job *j = job;
    for (;;) {
        int64_t at = atomic_fetch_add_explicit(&j->next, 1, memory_order_relaxed);
        if (at >= j->heads * j->blocks)
            return;
        j->some(j, at / j->blocks, at % j->blocks);
    }
}

/* sizes: type, bits, elements of a group, heads, tokens, elements of a key, of a value; raw: lows and steps of keys
 * [heads, groups, key], of values [heads, tokens, groups], then codes, token after token. keys [heads, tokens, key] and
 * values [heads, tokens, value] are contiguous. Returns 0, or -1 if the level or the shape is not there. */
int offload_decode(int level, int threads, const int64_t *sizes, const void *raw, void *keys, void *values) {
    Job j = {.type = (int)sizes[0], .bits = (int)sizes[1], .group = sizes[2], .heads = sizes[3], .tokens = sizes[4],
             .key_width = sizes[5], .value_width = sizes[6], .keys = keys, .values = values};
    if (level < 0 || level > offload_level() || j.key_width > WIDEST || j.value_width > WIDEST || j.group < 1 ||
        (j.bits != 8 && j.bits != 4))
        return -1;
    j.blocks = (j.tokens + j.group - 1) / j.group;
    int64_t shared_keys = j.heads * j.blocks * j.key_width;
    int64_t shared_values = j.heads * j.tokens * ((j.value_width + j.group - 1) / j.group);
    j.key_low = raw;
    j.key_step = j.key_low + shared_keys;
    j.value_low = j.key_step + shared_keys;
    j.value_step = j.value_low + shared_values;
    j.key_codes = (const uint8_t *)(j.value_step + shared_values);
    j.value_codes = j.key_codes + j.heads * j.tokens * (j.bits == 8 ? j.key_width : (j.key_width + 1) / 2);
    j.some = level >= AVX2 ? decode_avx2 : decode_plain;
    if (j.heads * j.tokens * (j.key_width + j.value_width) < WAKES)
        threads = 1;
    atomic_init(&j.next, 0);
    Turn turn;
    if (!enter(&turn, 0))
        return -1;
    share(&turn, threads, work, &j);
    leave(&turn);
    return 0;
}
