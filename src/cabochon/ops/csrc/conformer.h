// The towers' ops on single rows: axial turning, and what a conformer does with the last few tokens (attention, depthwise
// convolution).
#pragma once

#include "settle.h"

namespace {

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

// Thirty-two numbers of a row as two registers: bfloat16 ones of even and of odd place.
struct Two {
    F16 a, b;
};
INLINE Two get_two(const Bf16* from, long n) {
    const U16 some = n >= 2 * LANES ? load<U16>(from) : some_pairs(from, n);
    return {as<F16>(some << 16), as<F16>(some & 0xffff0000u)};
}
// The sums over the lanes of sixteen registers, one to a lane.
INLINE F16 sums_in_order(const F16 (&v)[LANES]) {
#if CABOCHON_AVX512 && defined(__AVX512BF16__)
    F16 placed[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) placed[i % 4 * 4 + i / 4] = v[i];
    return sums(placed);
#else
    alignas(64) float found[LANES];
    for (int i = 0; i < LANES; ++i) found[i] = sum(v[i]);
    return get(found);
#endif
}
INLINE Two get_two(const float* from, long n) { return {get(from, n), n > LANES ? get(from + LANES, n - LANES) : zero()}; }
INLINE void put_two(Bf16* to, Two v, long n) {
    Bf16 some[2 * LANES];
    const U16 words = paired(v.a, v.b);
    if (n >= 2 * LANES) return store(to, words);
    store(some, words);
    memcpy(to, some, n * sizeof *to);
}
INLINE void put_two(float* to, Two v, long n) {
    put(to, v.a, n);
    if (n > LANES) put(to + LANES, v.b, n - LANES);
}

// A token's head over itself and those before it: at most sixteen scores, one per lane.
template <class T>
struct RecentHead {
    const Recent& op;
    const float* scale;  // in the order of `get_two`
    long width = op.heads * op.head;

    F16 scores(long token, long at, long seen) const {
        const T *q = static_cast<const T*>(op.q) + token * width + at, *k = static_cast<const T*>(op.k) + token * width + at;
        const T* relative = static_cast<const T*>(op.relative) + at;
        auto* mine = static_cast<float*>(scratch(BLOCK_A, (op.head + 2 * LANES) * sizeof(float)));
        for (long i = 0; i < op.head; i += 2 * LANES) {
            const Two some = get_two(q + i, op.head - i);
            put(mine + i, some.a * get(scale + i));
            put(mine + i + LANES, some.b * get(scale + i + LANES));
        }
        const F16 key_scale = splat(op.key_scale);
        F16 close[LANES];
        for (long j = 0; j < LANES; ++j) close[j] = zero();
        for (long j = 0; j < seen; ++j) {
            F16 even = zero(), odd = zero();
            for (long i = 0; i < op.head; i += 2 * LANES) {
                const Two key = get_two(k - j * width + i, op.head - i), place = get_two(relative + j * width + i, op.head - i);
                even = fma(get(mine + i), fma(key.a, key_scale, place.a), even);
                odd = fma(get(mine + i + LANES), fma(key.b, key_scale, place.b), odd);
            }
            close[j] = even + odd;
        }
        return sums_in_order(close);
    }

    void mix(const float* weights, long token, long at, long seen) const {
        const T* v = static_cast<const T*>(op.v) + token * width + at;
        for (long i = 0; i < op.head; i += 2 * LANES) {
            Two sum{zero(), zero()};
            for (long j = 0; j < seen; ++j) {
                const Two value = get_two(v - j * width + i, op.head - i);
                sum = {fma(splat(weights[j]), value.a, sum.a), fma(splat(weights[j]), value.b, sum.b)};
            }
            sum = {cut(sum.a, op.then.low, op.then.high), cut(sum.b, op.then.low, op.then.high)};
            put_two(static_cast<T*>(op.out) + token * op.out_stride + at + i, sum, op.head - i);
        }
    }

    // All heads' scores before all their weights, so that these wait side by side.
    void token(long token) const {
        const long seen = least(token + 1, op.reach);
        alignas(64) float beyond[LANES] = {};
        for (long j = seen; j < LANES; ++j) beyond[j] = -__builtin_inff();
        auto* found = static_cast<float*>(scratch(BLOCK_B, op.heads * LANES * sizeof(float)));
        for (long h = 0; h < op.heads; ++h) put(found + h * LANES, scores(token, h * op.head, seen));
        for (long h = 0; h < op.heads; ++h) {
            const F16 capped = op.cap * hyperbolic_tangent(get(found + h * LANES) / op.cap) + get(beyond);
            const F16 w = exponential(capped - maximum(capped));
            put(found + h * LANES, w * (1.0f / sum(w)));
        }
        for (long h = 0; h < op.heads; ++h) mix(found + h * LANES, token, h * op.head, seen);
    }
};

template <class T>
void recent_tokens(const Recent& op) {
    auto* scale = static_cast<float*>(scratch(HIDDEN, (op.head + 2 * LANES) * sizeof(float)));
    for (long i = 0; i < op.head; i += 2 * LANES)
        for (long lane = 0; lane < 2 * LANES; ++lane) {
            const long place = sizeof(T) == 2 ? lane % LANES * 2 + lane / LANES : lane;
            scale[i + lane] = i + place < op.head ? op.scale[i + place] : 0;
        }
    const RecentHead<T> of{op, scale};
    over_rows(op.tokens, op.heads * op.head * 8, [&](long token) { of.token(token); });
}

void recent(const Recent& op) { op.dtype == FLOAT32 ? recent_tokens<float>(op) : recent_tokens<Bf16>(op); }

// y = silu(norm(cut(sum of tap i times x, `taps` - 1 - i tokens back)) * weight), cut once more
template <class T>
void blend_row(const Blend& op, long row) {
    const long width = op.x.width;
    const T *x = static_cast<const T*>(op.x.data), *taps = static_cast<const T*>(op.taps), *weight = static_cast<const T*>(op.weight);
    T* y = static_cast<T*>(op.y) + row * op.y_stride;
    auto* mixed = static_cast<float*>(scratch(BLOCK_A, (width + LANES) * sizeof(float)));
    F16 squares = zero();
    over_lanes(width, [&](long i, long n) __attribute__((always_inline)) {
        F16 v = zero();
        for (long t = most(0, op.count - 1 - row); t < op.count; ++t)
            v = fma(get(x + (row + t - op.count + 1) * op.x.stride + i, n), get(taps + t * width + i, n), v);
        v = cut(v, -op.bound, op.bound);
        squares = fma(v, v, squares);
        put(mixed + i, v);
    });
    const F16 scale = splat(1.0f / square_root(sum(squares) / width + op.eps));
    over_lanes(width, [&](long i, long n) __attribute__((always_inline)) {
        const F16 v = get(mixed + i) * scale * get(weight + i, n);
        put_rounded(y + i, cut(v * logistic<sizeof(T) == 2>(v), op.then.low, op.then.high), n);
    });
}

void blend(const Blend& op) {
    over_rows(op.x.count, op.x.width * 4, [&](long row) { op.x.dtype == FLOAT32 ? blend_row<float>(op, row) : blend_row<Bf16>(op, row); });
}

}  // namespace
