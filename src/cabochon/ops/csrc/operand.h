// The left side of a product as the tiles want it: floats as they are, or groups of 32 rounded to bytes.
#pragma once

#include "ops.h"
#include "simd.h"

namespace {

using namespace cabochon;

constexpr long GROUP = 32;

// By how much weights' codes are stored too large, so that they have no sign.
constexpr int32_t excess(Format weights) {
#if CABOCHON_AVX2
    return weights == INT8 ? 0 : 8;  // int8 codes get their sign back before they are multiplied
#else
    return weights == INT8 ? 128 : 8;
#endif
}

// Rows of activations. For integer weights `codes`, `scales` and `begins` are filled, one scale and beginning per group;
// `quant.round_activations` is the definition.
struct Operand {
    const void* data;  // dense: the rows
    long stride;       // dense: elements
    int8_t* codes;     // [rows, groups * 32]
    float* scales;     // [rows, groups]
    int32_t* begins;   // [rows, groups], where the sum of a group's products begins: `excess` of all codes, taken away
    int32_t less;      // the `excess`
    long groups;

    static size_t bytes(long rows, long width) { return rows * ((width + GROUP - 1) / GROUP) * (GROUP + 8); }

    static Operand in(void* memory, long rows, long width, Format weights) {
        const long groups = (width + GROUP - 1) / GROUP;
        auto* scales = static_cast<float*>(memory);
        auto* begins = reinterpret_cast<int32_t*>(scales + rows * groups);
        return {nullptr, 0, reinterpret_cast<int8_t*>(begins + rows * groups), scales, begins, excess(weights), groups};
    }

    static Operand dense(const void* data, long stride) { return {data, stride, nullptr, nullptr, nullptr, 0, 0}; }

    inline __attribute__((always_inline)) void set(long row, long group, F16 a, F16 b) const {
        // As integers, magnitudes order like floats and what is not a number is the largest: it reaches the scale.
        const I16 abs_a = as<I16>(a) & 0x7fffffff, abs_b = as<I16>(b) & 0x7fffffff;
        const int32_t top = maximum(larger(abs_a, abs_b));
        float largest;
        memcpy(&largest, &top, 4);
        const float scale = largest / 127.0f;
        const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
        const I16 qa = rounded(a * inverse), qb = rounded(b * inverse);
        int8_t* to = codes + (row * groups + group) * GROUP;
        put_bytes(to, qa);
        put_bytes(to + LANES, qb);
        scales[row * groups + group] = scale;
        begins[row * groups + group] = -less * sum(qa + qb);
    }

    template <class T>
    void fill(long row, const T* from, long width) const {
        for (long g = 0; g < groups; ++g) {
            const long left = width - g * GROUP;
            const F16 a = get(from + g * GROUP, least(left, LANES));
            const F16 b = left > LANES ? get(from + g * GROUP + LANES, least(left - LANES, LANES)) : zero();
            set(row, g, a, b);
        }
    }
};

}  // namespace
