// Tiles of float32 and bfloat16 weights, read where they lie (row-major, so a mapped checkpoint needs no copy).
//
// Each product is a dot along the inner axis with sixteen or thirty-two partial sums, cut every 2048 elements and folded
// in a fixed tree: a row's result is the same bits whatever rows go beside it.
#pragma once

#include "integer_tiles.h"

namespace {

constexpr long INNER = 2048;

#if CABOCHON_AVX512
constexpr int DOT_ROWS = 4, DOT_OUTPUTS = 4;
#elif CABOCHON_AVX2
constexpr int DOT_ROWS = 2, DOT_OUTPUTS = 2;
#else
constexpr int DOT_ROWS = 1, DOT_OUTPUTS = 2;
#endif

// One step along the inner axis: how many elements, and acc[r][c] += a[r] . b[c].
template <class T>
struct Step {
    static constexpr long SIZE = LANES;
    typedef F16 Value;
    INLINE F16 read(const T* from) { return get(from); }
    INLINE F16 add(F16 acc, F16 a, F16 b) { return fma(a, b, acc); }
};

#if CABOCHON_AVX512 && defined(__AVX512BF16__)
template <>
struct Step<Bf16> {
    static constexpr long SIZE = 32;
    typedef __m512bh Value;
    INLINE Value read(const Bf16* from) { return (Value)load<__m512i>(from); }
    INLINE F16 add(F16 acc, Value a, Value b) {
        acc.part[0] = (F16::Part)_mm512_dpbf16_ps((__m512)acc.part[0], a, b);
        return acc;
    }
};
#endif

template <class T>
INLINE typename Step<T>::Value read_some(const T* from, long n) {
    T some[Step<T>::SIZE] = {};
    memcpy(some, from, n * sizeof(T));
    return Step<T>::read(some);
}

template <class T, int R, int C>
void dots(const T* x, long x_stride, const T* w, long w_stride, long inner, bool onto, float* out) {
    constexpr long SIZE = Step<T>::SIZE;
    F16 acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = zero();
    long k = 0;
    for (; k + SIZE <= inner; k += SIZE) {
        typename Step<T>::Value b[C];
        for (int c = 0; c < C; ++c) {
            b[c] = Step<T>::read(w + c * w_stride + k);
            if constexpr (R * C == 1) __builtin_prefetch(reinterpret_cast<const char*>(w + k) + AHEAD);
        }
        for (int r = 0; r < R; ++r) {
            const auto a = Step<T>::read(x + r * x_stride + k);
            for (int c = 0; c < C; ++c) acc[r][c] = Step<T>::add(acc[r][c], a, b[c]);
        }
    }
    if (k < inner) {
        typename Step<T>::Value b[C];
        for (int c = 0; c < C; ++c) b[c] = read_some(w + c * w_stride + k, inner - k);
        for (int r = 0; r < R; ++r) {
            const auto a = read_some(x + r * x_stride + k, inner - k);
            for (int c = 0; c < C; ++c) acc[r][c] = Step<T>::add(acc[r][c], a, b[c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            float& y = out[r * BLOCK + c];
            y = onto ? y + sum(acc[r][c]) : sum(acc[r][c]);
        }
}

template <class T, int R, int C>
void fit(long rows, long outputs, const T* x, long x_stride, const T* w, long w_stride, long inner, bool onto, float* out) {
    if constexpr (R > 1) {
        if (rows < R) return fit<T, R - 1, C>(rows, outputs, x, x_stride, w, w_stride, inner, onto, out);
    }
    if constexpr (C > 1) {
        if (outputs < C) return fit<T, R, C - 1>(rows, outputs, x, x_stride, w, w_stride, inner, onto, out);
    }
    dots<T, R, C>(x, x_stride, w, w_stride, inner, onto, out);
}

// Without bfloat16 dot products, weights are widened once for all rows of a block, and rows once for all blocks.
template <class T>
constexpr bool WIDENED = sizeof(T) == 2 && Step<T>::SIZE == LANES;

template <class T>
void dense_block(const Operand& x, long first, long last, const Matrix& w, long output, long outputs, float* out) {
    const auto* rows = static_cast<const T*>(x.data);
    const auto* weight = static_cast<const T*>(w.codes);
    if (last - first == 1) {  // a single row reads the weight in one run through memory
        for (long c = 0; c < outputs; ++c)
            for (long from = 0; from < w.cols; from += INNER)
                dots<T, 1, 1>(rows + first * x.stride + from, x.stride, weight + (output + c) * w.cols + from, w.cols,
                              least(INNER, w.cols - from), from > 0, out + c);
        return;
    }
    for (long from = 0; from < w.cols; from += INNER)
        for (long row = first; row < last; row += DOT_ROWS)
            for (long c = 0; c < outputs; c += DOT_OUTPUTS)
                fit<T, DOT_ROWS, DOT_OUTPUTS>(last - row, outputs - c, rows + row * x.stride + from, x.stride,
                                              weight + (output + c) * w.cols + from, w.cols, least(INNER, w.cols - from),
                                              from > 0, out + (row - first) * BLOCK + c);
}

void widened_block(const Operand& x, long first, long last, const Matrix& w, long output, long outputs, float* out) {
    alignas(64) float wide[DOT_OUTPUTS * INNER];
    const auto* rows = static_cast<const float*>(x.data);
    const auto* weight = static_cast<const Bf16*>(w.codes);
    for (long from = 0; from < w.cols; from += INNER) {
        const long inner = least(INNER, w.cols - from);
        for (long c = 0; c < outputs; c += DOT_OUTPUTS) {
            for (long i = 0; i < least(DOT_OUTPUTS, outputs - c); ++i)
                for (long k = 0; k < inner; k += LANES)
                    put(wide + i * INNER + k, get(weight + (output + c + i) * w.cols + from + k, inner - k), inner - k);
            for (long row = first; row < last; row += DOT_ROWS)
                fit<float, DOT_ROWS, DOT_OUTPUTS>(last - row, outputs - c, rows + row * x.stride + from, x.stride, wide, INNER,
                                                  inner, from > 0, out + (row - first) * BLOCK + c);
        }
    }
}

// out [last - first, 64] float32: the first `outputs` of every row, whatever the weight is.
void block(const Operand& x, long first, long last, const Matrix& w, long output, long outputs, float* out) {
    if (w.format == INT8) return integer_product<INT8>(x, first, last, w, output, outputs, out);
    if (w.format == INT4) return integer_product<INT4>(x, first, last, w, output, outputs, out);
    if (w.dtype == FLOAT32) return dense_block<float>(x, first, last, w, output, outputs, out);
    if constexpr (WIDENED<Bf16>)
        widened_block(x, first, last, w, output, outputs, out);
    else
        dense_block<Bf16>(x, first, last, w, output, outputs, out);
}

}  // namespace
