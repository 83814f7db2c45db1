// A decoder layer in one call: what `model.decoder.Layer.forward` does op by op, by the same kernels and with the same
// roundings in between, without the interpreter. A decode step of a small model is mostly calls otherwise.
//
// Only layers with dense feed-forward; the others stay in Python.
#pragma once

#include "settle.h"

namespace {

template <class T>  // of what matrices take and of what is stored; what they give is float32
struct Decoder {
    const Layer& op;
    const LayerWeights& w = *op.weights;
    long count = op.x.count, width = op.x.width;
    long queries = w.heads * w.head, keys = w.kv_heads * w.head, inner = w.ple_gate.rows;
    bool value_is_key = op.attend.value_offset == 0;

    Rows taken(const T* data, long columns) const { return {const_cast<T*>(data), w.dtype, count, columns, columns}; }
    Rows given(float* data, long columns) const { return {data, FLOAT32, count, columns, columns}; }
    static const T* gain(const void* weight) { return static_cast<const T*>(weight); }

    void norm_one(const float* from, const void* weight, T* to, long row) const {
        norm_row(from + row * width, gain(weight), to + row * width, width, w.eps);
    }

    // to = x + norm(y), and times the layer's scalar where it is the last thing; `then(row)` while a row is near.
    template <class Then>
    void add_normed(const float* x, float* y, const void* weight, float* to, bool last, Then then) const {
        Settle op{given(y, width), weight, x, w.eps, __builtin_inff(), 1, to, width};
        if (last) op.factor = lane_zero(get(gain(w.scalar), 1));
        over_rows(count, width, [&](long row) {
            settle_row<T, float>(op, row);
            then(row);
        });
    }

    template <class To>
    void turned(const float* from, To* to, long row) const {
        const float *cos = op.cos + row * op.half_rotated, *sin = op.sin + row * op.half_rotated;
        rope_row(from, cos, sin, to, w.head, op.half_rotated);
    }

    // Queries of all rows into `q`, and where the layer owns them, keys and values into the rows of the step; what the matrices
    // give lies in `raw`.
    void project(const T* x, float* raw, T* q) const {
        const bool owns = w.k.codes;
        float *key_rows = raw + count * queries, *value_rows = key_rows + count * keys;
        const Target targets[] = {{w.q, given(raw, queries)}, {w.k, given(key_rows, keys)}, {w.v, given(value_rows, keys)}};
        multiply_to(operand(taken(x, width), w.q.format, LEFT), count, targets, !owns ? 1 : value_is_key ? 2 : 3);
        over_rows(count, queries + 2 * keys, [&](long row) {
            for (long h = 0; h < w.heads; ++h) {
                float* head = raw + row * queries + h * w.head;
                T* to = q + row * queries + h * w.head;
                norm_row(head, gain(w.q_norm), head, w.head, w.eps);
                if (!value_is_key) {
                    turned(head, to, row);
                    continue;
                }
                turned(head, head, row);
                reorder_query(head, to);
            }
            for (long h = 0; owns && h < w.kv_heads; ++h) {
                float *key = key_rows + row * keys + h * w.head, *value = value_rows + row * keys + h * w.head;
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
    void split(const float* head, T* rot, T* rest) const {
        const long part = op.half_rotated, half = w.head / 2, others = half - part;
        copy_numbers(head, rot, part), copy_numbers(head + half, rot + part, part);
        copy_numbers(head + part, rest, others), copy_numbers(head + half + part, rest + others, others);
    }
    void join(const T* rot, const T* rest, T* head) const {
        const long part = op.half_rotated, half = w.head / 2, others = half - part;
        memcpy(head, rot, part * sizeof(T)), memcpy(head + half, rot + part, part * sizeof(T));
        memcpy(head + part, rest, others * sizeof(T)), memcpy(head + half + part, rest + others, others * sizeof(T));
    }

    static void weigh(float* x, const T* by, long n) {
        for (long i = 0; i < n; i += LANES) put(x + i, get(x + i, n - i) * get(by + i, n - i), n - i);
    }

    // In the order of the stored key, with the weight that the numbers that don't turn are stored without.
    void reorder_query(float* head, T* to) const {
        const long part = op.half_rotated, half = w.head / 2, others = half - part;
        weigh(head + part, gain(op.kept_norm) + part, others), weigh(head + half + part, gain(op.kept_norm) + half + part, others);
        split(head, to + 2 * others, to);
    }

    void store_shared(float* key, T* to, long row) const {
        const long part = op.half_rotated, half = w.head / 2;
        norm_row(key, gain(nullptr), key, w.head, w.eps);
        split(key, to, to + 2 * part);
        weigh(key, gain(op.kept_norm), part), weigh(key + half, gain(op.kept_norm) + half, part);
        memmove(key + part, key + half, part * sizeof(float));  // the numbers that turn, as a narrower head
        rope_row(key, op.cos + row * part, op.sin + row * part, to + w.head, 2 * part, part);
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

    // to = projection(gelu(gate(x)) * ple); `wide` and `narrow` hold what is in between.
    void per_layer(const T* x, float* wide, T* narrow, float* to) const {
        one_product(taken(x, width), w.ple_gate, given(wide, inner));
        over_rows(count, inner, [&](long row) {
            const T* ple = gain(op.ple) + row * op.ple_stride;
            for (long i = 0; i < inner; i += LANES)
                put(narrow + row * inner + i, gelu(get(wide + row * inner + i, inner - i)) * get(ple + i, inner - i), inner - i);
        });
        one_product(taken(narrow, inner), w.ple_projection, given(to, width));
    }

    void one_product(const Rows& x, const Matrix& weight, const Rows& y) const {
        const Target target{weight, y};
        multiply_to(operand(x, weight.format, LEFT), count, &target, 1);
    }

    void run() const {
        const long broad = most(queries + 2 * keys, inner), narrow = most(queries, inner);
        auto* given_memory = static_cast<float*>(
            scratch(LAYER, count * ((width + broad) * sizeof(float) + (width + narrow + queries) * sizeof(T))));
        float *sums = given_memory, *raw = sums + count * width;
        T *a = reinterpret_cast<T*>(raw + count * broad), *q = a + count * width, *seen = q + count * narrow;
        const auto* x = static_cast<const float*>(op.x.data);
        float* y = op.y;
        over_rows(count, width, [&](long row) { norm_one(x, w.input_norm, a, row); });
        project(a, raw, q);
        Attend attention = op.attend;
        attention.q = q, attention.out = seen;
        attend(attention);
        one_product(taken(read(seen, q), queries), w.o, given(sums, width));
        add_normed(x, sums, w.post_attention_norm, y, false, [&](long row) { norm_one(y, w.pre_feedforward_norm, a, row); });
        gated({taken(a, width), w.gate, w.up, w.down, given(sums, width)});
        if (!op.ple) return add_normed(y, sums, w.post_feedforward_norm, y, true, [](long) {});
        add_normed(y, sums, w.post_feedforward_norm, y, false,
                   [&](long row) { copy_numbers(y + row * width, a + row * width, width); });
        per_layer(a, raw, q, sums);
        add_normed(y, sums, w.post_ple_norm, y, true, [](long) {});
    }
};

void layer(const Layer& op) { op.weights->dtype == FLOAT32 ? Decoder<float>{op}.run() : Decoder<Bf16>{op}.run(); }

}  // namespace
