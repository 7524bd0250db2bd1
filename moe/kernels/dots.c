/* Sums of products of rows with a few inputs, and what is done to them, for each level of instructions.
 *
 * Every dot product is summed in one order that depends on nothing but its length and the level: not on the other rows
 * and tokens in the call. Products accumulate in float32.
 */
#include "kernels.h"
#include <math.h>

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

INLINE void stored_all(const float *sums, int rows, const void *bias, int type, void *out) {
    if (type == FLOAT32)
        for (int r = 0; r < rows; r++)
            ((float *)out)[r] = bias ? sums[r] + ((const float *)bias)[r] : sums[r];
    else
        for (int r = 0; r < rows; r++)
            ((bf16 *)out)[r] = narrow(bias ? sums[r] + widen(((const bf16 *)bias)[r]) : sums[r]);
}

/* tanh within a few ulps, near zero too (Cephes' tanhf) */
INLINE void capped_all(float *s, int rows, float scale, float cap) {
    for (int r = 0; r < rows; r++) {
        float x = s[r] * scale, z = x * x;
        float p = -5.70498872745e-3f;
        p = p * z + 2.06390887954e-2f;
        p = p * z - 5.37397155531e-2f;
        p = p * z + 1.33314422036e-1f;
        p = p * z - 3.33332819422e-1f;
        float near = p * z * x + x, far = 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
        s[r] = cap * (z < 0.390625f ? near : far); /* 0.625² */
    }
}

INLINE float softened_all(float *s, int rows, float scale, float *largest) {
    float lane[16], sum[16] = {0}, most = *largest;
    for (int r = rows; r < ROWS; r++)
        s[r] = -INFINITY;
    for (int j = 0; j < 16; j++)
        lane[j] = -INFINITY;
    for (int r = 0; r < ROWS; r += 16)
        for (int j = 0; j < 16; j++) {
            s[r + j] *= scale;
            lane[j] = lane[j] > s[r + j] ? lane[j] : s[r + j]; /* what is no number is found in the sum */
        }
    for (int j = 0; j < 16; j++)
        most = most > lane[j] ? most : lane[j];
    *largest = most;
    for (int r = 0; r < ROWS; r += 16)
        for (int j = 0; j < 16; j++)
            s[r + j] = exponential(s[r + j] - most);
    for (int r = rows; r < ROWS; r++)
        s[r] = 0;
    for (int r = 0; r < ROWS; r += 16)
        for (int j = 0; j < 16; j++)
            sum[j] += s[r + j];
    for (int width = 8; width; width /= 2)
        for (int j = 0; j < width; j++)
            sum[j] += sum[j + width];
    return sum[0];
}

INLINE void mixed_any(const float *p, const char *v, int64_t stride, int rows, int tokens, int64_t k, int type,
                      float *sums) {
    int64_t size = type == BFLOAT16 ? 2 : 4, row = stride * size;
    for (int r = 0; r < rows; r += MOST) {
        /* the rows after the last one count for nothing, so that any row will do */
        const char *at[MOST];
        for (int i = 0; i < MOST; i++) {
            at[i] = v + (r + i < rows ? r + i : r) * row;
            __builtin_prefetch(at[i] + 4 * MOST * row);
            __builtin_prefetch(at[i] + 4 * MOST * row + 64);
        }
        for (int t = 0; t < tokens; t++) {
            const float *w = p + t * ROWS + r;
            float *to = sums + t * k, w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
            if (r + MOST > rows) {
                w1 = r + 1 < rows ? w1 : 0;
                w2 = r + 2 < rows ? w2 : 0;
                w3 = 0;
            }
            for (int64_t i = 0; i < k; i++) {
                if (type == BFLOAT16)
                    to[i] += w0 * widen(((const bf16 *)at[0])[i]) + w1 * widen(((const bf16 *)at[1])[i]) +
                             w2 * widen(((const bf16 *)at[2])[i]) + w3 * widen(((const bf16 *)at[3])[i]);
                else
                    to[i] += w0 * ((const float *)at[0])[i] + w1 * ((const float *)at[1])[i] +
                             w2 * ((const float *)at[2])[i] + w3 * ((const float *)at[3])[i];
            }
        }
    }
}

INLINE void mixed_all(const float *p, const void *v, int64_t stride, int rows, int tokens, int64_t k, int type,
                      float *sums) {
    if (type == BFLOAT16)
        mixed_any(p, v, stride, rows, tokens, k, BFLOAT16, sums);
    else
        mixed_any(p, v, stride, rows, tokens, k, FLOAT32, sums);
}

/* The elementwise parts are the same for each level; the compiler vectorises them for it. */
#define ELEMENTWISE(level, narrowed, attribute)                                                                        \
    attribute static void gated_##level(const float *g, const float *u, int rows, int act, int type, void *product) {  \
        gated_all(g, u, rows, act, type, narrowed, product);                                                           \
    }                                                                                                                  \
    attribute static void scaled_##level(const float *sums, int rows, float weight, int type, void *out) {             \
        scaled_all(sums, rows, weight, type, out);                                                                     \
    }                                                                                                                  \
    attribute static void stored_##level(const float *sums, int rows, const void *bias, int type, void *out) {         \
        stored_all(sums, rows, bias, type, out);                                                                       \
    }                                                                                                                  \
    attribute static void capped_##level(float *s, int rows, float scale, float cap) {                                 \
        capped_all(s, rows, scale, cap);                                                                               \
    }                                                                                                                  \
    attribute static float softened_##level(float *s, int rows, float scale, float *largest) {                         \
        return softened_all(s, rows, scale, largest);                                                                  \
    }                                                                                                                  \
    attribute static void mixed_##level(const float *p, const void *v, int64_t stride, int rows, int tokens,           \
                                        int64_t k, int type, float *sums) {                                            \
        mixed_all(p, v, stride, rows, tokens, k, type, sums);                                                          \
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

/* A tile of R rows and T tokens, both known to the compiler, with two vectors of sums for each product. `step` elements
 * are multiplied at a time, the last ones in `tail`. Rows at `ahead` are prefetched meanwhile. */
#define TILE(name, attribute, acc_t, zero, step, size, vec, load_w, load_x, fma, tail, total)                          \
    attribute INLINE void name(const int R, const int T, const char *w, int64_t stride, const void *const *x,          \
                               int64_t k, float *sums, const char *ahead) {                                            \
        acc_t acc[MOST][2][2];                                                                                         \
        _Pragma("GCC unroll 4") for (int r = 0; r < R; r++)                                                            \
            _Pragma("GCC unroll 2") for (int t = 0; t < T; t++) acc[r][t][0] = acc[r][t][1] = zero;                    \
        int64_t i = 0;                                                                                                 \
        for (; i + 2 * step <= k; i += 2 * step)                                                                       \
            _Pragma("GCC unroll 2") for (int u = 0; u < 2; u++) {                                                      \
                int64_t at = i + u * step;                                                                             \
                vec v[MOST];                                                                                           \
                _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) {                                                  \
                    if (ahead)                                                                                         \
                        _mm_prefetch(ahead + (r * stride + at) * size, _MM_HINT_T0);                                   \
                    v[r] = load_w(w + (r * stride + at) * size);                                                       \
                }                                                                                                      \
                _Pragma("GCC unroll 2") for (int t = 0; t < T; t++) {                                                  \
                    vec y = load_x(x[t], at);                                                                          \
                    _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) acc[r][t][u] = fma(acc[r][t][u], v[r], y);     \
                }                                                                                                      \
            }                                                                                                          \
        if (i + step <= k) {                                                                                           \
            _Pragma("GCC unroll 2") for (int t = 0; t < T; t++) {                                                      \
                vec y = load_x(x[t], i);                                                                               \
                _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) acc[r][t][0] =                                     \
                    fma(acc[r][t][0], load_w(w + (r * stride + i) * size), y);                                         \
            }                                                                                                          \
            i += step;                                                                                                 \
        }                                                                                                              \
        if (i < k)                                                                                                     \
            tail                                                                                                       \
        _Pragma("GCC unroll 2") for (int t = 0; t < T; t++)                                                            \
            _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) sums[t * ROWS + r] = total(acc[r][t]);                 \
    }

/* Calls the tile with constants. One token: row after row, as memory lies, is what a core fetches ahead best by itself
 * (four rows at a time, prefetched, come to three quarters of that). More: R rows share what is read of two tokens. */
#define DOTS(name, tile, attribute, R, size)                                                                           \
    attribute static void name(const void *w, int64_t stride, int rows, const void *const *x, int tokens, int64_t k,   \
                               float *sums) {                                                                          \
        const char *at = w;                                                                                            \
        int64_t width = stride * size;                                                                                 \
        int r = 0;                                                                                                     \
        for (; tokens > 1 && r + R <= rows; r += R, at += R * width)                                                   \
            for (int t = 0; t < tokens; t += 2) {                                                                      \
                if (t + 2 <= tokens)                                                                                   \
                    tile(R, 2, at, stride, x + t, k, sums + t * ROWS + r, t ? NULL : at + R * width);                  \
                else                                                                                                   \
                    tile(R, 1, at, stride, x + t, k, sums + t * ROWS + r, NULL);                                       \
            }                                                                                                          \
        for (; r < rows; r++, at += width)                                                                             \
            for (int t = 0; t < tokens; t++)                                                                           \
                tile(1, 1, at, stride, x + t, k, sums + t * ROWS + r, NULL);                                           \
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

#define LOAD_AVX2(p) _mm256_loadu_ps((const float *)(p))
#define X_AVX2(x, i) _mm256_loadu_ps((const float *)(x) + (i))
#define FMA256(a, v, y) _mm256_fmadd_ps(v, y, a)
#define TOTAL256(a) sum_avx2(_mm256_add_ps(a[0], a[1]))
#define TAIL256(size, load)                                                                                            \
    for (int r = 0; r < R; r++) {                                                                                      \
        char row[32] = {0};                                                                                            \
        memcpy(row, w + (r * stride + i) * size, (size_t)(k - i) * size);                                              \
        for (int t = 0; t < T; t++) {                                                                                  \
            float last[8] = {0};                                                                                       \
            memcpy(last, (const float *)x[t] + i, (size_t)(k - i) * 4);                                                \
            acc[r][t][0] = FMA256(acc[r][t][0], load((const void *)row), _mm256_loadu_ps(last));                       \
        }                                                                                                              \
    }
TILE(tile_avx2_f32, T_AVX2, __m256, _mm256_setzero_ps(), 8, 4, __m256, LOAD_AVX2, X_AVX2, FMA256,
     TAIL256(4, LOAD_AVX2), TOTAL256)
TILE(tile_avx2_bf16, T_AVX2, __m256, _mm256_setzero_ps(), 8, 2, __m256, widen_avx2, X_AVX2, FMA256,
     TAIL256(2, widen_avx2), TOTAL256)
DOTS(dots_avx2_f32, tile_avx2_f32, T_AVX2, 2, 4) /* 16 registers */
DOTS(dots_avx2_bf16, tile_avx2_bf16, T_AVX2, 2, 2)
ELEMENTWISE(avx2, 0, T_AVX2)

/* AVX-512: 16 elements at a time, masked at the end */

#define T_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define TOTAL512(a) _mm512_reduce_add_ps(_mm512_add_ps(a[0], a[1]))
#define TAIL512(vec, mask_t, size, fma, mask_w, mask_x)                                                                \
    {                                                                                                                  \
        mask_t m = (mask_t)((((uint64_t)1) << (k - i)) - 1);                                                           \
        _Pragma("GCC unroll 2") for (int t = 0; t < T; t++) {                                                          \
            vec y = mask_x(m, x[t], i);                                                                                \
            _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) acc[r][t][0] =                                         \
                fma(acc[r][t][0], mask_w(m, w + (r * stride + i) * size), y);                                          \
        }                                                                                                              \
    }
#define FMA512(a, v, y) _mm512_fmadd_ps(v, y, a)
#define W32(p) _mm512_loadu_ps((const float *)(p))
#define X32(x, i) _mm512_loadu_ps((const float *)(x) + (i))
#define MW32(m, p) _mm512_maskz_loadu_ps(m, (const float *)(p))
#define MX32(m, x, i) _mm512_maskz_loadu_ps(m, (const float *)(x) + (i))
#define WIDEN512(h) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))
#define W16(p) WIDEN512(_mm256_loadu_si256((const __m256i *)(p)))
#define MW16(m, p) WIDEN512(_mm256_maskz_loadu_epi16(m, p))

TILE(tile_avx512_f32, T_AVX512, __m512, _mm512_setzero_ps(), 16, 4, __m512, W32, X32, FMA512,
     TAIL512(__m512, __mmask16, 4, FMA512, MW32, MX32), TOTAL512)
TILE(tile_avx512_bf16, T_AVX512, __m512, _mm512_setzero_ps(), 16, 2, __m512, W16, X32, FMA512,
     TAIL512(__m512, __mmask16, 2, FMA512, MW16, MX32), TOTAL512)
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

TILE(tile_dpbf16, T_DPBF16, __m512, _mm512_setzero_ps(), 32, 2, __m512i, WB, XB, DP512,
     TAIL512(__m512i, __mmask32, 2, DP512, MWB, MXB), TOTAL512)
DOTS(dots_dpbf16, tile_dpbf16, T_DPBF16, 4, 2)
ELEMENTWISE(dpbf16, 1, T_DPBF16)

#endif

#define LEVEL(dots_f32, dots_bf16, level, narrowed)                                                                    \
    {{dots_f32, dots_bf16}, gated_##level, scaled_##level, stored_##level, capped_##level, softened_##level,           \
     mixed_##level, narrowed}

const Level levels[] = {
    LEVEL(dots_plain_f32, dots_plain_bf16, plain, 0),
#if X86
    LEVEL(dots_avx2_f32, dots_avx2_bf16, avx2, 0),
    LEVEL(dots_avx512_f32, dots_avx512_bf16, avx512, 0),
    LEVEL(dots_avx512_f32, dots_dpbf16, dpbf16, 1),
#endif
};

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
