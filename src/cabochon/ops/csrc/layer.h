// A decoder layer in one call: what `model.decoder.Layer.forward` does op by op, by the same kernels and with the same
// roundings in between, without the interpreter. A decode step of a small model is mostly calls otherwise.
//
// Only layers with dense feed-forward and with keys and values apart; the others stay in Python.
#pragma once

#include "attend.h"
#include "rows.h"

namespace {

template <class T>
struct Decoder {
    const Layer& op;
    const LayerWeights& w = *op.weights;
    long count = op.x.count, width = op.x.width;
    long queries = w.heads * w.head, keys = w.kv_heads * w.head;

    Rows span(T* data, long columns) const { return {data, w.dtype, count, columns, columns}; }
    static const T* gain(const void* weight) { return static_cast<const T*>(weight); }

    void normed(const T* from, const void* weight, T* to) const {
        over_rows(count, width, [&](long row) { norm_row(from + row * width, gain(weight), to + row * width, width, w.eps); });
    }

    // to = x + norm(y), y being spoilt, and times the layer's scalar where it is the last thing.
    void add_normed(const T* x, T* y, const void* weight, T* to, bool last) const {
        const F16 scalar = splat(lane_zero(get(gain(w.scalar), 1)));
        over_rows(count, width, [&](long row) {
            T* mine = y + row * width;
            norm_row(mine, gain(weight), mine, width, w.eps);
            for (long i = 0; i < width; i += LANES) {
                const long at = row * width + i, left = width - i;
                put(to + at, get(x + at, left) + get(mine + i, left), left);
                if (last) put(to + at, get(to + at, left) * scalar, left);
            }
        });
    }

    void turned(const T* from, T* to, long row) const {
        const T *cos = gain(op.cos) + row * op.half_rotated, *sin = gain(op.sin) + row * op.half_rotated;
        rope_row(from, cos, sin, to, w.head, op.half_rotated);
    }

    // Queries of all rows into `q`; where the layer owns them, keys and values into the rows of the step.
    void project(const T* x, T* q, T* kv) const {
        const bool owns = w.k.codes;
        const Target targets[] = {{w.q, span(q, queries)}, {w.k, span(kv, keys)}, {w.v, span(kv + count * keys, keys)}};
        multiply_to(operand(span(const_cast<T*>(x), width), w.q.format, LEFT), count, targets, owns ? 3 : 1);
        over_rows(count, queries + 2 * keys, [&](long row) {
            for (long h = 0; h < w.heads; ++h) {
                T* head = q + row * queries + h * w.head;
                norm_row(head, gain(w.q_norm), head, w.head, w.eps);
                turned(head, head, row);
            }
            for (long h = 0; owns && h < w.kv_heads; ++h) {
                T *key = kv + row * keys + h * w.head, *value = key + count * keys;
                T* to = static_cast<T*>(const_cast<void*>(op.attend.step)) + (row * w.kv_heads + h) * op.attend.width;
                norm_row(key, gain(w.k_norm), key, w.head, w.eps);
                turned(key, to + op.attend.key_offset, row);
                norm_row(value, gain(nullptr), to + op.attend.value_offset, w.head, w.eps);
            }
        });
    }

    // to = projection(gelu(gate(x)) * ple).
    void per_layer(const T* x, T* gate, T* to) const {
        const long inner = w.ple_gate.rows;
        one_product(span(const_cast<T*>(x), width), w.ple_gate, span(gate, inner));
        over_rows(count, inner, [&](long row) {
            const T* ple = gain(op.ple) + row * op.ple_stride;
            for (long i = 0; i < inner; i += LANES) {
                T* at = gate + row * inner + i;
                put(at, gelu(get(at, inner - i)), inner - i);
                put(at, get(at, inner - i) * get(ple + i, inner - i), inner - i);
            }
        });
        one_product(span(gate, inner), w.ple_projection, span(to, width));
    }

    void one_product(const Rows& x, const Matrix& weight, const Rows& y) const {
        const Target target{weight, y};
        multiply_to(operand(x, weight.format, LEFT), count, &target, 1);
    }

    void run() const {
        auto* memory = static_cast<T*>(scratch(LAYER, count * (2 * width + 2 * queries + 2 * keys + w.ple_gate.rows) * sizeof(T)));
        T *a = memory, *b = a + count * width, *q = b + count * width, *seen = q + count * queries, *kv = seen + count * queries;
        const T* x = static_cast<const T*>(op.x.data);
        T* y = static_cast<T*>(op.y);
        normed(x, w.input_norm, a);
        project(a, q, kv);
        Attend attention = op.attend;
        attention.q = q, attention.out = seen;
        attend(attention);
        one_product(span(seen, queries), w.o, span(a, width));
        add_normed(x, a, w.post_attention_norm, y, false);
        normed(y, w.pre_feedforward_norm, a);
        gated({span(a, width), w.gate, w.up, w.down, span(b, width)});
        add_normed(y, b, w.post_feedforward_norm, y, !op.ple);
        if (!op.ple) return;
        per_layer(y, kv + 2 * count * keys, a);
        add_normed(y, a, w.post_ple_norm, y, true);
    }
};

void layer(const Layer& op) { op.weights->dtype == FLOAT32 ? Decoder<float>{op}.run() : Decoder<Bf16>{op}.run(); }

}  // namespace
