// A decoder layer in one call: what `model.decoder.Layer.forward` does op by op, by the same kernels and with the same
// roundings in between, without the interpreter. A decode step of a small model is mostly calls otherwise.
//
// Only layers with dense feed-forward; the others stay in Python.
#pragma once

#include "settle.h"

namespace {

template <class T>
struct Decoder {
    const Layer& op;
    const LayerWeights& w = *op.weights;
    long count = op.x.count, width = op.x.width;
    long queries = w.heads * w.head, keys = w.kv_heads * w.head;
    bool value_is_key = op.attend.value_offset == 0;

    Rows span(T* data, long columns) const { return {data, w.dtype, count, columns, columns}; }
    static const T* gain(const void* weight) { return static_cast<const T*>(weight); }

    void norm_one(const float* from, const void* weight, T* to, long row) const {
        norm_row(from + row * width, gain(weight), to + row * width, width, w.eps);
    }

    // to = x + norm(y), and times the layer's scalar where it is the last thing; `then(row)` while a row is near.
    template <class Then>
    void add_normed(const float* x, T* y, const void* weight, float* to, bool last, Then then) const {
        Settle op{span(y, width), weight, x, w.eps, __builtin_inff(), 1, to, width};
        if (last) op.factor = lane_zero(get(gain(w.scalar), 1));
        over_rows(count, width, [&](long row) {
            settle_row<T, float>(op, row);
            then(row);
        });
    }

    void narrow_one(const float* from, T* to, long row) const {
        over_lanes(width, [&](long i, long n) { put(to + row * width + i, get(from + row * width + i, n), n); });
    }

    void turned(const T* from, T* to, long row) const {
        const T *cos = gain(op.cos) + row * op.half_rotated, *sin = gain(op.sin) + row * op.half_rotated;
        rope_row(from, cos, sin, to, w.head, op.half_rotated);
    }

    // Queries of all rows into `q`, by way of `room` where they are reordered; where the layer owns them, keys and values into
    // the rows of the step.
    void project(const T* x, T* q, T* room, T* kv) const {
        const bool owns = w.k.codes;
        T* projected = value_is_key ? room : q;
        const Target targets[] = {{w.q, span(projected, queries)}, {w.k, span(kv, keys)}, {w.v, span(kv + count * keys, keys)}};
        multiply_to(operand(span(const_cast<T*>(x), width), w.q.format, LEFT), count, targets, !owns ? 1 : value_is_key ? 2 : 3);
        over_rows(count, queries + 2 * keys, [&](long row) {
            for (long h = 0; h < w.heads; ++h) {
                T* head = projected + row * queries + h * w.head;
                norm_row(head, gain(w.q_norm), head, w.head, w.eps);
                turned(head, head, row);
                if (value_is_key) reorder_query(head, q + row * queries + h * w.head);
            }
            for (long h = 0; owns && h < w.kv_heads; ++h) {
                T *key = kv + row * keys + h * w.head, *value = key + count * keys;
                T* to = static_cast<T*>(const_cast<void*>(op.attend.step)) + (row * w.kv_heads + h) * op.attend.width;
                if (value_is_key) {
                    store_shared(key, to, row);
                    continue;
                }
                norm_row(key, gain(w.k_norm), key, w.head, w.eps);
                turned(key, to + op.attend.key_offset, row);
                norm_row(value, gain(nullptr), to + op.attend.value_offset, w.head, w.eps);
            }
        });
    }

    // Where value = key, rows are [n_rot | n_rest | k_rot], see `kv.layout`: a head's numbers that turn, and the others.
    void split(const T* head, T* rot, T* rest) const {
        const long part = op.half_rotated, half = w.head / 2, others = half - part;
        memcpy(rot, head, part * sizeof(T)), memcpy(rot + part, head + half, part * sizeof(T));
        memcpy(rest, head + part, others * sizeof(T)), memcpy(rest + others, head + half + part, others * sizeof(T));
    }
    void join(const T* rot, const T* rest, T* head) const {
        const long part = op.half_rotated, half = w.head / 2, others = half - part;
        memcpy(head, rot, part * sizeof(T)), memcpy(head + half, rot + part, part * sizeof(T));
        memcpy(head + part, rest, others * sizeof(T)), memcpy(head + half + part, rest + others, others * sizeof(T));
    }

    static void weigh(T* x, const T* by, long n) {
        for (long i = 0; i < n; i += LANES) put(x + i, get(x + i, n - i) * get(by + i, n - i), n - i);
    }

    // In the order of the stored key, with the weight that the numbers that don't turn are stored without.
    void reorder_query(const T* head, T* to) const {
        const long part = op.half_rotated, half = w.head / 2, others = half - part;
        split(head, to + 2 * others, to);
        weigh(to, gain(op.kept_norm) + part, others), weigh(to + others, gain(op.kept_norm) + half + part, others);
    }

    void store_shared(T* key, T* to, long row) const {
        const long part = op.half_rotated, half = w.head / 2;
        T* turning = to + w.head;
        norm_row(key, gain(nullptr), key, w.head, w.eps);
        split(key, to, to + 2 * part);
        memcpy(turning, to, 2 * part * sizeof(T));
        weigh(turning, gain(op.kept_norm), part), weigh(turning + part, gain(op.kept_norm) + half, part);
        rope_row(turning, gain(op.cos) + row * part, gain(op.sin) + row * part, turning, 2 * part, part);
    }

    // What the heads have read, in the order of the projection: in `seen`, or from there in `room`.
    T* read(T* seen, T* room) const {
        if (!value_is_key) return seen;
        over_rows(count, queries, [&](long row) {
            for (long h = 0; h < w.heads; ++h) {
                const T* head = seen + row * queries + h * w.head;
                join(head, head + 2 * op.half_rotated, room + row * queries + h * w.head);
            }
        });
        return room;
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
        const auto* x = static_cast<const float*>(op.x.data);
        float* y = op.y;
        over_rows(count, width, [&](long row) { norm_one(x, w.input_norm, a, row); });
        project(a, q, seen, kv);
        Attend attention = op.attend;
        attention.q = q, attention.out = seen;
        attend(attention);
        one_product(span(read(seen, q), queries), w.o, span(a, width));
        add_normed(x, a, w.post_attention_norm, y, false, [&](long row) { norm_one(y, w.pre_feedforward_norm, a, row); });
        gated({span(a, width), w.gate, w.up, w.down, span(b, width)});
        if (!op.ple) return add_normed(y, b, w.post_feedforward_norm, y, true, [](long) {});
        add_normed(y, b, w.post_feedforward_norm, y, false, [&](long row) { narrow_one(y, a, row); });
        per_layer(a, kv + 2 * count * keys, b);
        add_normed(y, b, w.post_ple_norm, y, true, [](long) {});
    }
};

void layer(const Layer& op) { op.weights->dtype == FLOAT32 ? Decoder<float>{op}.run() : Decoder<Bf16>{op}.run(); }

}  // namespace
