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

template <class S, class T>
void norm_row(const S* x, const T* weight, T* y, long width, float eps) {
    F16 squares = zero();
    for (long i = 0; i < width; i += LANES) {
        const F16 v = get(x + i, width - i);
        squares = fma(v, v, squares);
    }
    const F16 scale = splat(1.0f / square_root(sum(squares) / width + eps));
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
    const auto *x = static_cast<const T*>(op.x.data), *onto = static_cast<const T*>(op.onto);
    const long width = op.x.width;
    over_rows(op.x.count, width, [&](long row) {
        T* y = static_cast<T*>(op.y) + row * width;
        for (long i = 0; i < width; i += LANES) put(y + i, get(x + row * width + i, width - i) * op.scale, width - i);
        norm_row(y, static_cast<const T*>(op.weight), y, width, op.eps);
        for (long i = 0; i < width; i += LANES) {
            put(y + i, get(y + i, width - i) + get(onto + row * width + i, width - i), width - i);
            put(y + i, get(y + i, width - i) * half_root, width - i);
        }
    });
}

void per_layer(const PerLayer& op) { op.x.dtype == FLOAT32 ? per_layer_rows<float>(op) : per_layer_rows<Bf16>(op); }

// y[i] and y[i + head / 2] from x[i] and x[i + head / 2] for i < turning; what does not turn is copied.
template <class T>
void rope_row(const T* x, const T* cos, const T* sin, T* y, long head, long turning) {
    const long half = head / 2;
    for (long i = 0; i < turning; i += LANES) {
        const long n = turning - i;
        const F16 a = get(x + i, n), b = get(x + half + i, n), c = get(cos + i, n), s = get(sin + i, n);
        put(y + i, a * c - b * s, n);
        put(y + half + i, b * c + a * s, n);
    }
    memcpy(y + turning, x + turning, (half - turning) * sizeof(T));
    memcpy(y + half + turning, x + half + turning, (half - turning) * sizeof(T));
}

template <class T>
void rope_rows(const Rope& op) {
    over_rows(op.tokens, op.heads * op.head, [&](long token) {
        const T *cos = static_cast<const T*>(op.cos) + token * op.half_rotated;
        const T *sin = static_cast<const T*>(op.sin) + token * op.half_rotated;
        for (long head = 0; head < op.heads; ++head) {
            const long at = (token * op.heads + head) * op.head;
            rope_row(static_cast<const T*>(op.x) + at, cos, sin, static_cast<T*>(op.y) + at, op.head, op.half_rotated);
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
