// Tiles of int8 and int4 weights times rounded activations.
//
// Sums within a group of 32 are exact integers and groups are added in order by fused multiply-add, so a row's result
// depends neither on the tile it was in nor on the instruction set (without FMA: but for rounding).
//
// Zen 4 begins every kind of product in the same two places, so one of 512 bits a cycle: a row, panel and group takes eight
// products of bytes and an FMA, for int4 a product of scales, too. Of these 9 and 10 cycles, eight rows take 9.4 and 10.3.
#pragma once

#include "operand.h"

namespace {

constexpr long PANEL = 16;
constexpr long BLOCK = 64;         // outputs of a work item: four panels
constexpr long GROUPS_AT_ONCE = 64;  // of a panel while it should stay in L2

template <Format F>
constexpr long group_bytes() {
    return F == INT8 ? PANEL * GROUP : PANEL * GROUP / 2;
}

// How few rows ask memory for a weight: so many bytes before they come to them, into cache `level` (3: the first, 2: the
// second, 0: the first for a moment). What was timed: the second is the better place, since the first can wait for few
// lines at once and then holds computing up; but a row of nibbles, or three of bytes, lose more by fetching from it. A
// row of nibbles also wants its own numbers to stay in the first. A single row of bytes computes next to nothing: the
// CPU runs ahead by itself, and a far request would be in its way.
constexpr long SOON = 2048, AHEAD = 6144;

template <Format F, int R>
INLINE void ask_for(const uint8_t* group, const uint8_t* scales) {
    constexpr long ahead = R > 1 ? AHEAD : F == INT8 ? SOON : 4096;
    constexpr int level = R > 1 ? (F == INT8 && R <= 3 ? 3 : 2) : F == INT8 ? 2 : 0;
    for (int line = 0; line < group_bytes<F>(); line += 64) __builtin_prefetch(group + ahead + line, 0, level);
    if constexpr (F == INT4 && R == 1) __builtin_prefetch(scales + ahead / 8, 0, level);
}

INLINE int32_t four(const int8_t* from) {
    int32_t v;
    memcpy(&v, from, 4);
    return v;
}

// total[r][c] += weights of one group of panel c (w[c]) . activations of row r (a[r]), both 32 long.
#if CABOCHON_AVX512
INLINE void add_products(I16& total, __m512i codes, __m512i x) {
    total.part[0] = (I16::Part)_mm512_dpbusd_epi32((__m512i)total.part[0], codes, x);
}

template <Format F, int R, int C>
INLINE void add_group(I16 (&total)[R][C], const int8_t* const (&a)[R], const uint8_t* const (&w)[C]) {
    if constexpr (F == INT8) {
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) {
            __m512i codes[C];
            for (int c = 0; c < C; ++c) codes[c] = load<__m512i>(w[c] + k * 64);
            for (int r = 0; r < R; ++r) {
                const __m512i x = _mm512_set1_epi32(four(a[r] + k * 4));
                for (int c = 0; c < C; ++c) add_products(total[r][c], codes[c], x);
            }
        }
    } else {
        const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            __m512i lows[C], highs[C];
            for (int c = 0; c < C; ++c) {
                const __m512i both = load<__m512i>(w[c] + k * 64);
                lows[c] = _mm512_and_si512(both, mask);
                highs[c] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
            }
            for (int r = 0; r < R; ++r) {
                const __m512i x = _mm512_set1_epi32(four(a[r] + k * 4)), y = _mm512_set1_epi32(four(a[r] + 16 + k * 4));
                for (int c = 0; c < C; ++c) {
                    add_products(total[r][c], lows[c], x);
                    add_products(total[r][c], highs[c], y);
                }
            }
        }
    }
}
#elif CABOCHON_AVX2
template <Format F, int R, int C>
INLINE void add_group(I16 (&total)[R][C], const int8_t* const (&a)[R], const uint8_t* const (&w)[C]) {
    const __m256i ones = _mm256_set1_epi16(1), mask = _mm256_set1_epi8(15);
    for (int c = 0; c < C; ++c) {
        __m256i sums[R][2];
        for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
        for (int half = 0; half < 2; ++half) {
            if constexpr (F == INT8) {
#pragma GCC unroll 8
                for (int k = 0; k < 8; ++k) {
                    const __m256i codes = _mm256_xor_si256(load<__m256i>(w[c] + k * 64 + half * 32), _mm256_set1_epi8(-128));
                    const __m256i magnitude = _mm256_abs_epi8(codes);
                    for (int r = 0; r < R; ++r) {  // 2 * 127 * 127 fits in 16 bits
                        const __m256i x = _mm256_sign_epi8(_mm256_set1_epi32(four(a[r] + k * 4)), codes);
                        const __m256i pairs = _mm256_maddubs_epi16(magnitude, x);
                        sums[r][half] = _mm256_add_epi32(sums[r][half], _mm256_madd_epi16(pairs, ones));
                    }
                }
            } else {
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) {  // 16 * 15 * 127 fits in 16 bits: widen once per group
                    const __m256i both = load<__m256i>(w[c] + k * 64 + half * 32);
                    const __m256i low = _mm256_and_si256(both, mask);
                    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
                    for (int r = 0; r < R; ++r) {
                        const __m256i x = _mm256_maddubs_epi16(low, _mm256_set1_epi32(four(a[r] + k * 4)));
                        const __m256i y = _mm256_maddubs_epi16(high, _mm256_set1_epi32(four(a[r] + 16 + k * 4)));
                        sums[r][half] = _mm256_add_epi16(sums[r][half], _mm256_add_epi16(x, y));
                    }
                }
                for (int r = 0; r < R; ++r) sums[r][half] = _mm256_madd_epi16(sums[r][half], ones);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int half = 0; half < 2; ++half) total[r][c].part[half] += (I16::Part)sums[r][half];
    }
}
#else
template <Format F, int R, int C>
INLINE void add_group(I16 (&total)[R][C], const int8_t* const (&a)[R], const uint8_t* const (&w)[C]) {
    for (int c = 0; c < C; ++c)
        for (int r = 0; r < R; ++r) {
            int32_t lanes[PANEL] = {};
            for (int k = 0; k < (F == INT8 ? 8 : 4); ++k)
                for (int lane = 0; lane < PANEL; ++lane)
                    for (int i = 0; i < 4; ++i) {
                        const int code = w[c][k * 64 + lane * 4 + i];
                        if constexpr (F == INT8)
                            lanes[lane] += code * a[r][k * 4 + i];
                        else
                            lanes[lane] += (code & 15) * a[r][k * 4 + i] + (code >> 4) * a[r][16 + k * 4 + i];
                    }
            total[r][c] = total[r][c] + load<I16>(lanes);
        }
}
#endif

// out[r][c * 16 ..] for R rows and C panels over the groups [from, to): begun when from is 0, else continued.
template <Format F, int R, int C>
void tile(const Operand& x, long row, const Matrix& w, long panel, long from, long to, float* out) {
    const long groups = x.groups;
    F16 value[R][C];
#pragma GCC unroll 8  // like all loops over sums below, or GCC would also write them to memory in every group
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) value[r][c] = from ? get(out + r * BLOCK + c * PANEL) : zero();
    const auto* codes = static_cast<const uint8_t*>(w.codes);
    const auto* scales = static_cast<const uint8_t*>(w.scales);
    for (long g = from; g < to; ++g) {
        const int8_t* a[R];
        const uint8_t* b[C];
        I16 total[R][C];
        for (int c = 0; c < C; ++c) {
            b[c] = codes + ((panel + c) * groups + g) * group_bytes<F>();
            if constexpr (C == 1) ask_for<F, R>(b[c], scales + ((panel + c) * groups + g) * PANEL * 2);  // decode: the weight comes from memory
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            a[r] = x.codes + ((row + r) * groups + g) * GROUP;
            const I16 begin = splat(x.begins[(row + r) * groups + g]);
            for (int c = 0; c < C; ++c) total[r][c] = begin;
        }
        add_group<F, R, C>(total, a, b);
        for (int c = 0; c < C; ++c) {
            F16 scale;
            if constexpr (F == INT4) scale = get_half(scales + ((panel + c) * groups + g) * PANEL * 2);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const F16 step = splat(x.scales[(row + r) * groups + g]);
                value[r][c] = fma(to_float(total[r][c]), F == INT4 ? step * scale : step, value[r][c]);
            }
        }
    }
    for (int c = 0; c < C; ++c) {
        F16 scale = splat(1.0f);
        if constexpr (F == INT8) {
            if (to == groups) scale = get(reinterpret_cast<const float*>(scales) + (panel + c) * PANEL);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) put(out + r * BLOCK + c * PANEL, F == INT8 ? value[r][c] * scale : value[r][c]);
    }
}

#if CABOCHON_AVX512
constexpr int TALL = 6, TALL_PANELS = 2, FLAT = 8;
#elif CABOCHON_AVX2
constexpr int TALL = 2, TALL_PANELS = 1, FLAT = 2;
#else
constexpr int TALL = 1, TALL_PANELS = 1, FLAT = 1;
#endif
constexpr long FEW_ROWS = 48;  // rows that go in flat tiles, of one panel: those read memory in one run through it

// At most R rows and C panels: the template instance that fits exactly.
template <Format F, int R, int C>
void fit(long rows, long panels, const Operand& x, long row, const Matrix& w, long panel, long from, long to, float* out) {
    if constexpr (R > 1) {
        if (rows < R) return fit<F, R - 1, C>(rows, panels, x, row, w, panel, from, to, out);
    }
    if constexpr (C > 1) {
        if (panels < C) return fit<F, R, C - 1>(rows, panels, x, row, w, panel, from, to, out);
    }
    tile<F, R, C>(x, row, w, panel, from, to, out);
}

// out [last - first, 64]: the rows [first, last) of x times `outputs` (64 at most) of `w` that begin at `output`.
template <Format F>
void integer_block(const Operand& x, long first, long last, const Matrix& w, long output, long outputs, float* out) {
    const long panel = output / PANEL, panels = (outputs + PANEL - 1) / PANEL;
    const bool few = last - first <= FEW_ROWS;
    const long at_once = few ? x.groups : GROUPS_AT_ONCE;
    for (long from = 0; from < x.groups; from += at_once) {
        const long to = least(from + at_once, x.groups);
        for (long c = 0; c < panels; c += few ? 1 : TALL_PANELS)
            for (long row = first; row < last; row += few ? FLAT : TALL) {
                float* to_tile = out + (row - first) * BLOCK + c * PANEL;
                if (few)
                    fit<F, FLAT, 1>(last - row, 1, x, row, w, panel + c, from, to, to_tile);
                else
                    fit<F, TALL, TALL_PANELS>(last - row, panels - c, x, row, w, panel + c, from, to, to_tile);
            }
    }
}

}  // namespace
