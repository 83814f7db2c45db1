// Norms with what stands around them: a module's output on its way into the residual stream.
#pragma once

#include "product.h"

namespace {

// y = (onto + share * norm(cut(x)) * weight) * factor, cut once more; weight of type T, all else of type S
template <class T, class S>
void settle_row(const Settle& op, long row) {
    const S* x = static_cast<const S*>(op.x.data) + row * op.x.stride;
    const auto* weight = static_cast<const T*>(op.weight);
    const S* onto = op.onto ? static_cast<const S*>(op.onto) + row * op.x.width : nullptr;
    S* y = static_cast<S*>(op.y) + row * op.y_stride;
    const long width = op.x.width;
    const float squares = sum_of_squares(width, [&](long i, long n) __attribute__((always_inline)) {
        return cut(get(x + i, n), -op.bound, op.bound);
    });
    const F16 scale = splat(op.share / square_root(squares / width + op.eps));
    over_lanes(width, [&](long i, long n) __attribute__((always_inline)) {
        F16 v = cut(get(x + i, n), -op.bound, op.bound) * scale * get(weight + i, n);
        if (onto) v = v + get(onto + i, n);
        put_rounded(y + i, cut(v * op.factor, op.then.low, op.then.high), n);
    });
}

INLINE void settle_row(const Settle& op, long row) {
    if (op.x.dtype == BFLOAT16) return settle_row<Bf16, Bf16>(op, row);
    op.dtype == FLOAT32 ? settle_row<float, float>(op, row) : settle_row<Bf16, float>(op, row);
}

void settle(const Settle& op) {
    over_rows(op.x.count, op.x.width, [&](long row) { settle_row(op, row); });
}

}  // namespace
