// The k largest numbers of a row and where they stand, in one run through the row.
//
// The best so far lie in a heap whose root is the k-th of them. Few numbers beat it (about k ln(width / k) in a row in
// random order), so nearly all of the run is one comparison per number.
#pragma once

#include "rows.h"

namespace {

constexpr long STRIDE = 4 * LANES;

// A number and its place as one key: larger for the larger number, and of equal ones for the earlier; NaN before all.
INLINE uint64_t ranked(float value, long place) {
    const float plain = value + 0.0f;  // -0 equals 0
    uint32_t bits;
    memcpy(&bits, &plain, sizeof bits);
    bits = value != value ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
    return uint64_t(bits) << 32 | uint32_t(~place);
}
INLINE long place_of(uint64_t key) { return uint32_t(~key); }

// Let heap[at] sink to its place; the smallest key comes to lie at the root.
INLINE void sink(uint64_t* heap, long count, long at) {
    const uint64_t key = heap[at];
    for (long child; (child = 2 * at + 1) < count; at = child) {
        child += child + 1 < count && heap[child + 1] < heap[child];
        if (heap[child] >= key) break;
        heap[at] = heap[child];
    }
    heap[at] = key;
}

// One bit per lane that is above `floor` or NaN.
INLINE uint64_t above(F16 v, F16 floor) {
#if CABOCHON_AVX512
    return _mm512_cmp_ps_mask((__m512)v.part[0], (__m512)floor.part[0], _CMP_NLE_UQ);
#elif CABOCHON_AVX2
    uint64_t bits = 0;
    EACH(i) bits |= uint64_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v.part[i], (__m256)floor.part[i], _CMP_NLE_UQ))) << i * WIDTH;
    return bits;
#else
    static constexpr int32_t LANE[LANES] = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                            1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    return 0xffff - sum(load<I16>(LANE) & (floor >= v));
#endif
}

void largest_of_row(const float* x, long width, long k, float* values, int64_t* places) {
    auto* heap = static_cast<uint64_t*>(scratch(LISTS, k * sizeof(uint64_t)));
    for (long i = 0; i < k; ++i) heap[i] = ranked(x[i], i);
    for (long at = k / 2; at--;) sink(heap, k, at);
    auto offer = [&](long i) {
        const uint64_t key = ranked(x[i], i);
        if (key <= heap[0]) return;
        heap[0] = key;
        sink(heap, k, 0);
    };
    long i = k;
    for (; i + STRIDE <= width; i += STRIDE) {
        const F16 floor = splat(x[place_of(heap[0])]);
        uint64_t found = 0;
        for (int j = 0; j < 4; ++j) found |= above(load<F16>(x + i + j * LANES), floor) << j * LANES;
        for (; found; found &= found - 1) offer(i + __builtin_ctzll(found));
    }
    for (; i < width; ++i) offer(i);
    for (long left = k; left--;) {  // the smallest goes last
        const long place = place_of(heap[0]);
        values[left] = x[place];
        places[left] = place;
        heap[0] = heap[left];
        sink(heap, left, 0);
    }
}

void largest(const Largest& op) {
    over_rows(op.x.count, op.x.width, [&](long row) {
        largest_of_row(static_cast<const float*>(op.x.data) + row * op.x.stride, op.x.width, op.k, op.values + row * op.k,
                       op.places + row * op.k);
    });
}

}  // namespace
