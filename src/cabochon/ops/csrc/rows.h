// The ops on single rows: root-mean-square norm, rotary embedding, storing keys and values.
#pragma once

#include "linear.h"

namespace {

constexpr long SMALL = 1 << 15;  // elements below which a job costs more to share than to do

template <class Work>
void over_rows(long rows, long width, const Work& work) {
    const long chunk = most(1, SMALL / 4 / most(width, 1)), items = (rows + chunk - 1) / chunk;
    auto some = [&](long item) {
        for (long row = item * chunk; row < least(rows, (item + 1) * chunk); ++row) work(row);
    };
    if (rows * width > SMALL) return parallel(items, some);
    for (long item = 0; item < items; ++item) some(item);
}

// f(i, n) for sixteen lanes from i, of which n are within `width`.
template <class F>
INLINE void over_lanes(long width, F f) {
    long i = 0;
    for (; i + LANES <= width; i += LANES) f(i, LANES);
    if (i < width) f(i, width - i);
}

// Of numbers(i, n), in one order wherever a row is normed.
template <class F>
INLINE float sum_of_squares(long width, F numbers) {
    F16 squares[2] = {zero(), zero()};
    over_lanes(width, [&](long i, long n) __attribute__((always_inline)) {
        const F16 v = numbers(i, n);
        F16& some = squares[i / LANES % 2];
        some = fma(v, v, some);
    });
    return sum(squares[0] + squares[1]);
}

template <class S, class W, class T>
void norm_row(const S* x, const W* weight, T* y, long width, float eps) {
    const float squares =
        sum_of_squares(width, [&](long i, long n) __attribute__((always_inline)) { return get(x + i, n); });
    const F16 scale = splat(1.0f / square_root(squares / width + eps));
    for (long i = 0; i < width; i += LANES) {
        F16 v = get(x + i, width - i) * scale;
        if (weight) v = v * get(weight + i, width - i);
        put(y + i, v, width - i);
    }
}

template <class S, class T>
void norm_rows(const Norm& op) {
    over_rows(op.x.count, op.x.width, [&](long row) {
        norm_row(static_cast<const S*>(op.x.data) + row * op.x.stride, static_cast<const T*>(op.weight),
                 static_cast<T*>(op.y.data) + row * op.y.stride, op.x.width, op.eps);
    });
}

void norm(const Norm& op) {
    if (op.x.dtype == BFLOAT16) return norm_rows<Bf16, Bf16>(op);
    op.y.dtype == FLOAT32 ? norm_rows<float, float>(op) : norm_rows<float, Bf16>(op);
}

template <class T>
void per_layer_rows(const PerLayer& op) {
    const F16 half_root = splat(0.70710678118654752f);
    const long width = op.width;
    over_rows(op.count, width, [&](long row) {
        const float* x = op.x + row * width;
        const auto *onto = static_cast<const T*>(op.onto) + row * width, *weight = static_cast<const T*>(op.weight);
        T* y = static_cast<T*>(op.y) + row * width;
        const float squares =
            sum_of_squares(width, [&](long i, long n) __attribute__((always_inline)) { return get(x + i, n) * op.scale; });
        const F16 scale = splat(op.scale / square_root(squares / width + op.eps));
        for (long i = 0; i < width; i += LANES) {
            const F16 v = get(x + i, width - i) * scale * get(weight + i, width - i);
            put(y + i, (v + get(onto + i, width - i)) * half_root, width - i);
        }
    });
}

void per_layer(const PerLayer& op) { op.dtype == FLOAT32 ? per_layer_rows<float>(op) : per_layer_rows<Bf16>(op); }

template <class T>
void copy_numbers(const float* from, T* to, long count) {
    for (long i = 0; i < count; i += LANES) put(to + i, get(from + i, count - i), count - i);
}

// y[i] and y[i + head / 2] from x[i] and x[i + head / 2] for i < turning; what does not turn is copied.
template <class T>
void rope_row(const float* x, const float* cos, const float* sin, T* y, long head, long turning) {
    const long half = head / 2;
    for (long i = 0; i < turning; i += LANES) {
        const long n = turning - i;
        const F16 a = get(x + i, n), b = get(x + half + i, n), c = get(cos + i, n), s = get(sin + i, n);
        put(y + i, a * c - b * s, n);
        put(y + half + i, b * c + a * s, n);
    }
    copy_numbers(x + turning, y + turning, half - turning);
    copy_numbers(x + half + turning, y + half + turning, half - turning);
}

template <class T>
void rope_rows(const Rope& op) {
    over_rows(op.tokens, op.heads * op.head, [&](long token) {
        const float *cos = op.cos + token * op.half_rotated, *sin = op.sin + token * op.half_rotated;
        for (long head = 0; head < op.heads; ++head) {
            const long at = (token * op.heads + head) * op.head;
            rope_row(op.x + at, cos, sin, static_cast<T*>(op.y) + at, op.head, op.half_rotated);
        }
    });
}

void rope(const Rope& op) { op.dtype == FLOAT32 ? rope_rows<float>(op) : rope_rows<Bf16>(op); }

// Numbers as codes from -127 to 127; returns their scale, no number if any of them is none.
template <class T>
float store_codes(const T* from, int8_t* to, long width) {
    F16 top = zero(), odd = zero();
    for (long i = 0; i < width; i += LANES) {
        const F16 v = get(from + i, width - i);
        top = larger(larger(v, 0.0f - v), top), odd = odd + (v - v);
    }
    const float largest = maximum(top) / 127, scale = largest > 1e-20f ? largest : 1e-20f;
    for (long i = 0; i < width; i += LANES) {
        int8_t codes[LANES];
        put_bytes(codes, rounded(get(from + i, width - i) / scale));
        memcpy(to + i, codes, least(width - i, LANES));
    }
    return scale + sum(odd);
}

template <class T>
void store_typed(const Store& op) {
    const long width = op.kv_heads * op.width;
    over_rows(op.tokens, width, [&](long token) {
        const long slot = op.slots[token];
        if (slot < 0) return;
        const T* from = static_cast<const T*>(op.rows) + token * width;
        if (!op.scales) return (void)memcpy(static_cast<T*>(op.pages) + slot * width, from, width * sizeof(T));
        for (long h = 0; h < op.kv_heads; ++h, from += op.width) {
            auto* to = static_cast<int8_t*>(op.pages) + slot * width + h * op.width;
            float* scales = op.scales + (slot * op.kv_heads + h) * 2;
            scales[0] = store_codes(from, to, op.split);
            scales[1] = store_codes(from + op.split, to + op.split, op.width - op.split);
        }
    });
}

void store_rows(const Store& op) { op.dtype == FLOAT32 ? store_typed<float>(op) : store_typed<Bf16>(op); }

}  // namespace
