// Weights into codes: `quant.quantize` and `quant.pack` define what comes out, to the bit.
#pragma once

#include "rows.h"

namespace {

// Where the codes of a matrix go: row after row, or in panels, where four bytes of each of sixteen rows lie side by side.
struct Codes {
    uint8_t* data;
    long bytes;  // of a row; in panels filled up to whole groups
    bool panels;
    uint32_t flip;  // int8 panels hold codes plus 128

    void put(long row, long at, const uint8_t* from, long count) const {
        if (!panels) {
            memcpy(data + row * bytes + at, from, least(count, bytes - at));
            return;
        }
        uint8_t* to = data + row / PANEL * PANEL * bytes + row % PANEL * 4 + at * PANEL;
        for (long i = 0; i < count; i += 4) {
            uint32_t bits;
            memcpy(&bits, from + i, 4);
            bits ^= flip;
            memcpy(to + i * PANEL, &bits, 4);
        }
    }
};

INLINE long groups_of(long width) { return (width + GROUP - 1) / GROUP; }

Codes codes_of(void* data, Format format, bool panels, long width) {
    const long whole = groups_of(width) * GROUP;
    if (format == INT4) return {static_cast<uint8_t*>(data), whole / 2, panels, 0};
    return {static_cast<uint8_t*>(data), panels ? whole : width, panels, 0x80808080u};
}

#if !CABOCHON_AVX512 && !CABOCHON_AVX2
INLINE uint16_t to_half(float v) {  // to nearest even
    uint32_t u;
    memcpy(&u, &v, 4);
    const uint16_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return sign | 0x7e00;
    if (u >= 0x477ff000) return sign | 0x7c00;
    if (u >= 0x38800000) return sign | ((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
    float small;  // a subnormal half: adding 0.5 shifts its bits to the lower end, rounded
    memcpy(&small, &u, 4);
    small += 0.5f;
    memcpy(&u, &small, 4);
    return sign | (u - 0x3f000000);
}
#endif
INLINE void put_half(uint16_t* to, F16 v) {
#if CABOCHON_AVX512
    store(to, _mm512_cvtps_ph((__m512)v.part[0], _MM_FROUND_TO_NEAREST_INT));
#elif CABOCHON_AVX2
    EACH(i) store(to + i * WIDTH, _mm256_cvtps_ph((__m256)v.part[i], _MM_FROUND_TO_NEAREST_INT));
#else
    EACH(i) for (int lane = 0; lane < WIDTH; ++lane) to[i * WIDTH + lane] = to_half(v.part[i][lane]);
#endif
}

INLINE float from_half(uint16_t h) {
    uint32_t u = (h & 0x7fff) >= 0x7c00 ? 0x7f800000 | (h & 0x3ff) << 13 : (h & 0x7fff) << 13;
    float v;
    memcpy(&v, &u, 4);
    if (u < 0x7f800000) v *= 0x1p112f;
    return h & 0x8000 ? -v : v;
}

INLINE float inverse_of(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }
INLINE I16 clamped(I16 v, int low, int high) {
    v = select(v > splat(high), splat(high), v);
    return select(splat(low) > v, splat(low), v);
}

template <class T>
INLINE F16 half_group(const T* row, long at, long width) {
    return at + LANES <= width ? get(row + at) : at < width ? get(row + at, width - at) : zero();
}

// The number of largest magnitude, the first of those that are equally large; what is not a number counts as largest.
INLINE float extreme(F16 a, F16 b) {
    const I16 x = as<I16>(a), y = as<I16>(b);
    const uint32_t top = maximum(larger(x & 0x7fffffff, y & 0x7fffffff)), bottom = top | 0x80000000u;
    const bool above = uint32_t(maximum(larger(x, y))) == top;
    const bool below = uint32_t(maximum(larger(as<I16>(0.0f - a), as<I16>(0.0f - b)))) == top;
    uint32_t found = above ? top : bottom;
    if (above && below) {
        uint32_t bits[2 * LANES];
        store(bits, x), store(bits + LANES, y);
        for (int i = 2 * LANES - 1; i >= 0; --i)
            if (bits[i] == top || bits[i] == bottom) found = bits[i];
    }
    float v;
    memcpy(&v, &found, 4);
    return v;
}

INLINE F16 bounded(F16 v, float low, float high) {
    const F16 bottom = splat(low), top = splat(high);
    EACH(i) v.part[i] = v.part[i] > top.part[i] ? top.part[i] : v.part[i];
    EACH(i) v.part[i] = v.part[i] < bottom.part[i] ? bottom.part[i] : v.part[i];
    return v;
}

// What sixteen numbers lose on the grid -8 .. 7 times `scale`, squared. Adding and taking away 1.5 * 2^23 rounds.
INLINE F16 lost(F16 v, float scale, float inverse) {
    const F16 off = v - bounded((v * inverse + 12582912.0f) - 12582912.0f, -8, 7) * scale;
    return off * off;
}

// `quant.DIVISORS`: the scale of a group is its extreme over minus one of them, the earliest of those that fit best.
constexpr int CANDIDATES = 6;
constexpr float DIVISORS[LANES] = {8, 7.25, 7.75, 8.25, 8.5, 8.75, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// The scale of a group of least squared error.
INLINE uint16_t fitted(F16 a, F16 b) {
    uint16_t halves[LANES];
    float scales[LANES], inverses[LANES], errors[CANDIDATES];
    put_half(halves, extreme(a, b) / (0.0f - get(DIVISORS)));
    const F16 scale = get_half(halves);
    put(scales, scale), put(inverses, select(scale != zero(), 1.0f / scale, zero()));
    for (int i = 0; i < CANDIDATES; ++i)
        errors[i] = sum(lost(a, scales[i], inverses[i]) + lost(b, scales[i], inverses[i]));
    int best = 0;
    for (int i = 1; i < CANDIDATES; ++i) best = errors[i] < errors[best] ? i : best;
    return halves[best];
}

template <class T>
void quantize4(const T* x, long row, long width, const Codes& codes, uint16_t* scales, long step) {
    for (long g = 0; g < groups_of(width); ++g) {
        const F16 a = half_group(x, g * GROUP, width), b = half_group(x, g * GROUP + LANES, width);
        const uint16_t scale = fitted(a, b);
        const float inverse = inverse_of(from_half(scale));
        const I16 low = clamped(rounded(a * inverse + 8.0f), 0, 15), high = clamped(rounded(b * inverse + 8.0f), 0, 15);
        uint8_t bytes[LANES];
        put_bytes(reinterpret_cast<int8_t*>(bytes), low | high << 4);
        codes.put(row, g * LANES, bytes, LANES);
        scales[g * step] = scale;
    }
}

template <class T>
void quantize8(const T* x, long row, long width, const Codes& codes, float* scale) {
    I16 top = splat(0);
    for (long i = 0; i < width; i += LANES) top = larger(top, as<I16>(half_group(x, i, width)) & 0x7fffffff);
    const int32_t bits = maximum(top);
    memcpy(scale, &bits, 4);
    *scale /= 127.0f;
    const float inverse = inverse_of(*scale);
    for (long i = 0; i < groups_of(width) * GROUP; i += LANES) {
        uint8_t bytes[LANES];
        put_bytes(reinterpret_cast<int8_t*>(bytes), clamped(rounded(half_group(x, i, width) * inverse), -127, 127));
        if (i < codes.bytes) codes.put(row, i, bytes, LANES);
    }
}

// Rows that fill up the last panel: codes of zero, scales of zero.
void fill_panel(const Packing& op, const Codes& codes, long row) {
    const uint8_t zeros[LANES] = {};
    for (long at = 0; at < codes.bytes; at += LANES) codes.put(row, at, zeros, LANES);
    const long panel = row / PANEL, lane = row % PANEL, groups = groups_of(op.x.width);
    if (op.format == INT8)
        static_cast<float*>(op.scales)[row] = 0;
    else
        for (long g = 0; g < groups; ++g) static_cast<uint16_t*>(op.scales)[(panel * groups + g) * PANEL + lane] = 0;
}

// Sixteen rows at a time, so that a panel is written while it is in the cache.
template <class RowWork>
void over_panels(const Packing& op, const RowWork& work) {
    const Codes codes = codes_of(op.codes, op.format, op.panels, op.x.width);
    const long rows = op.x.count, groups = groups_of(op.x.width);
    parallel((rows + PANEL - 1) / PANEL, [&](long panel) {
        for (long row = panel * PANEL; row < (panel + 1) * PANEL; ++row) {
            if (row >= rows) {
                if (op.panels) fill_panel(op, codes, row);
                continue;
            }
            const long first = op.panels ? panel * groups * PANEL + row % PANEL : row * groups;
            work(row, codes, first, op.panels ? PANEL : 1);
        }
    });
}

void quantize(const Packing& op) {
    over_panels(op, [&](long row, const Codes& codes, long first, long step) {
        typed(op.x.dtype, row_of(op.x, row), [&](auto* x) {
            if (op.format == INT8)
                quantize8(x, row, op.x.width, codes, static_cast<float*>(op.scales) + row);
            else
                quantize4(x, row, op.x.width, codes, static_cast<uint16_t*>(op.scales) + first, step);
        });
    });
}

// Four words of each of four rows, lying `stride` bytes apart, turned: word by word, those of the four rows together.
INLINE void turn_words(const uint8_t* from, long stride, uint32_t flip, uint8_t* to) {
    typedef uint32_t Four __attribute__((vector_size(16)));
    const Four a = load<Four>(from), b = load<Four>(from + stride);
    const Four c = load<Four>(from + 2 * stride), d = load<Four>(from + 3 * stride);
    const Four low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
    const Four ab = __builtin_shuffle(a, b, low), cd = __builtin_shuffle(c, d, low);
    const Four ab2 = __builtin_shuffle(a, b, high), cd2 = __builtin_shuffle(c, d, high);
    store(to, __builtin_shuffle(ab, cd, first) ^ flip);
    store(to + 4 * PANEL, __builtin_shuffle(ab, cd, second) ^ flip);
    store(to + 8 * PANEL, __builtin_shuffle(ab2, cd2, first) ^ flip);
    store(to + 12 * PANEL, __builtin_shuffle(ab2, cd2, second) ^ flip);
}

// The rows from `row` on are there, sixteen of them, and fill whole groups.
void pack_whole_panel(const Codes& from, const Codes& codes, long row) {
    uint8_t* to = codes.data + row * codes.bytes;
    for (long at = 0; at < codes.bytes; at += 16)
        for (long lane = 0; lane < PANEL; lane += 4)
            turn_words(from.data + (row + lane) * from.bytes + at, from.bytes, codes.flip, to + at * PANEL + lane * 4);
}

void pack_row(const Codes& from, const Codes& codes, long row) {
    const uint8_t* bytes = from.data + row * from.bytes;
    for (long at = 0; at < codes.bytes; at += LANES) {
        uint8_t some[LANES] = {};
        memcpy(some, bytes + at, most(0, least(LANES, from.bytes - at)));
        codes.put(row, at, some, LANES);
    }
}

// Codes and scales in rows (`x.data`, `from_scales`) into panels.
void pack(const Packing& op) {
    const Codes from = codes_of(op.x.data, op.format, false, op.x.width);
    const long groups = groups_of(op.x.width);
    over_panels(op, [&](long row, const Codes& codes, long first, long step) {
        const long lane = row % PANEL;
        if (row - lane + PANEL > op.x.count || from.bytes != codes.bytes)
            pack_row(from, codes, row);
        else if (lane == 0)
            pack_whole_panel(from, codes, row);
        if (op.format == INT8) {
            static_cast<float*>(op.scales)[row] = static_cast<const float*>(op.from_scales)[row];
            return;
        }
        const auto* scales = static_cast<const uint16_t*>(op.from_scales) + row * groups;
        for (long g = 0; g < groups; ++g) static_cast<uint16_t*>(op.scales)[first + g * step] = scales[g];
    });
}

}  // namespace
