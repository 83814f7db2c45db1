// Tiles of "one left value for all lanes times sixteen right values", a value being a word of 32 bits: a float, or a
// pair of neighbours along the inner axis in bfloat16 or, for codes of 8 bits, in 16-bit integers.
#pragma once

#include "rows.h"

namespace {

#if CABOCHON_AVX512
constexpr int QUERY_ROWS = 8, COLUMNS = 2;  // a decoded token brings eight rows in the small models
#elif CABOCHON_AVX2
constexpr int QUERY_ROWS = 2, COLUMNS = 2;
#else
constexpr int QUERY_ROWS = 1, COLUMNS = 4;
#endif

enum Words { FLOATS, PAIRS_OF_BF16, PAIRS_OF_INTS };

#if CABOCHON_AVX512 && defined(__AVX512BF16__)
template <class T>
constexpr bool PAIRS = sizeof(T) == 2;
#else
template <class T>
constexpr bool PAIRS = false;
#endif
template <class T>
constexpr Words WORDS = PAIRS<T> ? PAIRS_OF_BF16 : FLOATS;
template <Words W>
constexpr int PER_WORD = W == FLOATS ? 1 : 2;

template <bool Pairs>
INLINE F16 step(F16 acc, uint32_t left, F16 right) {
#if CABOCHON_AVX512 && defined(__AVX512BF16__)
    if constexpr (Pairs)
    {
        acc.part[0] = (F16::Part)_mm512_dpbf16_ps((__m512)acc.part[0], (__m512bh)_mm512_set1_epi32(left), (__m512bh)right.part[0]);
        return acc;
    }
#endif
    float value;
    memcpy(&value, &left, 4);
    return fma(splat(value), right, acc);
}

template <Words W>
struct SumsOf {
    typedef F16 Type;
};
template <>
struct SumsOf<PAIRS_OF_INTS> {
    typedef I16 Type;
};

// The same of integers: exact while sums stay below 2^31.
INLINE I16 step(I16 acc, uint32_t left, U16 right) {
#if CABOCHON_AVX512
    acc.part[0] = (I16::Part)_mm512_dpwssd_epi32((__m512i)acc.part[0], _mm512_set1_epi32(left), (__m512i)right.part[0]);
#elif CABOCHON_AVX2
    EACH(i) acc.part[i] += (I16::Part)_mm256_madd_epi16(_mm256_set1_epi32(left), (__m256i)right.part[i]);
#else
    EACH(i) {
        const I16::Part both = (I16::Part)right.part[i];
        acc.part[i] += (both << 16 >> 16) * int16_t(left) + (both >> 16) * (int32_t(left) >> 16);
    }
#endif
    return acc;
}

// Memory that is wanted soon, asked for a line at a time between products: a CPU that has to wait for its turn to ask
// computes nothing meanwhile, so a block's worth of requests can't be made in one go.
struct Ahead {
    static constexpr long ROWS = 64, LINE = 64;
    const char* row[ROWS];
    long rows = 0, bytes = 0;  // of a row
    const char *at = nullptr, *end = nullptr;

    inline __attribute__((always_inline)) void operator()() {
        if (at >= end) {
            if (!rows) return;
            at = row[--rows], end = at + bytes;
        }
        __builtin_prefetch(at, 0, 2);
        at += LINE;
    }
};

// The left side of a product; `unit` is what an integer of a row is worth.
struct Left {
    const uint32_t* words;
    long stride;
    const float* unit;

    Left from(long row) const { return {words + row * stride, stride, unit ? unit + row : nullptr}; }
};

struct Right {
    const uint32_t* words;
    long stride;
};

// out[r][..] (+)= left[r][..] . right, over C registers across.
template <Words W, int R, int C>
void strip(const Left& left, const Right& right, long inner, float* out, long out_stride, bool onto, Ahead& ahead) {
    constexpr bool ints = W == PAIRS_OF_INTS;
    typename SumsOf<W>::Type acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            if constexpr (ints)
                acc[r][c] = splat(0);
            else
                acc[r][c] = onto ? get(out + r * out_stride + c * LANES) : zero();
        }
    for (long k = 0; k < inner; ++k) {
        U16 b[C];
        for (int c = 0; c < C; ++c) b[c] = load<U16>(right.words + k * right.stride + c * LANES);
        ahead();
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) {
                const uint32_t a = left.words[r * left.stride + k];
                if constexpr (ints)
                    acc[r][c] = step(acc[r][c], a, b[c]);
                else
                    acc[r][c] = step<W == PAIRS_OF_BF16>(acc[r][c], a, as<F16>(b[c]));
            }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            float* to = out + r * out_stride + c * LANES;
            if constexpr (ints)
                put(to, onto ? fma(to_float(acc[r][c]), splat(left.unit[r]), get(to)) : to_float(acc[r][c]) * left.unit[r]);
            else
                put(to, acc[r][c]);
        }
}

template <Words W, int R, int C>
void fit_strip(long rows, long lanes, const Left& left, const Right& right, long inner, float* out, long out_stride, bool onto,
               Ahead& ahead) {
    if constexpr (R > 1) {
        if (rows < R) return fit_strip<W, R - 1, C>(rows, lanes, left, right, inner, out, out_stride, onto, ahead);
    }
    if constexpr (C > 1) {
        if (lanes < C * LANES) return fit_strip<W, R, C - 1>(rows, lanes, left, right, inner, out, out_stride, onto, ahead);
    }
    strip<W, R, C>(left, right, inner, out, out_stride, onto, ahead);
}

template <Words W, int R = QUERY_ROWS, int C = COLUMNS>
void multiply(long rows, long lanes, const Left& left, const Right& right, long inner, float* out, long out_stride, bool onto,
              Ahead& ahead) {
    for (long c = 0; c < lanes; c += C * LANES)
        for (long r = 0; r < rows; r += R)
            fit_strip<W, R, C>(rows - r, lanes - c, left.from(r), {right.words + c, right.stride}, inner,
                               out + r * out_stride + c, out_stride, onto, ahead);
}

// 16 x 16 words, transposed.
INLINE void transpose(const U16 (&in)[16], uint32_t* to, long stride) {
#if CABOCHON_AVX512
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = (__m512i)in[i].part[0];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)  // a[i + c]: of rows i .. i + 3, column c of each four
        for (int half = 0; half < 2; ++half) {
            a[i + 2 * half] = _mm512_unpacklo_epi64(b[i + half], b[i + 2 + half]);
            a[i + 2 * half + 1] = _mm512_unpackhi_epi64(b[i + half], b[i + 2 + half]);
        }
    for (int c = 0; c < 4; ++c) {
        const __m512i even[2] = {_mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88)};
        const __m512i odd[2] = {_mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd), _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd)};
        b[c] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
        b[4 + c] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        b[8 + c] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
        b[12 + c] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
    }
    for (int i = 0; i < 16; ++i) store(to + i * stride, b[i]);
#else
    for (int j = 0; j < 16; ++j) {
        uint32_t row[16];
        store(row, in[j]);
        for (int i = 0; i < 16; ++i) to[i * stride + j] = row[i];
    }
#endif
}

// Thirty-two numbers as sixteen words.
INLINE U16 pairs_of(const Bf16* from) { return load<U16>(from); }
INLINE U16 pairs_of(const int8_t* from) {
    U16 r;
#if CABOCHON_AVX512
    r.part[0] = (U16::Part)_mm512_cvtepi8_epi16(load<__m256i>(from));
#elif CABOCHON_AVX2
    EACH(i) r.part[i] = (U16::Part)_mm256_cvtepi8_epi16(load<__m128i>(from + i * LANES));
#else
    int16_t wide[2 * LANES];
    for (int i = 0; i < 2 * LANES; ++i) wide[i] = from[i];
    r = load<U16>(wide);
#endif
    return r;
}

// Sixteen words with a number of `a` in the lower half and one of `b` in the upper.
INLINE U16 side_by_side(const Bf16* a, const Bf16* b) { return get_shorts(a) | get_shorts(b) << 16; }
INLINE U16 side_by_side(const int8_t* a, const int8_t* b) {
    return (as<U16>(get_bytes(a)) & 0xffffu) | as<U16>(get_bytes(b)) << 16;
}

// Thirty-two of both.
template <class E>
INLINE void put_side_by_side(const E* a, const E* b, uint32_t* to) {
#if CABOCHON_AVX512
    static const uint16_t order[2][32] = {{0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                           8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
                                          {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                           24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    const auto low = (__m512i)pairs_of(a).part[0], high = (__m512i)pairs_of(b).part[0];
    for (int half = 0; half < 2; ++half)
        store(to + half * LANES, _mm512_permutex2var_epi16(low, load<__m512i>(order[half]), high));
#else
    for (int half = 0; half < 2; ++half) store(to + half * LANES, side_by_side(a + half * LANES, b + half * LANES));
#endif
}

}  // namespace
