// The two products of attention, over rows of keys and values as they lie on pages.
//
// A score is a sum along the head's width: lane i of a register adds up words i, i + 16, ..., then lanes are added as `sum`
// adds them. So keys are read where they lie, and a score is the same number however many keys and queries are at hand.
// Values are summed over keys; what neighbouring keys have of a column is laid side by side in registers.
//
#pragma once

#include "words.h"

namespace {

enum Words { FLOATS, PAIRS_OF_BF16 };

template <Words W>
struct In {
    typedef float Number;
};
template <>
struct In<PAIRS_OF_BF16> {
    typedef Bf16 Number;
};
template <Words W>
using Number = typename In<W>::Number;

template <class T>
constexpr Words WORDS = PAIRS<T> ? PAIRS_OF_BF16 : FLOATS;
template <Words W>
constexpr long PER_WORD = 4 / sizeof(Number<W>);

constexpr long KEYS = 128;          // of a chunk
constexpr long COLUMN = 2 * LANES;  // numbers of a value that are summed together
#if CABOCHON_AVX512
constexpr int ABREAST = 4, SCORED = 4, MIXED = 8;  // keys and queries of a tile of scores; rows of a tile of values
#elif CABOCHON_AVX2
constexpr int ABREAST = 4, SCORED = 1, MIXED = 2;
#else
constexpr int ABREAST = 2, SCORED = 1, MIXED = 1;
#endif

// Memory that is wanted soon, asked for some lines at a time between products: a CPU that has to wait for its turn to ask
// computes nothing meanwhile, so a block's worth of requests can't be made in one go.
struct Ahead {
    static constexpr long LINE = 64;
    const char *const *row = nullptr, *const *last = nullptr;  // rows to come
    long bytes = 0, burst = 1;                                 // of a row; lines at a time
    const char *at = nullptr, *end = nullptr;

    inline __attribute__((always_inline)) void operator()() {
        for (long i = 0; i < burst; ++i) {
            if (at >= end) {
                if (row == last) return;
                at = *row++, end = at + bytes;
            }
            __builtin_prefetch(at, 0, 2);
            at += LINE;
        }
    }
};

INLINE F16 multiply_words(F16 sums, U16 a, U16 b, bool pairs) {
#if CABOCHON_AVX512 && defined(__AVX512BF16__)
    if (pairs) {
        sums.part[0] = (F16::Part)_mm512_dpbf16_ps((__m512)sums.part[0], (__m512bh)a.part[0], (__m512bh)b.part[0]);
        return sums;
    }
#endif
    (void)pairs;
    return fma(as<F16>(a), as<F16>(b), sums);
}

// e^x for x <= 0, to 3e-7 of its value: 2^n 2^r for the whole number n below, and 2^r by a polynomial that is 1 at 0.
INLINE F16 decaying(F16 x) {
#if CABOCHON_AVX512
    const F16 v = x * 1.44269504f;
    F16 r, p;
    r.part[0] = (F16::Part)_mm512_reduce_ps((__m512)v.part[0], 1);
    p = fma(splat(0.00186713011f), r, splat(0.00901703022f));
    p = fma(p, r, splat(0.0557999132f));
    p = fma(p, r, splat(0.24016445f));
    p = fma(p, r, splat(0.693151312f));
    p = fma(p, r, splat(1.0f));
    p.part[0] = (F16::Part)_mm512_scalef_ps((__m512)p.part[0], (__m512)v.part[0]);
    return p;
#else
    return exponential(x);
#endif
}

#if CABOCHON_AVX512
// Two quarters of `a` and two of `b`.
template <int WAY, class E>
INLINE Lanes<E> quarters(Lanes<E> a, Lanes<E> b) {
    a.part[0] = (typename Lanes<E>::Part)_mm512_shuffle_i32x4((__m512i)a.part[0], (__m512i)b.part[0], WAY);
    return a;
}
// Of each quarter, the lower lanes of `a` and of `b` in turns; the upper ones. (Cheaper than what crosses quarters.)
INLINE F16 unpack_low(F16 a, F16 b) {
    a.part[0] = (F16::Part)_mm512_unpacklo_ps((__m512)a.part[0], (__m512)b.part[0]);
    return a;
}
INLINE F16 unpack_high(F16 a, F16 b) {
    a.part[0] = (F16::Part)_mm512_unpackhi_ps((__m512)a.part[0], (__m512)b.part[0]);
    return a;
}
// The lanes of `b` where MASK has a bit, else those of `a`.
template <int MASK, class E>
INLINE Lanes<E> blend(Lanes<E> a, Lanes<E> b) {
    a.part[0] = (typename Lanes<E>::Part)_mm512_mask_blend_epi32(MASK, (__m512i)a.part[0], (__m512i)b.part[0]);
    return a;
}
// The halves of `a` added up, then those of `b`. (A blend is cheaper than a second shuffle.)
INLINE F16 add_halves(F16 a, F16 b) {
    return blend<0xff00>(a, b) + quarters<0x4e>(a, b);
}
// Of each quarter, lanes 0 and 2 of `a`, then of `b`, and lanes 1 and 3 of `a`, then of `b`, added up.
INLINE F16 add_pairs(F16 a, F16 b) {
    F16 low, high;
    low.part[0] = (F16::Part)_mm512_unpacklo_pd((__m512d)a.part[0], (__m512d)b.part[0]);
    high.part[0] = (F16::Part)_mm512_unpackhi_pd((__m512d)a.part[0], (__m512d)b.part[0]);
    return low + high;
}

// Four keys' scores by R queries, each the sum of a lane over all quarters, to to[query * KEYS + key].
template <int R>
INLINE void put_scores(const F16 (&row)[R], float* to) {
    const F16 low = add_halves(row[0], row[1 % R]), high = add_halves(row[R > 2 ? 2 : 0], row[R > 3 ? 3 : 1 % R]);
    const auto all = (__m512)(quarters<0x88>(low, high) + quarters<0xdd>(low, high)).part[0];
    _mm_storeu_ps(to, _mm512_castps512_ps128(all));
    if constexpr (R > 1) _mm_storeu_ps(to + KEYS, _mm512_extractf32x4_ps(all, 1));
    if constexpr (R > 2) _mm_storeu_ps(to + 2 * KEYS, _mm512_extractf32x4_ps(all, 2));
    if constexpr (R > 3) _mm_storeu_ps(to + 3 * KEYS, _mm512_extractf32x4_ps(all, 3));
}
#endif

// to[j * KEYS + i] = sum(v[i][j])
template <int R>
INLINE void put_sums(const F16 (&v)[ABREAST][R], float* to) {
#if CABOCHON_AVX512
    F16 row[R];
#pragma GCC unroll 8
    for (int j = 0; j < R; ++j)
        row[j] = add_pairs(unpack_low(v[0][j], v[1][j]) + unpack_high(v[0][j], v[1][j]),
                           unpack_low(v[2][j], v[3][j]) + unpack_high(v[2][j], v[3][j]));
    put_scores(row, to);
#else
#pragma GCC unroll 8
    for (int i = 0; i < ABREAST; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < R; ++j) to[j * KEYS + i] = sum(v[i][j]);
#endif
}

// Queries as words along the head's width.
struct Queries {
    const uint32_t* words;
    long stride;

    Queries from(long row) const { return {words + row * stride, stride}; }
};

// Scores of R queries over ABREAST keys, to out[query * KEYS + key].
template <Words W, int R>
void score(const Queries& q, const Number<W>* const* key, long inner, float* out, Ahead& ahead) {
    F16 sums[ABREAST][R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < ABREAST; ++i) sums[i][r] = zero();
    for (long at = 0; at < inner; at += LANES) {
        ahead();
        U16 k[ABREAST];
#pragma GCC unroll 8
        for (int i = 0; i < ABREAST; ++i) k[i] = load<U16>(key[i] + at * PER_WORD<W>);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const U16 left = load<U16>(q.words + r * q.stride + at);
#pragma GCC unroll 8
            for (int i = 0; i < ABREAST; ++i) sums[i][r] = multiply_words(sums[i][r], left, k[i], W == PAIRS_OF_BF16);
        }
    }
    put_sums(sums, out);
}

// The scores of all rows over the keys [first, last), both multiples of ABREAST.
template <Words W, int R = SCORED>
void score_rows(long rows, const Queries& q, const Number<W>* const* key, long first, long last, long inner, float* out,
                Ahead& ahead) {
    if constexpr (R > 1) {
        if (rows < R) return score_rows<W, R - 1>(rows, q, key, first, last, inner, out, ahead);
    }
    for (long r = 0; r + R <= rows; r += R)
        for (long k = first; k < last; k += ABREAST)
            score<W, R>(q.from(r), key + k, inner, out + r * KEYS + k, ahead);
    if constexpr (R > 1) {
        const long done = rows / R * R;
        if (done < rows)
            score_rows<W, R - 1>(rows - done, q.from(done), key, first, last, inner, out + done * KEYS, ahead);
    }
}

// One column of PER_WORD values, side by side in words; `in_order` puts sums of such words where they belong.
template <Words W>
INLINE void side_by_side(const Number<W>* const* value, long column, U16 (&right)[2]) {
    if constexpr (W == FLOATS) {
        right[0] = load<U16>(value[0] + column), right[1] = load<U16>(value[0] + column + LANES);
    }
#if CABOCHON_AVX512
    if constexpr (W == PAIRS_OF_BF16) {
        const auto a = load<__m512i>(value[0] + column), b = load<__m512i>(value[1] + column);
        right[0].part[0] = (U16::Part)_mm512_unpacklo_epi16(a, b), right[1].part[0] = (U16::Part)_mm512_unpackhi_epi16(a, b);
    }
#endif
}

template <Words W>
INLINE void in_order([[maybe_unused]] F16 (&sums)[2]) {
#if CABOCHON_AVX512
    if constexpr (W == PAIRS_OF_BF16) {
        static const int64_t order[2][8] = {{0, 1, 8, 9, 2, 3, 10, 11}, {4, 5, 12, 13, 6, 7, 14, 15}};
        const F16 a = sums[0], b = sums[1];
        for (int i = 0; i < 2; ++i)
            sums[i].part[0] = (F16::Part)_mm512_permutex2var_epi64((__m512i)a.part[0], load<__m512i>(order[i]), (__m512i)b.part[0]);
    }
#endif
}

// R rows of weights [R, KEYS / PER_WORD] over one column of the values [first, last) (in words), to or onto out[row * stride ..].
template <Words W, int R>
void mix(const uint32_t* weights, const Number<W>* const* value, long column, long first, long last, float* out, long stride,
         bool onto, Ahead& ahead) {
    constexpr long words = KEYS / PER_WORD<W>;
    F16 sums[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < 2; ++c) sums[r][c] = zero();
    for (long k = first; k < last; ++k) {
        U16 right[2];
        side_by_side<W>(value + k * PER_WORD<W>, column, right);
        ahead();
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const uint32_t left = weights[r * words + k];
#pragma GCC unroll 8
            for (int c = 0; c < 2; ++c) sums[r][c] = multiply_words(sums[r][c], U16::of(left), right[c], W == PAIRS_OF_BF16);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        in_order<W>(sums[r]);
#pragma GCC unroll 8
        for (int c = 0; c < 2; ++c) {
            float* to = out + r * stride + c * LANES;
            put(to, onto ? get(to) + sums[r][c] : sums[r][c]);
        }
    }
}

// All rows over one column.
template <Words W, int R = MIXED>
void mix_rows(long rows, const uint32_t* weights, const Number<W>* const* value, long column, long first, long last, float* out,
              long stride, bool onto, Ahead& ahead) {
    const auto from = [&](long row) { return weights + row * KEYS / PER_WORD<W>; };
    long r = 0;
    for (; r + R <= rows; r += R) mix<W, R>(from(r), value, column, first, last, out + r * stride, stride, onto, ahead);
    if constexpr (R > 1) {
        if (r < rows) mix_rows<W, R - 1>(rows - r, from(r), value, column, first, last, out + r * stride, stride, onto, ahead);
    }
}

}  // namespace
