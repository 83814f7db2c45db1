// Products with rows of a table that lie anywhere in it: a drafter looks only at the tokens of the nearest clusters.
#pragma once

#include "linear.h"

namespace {

constexpr long SOME = 64;         // numbers of an item
constexpr long ROWS_AHEAD = 8;    // asked for while earlier ones are multiplied; the CPU can't guess where they lie

template <class T>
void products_at(const T* x, const Matrix& table, const int64_t* ids, long count, float* y) {
    const auto row = [&](long i) { return static_cast<const T*>(table.codes) + ids[i] * table.cols; };
    for (long i = 0; i < count; i += 2) {
        for (long next = i + ROWS_AHEAD; next < least(i + ROWS_AHEAD + 2, count); ++next)
            for (long k = 0; k < table.cols; k += 64 / long(sizeof(T))) __builtin_prefetch(row(next) + k);
        const T *one = row(i), *other = row(least(i + 1, count - 1));
        float both[2];
        for (long from = 0; from < table.cols; from += INNER)
            dots<T, 1, 2>(x + from, 0, one + from, other - one, least(INNER, table.cols - from), from > 0, both);
        y[i] = both[0];
        if (i + 1 < count) y[i + 1] = both[1];
    }
}

void head_at(const HeadAt& op) {
    const Operand x = operand(op.x, DENSE, LEFT);
    const long items = blocks(op.some, SOME);
    parallel(op.x.count * items, [&](long item) {
        const long row = item / items, begin = item % items * SOME, count = least(SOME, op.some - begin);
        const int64_t* ids = op.ids + row * op.some + begin;
        float* y = op.y + row * op.some + begin;
        if (op.table.dtype == FLOAT32)
            products_at(static_cast<const float*>(x.data) + row * x.stride, op.table, ids, count, y);
        else if constexpr (!WIDENED<Bf16>)
            products_at(static_cast<const Bf16*>(x.data) + row * x.stride, op.table, ids, count, y);
        else
            for (long i = 0; i < count; ++i) widened_block(x, row, row + 1, op.table, ids[i], 1, y + i);
    });
}

}  // namespace
