// Many rows times a bfloat16 matrix, as the towers need it: ranges cut on the way in and out, activations on the way out.
//
// Both sides are packed as they are read: rows in tiles of twelve (where they are cut, too), the matrix in strips of 32
// outputs that one item keeps in its cache for all rows. A matrix is packed anew for every call; for several hundred
// rows that is a hundredth of the work, and a checkpoint may stay mapped as it lies.
#pragma once

#include "attend_all.h"

namespace {

constexpr int LOW = (UPRIGHT + 1) / 2;              // rows of a last tile, where that is enough
constexpr long STRIP = 2 * LANES, STRIPS = 4;       // outputs of a strip; strips of an item, at most
constexpr long DEPTH = 640;                         // words along the inner axis before sums go to memory
constexpr long SHEET = 96, ROWS_PACKED = 1536;      // rows that meet a depth of the matrix together; that are packed together

// Not-a-numbers pass, as they do in torch.
INLINE F16 cut(F16 v, float low, float high) {
#if CABOCHON_AVX512
    v = peak(splat(low), v);
    v.part[0] = (F16::Part)_mm512_min_ps(_mm512_set1_ps(high), (__m512)v.part[0]);
    return v;
#else
    v = select(splat(low) > v, splat(low), v);
    return select(v > splat(high), splat(high), v);
#endif
}

// 1 / (1 + e^-v); to 2e-4 of its value where the result is rounded to bfloat16.
template <bool Rounded>
INLINE F16 logistic(F16 v) {
#if CABOCHON_AVX512
    if constexpr (Rounded) {
        F16 r;
        r.part[0] = (F16::Part)_mm512_rcp14_ps((__m512)(1.0f + decay<true>(zero(), v)).part[0]);
        return r;
    }
#endif
    return 1.0f / (1.0f + exponential(0.0f - v));
}

struct Tower {
    static constexpr bool pairs = PAIRS<Bf16>;
    const Product& op;
    long inner = pairs ? (op.x.width + 1) / 2 : op.x.width;  // words of a row: pairs of neighbours, or floats
    long cuts = (inner + DEPTH - 1) / DEPTH, depth = (inner + cuts - 1) / cuts;
    long columns = op.how == GELU_TIMES || op.how == GATED ? LANES : STRIP;  // outputs that a strip gives
    long strips = (op.y.width + columns - 1) / columns;
    bool cuts_in = op.in.low > -__builtin_inff() || op.in.high < __builtin_inff();

    U16 words(const Bf16* row, long word, bool cutting) const {
        const long at = pairs ? 2 * word : word, left = op.x.width - at;
        if constexpr (pairs) {
            U16 some;
            if (left >= 2 * LANES)
                some = load<U16>(row + at);
            else {
                some = U16::of(0);
                memcpy(&some, row + at, left * sizeof(Bf16));
            }
            if (!cutting) return some;
            const F16 even = cut(as<F16>(some << 16), op.in.low, op.in.high);
            const F16 odd = cut(as<F16>(some & 0xffff0000u), op.in.low, op.in.high);
            return as<U16>(odd) | as<U16>(even) >> 16;  // both are bfloat16 numbers: nothing is lost
        } else {
            const F16 some = get(row + at, left);
            return as<U16>(cutting ? cut(some, op.in.low, op.in.high) : some);
        }
    }

    // `count` rows, at most 16, as `to[word * stride + row]`; `Keep` of each sixteen are written.
    template <long Keep>
    void pack(const Bf16* rows, long row_stride, long count, bool cutting, uint32_t* to, long stride) const {
        constexpr long AHEAD = 256;
        for (long k = 0; k < inner; k += LANES) {
            U16 square[LANES];
            for (long i = 0; i < LANES; ++i) {
                if (i >= Keep || i >= count) {
                    square[i] = U16::of(0);
                    continue;
                }
                __builtin_prefetch(rows + i * row_stride + (pairs ? 2 * k : k) + AHEAD);
                square[i] = words(rows + i * row_stride, k, cutting);
            }
            alignas(64) uint32_t across[LANES * LANES];
            transpose(square, across, LANES);
            for (long w = 0; w < least(LANES, inner - k); ++w) memcpy(to + (k + w) * stride, across + w * LANES, Keep * 4);
        }
    }

    void pack_strip(long strip, uint32_t* to) const {
        for (long half = 0; half < 2; ++half) {
            const bool other = half && columns == LANES;  // the upper half is the second matrix's
            const Matrix& w = op.weight[other];
            const long from = strip * columns + (other ? 0 : half * LANES);
            const auto* rows = static_cast<const Bf16*>(w.codes) + from * w.cols;
            pack<LANES>(rows, w.cols, least(LANES, w.rows - from), false, to + half * LANES, STRIP);
        }
    }

    // Sums to outputs: 32 of one matrix, or 16 of the two together.
    INLINE void finish(const Product& op, Bf16* to, F16 a, F16 b, long left) {
        a = cut(a, op.out[0].low, op.out[0].high);
        if (op.how == GELU_TIMES || op.how == GATED) {
            b = cut(b, op.out[1].low, op.out[1].high);
            a = op.how == GATED ? a * logistic<true>(b) : a * logistic<true>(gelu_slope(a)) * b;
            return left >= LANES ? put_rounded(to, a) : put(to, a, left);
        }
        b = cut(b, op.out[0].low, op.out[0].high);
        if (op.how == SILU) a = a * logistic<true>(a), b = b * logistic<true>(b);
        if (left >= STRIP) {
            put_rounded(to, a);
            put_rounded(to + LANES, b);
        } else {
            put(to, a, least(left, LANES));
            if (left > LANES) put(to + LANES, b, left - LANES);
        }
    }

    template <int R>
    void tile(const uint32_t* left, const uint32_t* strip, long from, float* sums, long row, long output) const {
        F16 acc[R][2];
#pragma GCC unroll 12  // else GCC keeps the sums in memory
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < 2; ++c) acc[r][c] = from ? get(sums + r * STRIP + c * LANES) : zero();
        const long until = least(from + depth, inner);
        for (long k = from; k < until; ++k) {
            __builtin_prefetch(left + (k + 24) * UPRIGHT);  // the strip's own stream is found by the CPU
            const F16 low = load<F16>(strip + k * STRIP), high = load<F16>(strip + k * STRIP + LANES);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                acc[r][0] = step<pairs>(acc[r][0], left[k * UPRIGHT + r], low);
                acc[r][1] = step<pairs>(acc[r][1], left[k * UPRIGHT + r], high);
            }
        }
        if (until < inner) {
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < 2; ++c) put(sums + r * STRIP + c * LANES, acc[r][c]);
            return;
        }
        auto* to = static_cast<Bf16*>(op.y.data) + row * op.y.stride + output;
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
            if (row + r < op.x.count) finish(op, to + r * op.y.stride, acc[r][0], acc[r][1], op.y.width - output);
    }

    // Strips first .. last over the packed rows `row` .. `row` + `count`.
    void item(const uint32_t* left, long row, long count, long first, long last) const {
        auto* packed = static_cast<uint32_t*>(scratch(SORTED, (last - first) * STRIP * inner * 4));
        auto* sums = static_cast<float*>(scratch(RESULT, SHEET * STRIPS * STRIP * 4));
        for (long s = first; s < last; ++s) pack_strip(s, packed + (s - first) * STRIP * inner);
        for (long top = 0; top < count; top += SHEET)
            for (long from = 0; from < inner; from += depth)
                for (long r = top; r < least(count, top + SHEET); r += UPRIGHT)
                    for (long s = first; s < last; ++s) {
                        const auto some = count - r > LOW ? &Tower::tile<UPRIGHT> : &Tower::tile<LOW>;
                        (this->*some)(left + r * inner, packed + (s - first) * STRIP * inner, from,
                                      sums + ((r - top) * STRIPS + (s - first) * UPRIGHT) * STRIP, row + r, s * columns);
                    }
    }

    // Strips per item so that the threads end together.
    long share() const {
        long best = 1, least_rounds = __LONG_MAX__;
        for (long some = 1; some <= STRIPS; ++some) {
            const long items = (strips + some - 1) / some, rounds = (items + threads() - 1) / threads() * some;
            if (rounds <= least_rounds) best = some, least_rounds = rounds;
        }
        return best;
    }

    void run() const {
        const long some = share(), items = (strips + some - 1) / some;
        for (long row = 0; row < op.x.count; row += ROWS_PACKED) {
            const long count = least(ROWS_PACKED, op.x.count - row), tiles = (count + UPRIGHT - 1) / UPRIGHT;
            auto* left = static_cast<uint32_t*>(scratch(LEFT, tiles * UPRIGHT * inner * 4));
            parallel(tiles, [&](long t) {
                const auto* from = static_cast<const Bf16*>(op.x.data) + (row + t * UPRIGHT) * op.x.stride;
                pack<UPRIGHT>(from, op.x.stride, least(UPRIGHT, count - t * UPRIGHT), cuts_in, left + t * UPRIGHT * inner, UPRIGHT);
            });
            parallel(items, [&](long i) { item(left, row, count, i * some, least((i + 1) * some, strips)); });
        }
    }
};

void product(const Product& op) { Tower{op}.run(); }

// A tile's steps on all threads without its loads: what no product can be faster than.
double spin(long rounds) {
    constexpr bool pairs = PAIRS<Bf16>;
    constexpr int SUMS = 8 / PARTS;
    float start[2 * LANES];
    for (int i = 0; i < 2 * LANES; ++i) start[i] = i;  // were they the same, one sum would be computed for all
    parallel(threads(), [&](long) {
        F16 acc[SUMS];
#pragma GCC unroll 8
        for (int i = 0; i < SUMS; ++i) acc[i] = get(start + i);
        for (long k = 0; k < rounds; ++k) {
            const F16 right = splat(float(k));
#pragma GCC unroll 8
            for (int i = 0; i < SUMS; ++i) acc[i] = step<pairs>(acc[i], ONES, right);
        }
        F16 all = zero();
#pragma GCC unroll 8
        for (int i = 0; i < SUMS; ++i) all = all + acc[i];
        *static_cast<volatile float*>(scratch(RESULT, sizeof(float))) = sum(all);
    });
    return double(threads()) * rounds * SUMS * LANES * (pairs ? 4 : 2);
}

}  // namespace
