// Some rows and more times int8 and int4 weights on AVX2: the bits of `integer.h`. A panel's codes are unpacked once for
// all rows, into the first-level cache, so that a tile of rows does little but multiply and add.
//
// Operations per row, panel and group: int4 takes 16 products of bytes, 14 additions (all of a group fit in 16 bits) and 10
// to widen and scale the sums, six of them products. Zen 4 begins four a cycle, products in two places only, where additions
// get in their way: 11 cycles at best, 13 by hand, 14 here. A pair of int8 products fills 16 bits, so codes and rows are widened: 32
// products, 30 additions and 4, which takes 23.
#pragma once

#include "integer.h"

namespace {

#if CABOCHON_AVX2

constexpr int ROWS = 4, HALVES = 2;  // of a tile: eight registers of sums, two of codes, and some to spare

// A group's numbers, four in a word as bytes or two as shorts; words of a row lie across a register, so do a panel half's.
template <Format F>
constexpr int GROUP_WORDS = F == INT8 ? 16 : 8;
template <Format F>
constexpr long OPEN_GROUPS = F == INT8 ? 16 : 24;  // of a panel: half of a first-level cache
template <Format F>
constexpr long OPEN_FROM = F == INT8 ? 6 : 3;  // rows that are worth it

template <Format F>
struct OpenPanel {
    __m256i codes[OPEN_GROUPS<F>][GROUP_WORDS<F>][HALVES];
    F16 scales[OPEN_GROUPS<F>];  // int4
};

// Bytes with a sign as shorts, the first and third of each word, then the others.
INLINE void widen_bytes(__m256i bytes, __m256i& even, __m256i& odd) {
    even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
    odd = _mm256_srai_epi16(bytes, 8);
}

template <Format F>
void open(const Matrix& w, long panel, long groups, long from, long to, OpenPanel<F>& opened) {
    const auto* codes = static_cast<const uint8_t*>(w.codes) + (panel * groups + from) * group_bytes<F>();
    const auto* scales = static_cast<const char*>(w.scales) + (panel * groups + from) * PANEL * 2;
    const __m256i mask = _mm256_set1_epi8(15);
    for (long g = 0; g < to - from; ++g) {
        auto& words = opened.codes[g];
        for (int k = 0; k < group_bytes<F>() / 64; ++k)
            for (int half = 0; half < HALVES; ++half, codes += 32) {
                const __m256i some = load<__m256i>(codes);
                __builtin_prefetch(codes + AHEAD, 0, 2);
                if constexpr (F == INT8) {
                    widen_bytes(_mm256_xor_si256(some, _mm256_set1_epi8(-128)), words[k][half], words[k + 8][half]);
                } else {
                    words[k][half] = _mm256_and_si256(some, mask);
                    words[k + 4][half] = _mm256_and_si256(_mm256_srli_epi16(some, 4), mask);
                }
            }
        if constexpr (F == INT4) opened.scales[g] = get_half(scales + g * PANEL * 2);
    }
}

// R rows from `row` on times the groups [from, to) of a panel, to (if from is 0) or onto `out`, where sums stay: there are
// no registers for them.
template <Format F, int R>
void run_rows(const Operand& x, long row, long from, long to, const OpenPanel<F>& w, float* out) {
    const long groups = x.groups, stride = F == INT8 ? 2 * GROUP : groups * GROUP;
    const int8_t* codes = x.codes + (row * groups + from) * GROUP;
    const float* steps = x.scales + row * groups + from;
    const int32_t* begins = x.begins + row * groups + from;
    alignas(32) int8_t wide[F == INT8 ? OPEN_GROUPS<F> : 1][R][2 * GROUP];
    if constexpr (F == INT8) {
        for (long g = 0; g < to - from; ++g)
            for (int r = 0; r < R; ++r) {
                __m256i even, odd;
                widen_bytes(load<__m256i>(codes + (r * groups + g) * GROUP), even, odd);
                store(wide[g][r], even);
                store(wide[g][r] + GROUP, odd);
            }
        codes = wide[0][0];
    }
    if (!from)
        for (int r = 0; r < R; ++r) put(out + r * BLOCK, zero());
    const __m256i ones = _mm256_set1_epi16(1);
    for (long g = 0; g < to - from; ++g, codes += F == INT8 ? R * stride : GROUP, ++steps, ++begins) {
        asm("" ::: "memory");  // or GCC would keep what is in `out` twice
        __m256i total[R][HALVES];
#pragma GCC unroll 16
        for (int k = 0; k < GROUP_WORDS<F>; ++k)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const __m256i word = _mm256_set1_epi32(four(codes + r * stride + k * 4));
#pragma GCC unroll 2
                for (int half = 0; half < HALVES; ++half) {
                    __m256i& sum = total[r][half];
                    if constexpr (F == INT8) {
                        const __m256i products = _mm256_madd_epi16(w.codes[g][k][half], word);
                        sum = k ? _mm256_add_epi32(sum, products) : products;
                    } else {  // 16 * 15 * 127 fits in 16 bits
                        const __m256i products = _mm256_maddubs_epi16(w.codes[g][k][half], word);
                        sum = k ? _mm256_add_epi16(sum, products) : products;
                    }
                    asm("" : "+x"(sum));  // or GCC would add in pairs, for which there are no registers
                }
            }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            float* to = out + r * BLOCK;
            const F16 step = splat(steps[r * groups]);
            const __m256i begin = _mm256_set1_epi32(begins[r * groups]);
            I16 whole;
            for (int half = 0; half < HALVES; ++half) {
                const __m256i sum = total[r][half];
                whole.part[half] = (I16::Part)(F == INT8 ? sum : _mm256_add_epi32(begin, _mm256_madd_epi16(sum, ones)));
            }
            put(to, fma(to_float(whole), F == INT4 ? step * w.scales[g] : step, get(to)));
        }
    }
}

template <Format F, int R>
void fit_rows(long rows, const Operand& x, long row, long from, long to, const OpenPanel<F>& w, float* out) {
    if constexpr (R > 1) {
        if (rows < R) return fit_rows<F, R - 1>(rows, x, row, from, to, w, out);
    }
    run_rows<F, R>(x, row, from, to, w, out);
}

// Like `integer_block`.
template <Format F>
void opened_block(const Operand& x, long first, long last, const Matrix& w, long output, long outputs, float* out) {
    const long panel = output / PANEL, panels = (outputs + PANEL - 1) / PANEL;
    const long cuts = (x.groups + OPEN_GROUPS<F> - 1) / OPEN_GROUPS<F>, depth = (x.groups + cuts - 1) / cuts;
    OpenPanel<F> opened;
    for (long from = 0; from < x.groups; from += depth)
        for (long c = 0; c < panels; ++c) {
            const long to = least(from + depth, x.groups);
            open<F>(w, panel + c, x.groups, from, to, opened);
            for (long row = first; row < last; row += ROWS)
                fit_rows<F, ROWS>(last - row, x, row, from, to, opened, out + (row - first) * BLOCK + c * PANEL);
        }
    if constexpr (F == INT8)
        for (long c = 0; c < panels; ++c) {
            const F16 scale = get(static_cast<const float*>(w.scales) + (panel + c) * PANEL);
            for (long row = 0; row < last - first; ++row) {
                float* to = out + row * BLOCK + c * PANEL;
                put(to, get(to) * scale);
            }
        }
}

#endif

}  // namespace
