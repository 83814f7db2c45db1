// Norms with what stands around them: a module's output on its way into the residual stream.
#pragma once

#include "product.h"

namespace {

// f(i, n) for sixteen lanes from i, of which n are within `width`.
template <class F>
INLINE void over_lanes(long width, F f) {
    long i = 0;
    for (; i + LANES <= width; i += LANES) f(i, LANES);
    if (i < width) f(i, width - i);
}

// y = (onto + share * norm(cut(x)) * weight) * factor, cut once more; x and weight of type T, onto and y of type S
template <class T, class S>
void settle_row(const Settle& op, long row) {
    const T *x = static_cast<const T*>(op.x.data) + row * op.x.stride, *weight = static_cast<const T*>(op.weight);
    const S* onto = op.onto ? static_cast<const S*>(op.onto) + row * op.x.width : nullptr;
    S* y = static_cast<S*>(op.y) + row * op.y_stride;
    const long width = op.x.width;
    F16 squares[2] = {zero(), zero()};
    over_lanes(width, [&](long i, long n) __attribute__((always_inline)) {
        const F16 v = cut(get(x + i, n), -op.bound, op.bound);
        F16& some = squares[i / LANES % 2];
        some = fma(v, v, some);
    });
    const F16 scale = splat(op.share / square_root(sum(squares[0] + squares[1]) / width + op.eps));
    over_lanes(width, [&](long i, long n) __attribute__((always_inline)) {
        F16 v = cut(get(x + i, n), -op.bound, op.bound) * scale * get(weight + i, n);
        if (onto) v = v + get(onto + i, n);
        put_rounded(y + i, cut(v * op.factor, op.then.low, op.then.high), n);
    });
}

INLINE void settle_row(const Settle& op, long row) {
    if (op.x.dtype == FLOAT32) return settle_row<float, float>(op, row);
    op.dtype == FLOAT32 ? settle_row<Bf16, float>(op, row) : settle_row<Bf16, Bf16>(op, row);
}

void settle(const Settle& op) {
    over_rows(op.x.count, op.x.width, [&](long row) { settle_row(op, row); });
}

}  // namespace
