// Many rows times a bfloat16 matrix, as the towers need it: ranges cut on the way in and out, activations on the way out.
//
// The matrix is packed as it is read: in strips of 32 outputs that a thread keeps in its cache for all rows. That happens
// anew for every call; for several hundred rows it is a hundredth of the work, and a checkpoint may stay mapped as it lies.
// Rows are only copied (and cut): a tile reads twelve of them side by side, a word of each for all outputs at a time.
#pragma once

#include "attend_all.h"

namespace {

constexpr int LOW = (UPRIGHT + 1) / 2;              // rows of a last tile, where that is enough
constexpr long STRIP = 2 * LANES, STRIPS = 4;       // outputs of a strip; strips of an item, at most
constexpr long DEPTH = 640;                         // words along the inner axis before sums go to memory
constexpr long SHEET = 96, ROWS_COPIED = 1536;      // rows that meet a depth of the matrix together; that are copied together
constexpr long PIECES = 2;                          // of the rows, so that threads may share a strip and end together

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
    static constexpr long each = pairs ? 2 : 1;  // numbers in a word
    const Product& op;
    long inner = (op.x.width + each - 1) / each;
    long cuts = (inner + DEPTH - 1) / DEPTH, depth = (inner + cuts - 1) / cuts;
    long columns = op.how == GELU_TIMES || op.how == GATED ? LANES : STRIP;  // outputs that a strip gives
    long strips = (op.y.width + columns - 1) / columns;
    long stride = ((inner + LANES - 1) / LANES | 1) * LANES;  // of copied rows: an odd number of cache lines, which spreads them
    bool cuts_in = op.in.low > -__builtin_inff() || op.in.high < __builtin_inff();

    // Sixteen words of `left` numbers, zero beyond.
    U16 words(const Bf16* from, long left, bool cutting) const {
        if constexpr (pairs) {
            const U16 some = some_pairs(from, left);
            if (!cutting) return some;
            const F16 even = cut(as<F16>(some << 16), op.in.low, op.in.high);
            const F16 odd = cut(as<F16>(some & 0xffff0000u), op.in.low, op.in.high);
            return as<U16>(odd) | as<U16>(even) >> 16;  // both are bfloat16 numbers: nothing is lost
        } else {
            const F16 some = get(from, left);
            return as<U16>(cutting ? cut(some, op.in.low, op.in.high) : some);
        }
    }

    // `count` outputs' weights, at most 16, as `to[word * STRIP + output]`. Meanwhile the next sixteen are fetched.
    void pack(const Bf16* rows, long count, uint32_t* to) const {
        const long width = op.x.width;
        for (long k = 0; k < inner; k += LANES) {
            U16 square[LANES];
            for (long i = 0; i < LANES; ++i) {
                const Bf16* from = rows + i * width + each * k;
                __builtin_prefetch(from + LANES * width, 0, 2);
                square[i] = i < count ? words(from, width - each * k, false) : U16::of(0);
            }
            alignas(64) uint32_t across[LANES * LANES];
            transpose(square, across, LANES);
            for (long w = 0; w < least(LANES, inner - k); ++w) memcpy(to + (k + w) * STRIP, across + w * LANES, LANES * 4);
        }
    }

    void pack_strip(long strip, uint32_t* to) const {
        for (long half = 0; half < 2; ++half) {
            const bool other = half && columns == LANES;  // the upper half is the second matrix's
            const Matrix& w = op.weight[other];
            const long from = strip * columns + (other ? 0 : half * LANES);
            const auto* rows = static_cast<const Bf16*>(w.codes) + from * w.cols;
            pack(rows, least(LANES, w.rows - from), to + half * LANES);
        }
    }

    // Sums to outputs: 32 of one matrix, or 16 of the two together.
    INLINE void finish(const Product& op, Bf16* to, const Bf16* onto, F16 a, F16 b, long left) {
        a = cut(a, op.out[0].low, op.out[0].high);
        if (op.how == GELU_TIMES || op.how == GATED) {
            b = cut(b, op.out[1].low, op.out[1].high);
            a = op.how == GATED ? a * logistic<true>(b) : a * logistic<true>(gelu_slope(a)) * b;
            return left >= LANES ? put_rounded(to, a) : put(to, a, left);
        }
        b = cut(b, op.out[0].low, op.out[0].high);
        if (op.how == SILU) a = a * logistic<true>(a), b = b * logistic<true>(b);
        if (onto) a = a + get(onto, left), b = b + get(onto + LANES, most(0, left - LANES));
        if (left >= STRIP) {
            put_rounded(to, a);
            put_rounded(to + LANES, b);
        } else {
            put(to, a, least(left, LANES));
            if (left > LANES) put(to + LANES, b, left - LANES);
        }
    }

    template <int R>
    void tile(const uint32_t* left, const uint32_t* right, long from, float* sums, long row, long output) const {
        F16 acc[R][2];
#pragma GCC unroll 12  // else GCC keeps the sums in memory
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < 2; ++c) acc[r][c] = from ? get(sums + r * STRIP + c * LANES) : zero();
        const long until = least(from + depth, inner), s = stride;
        const uint32_t* rows[] = {left + from, left + from + 3 * s, left + from + 6 * s, left + from + 9 * s};
        right += from * STRIP;
        for (long k = from; k < until;) {
            const uint32_t* ahead = rows[0] + 3 * LANES;  // of one row after the other; the strip's own stream is found by the CPU
            for (const long stop = least(k + R, until); k < stop; ++k, ahead += s, right += STRIP) {
                __builtin_prefetch(ahead);
                const F16 low = load<F16>(right), high = load<F16>(right + LANES);
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) {
                    const uint32_t word = rows[r / 3][r % 3 * s];
                    acc[r][0] = step<pairs>(acc[r][0], word, low);
                    acc[r][1] = step<pairs>(acc[r][1], word, high);
                }
#pragma GCC unroll 4
                for (auto& row : rows) ++row;
            }
        }
        if (until < inner) {
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r)
                for (int c = 0; c < 2; ++c) put(sums + r * STRIP + c * LANES, acc[r][c]);
            return;
        }
        auto* to = static_cast<Bf16*>(op.y.data) + row * op.y.stride + output;
        const auto* onto = op.onto ? static_cast<const Bf16*>(op.onto) + row * op.onto_stride + output : nullptr;
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
            if (row + r < op.x.count)
                finish(op, to + r * op.y.stride, onto ? onto + r * op.onto_stride : nullptr, acc[r][0], acc[r][1], op.y.width - output);
    }

    // Strips first .. last over the copied rows `row` .. `row` + `count`.
    void item(const uint32_t* left, long row, long count, long first, long last) const {
        auto* packed = static_cast<uint32_t*>(scratch(SORTED, STRIPS * STRIP * inner * 4));
        auto* sums = static_cast<float*>(scratch(RESULT, SHEET * STRIPS * STRIP * 4));
        for (long s = first; s < last; ++s) pack_strip(s, packed + (s - first) * STRIP * inner);
        for (long top = 0; top < count; top += SHEET)
            for (long from = 0; from < inner; from += depth)
                for (long r = top; r < least(count, top + SHEET); r += UPRIGHT)
                    for (long s = first; s < last; ++s) {
                        const auto some = count - r > LOW ? &Tower::tile<UPRIGHT> : &Tower::tile<LOW>;
                        (this->*some)(left + r * stride, packed + (s - first) * STRIP * inner, from,
                                      sums + ((r - top) * STRIPS + (s - first) * UPRIGHT) * STRIP, row + r, s * columns);
                    }
    }

    // A run of items, of which PIECES make a strip: some strips at a time, and single pieces at its ends.
    void items(const uint32_t* left, long row, long count, long first, long last) const {
        const long piece = ((count + UPRIGHT - 1) / UPRIGHT + PIECES - 1) / PIECES * UPRIGHT;
        while (first < last) {
            const long strip = first / PIECES, whole = (last - first) / PIECES;
            if (first % PIECES || !whole) {
                const long begin = first % PIECES * piece, end = least(count, (last - strip * PIECES) * piece);
                if (begin < end) item(left + begin * stride, row + begin, end - begin, strip, strip + 1);
                first = least(last, (strip + 1) * PIECES);
            } else {
                const long some = least(STRIPS, whole);
                item(left, row, count, strip, strip + some);
                first += some * PIECES;
            }
        }
    }

    // `count` numbers of a row as words, cut; whole registers are written.
    void copy(const Bf16* from, long count, uint32_t* to) const {
        for (long k = 0; each * k < count; k += LANES) store(to + k, words(from + each * k, count - each * k, cuts_in));
    }

    void run() const {
        for (long row = 0; row < op.x.count; row += ROWS_COPIED) {
            const long count = least(ROWS_COPIED, op.x.count - row), tiles = (count + UPRIGHT - 1) / UPRIGHT;
            auto* left = static_cast<uint32_t*>(scratch(LEFT, tiles * UPRIGHT * stride * 4));
            parallel(tiles, [&](long t) {
                for (long r = t * UPRIGHT; r < least(count, (t + 1) * UPRIGHT); ++r)
                    copy(static_cast<const Bf16*>(op.x.data) + (row + r) * op.x.stride, op.x.width, left + r * stride);
            });
            parallel_runs(strips * PIECES, [&](long first, long last) { items(left, row, count, first, last); });
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
