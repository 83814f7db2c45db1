// Tiles of float32 and bfloat16 weights, read where they lie (row-major, so a mapped checkpoint needs no copy).
//
// Each product is a dot along the inner axis with sixteen partial sums (of pairs, where bfloat16 has dot products), cut
// every 1024 elements and folded in a fixed tree: a row's result is the same bits whatever rows go beside it.
#pragma once

#include "integer_tiles.h"

namespace {

constexpr long INNER = 1024;

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

// `Streamed`: the weight comes from memory, so it is asked for a little early.
template <class T, int R, int C, bool Streamed = false>
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
            if constexpr (Streamed) __builtin_prefetch(reinterpret_cast<const char*>(w + c * w_stride + k) + SOON, 0, 2);
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

// A single row reads the weight in one run through memory. Were it long, the weight would push it out of the cache
// between one output and the next, so some outputs share it.
template <class T>
void dense_row(const Operand& x, long row, const Matrix& w, long output, long outputs, float* out) {
    const T *numbers = static_cast<const T*>(x.data) + row * x.stride, *weight = static_cast<const T*>(w.codes) + output * w.cols;
    const long at_once = w.cols > 2 * INNER ? DOT_OUTPUTS : 1;
    for (long c = 0; c < outputs;) {
        const bool shared = outputs - c >= at_once && at_once > 1;
        const auto some = shared ? dots<T, 1, DOT_OUTPUTS, true> : dots<T, 1, 1, true>;
        for (long from = 0; from < w.cols; from += INNER)
            some(numbers + from, x.stride, weight + c * w.cols + from, w.cols, least(INNER, w.cols - from), from > 0, out + c);
        c += shared ? DOT_OUTPUTS : 1;
    }
}

template <class T>
void dense_block(const Operand& x, long first, long last, const Matrix& w, long output, long outputs, float* out) {
    const auto* rows = static_cast<const T*>(x.data);
    const auto* weight = static_cast<const T*>(w.codes);
    if (last - first == 1) return dense_row<T>(x, first, w, output, outputs, out);
    for (long from = 0; from < w.cols; from += INNER)
        for (long row = first; row < last; row += DOT_ROWS)
            for (long c = 0; c < outputs; c += DOT_OUTPUTS)
                fit<T, DOT_ROWS, DOT_OUTPUTS>(last - row, outputs - c, rows + row * x.stride + from, x.stride,
                                              weight + (output + c) * w.cols + from, w.cols, least(INNER, w.cols - from),
                                              from > 0, out + (row - first) * BLOCK + c);
}

#if CABOCHON_AVX512 && defined(__AVX512BF16__)
constexpr int SIDE_BY_SIDE = 8, PAIR = 2;  // rows and outputs of a tile
constexpr long STEP = Step<Bf16>::SIZE;

// Where the sum of row r and output c has to lie for `sums` to give them row by row.
constexpr int place(int r, int c) { return (PAIR * r + c) % 4 * 4 + (PAIR * r + c) / 4; }

// The sums over the lanes of sixteen registers, in the order of `fold`: lane 4 j + s is that of register 4 s + j.
INLINE F16 sums(const F16 (&v)[LANES]) {
    __m512 half[8], quarter[4], pair[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m512 a = (__m512)v[2 * i].part[0], b = (__m512)v[2 * i + 1].part[0];
        half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512 a = half[2 * i], b = half[2 * i + 1];
        quarter[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    for (int i = 0; i < 2; ++i) {
        const __m512d a = _mm512_castps_pd(quarter[2 * i]), b = _mm512_castps_pd(quarter[2 * i + 1]);
        pair[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    F16 all;
    all.part[0] = (F16::Part)_mm512_add_ps(_mm512_shuffle_ps(pair[0], pair[1], 0x88), _mm512_shuffle_ps(pair[0], pair[1], 0xdd));
    return all;
}

// Like `dots`, with rows that lie side by side, thirty-two numbers of each in turn. `soon` is asked for on the way.
template <int R, int C>
void side_by_side(const Bf16* x, const Bf16* w, long w_stride, long inner, bool onto, float* out, const Bf16* soon) {
    F16 acc[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) acc[i] = zero();
    auto step = [&](const __m512bh (&b)[C]) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r, x += STEP)
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) acc[place(r, c)] = Step<Bf16>::add(acc[place(r, c)], Step<Bf16>::read(x), b[c]);
    };
    long k = 0;
    __m512bh b[C];
    for (; k + STEP <= inner; k += STEP) {
        for (int c = 0; c < C; ++c, soon += STEP) {
            b[c] = Step<Bf16>::read(w + c * w_stride + k);
            __builtin_prefetch(soon, 0, 2);
        }
        step(b);
    }
    if (k < inner) {
        for (int c = 0; c < C; ++c) b[c] = read_some(w + c * w_stride + k, inner - k);
        step(b);
    }
    float found[LANES];
    put(found, sums(acc));
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            float& y = out[r * BLOCK + c];
            y = onto ? y + found[PAIR * r + c] : found[PAIR * r + c];
        }
}

template <int R>
void fit_side_by_side(long rows, long outputs, const Bf16* x, const Bf16* w, long w_stride, long inner, bool onto, float* out,
                      const Bf16* soon) {
    if constexpr (R > 1) {
        if (rows < R) return fit_side_by_side<R - 1>(rows, outputs, x, w, w_stride, inner, onto, out, soon);
    }
    for (long c = 0; c + PAIR <= outputs; c += PAIR, soon += PAIR * inner)
        side_by_side<R, PAIR>(x, w + c * w_stride, w_stride, inner, onto, out + c, soon);
    if (outputs % PAIR)
        side_by_side<R, 1>(x, w + (outputs - 1) * w_stride, w_stride, inner, onto, out + outputs - 1, soon);
}

// Eight rows of a cut stay in the first-level cache, as one stream: eight streams far apart push one another out of it. The
// weight is asked for in the order in which it lies in memory, one item early, since it is read in pieces.
void side_by_side_block(const Operand& x, long first, long last, const Matrix& w, long output, long outputs, float* out) {
    alignas(64) Bf16 packed[SIDE_BY_SIDE * INNER];
    const auto* weight = static_cast<const Bf16*>(w.codes) + output * w.cols;
    for (long from = 0; from < w.cols; from += INNER) {
        const long inner = least(INNER, w.cols - from);
        for (long row = first; row < last; row += SIDE_BY_SIDE) {
            const long rows = least(SIDE_BY_SIDE, last - row);
            const Bf16* source = static_cast<const Bf16*>(x.data) + row * x.stride + from;
            Bf16* to = packed;
            for (long k = 0; k < inner; k += STEP)
                for (long r = 0; r < rows; ++r, to += STEP)
                    store(to, inner - k < STEP ? read_some(source + r * x.stride + k, inner - k)
                                               : Step<Bf16>::read(source + r * x.stride + k));
            const Bf16* soon = weight + (row == first ? outputs * (w.cols + from) : 0);
            fit_side_by_side<SIDE_BY_SIDE>(rows, outputs, packed, weight + from, w.cols, inner, from > 0,
                                           out + (row - first) * BLOCK, soon);
        }
    }
}
#endif

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
#if CABOCHON_AVX512 && defined(__AVX512BF16__)
    if (last - first == 1) return dense_row<Bf16>(x, first, w, output, outputs, out);
    side_by_side_block(x, first, last, w, output, outputs, out);
#else
    widened_block(x, first, last, w, output, outputs, out);
#endif
}

}  // namespace
