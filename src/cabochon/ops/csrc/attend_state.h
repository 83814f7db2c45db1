// The online softmax of attention: what blocks of keys come to, one by one, and as one.
#pragma once

#include "simd.h"

namespace {

// What a block comes to, or several: the state of the online softmax of a unit's rows.
struct State {
    float *acc, *top, *weight;  // [rows, head], [rows], [rows]

    static size_t floats(long rows, long head) { return rows * (head + 2 * LANES); }
    static State in(float* memory, long rows, long head) {
        return {memory, memory + rows * head, memory + rows * (head + LANES)};
    }
    // Nothing is seen yet; what `acc` holds is left to whoever writes there first.
    void forget(long rows) const {
        for (long r = 0; r < rows; ++r) top[r] = -__builtin_inff(), weight[r] = 0;
    }
    // Row r, now that there is a larger score: all so far counts for less.
    void lower(long r, float to, long head) const {
        if (!(to > top[r])) return;
        const float share = lane_zero(exponential(splat(top[r] - to)));
        top[r] = to;
        if (weight[r] == 0) return;
        weight[r] *= share;
        for (long i = 0; i < head; i += LANES) put(acc + r * head + i, get(acc + r * head + i) * share);
    }

    // Row r of this, then of `count` later states, each so many floats after the one before, as one. Many at a time, so that
    // the sums stay in registers meanwhile.
    void merge(State later, long count, size_t apart, long r, long head) const {
        while (count > 0) {
            Share shares[64];
            long some = 0;
            for (; count > 0 && some < 64; --count, later = {later.acc + apart, later.top + apart, later.weight + apart})
                if (later.weight[r] != 0) shares[some++] = take(later, r, head);
            for (long i = 0; i < head; i += LANES) {
                F16 sum = get(acc + r * head + i);
                for (long n = 0; n < some; ++n) sum = fma(sum, splat(shares[n].mine), get(shares[n].acc + i) * shares[n].other);
                put(acc + r * head + i, sum);
            }
        }
    }

private:
    // By how much all so far counts for less, and how much what comes does.
    struct Share {
        const float* acc;
        float mine, other;
    };
    Share take(const State& later, long r, long head) const {
        const float both = later.top[r] > top[r] ? later.top[r] : top[r];
        const float mine = lane_zero(exponential(splat(top[r] - both))), other = lane_zero(exponential(splat(later.top[r] - both)));
        top[r] = both;
        weight[r] = weight[r] * mine + later.weight[r] * other;
        return {later.acc + r * head, mine, other};
    }
};

}  // namespace
