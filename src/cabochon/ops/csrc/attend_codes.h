// The products of attention where keys and values are codes of 8 bits: in integers, exact in any order, by queries and weights
// of 8 bits.
//
// A query has a scale for each lane, that is for every four numbers in 64, which costs one more product per score and lane. So
// whatever else is done with a score's sixteen sums is kept off the multipliers' ports: integers begin as the bits of a float,
// which saves their conversion, and the product with a scale is the addition across lanes, too. (On Zen 4 shuffles within
// quarters of a register cost nothing beside products; those across quarters, and stores, do.)
#pragma once

#include "attend_tiles.h"

namespace {

#if CABOCHON_AVX512
constexpr bool BYTES = true;  // are there products of bytes?
#else
constexpr bool BYTES = false;
#endif

constexpr long FOLD = 64;      // numbers of a head that fill a register; the scales repeat after so many
constexpr long CODED = 64;     // keys whose weights are rounded together
constexpr long TOGETHER = 4;   // queries that meet keys together
constexpr long WIDEST = 2048;  // numbers of a head: 128 products of bytes per lane, 255 x 127 each, are below 2^22
constexpr uint32_t FLOATING = 0x4b400000;  // with an integer of 22 bits and a sign added, the bits of a float that is ...
constexpr float FLOATED = 12582912.0f;     // ... larger by this

// Bytes without a sign times bytes with one.
INLINE I16 multiply_bytes(I16 sums, U16 natural, U16 integer) {
#if CABOCHON_AVX512
    sums.part[0] = (I16::Part)_mm512_dpbusd_epi32((__m512i)sums.part[0], (__m512i)natural.part[0], (__m512i)integer.part[0]);
#endif
    (void)natural, (void)integer;
    return sums;
}

// The largest of every four neighbours, in all of their lanes.
INLINE F16 largest_of_fours(F16 v) {
#if CABOCHON_AVX512
    v.part[0] = (F16::Part)_mm512_max_ps((__m512)v.part[0], _mm512_permute_ps((__m512)v.part[0], 0xb1));
    v.part[0] = (F16::Part)_mm512_max_ps((__m512)v.part[0], _mm512_permute_ps((__m512)v.part[0], 0x4e));
#endif
    return v;
}

// A part of a key whose codes share a scale: numbers [begin, end) of the head.
struct KeyPart {
    long begin, end, index;
};

// Queries in codes, TOGETHER at a time: what meets a register of a key lies side by side, and behind all of it each part's `Ends`.
struct CodedQueries {
    // What a query's sums of products begin with and come to. Codes of keys are taken 128 larger than they are, for which
    // `begin` makes up; low and high scales are those of the lanes that `unpack_low` and `unpack_high` give.
    struct Ends {
        uint32_t begin[LANES];
        float low[LANES], high[LANES], offset[LANES];
    };
    uint32_t* words;  // of every TOGETHER queries [head / FOLD, TOGETHER, LANES], then [2, TOGETHER] of Ends
    long head;

    static long size(long rows, long head) {
        return (rows + TOGETHER - 1) / TOGETHER * TOGETHER * (head / 4 + 2 * long(sizeof(Ends) / 4));
    }
    CodedQueries from(long row) const { return {words + row * size(TOGETHER, head) / TOGETHER, head}; }  // a multiple of TOGETHER
    uint32_t* at(long number) const { return words + number / FOLD * TOGETHER * LANES; }
    Ends* ends(const KeyPart& part) const { return reinterpret_cast<Ends*>(words + TOGETHER * head / 4) + part.index * TOGETHER; }

    // A part of query `row` to codes. The scales are no numbers if any of `q` is none.
    template <class T>
    void round(const T* q, const KeyPart& part, long row) const {
        const CodedQueries some = from(row / TOGETHER * TOGETHER);
        row %= TOGETHER;
        F16 odd = zero();
        alignas(64) float scales[FOLD];
        F16 inverse[FOLD / LANES];
        for (long v = 0; v < FOLD / LANES; ++v) {
            F16 top = splat(1e-30f);
            for (long i = part.begin + v * LANES; i < part.end; i += FOLD) {
                const F16 some = get(q + i);
                top = larger(larger(some, 0.0f - some), top), odd = odd + (some - some);
            }
            top = largest_of_fours(top);
            inverse[v] = 127.0f / top;
            put(scales + v * LANES, top * (1.0f / 127));
        }
        I16 sums = splat(0);
        for (long i = part.begin; i < part.end; i += FOLD) {
            auto* codes = reinterpret_cast<int8_t*>(some.at(i) + row * LANES);
            for (long v = 0; v < FOLD / LANES; ++v) put_bytes(codes + v * LANES, rounded(get(q + i + v * LANES) * inverse[v]));
            sums = multiply_bytes(sums, U16::of(0x80808080u), load<U16>(codes));
        }
        Ends& to = some.ends(part)[row];
        store(to.begin, int32_t(FLOATING) - sums);
        const float nothing = sum(odd);
        for (long i = 0; i < LANES; ++i) {
            const float* scale = scales + FOLD / LANES * (i / 4 * 4 + i % 4 / 2);  // of lanes 0 0 1 1 of each four
            to.low[i] = scale[0] + nothing, to.high[i] = scale[8] + nothing;
            to.offset[i] = -FLOATED * (to.low[i] + to.high[i]);
        }
    }
};

#if CABOCHON_AVX512
// Scores of R queries over four keys of `steps` registers each, to out[query * KEYS + key].
template <int R>
INLINE void score_four(const uint32_t* words, const CodedQueries::Ends* ends, const int8_t* const* key, long steps, float* out, Ahead& ahead) {
    I16 sums[R][4];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[r][i] = load<I16>(ends[r].begin);
    const int8_t *a = key[0], *b = key[1], *c = key[2], *d = key[3];
    for (long at = 0; at < steps * FOLD; at += FOLD, words += TOGETHER * LANES) {
        ahead();
        const U16 k[4] = {load<U16>(a + at) ^ 0x80808080u, load<U16>(b + at) ^ 0x80808080u,  //
                          load<U16>(c + at) ^ 0x80808080u, load<U16>(d + at) ^ 0x80808080u};
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            U16 query = load<U16>(words + r * LANES);
            asm("" : "+v"(query.part[0]));  // GCC would load it once per key: as many loads as products
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) sums[r][i] = multiply_bytes(sums[r][i], k[i], query);
        }
    }
    F16 row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const F16 low = load<F16>(ends[r].low), high = load<F16>(ends[r].high), offset = load<F16>(ends[r].offset);
        F16 two[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const F16 v = as<F16>(sums[r][2 * i]), w = as<F16>(sums[r][2 * i + 1]);
            two[i] = fma(unpack_low(v, w), low, fma(unpack_high(v, w), high, offset));
        }
        row[r] = add_pairs(two[0], two[1]);
    }
    put_scores(row, out);
}
#endif

// The scores of all queries over a part of keys, a multiple of four, to out[query * KEYS + key].
INLINE void score_codes(const CodedQueries& queries, long rows, const KeyPart& part, const int8_t* const* key, long count, float* out,
                        Ahead& asking) {
#if CABOCHON_AVX512
    const long steps = (part.end - part.begin) / FOLD, apart = CodedQueries::size(TOGETHER, queries.head);
    Ahead ahead = asking;  // a copy can stay in registers
    for (long k = 0; k < count; k += 4) {
        const uint32_t* words = queries.at(part.begin);
        const auto* ends = queries.ends(part);
        for (long r = 0; r < rows; r += TOGETHER) {
            float* to = out + r * KEYS + k;
            switch (least(rows - r, TOGETHER)) {
                case 1: score_four<1>(words, ends, key + k, steps, to, ahead); break;
                case 2: score_four<2>(words, ends, key + k, steps, to, ahead); break;
                case 3: score_four<3>(words, ends, key + k, steps, to, ahead); break;
                default: score_four<4>(words, ends, key + k, steps, to, ahead);
            }
            words += apart, ends = reinterpret_cast<const CodedQueries::Ends*>(reinterpret_cast<const uint32_t*>(ends) + apart);
        }
    }
    asking = ahead;
#endif
    (void)queries, (void)rows, (void)part, (void)key, (void)count, (void)out, (void)asking;
}

// Weights of a block of keys, times the values' scales, as bytes without a sign; the weights are added to `total`. Returns what
// an integer is worth.
INLINE float round_weights(const float* scores, const float* scales, float top, F16& total, int8_t* codes) {
    F16 weights[CODED / LANES], heaviest = zero();
#pragma GCC unroll 4
    for (long v = 0; v < CODED / LANES; ++v) {
        const F16 weight = decaying(get(scores + v * LANES) - top);
        total = total + weight;
        weights[v] = weight * get(scales + v * LANES);
        heaviest = larger(weights[v], heaviest);
    }
    const float largest = maximum(heaviest), inverse = largest > 0 ? 255.0f / largest : 0;
#pragma GCC unroll 4
    for (long v = 0; v < CODED / LANES; ++v) put_bytes(codes + v * LANES, rounded(weights[v] * inverse));
    return largest / 255.0f;
}

// Weights of the keys of a block as bytes, [rows, KEYS], of which an integer of a row is worth `unit`.
struct CodedWeights {
    const uint32_t* words;
    const float* unit;

    CodedWeights from(long row) const { return {words + row * KEYS / 4, unit + row}; }
};

#if CABOCHON_AVX512
// 32 numbers of four values, side by side in words: those of eight numbers in each half of either register.
INLINE void bytes_side_by_side(const int8_t* const* value, long column, U16 (&right)[2]) {
    const auto a = load<__m256i>(value[0] + column), b = load<__m256i>(value[1] + column);
    const auto c = load<__m256i>(value[2] + column), d = load<__m256i>(value[3] + column);
    const __m256i ab[] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
    const __m256i cd[] = {_mm256_unpacklo_epi8(c, d), _mm256_unpackhi_epi8(c, d)};
    for (int i = 0; i < 2; ++i)
        right[i].part[0] = (U16::Part)_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_unpacklo_epi16(ab[i], cd[i])),
                                                         _mm256_unpackhi_epi16(ab[i], cd[i]), 1);
}

// R rows of weights over one column of the values of `count` keys, to or onto out[row * stride ..].
template <int R, bool ONTO>
INLINE void mix_column(const CodedWeights& weights, const int8_t* const* value, long column, long count, float* out, long stride, Ahead& ahead) {
    I16 sums[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = splat(0);
    const uint32_t* word = weights.words;
    for (const auto* end = value + count; value < end; value += 4, ++word) {
        U16 right[2];
        bytes_side_by_side(value, column, right);
        ahead();
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const U16 left = U16::of(word[r * KEYS / 4]);
            sums[r][0] = multiply_bytes(sums[r][0], left, right[0]), sums[r][1] = multiply_bytes(sums[r][1], left, right[1]);
        }
    }
    F16 unit[R];  // read first: for all GCC knows they might lie where results go
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) unit[r] = splat(weights.unit[r]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const I16 ordered[2] = {quarters<0x88>(sums[r][0], sums[r][1]), quarters<0xdd>(sums[r][0], sums[r][1])};
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
            float* to = out + r * stride + c * LANES;
            put(to, ONTO ? fma(to_float(ordered[c]), unit[r], get(to)) : to_float(ordered[c]) * unit[r]);
        }
    }
}

template <int R>
void mix_columns(const CodedWeights& weights, const int8_t* const* value, long count, float* out, long width, bool onto, Ahead& asking) {
    Ahead ahead = asking;
    for (long i = 0; i < width; i += 2 * LANES)
        if (onto)
            mix_column<R, true>(weights, value, i, count, out + i, width, ahead);
        else
            mix_column<R, false>(weights, value, i, count, out + i, width, ahead);
    asking = ahead;
}
#endif

// Weighted values, all `width` numbers of those of `count` keys, to or onto out[rows, width].
template <int R = 8>
void mix_codes(long rows, const CodedWeights& weights, const int8_t* const* value, long count, float* out, long width, bool onto, Ahead& ahead) {
#if CABOCHON_AVX512
    long r = 0;
    for (; r + R <= rows; r += R) mix_columns<R>(weights.from(r), value, count, out + r * width, width, onto, ahead);
    if constexpr (R > 1) {
        if (r < rows) mix_codes<R - 1>(rows - r, weights.from(r), value, count, out + r * width, width, onto, ahead);
    }
#endif
    (void)rows, (void)weights, (void)value, (void)count, (void)out, (void)width, (void)onto, (void)ahead;
}

}  // namespace
