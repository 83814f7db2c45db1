// Twelve rows and more times int8 and int4 weights, by tiles: the bits of `integer.h`. A tile sums a group of 32 exactly,
// and groups are scaled and added in the same order by the same operations.
//
// A group is half as deep as a tile can be, so half of the peak is out of reach. What bounds the rest (cycles per row,
// panel and group on Sapphire Rapids, as documented): the product 1, storing its sums 1, loads 1.33 (of two a cycle: half a
// row of activations, two thirds of a row of weights, the sums, half a scale), vector operations 1 for int8 (convert, add)
// and 1.5 for int4 (scales, too). All go on at a time: 37 and 33 % of the peak, where AVX-512 takes 5 cycles.
#pragma once

#include "integer_rows.h"
#include "tiles.h"

namespace {

#if CABOCHON_TILES

constexpr long TILE_ROWS = 12, TILE_PANELS = 2;  // 24 registers of sums
constexpr long TILE_GROUPS = 24;                 // of both panels, unpacked: half of a first-level cache

// Sums of even groups go to tiles 0 and 1, of odd ones to 2 and 3; rows to 4 and 5, panels to 6 and 7.
constexpr TileShapes SHAPES = {
    1, 0, {}, {64, 64, 64, 64, GROUP, GROUP, 64, 64}, {TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, TILE_ROWS, 8, 8}};

// Groups of two panels as signed bytes: each is a tile of eight rows. Scales are those of int4.
struct Unpacked {
    alignas(64) int8_t codes[TILE_GROUPS][TILE_PANELS][PANEL * GROUP];
    float scales[TILE_GROUPS][TILE_PANELS][PANEL];
};

template <Format F>
void unpack(const Matrix& w, long groups, long from, long to, long panel, long place, Unpacked& unpacked) {
    const auto* codes = static_cast<const uint8_t*>(w.codes) + (panel * groups + from) * group_bytes<F>();
    const auto* scales = static_cast<const char*>(w.scales) + (panel * groups + from) * PANEL * 2;
    for (long g = 0; g < to - from; ++g, codes += group_bytes<F>()) {
        int8_t* row = unpacked.codes[g][place];
        for (int k = 0; k < group_bytes<F>(); k += 64) {
            const __m512i some = load<__m512i>(codes + k);
            if constexpr (F == INT8) {
                store(row + k, _mm512_xor_si512(some, _mm512_set1_epi8(-128)));
            } else {
                const __m512i mask = _mm512_set1_epi8(15), middle = _mm512_set1_epi8(8);
                store(row + k, _mm512_sub_epi8(_mm512_and_si512(some, mask), middle));
                const __m512i high = _mm512_and_si512(_mm512_srli_epi16(some, 4), mask);
                store(row + k + PANEL * GROUP / 2, _mm512_sub_epi8(high, middle));
            }
        }
        if constexpr (F == INT4) put(unpacked.scales[g][place], get_half(scales + g * PANEL * 2));
    }
}

template <int Odd>
INLINE void multiply(const int8_t* rows, long stride, const int8_t (&panels)[TILE_PANELS][PANEL * GROUP]) {
    tile_zero<2 * Odd>();
    tile_zero<2 * Odd + 1>();
    tile_load<4 + Odd>(rows, stride);
    tile_load<6>(panels[0], 64);
    tile_dot<2 * Odd, 4 + Odd, 6>();
    tile_load<7>(panels[1], 64);
    tile_dot<2 * Odd + 1, 4 + Odd, 7>();
}

typedef int32_t TileSums[TILE_PANELS][TILE_ROWS][PANEL];

template <int Odd>
INLINE void keep(TileSums& sums) {
    tile_store<2 * Odd>(sums[0], 64);
    tile_store<2 * Odd + 1>(sums[1], 64);
}

// value += sums, scaled: what `tile` does after `add_group`.
template <Format F>
INLINE void add_scaled(F16 (&value)[TILE_ROWS][TILE_PANELS], const TileSums& sums, const float* steps, long stride,
                       const float (&scales)[TILE_PANELS][PANEL]) {
    asm("" : "+r"(stride));  // unknown anew, or GCC prepares twelve addresses and keeps them in memory
#pragma GCC unroll 12
    for (int r = 0; r < TILE_ROWS; ++r)
        for (int c = 0; c < TILE_PANELS; ++c) {
            const F16 step = splat(steps[r * stride]);
            value[r][c] = fma(to_float(load<I16>(sums[c][r])), F == INT4 ? step * get(scales[c]) : step, value[r][c]);
        }
}

// Twelve rows from `row` times the groups [from, to) of two panels; `out` is added to unless from == 0. While a group is
// multiplied, the sums of the one before are stored and those before them are added: none waits for another.
template <Format F>
void run_tiles(const Operand& x, long row, long from, long to, const Unpacked& w, const float* scales, long panels, float* out) {
    const int8_t* codes = x.codes + (row * x.groups + from) * GROUP;
    const float* steps = x.scales + row * x.groups + from;
    const long groups = to - from, stride = x.groups;
    alignas(64) TileSums sums[2];
    F16 value[TILE_ROWS][TILE_PANELS];
#pragma GCC unroll 12
    for (int r = 0; r < TILE_ROWS; ++r)
        for (int c = 0; c < TILE_PANELS; ++c) value[r][c] = from && c < panels ? get(out + r * BLOCK + c * PANEL) : zero();
    for (long g = 0; g < groups + 2; g += 2) {
        if (g && g <= groups) keep<1>(sums[1]);
        if (g < groups) multiply<0>(codes + g * GROUP, stride * GROUP, w.codes[g]);
        if (g) add_scaled<F>(value, sums[0], steps + g - 2, stride, w.scales[g - 2]);
        if (g < groups) keep<0>(sums[0]);
        if (g + 1 < groups) multiply<1>(codes + (g + 1) * GROUP, stride * GROUP, w.codes[g + 1]);
        if (g && g <= groups) add_scaled<F>(value, sums[1], steps + g - 1, stride, w.scales[g - 1]);
    }
#pragma GCC unroll 12
    for (int r = 0; r < TILE_ROWS; ++r)
        for (int c = 0; c < TILE_PANELS; ++c)
            if (c < panels) put(out + r * BLOCK + c * PANEL, scales ? value[r][c] * get(scales + c * PANEL) : value[r][c]);
}

// Like `integer_block`, of twelve rows or more. `out` has room for rows in whole twelves: the last twelve may overlap
// the ones before, and come to lie behind them first.
template <Format F>
void tiled_block(const Operand& x, long first, long last, const Matrix& w, long output, long outputs, float* out) {
    const long count = last - first, panel = output / PANEL, panels = (outputs + PANEL - 1) / PANEL;
    const long cuts = (x.groups + TILE_GROUPS - 1) / TILE_GROUPS, depth = (x.groups + cuts - 1) / cuts;
    Unpacked unpacked;
    tile_configure(SHAPES);
    for (long from = 0; from < x.groups; from += depth) {
        const long to = least(from + depth, x.groups);
        for (long c = 0; c < panels; c += TILE_PANELS) {
            const long some = least(TILE_PANELS, panels - c);
            for (long p = 0; p < TILE_PANELS; ++p)  // a single panel is multiplied twice and written once
                unpack<F>(w, x.groups, from, to, panel + c + least(p, some - 1), p, unpacked);
            const float* scales = F == INT8 && to == x.groups ? static_cast<const float*>(w.scales) + (panel + c) * PANEL : nullptr;
            for (long row = 0; row < count; row += TILE_ROWS)
                run_tiles<F>(x, least(first + row, last - TILE_ROWS), from, to, unpacked, scales, some,
                             out + row * BLOCK + c * PANEL);
        }
    }
    tile_release();
    if (const long rest = count % TILE_ROWS)
        memmove(out + (count - rest) * BLOCK, out + (count - rest + TILE_ROWS - rest) * BLOCK, rest * BLOCK * sizeof(float));
}

#endif

// out [last - first, 64]: the rows [first, last) of x times `outputs` (64 at most) of `w` from `output` on.
template <Format F>
void integer_product(const Operand& x, long first, long last, const Matrix& w, long output, long outputs, float* out) {
#if CABOCHON_TILES
    if (last - first >= TILE_ROWS) return tiled_block<F>(x, first, last, w, output, outputs, out);
#elif CABOCHON_AVX2
    if (last - first >= OPEN_FROM<F>) return opened_block<F>(x, first, last, w, output, outputs, out);
#endif
    integer_block<F>(x, first, last, w, output, outputs, out);
}

}  // namespace
