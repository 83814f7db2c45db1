// The ops that are products: linear (and the head), the gated MLP, routed experts.
#pragma once

#include "dense.h"
#include "pool.h"

namespace {

constexpr long ROWS_AT_ONCE = 264;  // of a block's float32 results: 66 KiB; whole tiles of twelve and of six rows

enum Slot { LEFT, HIDDEN, BLOCK_A, BLOCK_B, SORTED, RESULT, LISTS, ATTENTION, LAYER };

INLINE float* block_memory(Slot slot) { return static_cast<float*>(scratch(slot, ROWS_AT_ONCE * BLOCK * sizeof(float))); }
INLINE long blocks(long outputs, long breadth = BLOCK) { return (outputs + breadth - 1) / breadth; }

// Outputs of an item: with few rows an item is mostly reading, and threads should end together.
constexpr long READING = 8;
INLINE long breadth(long count) { return count <= READING ? GROUP : BLOCK; }
INLINE size_t element(Dtype dtype) { return dtype == FLOAT32 ? 4 : 2; }
INLINE const void* row_of(const Rows& x, long row) {
    return static_cast<const char*>(x.data) + row * x.stride * element(x.dtype);
}

// f(p) with p typed by what the pointer holds.
template <class F>
INLINE void typed(Dtype dtype, const void* p, F f) {
    if (dtype == FLOAT32)
        f(static_cast<const float*>(p));
    else
        f(static_cast<const Bf16*>(p));
}
template <class F>
INLINE void typed(Dtype dtype, void* p, F f) {
    if (dtype == FLOAT32)
        f(static_cast<float*>(p));
    else
        f(static_cast<Bf16*>(p));
}

Operand widened(const Rows& x, Slot slot) {
    auto* wide = static_cast<float*>(scratch(slot, x.count * x.width * sizeof(float)));
    for (long row = 0; row < x.count; ++row)
        for (long i = 0; i < x.width; i += LANES)
            put(wide + row * x.width + i, get(static_cast<const Bf16*>(row_of(x, row)) + i, x.width - i), x.width - i);
    return Operand::dense(wide, x.width);
}

// x as the left side of products with weights of `format`.
Operand operand(const Rows& x, Format format, Slot slot) {
    if (format == DENSE) return WIDENED<Bf16> && x.dtype == BFLOAT16 ? widened(x, slot) : Operand::dense(x.data, x.stride);
    const Operand left = Operand::in(scratch(slot, Operand::bytes(x.count, x.width)), x.count, x.width, format);
    const long chunk = 16;
    parallel((x.count + chunk - 1) / chunk, [&](long item) {
        for (long row = item * chunk; row < least(x.count, (item + 1) * chunk); ++row)
            typed(x.dtype, row_of(x, row), [&](auto* from) { left.fill(row, from, x.width); });
    });
    return left;
}

// A weight that the rows are multiplied with, and where its outputs go.
struct Target {
    Matrix weight;
    Rows y;
};

// A thread that turns to another place in memory asks for the first lines there at once: the first products would wait for
// one after the other, until they are asked for on the way.
void ask_for_first(const Matrix& w, long output) {
    constexpr long lines = 64, lines_of_scales = lines / 8;
    const auto* codes = static_cast<const char*>(w.codes);
    if (w.format == DENSE) {
        codes += output * w.cols * element(w.dtype);
    } else {
        const long group = output / PANEL * ((w.cols + GROUP - 1) / GROUP);
        codes += group * (w.format == INT8 ? group_bytes<INT8>() : group_bytes<INT4>());
        const char* scales = static_cast<const char*>(w.scales) + group * PANEL * 2;
        for (long i = 0; i < lines_of_scales && w.format == INT4; ++i) __builtin_prefetch(scales + i * 64, 0, 2);
    }
    for (long i = 0; i < lines; ++i) __builtin_prefetch(codes + i * 64, 0, 2);
}

// The rows times a block of several weights' outputs; `item` counts the blocks of all of them.
void multiply_block(const Operand& x, long count, const Target* to, long item, bool turned, float softcap) {
    const long broad = breadth(count);
    for (; item >= blocks(to->weight.rows, broad); ++to) item -= blocks(to->weight.rows, broad);
    float* out = block_memory(BLOCK_A);
    const long output = item * broad, width = least(broad, to->weight.rows - output);
    if (turned || !item) ask_for_first(to->weight, output);
    for (long first = 0; first < count; first += ROWS_AT_ONCE) {
        const long last = least(first + ROWS_AT_ONCE, count);
        block(x, first, last, to->weight, output, width, out);
        for (long row = first; row < last; ++row)
            typed(to->y.dtype, const_cast<void*>(row_of(to->y, row)), [&](auto* y) {
                for (long i = 0; i < width; i += LANES) {
                    F16 v = get(out + (row - first) * BLOCK + i);
                    if (softcap > 0) v = softcap * hyperbolic_tangent(v / softcap);
                    put(y + output + i, v, width - i);
                }
            });
    }
}

// The same rows times several weights; the blocks of all of them are shared out together.
void multiply_to(const Operand& x, long count, const Target* targets, long n, float softcap = 0) {
    long items = 0;
    for (long i = 0; i < n; ++i) items += blocks(targets[i].weight.rows, breadth(count));
    parallel_runs(items, [&](long first, long last) {
        for (long item = first; item < last; ++item) multiply_block(x, count, targets, item, item == first, softcap);
    });
}

void linear(const Linear& op) {
    const Target target{op.weight, op.y};
    multiply_to(operand(op.x, op.weight.format, LEFT), op.x.count, &target, 1, op.softcap);
}

// Where the hidden rows of an MLP go: rounded, or in x's type, as the weight that reads them wants.
struct Hidden {
    Operand operand;
    Rows rows;

    Hidden(Format format, Dtype dtype, long count, long width) {
        if (format == DENSE) {
            if (WIDENED<Bf16>) dtype = FLOAT32;
            rows = {scratch(HIDDEN, count * width * element(dtype)), dtype, count, width, width};
            operand = Operand::dense(rows.data, width);
        } else {
            rows = {nullptr, dtype, count, width, width};
            operand = Operand::in(scratch(HIDDEN, Operand::bytes(count, width)), count, width, format);
        }
    }

    // gelu(gate) * up of `width` columns from `column`, which begins a group.
    void set(long row, long column, long width, const float* gate, const float* up) const {
        for (long i = 0; i < width; i += GROUP) {
            F16 h[2];
            for (int half = 0; half < 2; ++half) {
                const long at = i + half * LANES, left = width - at;
                h[half] = left > 0 ? gelu(get(gate + at, left)) * get(up + at, left) : zero();
                if (rows.data && left > 0)
                    typed(rows.dtype, rows.data, [&](auto* to) { put(to + row * rows.stride + column + at, h[half], left); });
            }
            if (!rows.data) operand.set(row, (column + i) / GROUP, h[0], h[1]);
        }
    }
};

// `width` columns of the hidden rows [first, last) from `gate_at` on; that one is output `up_at` of `up`. With few rows, many
// columns of the gate come first: a change from one matrix to the other has to wait for memory.
void hidden_block(const Operand& x, long first, long last, const Matrix& gate, const Matrix& up, long gate_at, long up_at,
                  long width, const Hidden& hidden) {
    float *a = block_memory(BLOCK_A), *b = block_memory(BLOCK_B);
    const auto multiply = [&](long until, const Matrix& w, long output, long outputs, float* out) {
        ask_for_first(w, output);
        for (long at = 0; at < outputs; at += BLOCK)
            block(x, first, until, w, output + at, least(BLOCK, outputs - at), out + at * (until - first));
    };
    for (; first < last; first += ROWS_AT_ONCE) {
        const long until = least(first + ROWS_AT_ONCE, last), rows = until - first;
        const long at_once = rows <= READING ? ROWS_AT_ONCE / rows * BLOCK : BLOCK;
        for (long begin = 0; begin < width; begin += at_once) {
            const long some = least(at_once, width - begin);
            multiply(until, gate, gate_at + begin, some, a);
            multiply(until, up, up_at + begin, some, b);
            for (long at = 0; at < some; at += BLOCK)
                for (long row = 0; row < rows; ++row)
                    hidden.set(first + row, gate_at + begin + at, least(BLOCK, some - at), a + at * rows + row * BLOCK,
                               b + at * rows + row * BLOCK);
        }
    }
}

void gated(const Gated& op) {
    const Operand x = operand(op.x, op.gate.format, LEFT);
    const Hidden hidden(op.down.format, op.x.dtype, op.x.count, op.gate.rows);
    const long broad = breadth(op.x.count), inner = op.gate.rows;
    parallel_runs(blocks(inner, broad), [&](long first, long last) {
        const long until = least(last * broad, inner), at_once = op.x.count <= READING ? until : BLOCK;
        for (long at = first * broad; at < until; at += at_once)
            hidden_block(x, 0, op.x.count, op.gate, op.up, at, at, least(at_once, until - at), hidden);
    });
    const Target target{op.down, op.y};
    multiply_to(hidden.operand, op.x.count, &target, 1);
}

// Tokens sorted by expert: rows first[e] .. first[e + 1] of the sorted order belong to expert e.
struct Routing {
    int32_t *source, *place, *first, *active;  // [T k] flat slot of a row; [T k] row of a flat slot; [E + 1]; [..E]
    long actives = 0;

    Routing(const Experts& op, long tokens, const int64_t* chosen) {
        const long rows = tokens * op.per_token;
        source = static_cast<int32_t*>(scratch(LISTS, (2 * rows + 2 * op.count + 2) * sizeof(int32_t)));
        place = source + rows, first = place + rows, active = first + op.count + 1;
        memset(first, 0, (op.count + 1) * sizeof(int32_t));
        for (long i = 0; i < rows; ++i) ++first[chosen[i] + 1];
        for (long e = 0; e < op.count; ++e) {
            if (first[e + 1]) active[actives++] = e;
            first[e + 1] += first[e];
        }
        for (long i = 0; i < rows; ++i) {
            place[i] = first[chosen[i]]++;
            source[place[i]] = i;
        }
        for (long e = op.count; e > 0; --e) first[e] = first[e - 1];
        first[0] = 0;
    }
};

// The rows of x in sorted order.
Operand gather(const Operand& x, const Routing& routing, const Experts& op, long rows) {
    const long width = op.x.width;
    if (op.gate_up.format != DENSE) {
        const Operand to = Operand::in(scratch(SORTED, Operand::bytes(rows, width)), rows, width, op.gate_up.format);
        for (long row = 0; row < rows; ++row) {
            const long token = routing.source[row] / op.per_token, g = x.groups;
            memcpy(to.codes + row * g * GROUP, x.codes + token * g * GROUP, g * GROUP);
            memcpy(to.scales + row * g, x.scales + token * g, g * sizeof(float));
            memcpy(to.begins + row * g, x.begins + token * g, g * sizeof(int32_t));
        }
        return to;
    }
    const size_t number = WIDENED<Bf16> ? sizeof(float) : element(op.x.dtype), bytes = width * number;
    auto* to = static_cast<char*>(scratch(SORTED, rows * bytes));
    for (long row = 0; row < rows; ++row) {
        const long token = routing.source[row] / op.per_token;
        memcpy(to + row * bytes, static_cast<const char*>(x.data) + token * x.stride * number, bytes);
    }
    return Operand::dense(to, width);
}

INLINE Matrix expert_matrix(const Matrix& zero, long expert, long code_step, long scale_step) {
    Matrix w = zero;
    w.codes = static_cast<const char*>(w.codes) + expert * code_step;
    w.scales = static_cast<const char*>(w.scales) + expert * scale_step;
    return w;
}

void experts_of(const Experts& op, const Rows& x, const int64_t* chosen, long first_token) {
    const long rows = x.count * op.per_token, inner = op.down.cols, width = op.down.rows;
    const Routing routing(op, x.count, chosen);
    const Operand sorted = gather(operand(x, op.gate_up.format, LEFT), routing, op, rows);
    const Hidden hidden(op.down.format, x.dtype, rows, inner);
    parallel(routing.actives * blocks(inner), [&](long item) {
        const long expert = routing.active[item / blocks(inner)], output = item % blocks(inner) * BLOCK;
        const Matrix w = expert_matrix(op.gate_up, expert, op.gate_up_codes, op.gate_up_scales);
        hidden_block(sorted, routing.first[expert], routing.first[expert + 1], w, w, output, inner + output,
                     least(BLOCK, inner - output), hidden);
    });
    auto* result = static_cast<float*>(scratch(RESULT, rows * width * sizeof(float)));
    parallel(routing.actives * blocks(width), [&](long item) {
        float* out = block_memory(BLOCK_A);
        const long expert = routing.active[item / blocks(width)], output = item % blocks(width) * BLOCK;
        const long outputs = least(BLOCK, width - output);
        const Matrix w = expert_matrix(op.down, expert, op.down_codes, op.down_scales);
        for (long first = routing.first[expert]; first < routing.first[expert + 1]; first += ROWS_AT_ONCE) {
            const long last = least(first + ROWS_AT_ONCE, routing.first[expert + 1]);
            block(hidden.operand, first, last, w, output, outputs, out);
            for (long row = first; row < last; ++row)
                memcpy(result + row * width + output, out + (row - first) * BLOCK, outputs * sizeof(float));
        }
    });
    parallel(x.count, [&](long token) {  // rows of a token in the order of its slots, whatever else the step holds
        typed(x.dtype, op.weights, [&](auto* weights) {
            typed(op.y.dtype, const_cast<void*>(row_of(op.y, first_token + token)), [&](auto* to) {
                for (long i = 0; i < width; i += LANES) {
                    F16 y = zero();
                    for (long slot = 0; slot < op.per_token; ++slot) {
                        const float weight = lane_zero(get(weights + (first_token + token) * op.per_token + slot, 1));
                        const float* from = result + routing.place[token * op.per_token + slot] * width + i;
                        y = fma(splat(weight), get(from, width - i), y);
                    }
                    put(to + i, y, width - i);
                }
            });
        });
    });
}

void experts(const Experts& op) {
    const long tokens_at_once = 1024;  // bounds the float32 results: tokens * per_token * width
    for (long first = 0; first < op.x.count; first += tokens_at_once) {
        Rows x = op.x;
        x.data = const_cast<void*>(row_of(op.x, first));
        x.count = least(tokens_at_once, op.x.count - first);
        experts_of(op, x, op.chosen + first * op.per_token, first);
    }
}

}  // namespace
