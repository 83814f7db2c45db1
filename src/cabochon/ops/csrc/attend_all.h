// Attention in which every token sees every token: the towers' pictures, without masks, pages or causal order.
//
// Queries lie across the lanes of registers and keys one below the other. So a query's largest score and its sum of
// weights are taken lane by lane, scores become weights while they are in registers, and weights leave as the right side
// of the second product, whose left side are the values as they lie. Neither side of either product is filled up to
// whole registers by the width of a head.
#pragma once

#include "attend.h"

namespace {

#if CABOCHON_AVX512
constexpr int UPRIGHT = 12, FEW = 4;  // rows of a tile: with two registers across, 24 sums; and of a last, lower one
#elif CABOCHON_AVX2
constexpr int UPRIGHT = 2, FEW = 1;
#else
constexpr int UPRIGHT = 1, FEW = 1;
#endif
constexpr int ACROSS = 2;
constexpr long QUERIES = ACROSS * LANES;
constexpr long SPAN = 384;      // keys of a block, a multiple of any UPRIGHT
constexpr uint32_t ONES = 0x3f803f80;  // two of them
constexpr float SLACK = 40.0f;  // so far may a score exceed what is taken off all before all are weighed anew

// Where AVX-512 has an instruction for it: the larger of two numbers, and `b` where either is none.
INLINE F16 peak(F16 a, F16 b) {
#if CABOCHON_AVX512
    a.part[0] = (F16::Part)_mm512_max_ps((__m512)a.part[0], (__m512)b.part[0]);
    return a;
#else
    return larger(a, b);
#endif
}

// Is any of `v` larger than its neighbour in `limit`?
INLINE bool exceeds(F16 v, F16 limit) {
#if CABOCHON_AVX512
    return _mm512_cmp_ps_mask((__m512)v.part[0], (__m512)limit.part[0], _CMP_GT_OQ);
#else
    return maximum(as<U16>(v > limit)) != 0;
#endif
}

INLINE void put_rounded(Bf16* to, F16 w) {
#if CABOCHON_AVX512 && defined(__AVX512BF16__)
    store(to, _mm512_cvtneps_pbh((__m512)w.part[0]));
#else
    put(to, w);
#endif
}

// The first n lanes, as far as there are so many.
INLINE void put_rounded(Bf16* to, F16 w, long n) {
#if CABOCHON_AVX512 && defined(__AVX512BF16__)
    if (n < LANES) return _mm256_mask_storeu_epi16(to, (1u << n) - 1, (__m256i)_mm512_cvtneps_pbh((__m512)w.part[0]));
    put_rounded(to, w);
#else
    put(to, w, n);
#endif
}
INLINE void put_rounded(float* to, F16 w, long n) { put(to, w, n); }

// Both rounded to bfloat16 and side by side in a lane, `a` below.
INLINE U16 paired(F16 a, F16 b) {
#if CABOCHON_AVX512 && defined(__AVX512BF16__)
    static const uint16_t order[2 * LANES] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b.part[0], (__m512)a.part[0]);
    U16 r;
    r.part[0] = (U16::Part)_mm512_permutexvar_epi16(load<__m512i>(order), both);
    return r;
#else
    return narrow(a) | narrow(b) << 16;
#endif
}

#if CABOCHON_AVX512
// 2^v, to 8e-5 of its value: 2^n 2^r for the whole number n below v, and 2^r by a cubic.
INLINE F16 power(F16 v) {
    F16 r, p;
    r.part[0] = (F16::Part)_mm512_reduce_ps((__m512)v.part[0], 1);
    p = fma(splat(0.078024524f), r, splat(0.226067150f));
    p = fma(p, r, splat(0.695833551f));
    p = fma(p, r, splat(0.999925209f));
    p.part[0] = (F16::Part)_mm512_scalef_ps((__m512)p.part[0], (__m512)v.part[0]);
    return p;
}
#endif

// e^(v - top), to 2e-7 of its value, or 8e-5 where the result is rounded to bfloat16.
template <bool Rounded>
INLINE F16 decay(F16 v, F16 top) {
#if CABOCHON_AVX512
    if constexpr (Rounded) return power(fma(v, splat(1.44269504f), top * -1.44269504f));
#endif
    return exponential(v - top);
}

// sums[r][c] += left[k][r] right[k][c] for k < inner. (Unrolled by hand: GCC would keep the sums in memory.)
template <bool Pairs, int R>
INLINE void accumulate(const uint32_t* left, long left_stride, const uint32_t* right, long inner, F16 (&sums)[R][ACROSS]) {
    for (long k = 0; k < inner; ++k) {
        F16 b[ACROSS];
#pragma GCC unroll 2
        for (int c = 0; c < ACROSS; ++c) b[c] = load<F16>(right + (k * ACROSS + c) * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int c = 0; c < ACROSS; ++c) sums[r][c] = step<Pairs>(sums[r][c], left[k * left_stride + r], b[c]);
    }
}

// Rows of words as `to[word * stride + row]`: `Keep` rows of at most sixteen, `words(row, word)` gives sixteen of one.
template <long Keep, class Words>
INLINE void pack_columns(long inner, const Words& words, uint32_t* to, long stride) {
    for (long k = 0; k < inner; k += LANES) {
        U16 square[LANES];
        for (long row = 0; row < LANES; ++row) square[row] = row < Keep ? words(row, k) : U16::of(0);
        alignas(64) uint32_t columns[LANES * LANES];
        transpose(square, columns, LANES);
        for (long w = 0; w < least(LANES, inner - k); ++w) memcpy(to + (k + w) * stride, columns + w * LANES, Keep * 4);
    }
}

// `n` numbers, two in a word; zero beyond.
INLINE U16 some_pairs(const Bf16* from, long n) {
    U16 some = U16::of(0);
#if CABOCHON_AVX512
    some.part[0] = (U16::Part)_mm512_maskz_loadu_epi16(n >= 2 * LANES ? ~0u : (1u << n) - 1, from);
#else
    memcpy(&some, from, least(n, 2 * LANES) * sizeof *from);
#endif
    return some;
}

// The queries of an item, and what they have seen so far.
struct Panel {
    uint32_t *queries, *weights;       // [words of a head, QUERIES], [words of a block's keys, QUERIES]
    float* mixed;                      // [height, QUERIES]
    F16 top[ACROSS], weight[ACROSS];   // what is taken off every score, and the weights' sum
    long begin;                        // the first word of the weights that is not mixed yet
};

template <class T>
struct Mutual {
    static constexpr bool pairs = PAIRS<T>;
    static constexpr long each = pairs ? 2 : 1;  // numbers in a word
    const AttendAll& op;
    long inner = (op.head + each - 1) / each;                              // words of a query or key
    long height = (op.head + UPRIGHT - 1) / UPRIGHT * UPRIGHT, room = (height + LANES - 1) / LANES * LANES;
    long blocks = (op.count + SPAN - 1) / SPAN;
    long block_words = SPAN * inner + SPAN / each * height;

    const T* row(const void* from, long batch, long head, long token) const {
        return static_cast<const T*>(from) + ((batch * op.count + token) * op.heads + head) * op.head;
    }

    // Sixteen words of a token's row; zero beyond its end and beyond the last token.
    U16 words(const void* from, long batch, long head, long token, long word) const {
        const long left = token < op.count ? op.head - each * word : 0;
        if (left <= 0) return U16::of(0);
        const T* at = row(from, batch, head, token) + each * word;
        if constexpr (pairs)
            return some_pairs(at, left);
        else
            return as<U16>(get(at, left));
    }

    // A block of keys as tiles [inner, UPRIGHT], then of values as tiles [keys, UPRIGHT].
    void pack(long batch, long head, long block, uint32_t* to) const {
        for (long j = 0; j < SPAN; j += UPRIGHT)
            pack_columns<UPRIGHT>(
                inner, [&](long i, long word) { return words(op.k, batch, head, block * SPAN + j + i, word); },
                to + j * inner, UPRIGHT);
        to += SPAN * inner;
        for (long i = 0; i < op.head; i += UPRIGHT)
            for (long token = block * SPAN; token < (block + 1) * SPAN; token += each, to += UPRIGHT) {
                const auto value = [&](long token) {
                    return token < op.count ? as<U16>(get(row(op.v, batch, head, token) + i, op.head - i)) : U16::of(0);
                };
                uint32_t some[LANES];
                store(some, pairs ? value(token) >> 16 | value(token + 1) : value(token));
                memcpy(to, some, UPRIGHT * sizeof *to);
            }
    }

    // R rows of what the panel has seen += values . weights
    template <int R>
    INLINE void mix_rows(const uint32_t* values, const uint32_t* weights, long inner, float* mixed) {
        F16 sums[R][ACROSS];
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < ACROSS; ++c) sums[r][c] = get(mixed + r * QUERIES + c * LANES);
        accumulate<pairs, R>(values, UPRIGHT, weights, inner, sums);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < ACROSS; ++c) put(mixed + r * QUERIES + c * LANES, sums[r][c]);
    }

    // All that is weighed of the block but not mixed yet, up to word `end`.
    void mix(const uint32_t* values, long end, Panel& panel) const {
        const uint32_t* weights = panel.weights + panel.begin * QUERIES;
        for (long i = 0; i < op.head; i += UPRIGHT) {
            const uint32_t* tile = values + i * (SPAN / each) + panel.begin * UPRIGHT;
            if (op.head - i > FEW)
                mix_rows<UPRIGHT>(tile, weights, end - panel.begin, panel.mixed + i * QUERIES);
            else
                mix_rows<FEW>(tile, weights, end - panel.begin, panel.mixed + i * QUERIES);
        }
        panel.begin = end;
    }

    // Some queries have met a score far above those before it: what they have seen counts for less.
    __attribute__((noinline, cold)) void raise(Panel& panel, const F16 (&best)[ACROSS]) const {
        for (int c = 0; c < ACROSS; ++c) {
            const F16 top = select(best[c] > panel.top[c] + SLACK, best[c], panel.top[c]);
            const F16 keep = exponential(panel.top[c] - top);
            for (long i = 0; i < height; ++i) {
                float* mixed = panel.mixed + i * QUERIES + c * LANES;
                put(mixed, get(mixed) * keep);
            }
            panel.weight[c] = panel.weight[c] * keep;
            panel.top[c] = top;
        }
    }

    // Scores of UPRIGHT keys, of which `count` count, to the weights from `word` on.
    void weigh(const uint32_t* keys, long count, const uint32_t* values, long word, Panel& panel) const {
        F16 scores[UPRIGHT][ACROSS];
#pragma GCC unroll 12
        for (int r = 0; r < UPRIGHT; ++r)
            for (int c = 0; c < ACROSS; ++c) scores[r][c] = zero();
        accumulate<pairs, UPRIGHT>(keys, UPRIGHT, panel.queries, inner, scores);
        if (count < UPRIGHT) {
#pragma GCC unroll 12
            for (int r = 0; r < UPRIGHT; ++r)
                for (int c = 0; c < ACROSS; ++c)
                    if (r >= count) scores[r][c] = splat(-1e30f);
        }
        F16 best[ACROSS];
#pragma GCC unroll 2
        for (int c = 0; c < ACROSS; ++c) {
            best[c] = scores[0][c];
#pragma GCC unroll 12
            for (int r = 1; r < UPRIGHT; ++r) best[c] = peak(best[c], scores[r][c]);
        }
        if (__builtin_expect(exceeds(best[0], panel.top[0] + SLACK) || exceeds(best[1], panel.top[1] + SLACK), false)) {
            mix(values, word, panel);
            raise(panel, best);
        }
        uint32_t* to = panel.weights + word * QUERIES;
#pragma GCC unroll 2
        for (int c = 0; c < ACROSS; ++c) {
            const F16 top = panel.top[c];
            F16 weight = panel.weight[c];
#pragma GCC unroll 12
            for (int r = 0; r < UPRIGHT; r += each) {
                const F16 a = decay<pairs>(scores[r][c], top);
                if constexpr (pairs) {
                    const U16 both = paired(a, decay<pairs>(scores[r + 1][c], top));
                    weight = step<pairs>(weight, ONES, as<F16>(both));  // as rounded: one that outweighs all counts as 1
                    store(to + (r / 2 * ACROSS + c) * LANES, both);
                } else {
                    weight = weight + a;
                    store(to + (r * ACROSS + c) * LANES, a);
                }
            }
            panel.weight[c] = weight;
        }
    }

    // As many queries of one head as lie across the registers, over one block of its keys after the other.
    void item(long batch, long head, long first, const uint32_t* packed) const {
        Panel panel;
        panel.queries = static_cast<uint32_t*>(scratch(ATTENTION, 4 * QUERIES * (inner + SPAN / each + room)));
        panel.weights = panel.queries + QUERIES * inner;
        panel.mixed = reinterpret_cast<float*>(panel.weights + QUERIES * SPAN / each);
        memset(panel.mixed, 0, 4 * QUERIES * room);
        for (long c = 0; c < ACROSS; ++c) {
            panel.top[c] = splat(-1e30f), panel.weight[c] = zero();
            pack_columns<LANES>(
                inner, [&](long i, long word) { return words(op.q, batch, head, first + c * LANES + i, word); },
                panel.queries + c * LANES, QUERIES);
        }
        for (long token = 0; token < op.count; token += SPAN, packed += block_words) {
            const long count = least(SPAN, op.count - token), tiles = (count + UPRIGHT - 1) / UPRIGHT;
            const uint32_t* values = packed + SPAN * inner;
            panel.begin = 0;
            for (long t = 0; t < tiles; ++t)
                weigh(packed + t * UPRIGHT * inner, count - t * UPRIGHT, values, t * UPRIGHT / each, panel);
            mix(values, tiles * UPRIGHT / each, panel);
        }
        for (long c = 0; c < ACROSS; ++c) finish(batch, head, first + c * LANES, panel, c);
    }

    // Sixteen queries' results, each as a row again.
    void finish(long batch, long head, long token, const Panel& panel, long c) const {
        const F16 share = splat(1.0f) / panel.weight[c];
        for (long i = 0; i < op.head; i += LANES) {
            U16 square[LANES];
            for (long w = 0; w < LANES; ++w) square[w] = as<U16>(get(panel.mixed + (i + w) * QUERIES + c * LANES) * share);
            alignas(64) float rows[LANES * LANES];
            transpose(square, reinterpret_cast<uint32_t*>(rows), LANES);
            for (long query = 0; query < least(LANES, op.count - token); ++query)
                put(const_cast<T*>(row(op.out, batch, head, token + query)) + i, get(rows + query * LANES), op.head - i);
        }
    }

    void run() const {
        auto* packed = static_cast<uint32_t*>(scratch(HIDDEN, 4 * blocks * block_words));
        for (long batch = 0; batch < op.batch; ++batch)
            for (long head = 0; head < op.heads; ++head) {
                parallel(blocks, [&](long b) { pack(batch, head, b, packed + b * block_words); });
                parallel((op.count + QUERIES - 1) / QUERIES, [&](long i) { item(batch, head, i * QUERIES, packed); });
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
