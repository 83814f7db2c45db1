// Attention in which every token sees every token: the towers' pictures, without masks, pages or causal order.
//
// The keys and values of one head are packed once for all its queries (`attend.h` packs them anew for every tile, which
// long prompts with wide heads hardly notice and narrow heads do). A tile is 24 queries against blocks of 128 keys.
#pragma once

#include "attend.h"

namespace {

constexpr long SPAN = 128, QUERIES = 24;  // multiples of any tile below
constexpr long GROUPED = 4 * QUERIES;

// Where AVX-512 has an instruction for it: the larger of two numbers, neither of which is a NaN that matters.
INLINE F16 peak(F16 a, F16 b) {
#if CABOCHON_AVX512
    a.part[0] = (F16::Part)_mm512_max_ps((__m512)a.part[0], (__m512)b.part[0]);
    return a;
#else
    return larger(a, b);
#endif
}

// Is any of them larger?
INLINE bool exceeds(F16 v, float top) {
#if CABOCHON_AVX512
    return _mm512_cmp_ps_mask((__m512)v.part[0], _mm512_set1_ps(top), _CMP_GT_OQ);
#else
    return maximum(v) > top;
#endif
}

INLINE void put_weights(Bf16* to, F16 w) {
#if CABOCHON_AVX512 && defined(__AVX512BF16__)
    store(to, _mm512_cvtneps_pbh((__m512)w.part[0]));
#else
    put(to, w);
#endif
}

// e^(v - top) for v <= top, to 2e-7 of its value, or 8e-5 where the result is rounded to bfloat16.
template <bool Rounded>
INLINE F16 decay(F16 v, float top) {
#if CABOCHON_AVX512
    if constexpr (Rounded) {  // as 2^n 2^r, with 2^r by a cubic whose error is spread over +-1/2
        const F16 t = fma(v, splat(1.44269504f), splat(top * -1.44269504f));
        F16 n, p;
        n.part[0] = (F16::Part)_mm512_roundscale_ps((__m512)t.part[0], 0);
        const F16 r = t - n;
        p = fma(splat(0.05517167f), r, splat(0.24261112f));
        p = fma(p, r, splat(0.69326099f));
        p = fma(p, r, splat(0.99992807f));
        p.part[0] = (F16::Part)_mm512_scalef_ps((__m512)p.part[0], (__m512)n.part[0]);
        return p;
    }
#endif
    return exponential(v - top);
}

#if CABOCHON_AVX512
constexpr int HIGH = 6, WIDE = 4;  // sums in registers: rows, and registers of columns
#elif CABOCHON_AVX2
constexpr int HIGH = 2, WIDE = 2;
#else
constexpr int HIGH = 1, WIDE = 4;
#endif
constexpr long STREAM = WIDE * LANES;  // keys that lie together

// out[r][..] (+)= left[r][..] . right, R rows by C registers. (Unrolled by hand: GCC would keep the sums in memory.)
template <bool Pairs, int R, int C>
void square(const uint32_t* left, long left_stride, const uint32_t* right, long right_stride, long inner, float* out,
            long out_stride, bool onto) {
    F16 acc[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) acc[r][c] = onto ? get(out + r * out_stride + c * LANES) : zero();
    for (long k = 0; k < inner; ++k) {
        F16 b[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) b[c] = load<F16>(right + k * right_stride + c * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) acc[r][c] = step<Pairs>(acc[r][c], left[r * left_stride + k], b[c]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) put(out + r * out_stride + c * LANES, acc[r][c]);
}

template <class T>
struct Mutual {
    static constexpr bool pairs = PAIRS<T>;
    const AttendAll& op;
    long lanes = (op.head + LANES - 1) / LANES * LANES;  // head width, filled up to whole registers
    long inner = pairs ? (op.head + 1) / 2 : op.head;    // words of a query or key
    long width = pairs ? SPAN / 2 : SPAN;              // words of a query's weights in a block
    long blocks = (op.count + SPAN - 1) / SPAN;

    const T* row(const void* from, long batch, long head, long token) const {
        return static_cast<const T*>(from) + ((batch * op.count + token) * op.heads + head) * op.head;
    }

    U16 words(const T* from, long word) const {
        if constexpr (pairs) {
            U16 some = U16::of(0);
            if (const long left = op.head - 2 * word; left > 0) memcpy(&some, from + 2 * word, least(left, 2 * LANES) * sizeof(T));
            return some;
        } else {
            return as<U16>(get(from + word, op.head - word));
        }
    }

    // One block of keys as [inner, SPAN] and of values as [width, lanes]; zero beyond the last token.
    void pack(long batch, long head, long block, uint32_t* keys, uint32_t* values) const {
        const long from = block * SPAN, count = least(SPAN, op.count - from);
        for (long j = 0; j < SPAN; j += LANES)
            for (long i = 0; i < inner; i += LANES) {
                U16 square[LANES];
                for (long lane = 0; lane < LANES; ++lane)
                    square[lane] = j + lane < count ? words(row(op.k, batch, head, from + j + lane), i) : U16::of(0);
                uint32_t columns[LANES * LANES];
                transpose(square, columns, LANES);
                for (long w = 0; w < least(LANES, inner - i); ++w) memcpy(keys + j / STREAM * STREAM * inner + (i + w) * STREAM + j % STREAM, columns + w * LANES, 64);
            }
        const auto value = [&](long j, long i) {
            return j < count ? as<U16>(get(row(op.v, batch, head, from + j) + i, op.head - i)) : U16::of(0);
        };
        for (long j = 0; j < width; ++j)
            for (long i = 0; i < lanes; i += LANES)
                store(values + j * lanes + i, pairs ? value(2 * j, i) >> 16 | value(2 * j + 1, i) : value(j, i));
    }

    // Scores of one query against a block to weights; rescales what the query has so far.
    void weigh(const float* scores, uint32_t* weights, long count, float* acc, float& top, F16& weight) const {
        static const int32_t counted[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        F16 v[SPAN / LANES], best = splat(-__builtin_inff());
        for (long i = 0; i < SPAN / LANES; ++i) {
            v[i] = get(scores + i * LANES);
            if (count < SPAN)
                v[i] = select(splat(int32_t(count)) > load<I16>(counted) + int32_t(i * LANES), v[i], splat(-1e30f));
            best = peak(v[i], best);
        }
        if (exceeds(best, top)) {
            const float now = maximum(best);
            const F16 keep = exponential(splat(top - now));
            for (long i = 0; i < lanes; i += LANES) put(acc + i, get(acc + i) * keep);
            weight = weight * keep;
            top = now;
        }
        for (long i = 0; i < SPAN / LANES; ++i) {
            const F16 w = decay<pairs>(v[i], top);
            weight = weight + w;
            if constexpr (pairs)
                put_weights(reinterpret_cast<Bf16*>(weights) + i * LANES, w);
            else
                store(weights + i * LANES, w);
        }
    }

    // acc += weights . values
    void mix(const uint32_t* weights, const uint32_t* values, float* acc) const {
        const auto some = [&]<int R, int C>(long i) {
            for (long r = 0; r < QUERIES; r += R)
                square<pairs, R, C>(weights + r * width, width, values + i, lanes, width, acc + r * lanes + i, lanes, true);
        };
        long i = 0;
        if (PARTS == 1 && lanes == 5 * LANES) return some.template operator()<4, 5>(0);  // heads of 72
        for (; i + WIDE * LANES <= lanes; i += WIDE * LANES) some.template operator()<HIGH, WIDE>(i);
        for (; i < lanes; i += LANES) some.template operator()<HIGH, 1>(i);
    }

    // Some queries of one head, over one block of its keys after another: all of them while the block is near.
    void group(long batch, long head, long first, const uint32_t* packed) const {
        const long count = least(GROUPED, op.count - first);
        auto* queries = static_cast<uint32_t*>(scratch(ATTENTION, 4 * (GROUPED * (inner + lanes) + QUERIES * (SPAN + width))));
        auto* acc = reinterpret_cast<float*>(queries + GROUPED * inner);
        auto* scores = acc + GROUPED * lanes;
        auto* weights = reinterpret_cast<uint32_t*>(scores + QUERIES * SPAN);
        float top[GROUPED];
        F16 weight[GROUPED];
        memset(queries, 0, 4 * (GROUPED * (inner + lanes) + QUERIES * (SPAN + width)));
        for (long r = 0; r < count; ++r) {
            top[r] = -__builtin_inff(), weight[r] = zero();
            for (long i = 0; i < inner; i += LANES) {
                uint32_t some[LANES];
                store(some, words(row(op.q, batch, head, first + r), i));
                memcpy(queries + r * inner + i, some, 4 * least(LANES, inner - i));
            }
        }
        for (long block = 0; block < blocks; ++block)
            for (long at = 0; at < count; at += QUERIES) {
                const uint32_t *keys = packed + block * (inner * SPAN + width * lanes), *values = keys + inner * SPAN;
                for (long j = 0; j < SPAN; j += STREAM)
                    for (long r = 0; r < QUERIES; r += HIGH)
                        square<pairs, HIGH, WIDE>(queries + (at + r) * inner, inner, keys + j * inner, STREAM, inner,
                                                  scores + r * SPAN + j, SPAN, false);
                for (long r = 0; r < least(QUERIES, count - at); ++r)
                    weigh(scores + r * SPAN, weights + r * width, op.count - block * SPAN, acc + (at + r) * lanes, top[at + r],
                          weight[at + r]);
                mix(weights, values, acc + at * lanes);
            }
        for (long r = 0; r < count; ++r) {
            T* to = const_cast<T*>(row(op.out, batch, head, first + r));
            const F16 share = splat(1.0f / sum(weight[r]));
            for (long i = 0; i < op.head; i += LANES) put(to + i, get(acc + r * lanes + i) * share, op.head - i);
        }
    }

    void run() const {
        const long size = inner * SPAN + width * lanes, groups = (op.count + GROUPED - 1) / GROUPED;
        auto* packed = static_cast<uint32_t*>(scratch(HIDDEN, 4 * blocks * size));
        for (long batch = 0; batch < op.batch; ++batch)
            for (long head = 0; head < op.heads; ++head) {
                parallel(blocks, [&](long b) { pack(batch, head, b, packed + b * size, packed + b * size + inner * SPAN); });
                parallel(groups, [&](long g) { group(batch, head, g * GROUPED, packed); });
            }
    }
};

void attend_all(const AttendAll& op) {
    if (op.dtype == FLOAT32)
        Mutual<float>{op}.run();
    else
        Mutual<Bf16>{op}.run();
}

}  // namespace
