// The towers' ops on single rows: norms with what stands around them, axial turning, and what a conformer does with the
// last few tokens (attention, depthwise convolution).
#pragma once

#include "product.h"

namespace {

// y = onto + share * norm(cut(x)) * weight
template <class T>
void settle_row(const Settle& op, long row) {
    const T *x = static_cast<const T*>(op.x.data) + row * op.x.stride, *weight = static_cast<const T*>(op.weight);
    const T* onto = op.onto ? static_cast<const T*>(op.onto) + row * op.x.width : nullptr;
    T* y = static_cast<T*>(op.y) + row * op.x.width;
    const long width = op.x.width;
    F16 squares = zero();
    for (long i = 0; i < width; i += LANES) {
        const F16 v = cut(get(x + i, width - i), -op.bound, op.bound);
        squares = fma(v, v, squares);
    }
    const F16 scale = splat(op.share / square_root(sum(squares) / width + op.eps));
    for (long i = 0; i < width; i += LANES) {
        F16 v = cut(get(x + i, width - i), -op.bound, op.bound) * scale * get(weight + i, width - i);
        if (onto) v = v + get(onto + i, width - i);
        put(y + i, v, width - i);
    }
}

void settle(const Settle& op) {
    over_rows(op.x.count, op.x.width, [&](long row) { op.x.dtype == FLOAT32 ? settle_row<float>(op, row) : settle_row<Bf16>(op, row); });
}

// A head: norm with weight, then in each of its halves dimension i turns with i + H / 4.
template <class T>
void turn_head(const Turn& op, const T* x, const T* cos, const T* sin, T* y) {
    const long quarter = op.head / 4;
    const T* weight = static_cast<const T*>(op.weight);
    F16 squares = zero();
    for (long i = 0; i < op.head; i += LANES) {
        const F16 v = get(x + i, op.head - i);
        squares = fma(v, v, squares);
    }
    const F16 scale = splat(1.0f / square_root(sum(squares) / op.head + op.eps));
    for (long axis = 0; axis < 2; ++axis)
        for (long i = 0; i < quarter; i += LANES) {
            const long n = quarter - i, low = axis * 2 * quarter + i, high = low + quarter;
            const F16 a = get(x + low, n) * scale * get(weight + low, n), b = get(x + high, n) * scale * get(weight + high, n);
            const F16 c = get(cos + axis * quarter + i, n), s = get(sin + axis * quarter + i, n);
            put(y + low, a * c - b * s, n);
            put(y + high, b * c + a * s, n);
        }
}

template <class T>
void turn_token(const Turn& op, long token) {
    const T *x = static_cast<const T*>(op.x), *cos = static_cast<const T*>(op.cos), *sin = static_cast<const T*>(op.sin);
    const long place = token % op.places * (op.head / 2), width = op.heads * op.head;
    for (long h = 0; h < op.heads; ++h)
        turn_head(op, x + token * width + h * op.head, cos + place, sin + place, static_cast<T*>(op.y) + token * width + h * op.head);
}

void turn(const Turn& op) {
    over_rows(op.tokens, op.heads * op.head, [&](long token) { op.dtype == FLOAT32 ? turn_token<float>(op, token) : turn_token<Bf16>(op, token); });
}

// One token and head over itself and those before it: at most sixteen scores, one per lane.
template <class T>
void recent_head(const Recent& op, long token, long head) {
    const long width = op.heads * op.head, at = head * op.head, seen = least(token + 1, op.reach);
    const T *q = static_cast<const T*>(op.q), *k = static_cast<const T*>(op.k), *v = static_cast<const T*>(op.v);
    F16 close[LANES];
    for (long j = 0; j < LANES; ++j) close[j] = zero();
    for (long i = 0; i < op.head; i += LANES) {
        const long n = op.head - i;
        const F16 mine = get(q + token * width + at + i, n) * get(op.scale + i, n);
        for (long j = 0; j < seen; ++j) {
            const F16 key = get(k + (token - j) * width + at + i, n), place = get(static_cast<const T*>(op.relative) + j * width + at + i, n);
            close[j] = fma(mine, fma(key, splat(op.key_scale), place), close[j]);
        }
    }
    alignas(64) float scores[LANES] = {};
    for (long j = 0; j < seen; ++j) scores[j] = sum(close[j]);
    put(scores, op.cap * hyperbolic_tangent(get(scores) / op.cap));
    for (long j = seen; j < LANES; ++j) scores[j] = -__builtin_inff();
    F16 w = get(scores);
    w = exponential(w - maximum(w));
    put(scores, w * (1.0f / sum(w)));
    for (long i = 0; i < op.head; i += LANES) {
        const long n = op.head - i;
        F16 mix = zero();
        for (long j = 0; j < seen; ++j) mix = fma(splat(scores[j]), get(v + (token - j) * width + at + i, n), mix);
        put(static_cast<T*>(op.out) + token * width + at + i, mix, n);
    }
}

void recent(const Recent& op) {
    over_rows(op.tokens, op.heads * op.head * 8, [&](long token) {
        for (long h = 0; h < op.heads; ++h) op.dtype == FLOAT32 ? recent_head<float>(op, token, h) : recent_head<Bf16>(op, token, h);
    });
}

// y = silu(norm(cut(sum of tap i times x, `taps` - 1 - i tokens back)) * weight)
template <class T>
void blend_row(const Blend& op, long row) {
    const long width = op.x.width;
    const T *x = static_cast<const T*>(op.x.data), *taps = static_cast<const T*>(op.taps), *weight = static_cast<const T*>(op.weight);
    auto* mixed = static_cast<float*>(scratch(BLOCK_A, (width + LANES) * sizeof(float)));
    F16 squares = zero();
    for (long i = 0; i < width; i += LANES) {
        const long n = width - i;
        F16 v = zero();
        for (long t = most(0, op.count - 1 - row); t < op.count; ++t)
            v = fma(get(x + (row + t - op.count + 1) * op.x.stride + i, n), get(taps + t * width + i, n), v);
        v = cut(v, -op.bound, op.bound);
        squares = fma(v, v, squares);
        put(mixed + i, v);
    }
    const F16 scale = splat(1.0f / square_root(sum(squares) / width + op.eps));
    for (long i = 0; i < width; i += LANES) {
        const F16 v = get(mixed + i) * scale * get(weight + i, width - i);
        put(static_cast<T*>(op.y) + row * width + i, v * logistic<sizeof(T) == 2>(v), width - i);
    }
}

void blend(const Blend& op) {
    over_rows(op.x.count, op.x.width * 4, [&](long row) { op.x.dtype == FLOAT32 ? blend_row<float>(op, row) : blend_row<Bf16>(op, row); });
}

}  // namespace
