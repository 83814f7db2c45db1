// Rows of a table by their numbers: what `reference.embed` makes of them, to the bit.
#pragma once

#include "packing.h"

namespace {

// Sixteen codes of a row that begin at byte `at`, from wherever the layout has them.
INLINE void sixteen_codes(const Lookup& op, long row, long at, uint8_t* to) {
    const auto* codes = static_cast<const uint8_t*>(op.table.codes);
    const long whole = groups_of(op.table.cols) * GROUP;
    if (!op.panels) {
        const long bytes = op.table.format == INT4 ? whole / 2 : op.table.cols;
        memcpy(to, codes + row * bytes + at, least(LANES, bytes - at));
        return;
    }
    const long bytes = op.table.format == INT4 ? whole / 2 : whole;
    const uint8_t* from = codes + row / PANEL * PANEL * bytes + row % PANEL * 4 + at * PANEL;
    for (long i = 0; i < LANES; i += 4) memcpy(to + i, from + i * PANEL, 4);
}

// Times the code's scale, rounded to the type of y, times `op.scale`.
template <class T>
INLINE void put_scaled(const Lookup& op, F16 codes, float scale, T* to, long count) {
    if (count <= 0) return;
    T rounded[LANES];
    put(rounded, codes * scale);
    put(to, get(rounded) * op.scale, count);
}

template <class T>
void lookup_row(const Lookup& op, long row, T* to) {
    const long width = op.table.cols, groups = groups_of(width), panel = row / PANEL, lane = row % PANEL;
    uint8_t codes[LANES] = {};
    const auto* bytes = reinterpret_cast<const int8_t*>(codes);
    if (op.table.format == DENSE) {
        const long size = op.table.dtype == FLOAT32 ? 4 : 2;
        return typed(op.table.dtype, static_cast<const char*>(op.table.codes) + row * width * size, [&](const auto* from) {
            for (long i = 0; i < width; i += LANES) put(to + i, get(from + i, width - i) * op.scale, width - i);
        });
    }
    if (op.table.format == INT8) {
        const float scale = static_cast<const float*>(op.table.scales)[row];
        for (long i = 0; i < width; i += LANES) {
            sixteen_codes(op, row, i, codes);
            if (op.panels)
                for (uint8_t& code : codes) code ^= 0x80;
            put_scaled(op, get(bytes), scale, to + i, width - i);
        }
        return;
    }
    const auto* scales = static_cast<const uint16_t*>(op.table.scales);
    for (long g = 0; g < groups; ++g) {
        sixteen_codes(op, row, g * LANES, codes);
        const I16 both = get_bytes(bytes) & 255;
        const float scale = from_half(scales[op.panels ? (panel * groups + g) * PANEL + lane : row * groups + g]);
        for (long half = 0; half < 2; ++half) {
            const long at = g * GROUP + half * LANES;
            put_scaled(op, to_float(((half ? both >> 4 : both) & 15) + (-8)), scale, to + at, width - at);
        }
    }
}

void lookup(const Lookup& op) {
    typed(op.dtype, op.y, [&](auto* y) {
        over_rows(op.count, op.table.cols, [&](long i) { lookup_row(op, op.ids[i], y + i * op.table.cols); });
    });
}

}  // namespace
