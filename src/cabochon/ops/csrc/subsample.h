// What a conformer does first: two 3 x 3 convolutions with stride 2 over time and frequency, each with a norm over its
// channels (mean and variance) and ReLU behind it.
//
// What lies between the two is sixteen times as large as the sound and is never whole: an item makes the rows that some
// rows of the result need, gathers every place's neighbours side by side and multiplies them as `product` does.
#pragma once

#include "product.h"

namespace {

constexpr long ROWS_OUT = 8;  // of the result; an item makes two rows for each and one more

// y = relu(norm(x) * weight), all in sixteens
INLINE void put_normed(const float* x, const Bf16* weight, long channels, float eps, Bf16* y) {
    F16 total = zero(), squares = zero();
    for (long i = 0; i < channels; i += LANES) total = total + get(x + i);
    const F16 mean = splat(sum(total) / channels);
    for (long i = 0; i < channels; i += LANES) {
        const F16 v = get(x + i) - mean;
        squares = fma(v, v, squares);
    }
    const F16 scale = splat(1.0f / square_root(sum(squares) / channels + eps));
    for (long i = 0; i < channels; i += LANES) put_rounded(y + i, peak(zero(), (get(x + i) - mean) * scale * get(weight + i)));
}

struct Front {
    const Subsample& op;
    long rows = (op.mel.count + 1) / 2, width = (op.mel.width + 1) / 2;  // after the first convolution
    long rows_out = (rows + 1) / 2, width_out = (width + 1) / 2;
    long padded = (width + 2) * op.channels;  // of a row between the two, with a place of zeros at either end
    long reach = 3 * op.channels;             // numbers that lie together around a place

    // Row `row` of what lies between; `taps` [9, channels].
    void between(const float* taps, long row, Bf16* to) const {
        memset(to, 0, padded * sizeof *to);
        if (row < 0 || row >= rows) return;
        const auto *x = static_cast<const Bf16*>(op.mel.data), *weight = static_cast<const Bf16*>(op.norm);
        auto* sums = static_cast<float*>(scratch(BLOCK_A, op.channels * sizeof(float)));
        for (long column = 0; column < width; ++column) {
            float seen[9] = {};
            for (int i = 0; i < 9; ++i) {
                const long r = 2 * row + i / 3 - 1, c = 2 * column + i % 3 - 1;
                if (r >= 0 && r < op.mel.count && c >= 0 && c < op.mel.width) seen[i] = number(x + r * op.mel.stride + c);
            }
            for (long i = 0; i < op.channels; i += LANES) {
                F16 v = zero();
                for (int tap = 0; tap < 9; ++tap) v = fma(splat(seen[tap]), get(taps + tap * op.channels + i), v);
                put(sums + i, v);
            }
            put_normed(sums, weight, op.channels, op.eps, to + (column + 1) * op.channels);
        }
    }

    static float number(const Bf16* from) { return lane_zero(get(from, 1)); }

    // Rows first .. last of the result.
    void item(const float* taps, long first, long last) const {
        const long count = last - first, places = count * width_out;
        auto* made = static_cast<Bf16*>(scratch(HIDDEN, (2 * ROWS_OUT + 1) * padded * sizeof(Bf16)));
        for (long row = 0; row <= 2 * count; ++row) between(taps, 2 * first - 1 + row, made + row * padded);
        auto* sums = static_cast<Bf16*>(scratch(ATTENTION, ROWS_OUT * width_out * op.outputs * sizeof(Bf16)));
        const Rows x{nullptr, BFLOAT16, places, 3 * reach, 0};
        const Matrix weight{DENSE, BFLOAT16, op.second_taps, nullptr, op.outputs, 3 * reach};
        const Range all;
        const Product op2{x, {weight, weight}, all, {all, all}, PLAIN, {sums, BFLOAT16, places, op.outputs, op.outputs}, nullptr, 0};
        const Tower tower{op2};
        auto* left = static_cast<uint32_t*>(scratch(LEFT, (ROWS_OUT * width_out + UPRIGHT) * tower.stride * 4));
        for (long place = 0; place < places; ++place)
            for (long tap = 0; tap < 3; ++tap)
                tower.copy(made + (place / width_out * 2 + tap) * padded + place % width_out * 2 * op.channels, reach,
                           left + place * tower.stride + tap * reach / Tower::each);
        tower.item(left, 0, places, 0, tower.strips, {});
        finish(sums, first * width_out, places);
    }

    void finish(const Bf16* sums, long first, long places) const {
        auto* wide = static_cast<float*>(scratch(BLOCK_A, op.outputs * sizeof(float)));
        for (long place = 0; place < places; ++place) {
            for (long i = 0; i < op.outputs; i += LANES) put(wide + i, get(sums + place * op.outputs + i));
            put_normed(wide, static_cast<const Bf16*>(op.second_norm), op.outputs, op.eps,
                       static_cast<Bf16*>(op.y) + (first + place) * op.outputs);
        }
    }

    void run() const {
        auto* taps = static_cast<float*>(scratch(BLOCK_B, 9 * op.channels * sizeof(float)));
        for (long c = 0; c < op.channels; ++c)
            for (long tap = 0; tap < 9; ++tap) taps[tap * op.channels + c] = number(static_cast<const Bf16*>(op.taps) + c * 9 + tap);
        parallel((rows_out + ROWS_OUT - 1) / ROWS_OUT,
                 [&](long i) { item(taps, i * ROWS_OUT, least(rows_out, (i + 1) * ROWS_OUT)); });
    }
};

void subsample(const Subsample& op) { Front{op}.run(); }

}  // namespace
