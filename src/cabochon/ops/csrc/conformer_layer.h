// A conformer's layer in one call: what `model.conformer.Layer.forward` does op by op, by the same kernels and with the same
// roundings in between, without the interpreter. All in bfloat16.
//
// Whoever computes what a product reads writes it as tiles read it, cut to the product's range, so no rows are copied.
// A row is settled after one module and before the next while it is near. Queries, keys and values are one job, and at a
// job's end threads fetch the first weights of the next. Products read from three places in turn: both threads have what the
// last one read in their caches, and would wait for each other where it is overwritten.
#pragma once

#include "conformer.h"

namespace {

struct ConformerLayer {
    const Conformer& op;
    const ConformerWeights& w = *op.weights;
    long count = op.x.count, width = op.x.width, inner = w.up[0].matrix.rows;
    Bf16 *x = nullptr, *sums = nullptr, *hidden = nullptr, *left[3] = {};  // `left` and `hidden` as tiles read them

    static long apart(long width) { return 2 * Tower::apart((width + 1) / 2); }  // numbers from row to row, as tiles read them

    Rows rows(const void* data, long columns) const { return {const_cast<void*>(data), BFLOAT16, count, columns, columns}; }
    Rows laid_out(const void* data, long columns) const { return {const_cast<void*>(data), BFLOAT16, count, columns, apart(columns)}; }

    // share * norm(cut(from)) onto `onto`; `then` is what reads it.
    Settle settled(const void* from, const void* weight, Bf16* to, const Bf16* onto = nullptr, float share = 1) const {
        return {rows(from, width), weight, onto, w.eps, op.bound, share, to, width};
    }
    Settle settled_for(const Clipped& reader, const void* from, const void* weight, Bf16* to, float bound) const {
        return {rows(from, width), weight, nullptr, w.eps, bound, 1, to, apart(width), reader.in};
    }

    template <class... Settles>
    void settle_all(const Settles&... ops) const {
        over_rows(count, width * sizeof...(ops), [&](long row) { (settle_row<Bf16, Bf16>(ops, row), ...); });
    }

    Product multiplied(const Bf16* from, const Clipped& m, How how, const Rows& y, const void* onto = nullptr, Range then = {}) const {
        Matrix first = m.matrix, second = m.matrix;
        if (how == GATED) {
            first.rows = second.rows = m.matrix.rows / 2;
            second.codes = static_cast<const Bf16*>(first.codes) + first.rows * first.cols;
        }
        return {laid_out(from, first.cols), {first, second}, {}, {m.out, m.out}, how, y, onto, width, then};
    }

    template <class... Products>
    static void multiply(const Matrix* after, const Products&... ops) {
        if constexpr (Tower::pairs) {
            const Part parts[] = {{Tower{ops}, static_cast<const uint32_t*>(ops.x.data), 0, ops.x.count}...};
            Job(parts, sizeof...(ops), after).run();
        } else {
            (product(ops), ...);  // tiles read wider words than these rows have
        }
    }

    // To `sums`.
    void feed_forward(int i, const Bf16* from, const Matrix* after) const {
        multiply(&w.down[i].matrix, multiplied(from, w.up[i], SILU, laid_out(hidden, inner), nullptr, w.down[i].in));
        multiply(after, multiplied(hidden, w.down[i], PLAIN, rows(sums, width)));
    }

    void attention(Bf16* far) const {
        const Clipped* heads[] = {&w.q, &w.k, &w.v};
        Bf16* const places[] = {left[1], left[2], left[0]};
        const Bf16* from[3];
        for (int i = 0; i < 3; ++i) {
            int same = 0;
            while (heads[same]->in.low != heads[i]->in.low || heads[same]->in.high != heads[i]->in.high) ++same;
            from[i] = places[same];
            if (same == i) settle_all(settled_for(*heads[i], x, w.before_attention, places[i], op.bound));
        }
        Bf16 *q = hidden, *k = q + count * width, *v = k + count * width, *relative = far + (op.reach + UPRIGHT) * apart(width);
        for (long i = 0; i < op.reach; ++i) memcpy(far + i * apart(width), static_cast<const Bf16*>(op.distance) + i * width, width * sizeof *far);
        Product distances = multiplied(far, w.relative, PLAIN, rows(relative, width));
        distances.x.count = distances.y.count = op.reach;
        multiply(&w.post.matrix, distances, multiplied(from[0], w.q, PLAIN, rows(q, width)), multiplied(from[1], w.k, PLAIN, rows(k, width)),
                 multiplied(from[2], w.v, PLAIN, rows(v, width)));
        recent({q, k, v, relative, op.scale, left[2], BFLOAT16, w.key_scale, w.cap, count, w.heads, width / w.heads, op.reach, apart(width), w.post.in});
        multiply(&w.start.matrix, multiplied(left[2], w.post, PLAIN, rows(sums, width)));
    }

    // Added to `x`.
    void convolution(Bf16* taps) const {
        for (long i = 0; i < width; ++i)
            for (long tap = 0; tap < w.tap_count; ++tap) taps[tap * width + i] = static_cast<const Bf16*>(w.taps)[i * w.tap_count + tap];
        multiply(&w.end.matrix, multiplied(left[0], w.start, GATED, rows(hidden, width)));
        blend({rows(hidden, width), taps, w.in_convolution, w.tap_count, w.eps, op.bound, left[1], apart(width), w.end.in});
        multiply(&w.up[1].matrix, multiplied(left[1], w.end, PLAIN, rows(x, width), x));
    }

    void run() {
        const long some = (count + UPRIGHT) * apart(width), few = (op.reach + UPRIGHT) * apart(width) + op.reach * width;
        const long numbers = 2 * count * width + 3 * some + (count + UPRIGHT) * apart(inner) + few + w.tap_count * width;
        x = static_cast<Bf16*>(scratch(LAYER, numbers * sizeof *x));
        sums = x + count * width;
        hidden = sums + count * width;
        Bf16* next = hidden + (count + UPRIGHT) * apart(inner);
        for (Bf16*& rows : left) rows = next, next += some;
        auto* y = static_cast<Bf16*>(op.y);

        settle_all(settled_for(w.up[0], op.x.data, w.before_first, left[0], op.bound));
        feed_forward(0, left[0], &w.q.matrix);
        settle_all(settled(sums, w.after_first, x, static_cast<const Bf16*>(op.x.data), w.share));
        attention(next);
        settle_all(settled(sums, w.after_attention, x, x), settled_for(w.start, x, w.before_convolution, left[0], __builtin_inff()));
        convolution(next + few);
        settle_all(settled_for(w.up[1], x, w.before_second, left[2], op.bound));
        feed_forward(1, left[2], op.after);
        settle_all(settled(sums, w.after_second, x, x, w.share), settled(x, w.last, y));
    }
};

void conformer(const Conformer& op) { ConformerLayer{op}.run(); }

}  // namespace
