// Words of 32 bits, sixteen to a register: a float each, or two neighbours in bfloat16.
#pragma once

#include "rows.h"

namespace {

#if CABOCHON_AVX512 && defined(__AVX512BF16__)
template <class T>
constexpr bool PAIRS = sizeof(T) == 2;
#else
template <class T>
constexpr bool PAIRS = false;
#endif

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

}  // namespace
