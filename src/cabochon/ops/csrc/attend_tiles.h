// The two products of attention, over rows of keys and values as they lie on pages.
//
// A score is a sum along the head's width: lane i of a register adds up words i, i + 16, ..., then lanes are added as `sum`
// adds them. So keys are read where they lie, and a score is the same number however many keys and queries are at hand.
// Values are summed over keys; what neighbouring keys have of a column is laid side by side in registers.
//
// Codes of 8 bits are multiplied in integers, exact in any order, by numbers of 16 bits that are cut into two bytes.
#pragma once

#include "words.h"

namespace {

enum Words { FLOATS, PAIRS_OF_BF16, QUADS_OF_BYTES };

template <Words W>
struct In {
    typedef float Number;
    typedef F16 Sums;
};
template <>
struct In<PAIRS_OF_BF16> {
    typedef Bf16 Number;
    typedef F16 Sums;
};
template <>
struct In<QUADS_OF_BYTES> {
    typedef int8_t Number;
    typedef I16 Sums;
};
template <Words W>
using Number = typename In<W>::Number;

template <class T>
constexpr Words WORDS = PAIRS<T> ? PAIRS_OF_BF16 : FLOATS;
template <Words W>
constexpr long PER_WORD = 4 / sizeof(Number<W>);
template <Words W>
constexpr int PLANES = W == QUADS_OF_BYTES ? 2 : 1;  // upper and lower bytes of what codes are multiplied by

constexpr long KEYS = 128;          // of a chunk
constexpr long COLUMN = 2 * LANES;  // numbers of a value that are summed together
#if CABOCHON_AVX512
constexpr bool BYTES = true;  // are there products of bytes?
constexpr int ABREAST = 4, SCORED = 4, MIXED = 8;  // keys and queries of a tile of scores; planes of a tile of values
#elif CABOCHON_AVX2
constexpr bool BYTES = false;
constexpr int ABREAST = 4, SCORED = 1, MIXED = 2;
#else
constexpr bool BYTES = false;
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

// Bytes without a sign times bytes with one.
INLINE I16 multiply_bytes(I16 sums, U16 natural, U16 integer) {
#if CABOCHON_AVX512
    sums.part[0] = (I16::Part)_mm512_dpbusd_epi32((__m512i)sums.part[0], (__m512i)natural.part[0], (__m512i)integer.part[0]);
#endif
    (void)natural, (void)integer;
    return sums;
}

INLINE F16 as_floats(F16 v) { return v; }
INLINE F16 as_floats(I16 v) { return to_float(v); }

#if CABOCHON_AVX512
// Two quarters of `a` and two of `b`; in each quarter, two lanes of `a` and two of `b`.
template <int WAY, class E>
INLINE Lanes<E> quarters(Lanes<E> a, Lanes<E> b) {
    a.part[0] = (typename Lanes<E>::Part)_mm512_shuffle_i32x4((__m512i)a.part[0], (__m512i)b.part[0], WAY);
    return a;
}
template <int WAY, class E>
INLINE Lanes<E> in_quarters(Lanes<E> a, Lanes<E> b) {
    a.part[0] = (typename Lanes<E>::Part)_mm512_shuffle_ps((__m512)a.part[0], (__m512)b.part[0], WAY);
    return a;
}
// The lanes of `b` where MASK has a bit, else those of `a`.
template <int MASK, class E>
INLINE Lanes<E> blend(Lanes<E> a, Lanes<E> b) {
    a.part[0] = (typename Lanes<E>::Part)_mm512_mask_blend_epi32(MASK, (__m512i)a.part[0], (__m512i)b.part[0]);
    return a;
}
// The halves of `a` added up, then those of `b`; of each quarter, the same. (A blend is cheaper than a second shuffle.)
template <class S>
INLINE S add_halves(S a, S b) {
    return blend<0xff00>(a, b) + quarters<0x4e>(a, b);
}
template <class S>
INLINE S add_halves_of_quarters(S a, S b) {
    return blend<0xcccc>(a, b) + in_quarters<0x4e>(a, b);
}
#endif

// to[j * KEYS + i] = sum(v[i][j])
template <int R, class S>
INLINE void put_sums(const S (&v)[ABREAST][R], float* to) {
#if CABOCHON_AVX512
    S by_key[ABREAST];  // a quarter of each v[i][0] .. v[i][3]; where there are fewer, of the first once more
#pragma GCC unroll 8
    for (int i = 0; i < ABREAST; ++i) {
        const S a = v[i][0], b = v[i][1 % R], c = v[i][R > 2 ? 2 : 0], d = v[i][R > 3 ? 3 : 1 % R];
        const S ab = add_halves(a, b), cd = add_halves(c, d);
        by_key[i] = quarters<0x88>(ab, cd) + quarters<0xdd>(ab, cd);
    }
    const S low = add_halves_of_quarters(by_key[0], by_key[1]), high = add_halves_of_quarters(by_key[2], by_key[3]);
    const auto all = (__m512)as_floats(in_quarters<0x88>(low, high) + in_quarters<0xdd>(low, high)).part[0];
    _mm_storeu_ps(to, _mm512_castps512_ps128(all));
    if constexpr (R > 1) _mm_storeu_ps(to + KEYS, _mm512_extractf32x4_ps(all, 1));
    if constexpr (R > 2) _mm_storeu_ps(to + 2 * KEYS, _mm512_extractf32x4_ps(all, 2));
    if constexpr (R > 3) _mm_storeu_ps(to + 3 * KEYS, _mm512_extractf32x4_ps(all, 3));
#else
#pragma GCC unroll 8
    for (int i = 0; i < ABREAST; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < R; ++j) to[j * KEYS + i] = sum(as_floats(v[i][j]));
#endif
}

// Queries as words along the head's width. What codes are multiplied by comes as upper bytes, then sixteen words that make up
// for codes being taken 128 larger than they are, then lower bytes (both with a sign).
struct Queries {
    const uint32_t* words;
    long stride;
};

// sums[key][query] += key . query, a plane of it.
template <Words W, int R, class S>
INLINE void add_products(const uint32_t* words, long stride, const Number<W>* const* key, long inner, S (&sums)[ABREAST][R], Ahead& ahead) {
    for (long at = 0; at < inner; at += LANES) {
        ahead();
        U16 k[ABREAST];
#pragma GCC unroll 8
        for (int i = 0; i < ABREAST; ++i) {
            k[i] = load<U16>(key[i] + at * PER_WORD<W>);
            if constexpr (W == QUADS_OF_BYTES) k[i] = k[i] ^ 0x80808080u;
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const U16 left = load<U16>(words + r * stride + at);
#pragma GCC unroll 8
            for (int i = 0; i < ABREAST; ++i) {
                if constexpr (W == QUADS_OF_BYTES)
                    sums[i][r] = multiply_bytes(sums[i][r], k[i], left);
                else
                    sums[i][r] = multiply_words(sums[i][r], left, k[i], W == PAIRS_OF_BF16);
            }
        }
    }
}

// Scores of R queries over ABREAST keys, to out[query * KEYS + key].
template <Words W, int R>
void score(const Queries& q, const Number<W>* const* key, long inner, float* out, Ahead& ahead) {
    typename In<W>::Sums sums[ABREAST][R];
#pragma GCC unroll 8
    for (int i = 0; i < ABREAST; ++i)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[i][r] = {};
    add_products<W, R>(q.words, q.stride, key, inner, sums, ahead);
    if constexpr (W == QUADS_OF_BYTES) {
        const uint32_t* lower = q.words + inner;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const I16 begin = load<I16>(lower + r * q.stride);
#pragma GCC unroll 8
            for (int i = 0; i < ABREAST; ++i) sums[i][r] = (sums[i][r] << 8) + begin;
        }
        add_products<W, R>(lower + LANES, q.stride, key, inner, sums, ahead);
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
            score<W, R>({q.words + r * q.stride, q.stride}, key + k, inner, out + r * KEYS + k, ahead);
    if constexpr (R > 1) {
        const long done = rows / R * R;
        if (done < rows)
            score_rows<W, R - 1>(rows - done, {q.words + done * q.stride, q.stride}, key, first, last, inner, out + done * KEYS, ahead);
    }
}

// Weights of a chunk's values; an integer among those of a row is worth `unit`.
struct Weights {
    const uint32_t* words;  // [rows, PLANES, KEYS / PER_WORD]
    const float* unit;
};

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
    if constexpr (W == QUADS_OF_BYTES) {
        const auto a = load<__m256i>(value[0] + column), b = load<__m256i>(value[1] + column);
        const auto c = load<__m256i>(value[2] + column), d = load<__m256i>(value[3] + column);
        const __m256i ab[] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
        const __m256i cd[] = {_mm256_unpacklo_epi8(c, d), _mm256_unpackhi_epi8(c, d)};
        for (int i = 0; i < 2; ++i)
            right[i].part[0] = (U16::Part)_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_unpacklo_epi16(ab[i], cd[i])),
                                                             _mm256_unpackhi_epi16(ab[i], cd[i]), 1);
    }
#endif
}

template <Words W, class S>
INLINE void in_order([[maybe_unused]] S (&sums)[2]) {
#if CABOCHON_AVX512
    const S a = sums[0], b = sums[1];
    if constexpr (W == PAIRS_OF_BF16) {
        static const int64_t order[2][8] = {{0, 1, 8, 9, 2, 3, 10, 11}, {4, 5, 12, 13, 6, 7, 14, 15}};
        for (int i = 0; i < 2; ++i)
            sums[i].part[0] = (typename S::Part)_mm512_permutex2var_epi64((__m512i)a.part[0], load<__m512i>(order[i]), (__m512i)b.part[0]);
    }
    if constexpr (W == QUADS_OF_BYTES) sums[0] = quarters<0x88>(a, b), sums[1] = quarters<0xdd>(a, b);
#endif
}

// R rows of weights over one column of the values [first, last) (in words), to or onto out[row * stride ..].
template <Words W, int R>
void mix(const Weights& w, const Number<W>* const* value, long column, long first, long last, float* out, long stride, bool onto,
         Ahead& ahead) {
    constexpr long words = KEYS / PER_WORD<W>;
    typename In<W>::Sums sums[R][2], lower[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < 2; ++c) sums[r][c] = lower[r][c] = {};
    for (long k = first; k < last; ++k) {
        U16 right[2];
        side_by_side<W>(value + k * PER_WORD<W>, column, right);
        ahead();
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const uint32_t* left = w.words + r * PLANES<W> * words + k;
#pragma GCC unroll 8
            for (int c = 0; c < 2; ++c) {
                if constexpr (W == QUADS_OF_BYTES) {
                    sums[r][c] = multiply_bytes(sums[r][c], U16::of(left[0]), right[c]);
                    lower[r][c] = multiply_bytes(lower[r][c], U16::of(left[words]), right[c]);
                } else {
                    sums[r][c] = multiply_words(sums[r][c], U16::of(left[0]), right[c], W == PAIRS_OF_BF16);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        if constexpr (W == QUADS_OF_BYTES)
#pragma GCC unroll 8
            for (int c = 0; c < 2; ++c) sums[r][c] = (sums[r][c] << 8) + lower[r][c];
        in_order<W>(sums[r]);
#pragma GCC unroll 8
        for (int c = 0; c < 2; ++c) {
            float* to = out + r * stride + c * LANES;
            F16 sum = as_floats(sums[r][c]);
            if constexpr (W == QUADS_OF_BYTES) sum = sum * w.unit[r];
            put(to, onto ? get(to) + sum : sum);
        }
    }
}

// All rows over one column.
template <Words W, int R = MIXED / PLANES<W>>
void mix_rows(long rows, const Weights& w, const Number<W>* const* value, long column, long first, long last, float* out,
              long stride, bool onto, Ahead& ahead) {
    const auto from = [&](long row) { return Weights{w.words + row * PLANES<W> * KEYS / PER_WORD<W>, w.unit + row}; };
    long r = 0;
    for (; r + R <= rows; r += R) mix<W, R>(from(r), value, column, first, last, out + r * stride, stride, onto, ahead);
    if constexpr (R > 1) {
        if (r < rows) mix_rows<W, R - 1>(rows - r, from(r), value, column, first, last, out + r * stride, stride, onto, ahead);
    }
}

}  // namespace
