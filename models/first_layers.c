/* The first two layers of the encoder, frozen at one location; see first_layers.py.

   layer 1: 1 -> 8 channels, 32^3 -> 32^3        layer 2: 8 -> 8 channels, stride 2, 32^3 -> 16^3

Both are 3 x 3 x 3 convolutions with padding 1, each followed by ELU. A vector holds 16 voxels of a line of x,
every other voxel of 32, and the 8 channels are 8 accumulators. Of layer 1's result three planes of z are kept,
what layer 2 looks at, so that it never leaves the cache.

A word is 32 bits: a float, or two bfloat16, whose products VDPBF16PS adds in float32. In bfloat16 the two are
neighbours in x for layer 1, and two of the input channels for layer 2. Functions take ``half``, a constant where
they are called: whether to compute in bfloat16. */

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum {
    SIDE = 32,
    HALF_SIDE = 16,
    CHANNELS = 8,
    LINES = SIDE + 2,         /* of a padded plane of the input */
    LINE = 48,                /* words of one, no more than half of them used in bfloat16 */
    SECOND = 24,              /* where its numbers 1, 3, 5 ... begin in float32; 0, 2, 4 ... come first */
    EVEN = 0,                 /* where a record of layer 1 has its 16 even voxels; 16 zeros follow */
    ODD = 32,                 /* and its 16 odd voxels */
    RECORD = 48,              /* words of one: a line of x of a channel, or of two */
    RECORDS = SIDE + 1,       /* of a channel's plane; the first is y = -1 and stays zero */
    PLANE = CHANNELS * RECORDS * RECORD,
    ALIGNMENT = 64
};

typedef uint16_t bf16;
typedef uint32_t word;

int first_layers_supported(int half) {
    int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    return wide && (!half || __builtin_cpu_supports("avx512bf16"));
}

INLINE __m512 add_product(__m512 sum, __m512i words, word weight, int half) {
    __m512i weights = _mm512_set1_epi32((int)weight);
    return half ? _mm512_dpbf16_ps(sum, (__m512bh)words, (__m512bh)weights)
                : _mm512_fmadd_ps(_mm512_castsi512_ps(words), _mm512_castsi512_ps(weights), sum);
}

/* max(x, exp(min(x, 0)) - 1). exp as 2^n 2^f, |f| <= 1/2, by the Taylor series to f^6, in bfloat16 to f^4: relative
   errors of 2e-7 and 6e-5, where the types have 6e-8 and 4e-3. x is the maximum's last operand: NaN stays NaN. */
INLINE __m512 elu(__m512 x, int half) {
    __m512 power = _mm512_mul_ps(_mm512_min_ps(x, _mm512_setzero_ps()), _mm512_set1_ps(1.44269504f));
    __m512 n = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(power, n);
    __m512 series = _mm512_set1_ps(0.00961812911f);
    if (!half) {
        series = _mm512_fmadd_ps(_mm512_set1_ps(0.000154035304f), f, _mm512_set1_ps(0.00133335581f));
        series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(0.00961812911f));
    }
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(0.0555041087f));
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(0.240226507f));
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(0.693147181f));
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(1.0f));
    return _mm512_max_ps(_mm512_sub_ps(_mm512_scalef_ps(series, n), _mm512_set1_ps(1.0f)), x);
}

/* ELU of a channel's sums as words, or of two channels' as pairs, rounded to nearest even. */
INLINE __m512i to_words(const __m512 *sums, int half) {
    if (!half) return _mm512_castps_si512(elu(sums[0], 0));
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(elu(sums[0], 1)));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(elu(sums[1], 1)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* A line of 32 numbers of the input -> its place in the padded input, whose number 0 is x = -1. */
INLINE void pad_line(const void *numbers, word *line, int half) {
    if (half) {
        memcpy((bf16 *)line + 1, numbers, SIDE * sizeof(bf16));
        return;
    }
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    __m512 left = _mm512_loadu_ps(numbers), right = _mm512_loadu_ps((const float *)numbers + 16);
    _mm512_storeu_ps((float *)line + SECOND, _mm512_permutex2var_ps(left, even, right)); /* x = 0, 2, 4 ... */
    _mm512_storeu_ps((float *)line + 1, _mm512_permutex2var_ps(left, odd, right));       /* after x = -1: 1, 3, 5 ... */
}

/* One line of layer 1, all channels: padded input from (z - 1, y - 1) on -> the records of (z, y).
   With X = 0 ... 15, numbers 2X, 2X + 1 and 2X + 2 of a padded line make voxel 2X, the next three voxel 2X + 1. */
INLINE void first_line(const word *input, const word *weights, const float *bias, word *records, int half) {
    __m512 even[CHANNELS], odd[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) even[c] = odd[c] = _mm512_set1_ps(bias[c]);
    for (int z = 0; z < 3; z++)
        for (int y = 0; y < 3; y++) {
            const word *line = input + (z * LINES + y) * LINE;
            if (half) { /* at[k]: the pairs of numbers 2X + k and 2X + k + 1 */
                __m512i at[4];
                for (int k = 0; k < 4; k++) at[k] = _mm512_loadu_si512((const bf16 *)line + k);
#pragma GCC unroll 8
                for (int c = 0; c < CHANNELS; c++, weights += 2) { /* taps 0 and 1; tap 2 and a zero */
                    even[c] = add_product(even[c], at[0], weights[0], half);
                    odd[c] = add_product(odd[c], at[1], weights[0], half);
                    even[c] = add_product(even[c], at[2], weights[1], half);
                    odd[c] = add_product(odd[c], at[3], weights[1], half);
                }
            } else { /* at[k]: numbers 2X + k */
                __m512i at[4] = {
                    _mm512_loadu_si512(line), _mm512_loadu_si512(line + SECOND), _mm512_loadu_si512(line + 1),
                    _mm512_loadu_si512(line + SECOND + 1)};
#pragma GCC unroll 8
                for (int c = 0; c < CHANNELS; c++, weights += 3)
#pragma GCC unroll 3
                    for (int x = 0; x < 3; x++) {
                        even[c] = add_product(even[c], at[x], weights[x], half);
                        odd[c] = add_product(odd[c], at[x + 1], weights[x], half);
                    }
            }
        }
    const int step = half ? 2 : 1;
#pragma GCC unroll 8
    for (int c = 0; c < CHANNELS; c += step, records += RECORDS * RECORD) {
        _mm512_store_si512(records + EVEN, to_words(even + c, half));
        _mm512_store_si512(records + ODD, to_words(odd + c, half));
    }
}

/* 4 vectors of 16 voxels -> 16 voxels of 4 words, ``step`` words apart. */
INLINE void store_transposed(__m512i a, __m512i b, __m512i c, __m512i d, word *out, int step) {
    __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
    /* In 128 bits each: voxels 0, 4, 8, 12; then 1, 5, 9, 13; and so on. */
    __m512i voxels[4] = {
        _mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
        _mm512_unpacklo_epi64(ab_high, cd_high), _mm512_unpackhi_epi64(ab_high, cd_high)};
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++, out += step) {
        _mm_storeu_si128((__m128i *)out, _mm512_castsi512_si128(voxels[k]));
        _mm_storeu_si128((__m128i *)(out + 4 * step), _mm512_extracti32x4_epi32(voxels[k], 1));
        _mm_storeu_si128((__m128i *)(out + 8 * step), _mm512_extracti32x4_epi32(voxels[k], 2));
        _mm_storeu_si128((__m128i *)(out + 12 * step), _mm512_extracti32x4_epi32(voxels[k], 3));
    }
}

/* 8 channels of a line of 16 voxels -> 16 voxels of 8 channels. */
INLINE void store_channels_last(const __m512 *sums, word *out, int half) {
    const int step = half ? CHANNELS / 2 : CHANNELS;
#pragma GCC unroll 2
    for (int first = 0; first < step; first += 4) {
        const __m512 *from = sums + first;
        const int next = half ? 2 : 1;
        __m512i a = to_words(from, half), b = to_words(from + next, half);
        __m512i c = to_words(from + 2 * next, half), d = to_words(from + 3 * next, half);
        store_transposed(a, b, c, d, out + first, step);
    }
}

/* Lines Y and Y + 1 of layer 2, of the planes 2Z - 1, 2Z and 2Z + 1. */
INLINE void second_lines(word *const *planes, int Y, const word *weights, const float *bias, word *out, int half) {
    __m512 upper[CHANNELS], lower[CHANNELS];
    const int inputs = half ? CHANNELS / 2 : CHANNELS;
    for (int c = 0; c < CHANNELS; c++) upper[c] = lower[c] = _mm512_set1_ps(bias[c]);
    for (int i = 0; i < inputs; i++)
        for (int z = 0; z < 3; z++)
            for (int y = 0; y < 3; y++) {
                const word *record = planes[z] + (i * RECORDS + 2 * Y + y) * RECORD;
                const int starts[3] = {ODD - 1, EVEN, ODD}; /* x = 2X - 1, a zero where X = 0; 2X; 2X + 1 */
#pragma GCC unroll 3
                for (int x = 0; x < 3; x++, weights += CHANNELS) {
                    __m512i above = _mm512_loadu_si512(record + starts[x]);
                    __m512i below = _mm512_loadu_si512(record + 2 * RECORD + starts[x]);
#pragma GCC unroll 8
                    for (int c = 0; c < CHANNELS; c++) {
                        upper[c] = add_product(upper[c], above, weights[c], half);
                        lower[c] = add_product(lower[c], below, weights[c], half);
                    }
                }
            }
    store_channels_last(upper, out, half);
    store_channels_last(lower, out + HALF_SIDE * inputs, half);
}

INLINE int compute(
    const char *patches, int64_t count, const word *weights1, const float *bias1, const word *weights2,
    const float *bias2, word *out, int half) {
    const size_t input_bytes = (LINES * LINES + 1) * LINE * sizeof(word), kept_bytes = 3 * PLANE * sizeof(word);
    const int line_bytes = SIDE * (half ? sizeof(bf16) : sizeof(float));
    word *input = NULL, *kept = NULL;
    if (posix_memalign((void **)&input, ALIGNMENT, input_bytes) || posix_memalign((void **)&kept, ALIGNMENT, kept_bytes)) {
        free(input);
        return 1;
    }
    memset(input, 0, input_bytes);
    memset(kept, 0, kept_bytes);
    for (int64_t n = 0; n < count; n++) {
        for (int z = 0; z < SIDE; z++)
            for (int y = 0; y < SIDE; y++, patches += line_bytes)
                pad_line(patches, input + ((z + 1) * LINES + y + 1) * LINE, half);
        word *planes[3] = {kept, kept + PLANE, kept + 2 * PLANE};
        memset(planes[0], 0, PLANE * sizeof(word)); /* z = -1 */
        for (int Z = 0; Z < HALF_SIDE; Z++) {
            for (int k = 0; k < 2; k++)
                for (int y = 0; y < SIDE; y++) {
                    const word *from = input + ((2 * Z + k) * LINES + y) * LINE;
                    first_line(from, weights1, bias1, planes[k + 1] + (y + 1) * RECORD, half);
                }
            for (int Y = 0; Y < HALF_SIDE; Y += 2, out += 2 * HALF_SIDE * (half ? CHANNELS / 2 : CHANNELS))
                second_lines(planes, Y, weights2, bias2, out, half);
            word *last = planes[2];
            planes[2] = planes[0];
            planes[0] = last; /* 2Z + 1 comes before 2 (Z + 1) */
        }
    }
    free(input);
    free(kept);
    return 0;
}

/* patches (count, 32, 32, 32) -> out (count, 16, 16, 16, 8), both of float or of bf16. Returns 0, or 1 where there
   is no memory.
   float: weights1 (z 3, y 3, out 8, x 3), weights2 (in 8, z 3, y 3, x 3, out 8).
   bf16:  weights1 (z 3, y 3, out 8, x 4), the last zero; weights2 (in / 2 4, z 3, y 3, x 3, out 8, in 2). */
int first_layers_float(
    const void *patches, int64_t count, const void *weights1, const float *bias1, const void *weights2,
    const float *bias2, void *out) {
    return compute(patches, count, weights1, bias1, weights2, bias2, out, 0);
}

int first_layers_bf16(
    const void *patches, int64_t count, const void *weights1, const float *bias1, const void *weights2,
    const float *bias2, void *out) {
    return compute(patches, count, weights1, bias1, weights2, bias2, out, 1);
}
