/* The first two layers of the encoder, frozen at one location, in bfloat16; see first_layers.py.

   layer 1: 1 -> 8 channels, 32^3 -> 32^3        layer 2: 8 -> 8 channels, stride 2, 32^3 -> 16^3

Both are 3 x 3 x 3 convolutions with padding 1, each followed by ELU. A vector holds 16 voxels of a line of x,
the 8 channels are 8 accumulators, and VDPBF16PS adds two taps at a time in float32. Layer 1 takes two taps
that are neighbours in x, so its two vectors of a line are the 16 even and the 16 odd voxels; layer 2 takes
two input channels. Of layer 1's result three planes of z are kept, what layer 2 looks at: it stays in the cache. */

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    SIDE = 32,
    HALF = 16,
    CHANNELS = 8,
    PAIRS = CHANNELS / 2,
    LINES = SIDE + 2,            /* of a padded plane of the input */
    LINE = 40,                   /* numbers in one, and in the memory between two */
    EVEN = 0,                    /* where a record has its 16 even voxels; 16 zeros follow */
    ODD = 32,                    /* and where its 16 odd voxels */
    RECORD = 48,                 /* one line of x of a pair of channels, in 32-bit words */
    RECORDS = SIDE + 1,          /* the first is y = -1 and stays zero */
    PLANE = PAIRS * RECORDS * RECORD
};

typedef uint16_t bf16;
typedef uint32_t pair; /* two bf16, the first one in the lower half */

int first_layers_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
}

static inline __m512 add_dot(__m512 sum, __m512i taps, pair weights) {
    return _mm512_dpbf16_ps(sum, (__m512bh)taps, (__m512bh)_mm512_set1_epi32((int)weights));
}

/* max(x, exp(min(x, 0)) - 1). exp as 2^n 2^f, |f| <= 1/2, by the Taylor series to f^4: relative error below 1e-4,
   where bfloat16 has 4e-3. x is the last operand of the maximum, so that NaN stays NaN. */
static inline __m512 elu(__m512 x) {
    __m512 power = _mm512_mul_ps(_mm512_min_ps(x, _mm512_setzero_ps()), _mm512_set1_ps(1.44269504f));
    __m512 n = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(power, n);
    __m512 series = _mm512_set1_ps(0.00961812911f);
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(0.0555041087f));
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(0.240226507f));
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(0.693147181f));
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(1.0f));
    return _mm512_max_ps(_mm512_sub_ps(_mm512_scalef_ps(series, n), _mm512_set1_ps(1.0f)), x);
}

/* Two channels of 16 voxels -> 16 pairs, rounded to nearest even. */
static inline __m512i to_pairs(__m512 first, __m512 second) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* One line of layer 1, all channels: padded input at (z - 1, y - 1) -> the records of (z, y). */
static inline void first_line(const bf16 *input, const pair *weights, const float *bias, pair *records) {
    __m512 even[CHANNELS], odd[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) even[c] = odd[c] = _mm512_set1_ps(bias[c]);
    for (int z = 0; z < 3; z++)
        for (int y = 0; y < 3; y++, weights += 2 * CHANNELS) {
            /* Numbers 2X + k and 2X + k + 1 for X = 0 ... 15. The padding makes 2X - 1 number 2X. */
            const bf16 *line = input + (z * LINES + y) * LINE;
            __m512i at0 = _mm512_loadu_si512(line), at1 = _mm512_loadu_si512(line + 1);
            __m512i at2 = _mm512_loadu_si512(line + 2), at3 = _mm512_loadu_si512(line + 3);
#pragma GCC unroll 8
            for (int c = 0; c < CHANNELS; c++) {
                even[c] = add_dot(even[c], at0, weights[2 * c]);
                odd[c] = add_dot(odd[c], at1, weights[2 * c]);
                even[c] = add_dot(even[c], at2, weights[2 * c + 1]); /* the third tap and a weight of zero */
                odd[c] = add_dot(odd[c], at3, weights[2 * c + 1]);
            }
        }
#pragma GCC unroll 4
    for (int p = 0; p < PAIRS; p++, records += RECORDS * RECORD) {
        _mm512_store_si512(records + EVEN, to_pairs(elu(even[2 * p]), elu(even[2 * p + 1])));
        _mm512_store_si512(records + ODD, to_pairs(elu(odd[2 * p]), elu(odd[2 * p + 1])));
    }
}

/* 8 channels of 16 voxels, as pairs of channels, -> 16 voxels of 8 channels. */
static inline void store_channels_last(const __m512 *sums, bf16 *out) {
    __m512i a = to_pairs(elu(sums[0]), elu(sums[1])), b = to_pairs(elu(sums[2]), elu(sums[3]));
    __m512i c = to_pairs(elu(sums[4]), elu(sums[5])), d = to_pairs(elu(sums[6]), elu(sums[7]));
    __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
    /* In 128 bits each: voxels 0, 4, 8, 12; then 1, 5, 9, 13; and so on. */
    __m512i voxels[4] = {
        _mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
        _mm512_unpacklo_epi64(ab_high, cd_high), _mm512_unpackhi_epi64(ab_high, cd_high)};
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++, out += CHANNELS) {
        _mm_storeu_si128((__m128i *)out, _mm512_castsi512_si128(voxels[k]));
        _mm_storeu_si128((__m128i *)(out + 4 * CHANNELS), _mm512_extracti32x4_epi32(voxels[k], 1));
        _mm_storeu_si128((__m128i *)(out + 8 * CHANNELS), _mm512_extracti32x4_epi32(voxels[k], 2));
        _mm_storeu_si128((__m128i *)(out + 12 * CHANNELS), _mm512_extracti32x4_epi32(voxels[k], 3));
    }
}

/* Lines Y and Y + 1 of layer 2 of the planes 2Z - 1, 2Z and 2Z + 1. */
static inline void second_lines(pair *const *planes, int Y, const pair *weights, const float *bias, bf16 *out) {
    __m512 upper[CHANNELS], lower[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) upper[c] = lower[c] = _mm512_set1_ps(bias[c]);
    for (int p = 0; p < PAIRS; p++)
        for (int z = 0; z < 3; z++)
            for (int y = 0; y < 3; y++) {
                const pair *record = planes[z] + (p * RECORDS + 2 * Y + y) * RECORD;
                const int starts[3] = {ODD - 1, EVEN, ODD}; /* x = 2X - 1, a zero where X = 0; 2X; 2X + 1 */
#pragma GCC unroll 3
                for (int x = 0; x < 3; x++, weights += CHANNELS) {
                    __m512i above = _mm512_loadu_si512(record + starts[x]);
                    __m512i below = _mm512_loadu_si512(record + 2 * RECORD + starts[x]);
#pragma GCC unroll 8
                    for (int c = 0; c < CHANNELS; c++) {
                        upper[c] = add_dot(upper[c], above, weights[c]);
                        lower[c] = add_dot(lower[c], below, weights[c]);
                    }
                }
            }
    store_channels_last(upper, out);
    store_channels_last(lower, out + HALF * CHANNELS);
}

/* patches (count, 32, 32, 32) -> out (count, 16, 16, 16, 8), 0; or 1 where there is no memory.
   weights1 (z 3, y 3, out 8, 2): taps 0 and 1 in x, tap 2 and zero. weights2 (pairs of in 4, z 3, y 3, x 3, out 8). */
int first_layers(
    const bf16 *patches, int64_t count, const pair *weights1, const float *bias1, const pair *weights2,
    const float *bias2, bf16 *out) {
    const size_t input_bytes = (LINES * LINES + 1) * LINE * sizeof(bf16), kept_bytes = 3 * PLANE * sizeof(pair);
    bf16 *input = NULL;
    pair *kept = NULL;
    if (posix_memalign((void **)&input, 64, input_bytes) || posix_memalign((void **)&kept, 64, kept_bytes)) {
        free(input);
        return 1;
    }
    memset(input, 0, input_bytes);
    memset(kept, 0, kept_bytes);
    for (int64_t n = 0; n < count; n++) {
        for (int z = 0; z < SIDE; z++)
            for (int y = 0; y < SIDE; y++, patches += SIDE)
                memcpy(input + ((z + 1) * LINES + y + 1) * LINE + 1, patches, SIDE * sizeof(bf16));
        pair *planes[3] = {kept, kept + PLANE, kept + 2 * PLANE};
        memset(planes[0], 0, PLANE * sizeof(pair)); /* z = -1 */
        for (int Z = 0; Z < HALF; Z++) {
            for (int k = 0; k < 2; k++)
                for (int y = 0; y < SIDE; y++)
                    first_line(
                        input + ((2 * Z + k) * LINES + y) * LINE, weights1, bias1, planes[k + 1] + (y + 1) * RECORD);
            for (int Y = 0; Y < HALF; Y += 2, out += 2 * HALF * CHANNELS) second_lines(planes, Y, weights2, bias2, out);
            pair *last = planes[2];
            planes[2] = planes[0];
            planes[0] = last; /* 2Z + 1 is before 2 (Z + 1) */
        }
    }
    free(input);
    free(kept);
    return 0;
}
