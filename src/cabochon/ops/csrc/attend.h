// Attention over pages and the step's own rows, for decode and prefill alike.
//
// A unit of work is up to 48 query rows (tokens x the query heads of one KV head) against blocks of 64 keys. Blocks and
// chunks of blocks begin at fixed absolute positions, each chunk is summed up on its own (online softmax) and chunks are
// merged in order: so a row's result does not depend on the rows beside it, on how the prompt was cut into steps, nor on
// whether one thread walked all chunks or several shared them.
//
// Blocks that lie whole in pages of 8 bits are multiplied in integers: codes as they are, queries and weights rounded to
// 16 bits, which is finer than bfloat16. Other rows of such pages are widened first.
#pragma once

#include "words.h"

namespace {

constexpr long KEYS = Ahead::ROWS, CHUNK = 256, TILE = 48;
constexpr size_t SHARED_BYTES = 16 << 20;  // of chunks' results while threads share them out

// What a unit keeps: the state of the online softmax of its rows.
struct State {
    float *acc, *top, *weight;  // [rows, head], [rows], [rows]

    static size_t floats(long rows, long head) { return rows * (head + 2 * LANES); }
    static State in(float* memory, long rows, long head) {
        return {memory, memory + rows * head, memory + rows * (head + LANES)};
    }
    void clear(long rows, long head) const {
        memset(acc, 0, rows * head * sizeof(float));
        for (long r = 0; r < rows; ++r) top[r] = -__builtin_inff(), weight[r] = 0;
    }
    // Row r of this, then of `later`, as one.
    void merge(const State& later, long r, long head) const {
        if (later.weight[r] == 0) return;
        const float both = later.top[r] > top[r] ? later.top[r] : top[r];
        const float mine = lane_zero(exponential(splat(top[r] - both))), other = lane_zero(exponential(splat(later.top[r] - both)));
        top[r] = both;
        weight[r] = weight[r] * mine + later.weight[r] * other;
        for (long i = 0; i < head; i += LANES) {
            float* to = acc + r * head + i;
            put(to, fma(get(to), splat(mine), get(later.acc + r * head + i) * other));
        }
    }
};

template <class T>
struct Attention {
    static constexpr Words OWN = WORDS<T>;
    const Attend& op;
    long group;  // query heads per KV head
    long lanes;  // head width, filled up to whole registers
    bool whole;  // are the keys and the values of a row of 8-bit pages under one scale each?
    struct Unit {
        int32_t request, kv_head, first, count, low, high;  // query rows (tokens), keys [low, high)
    };

    struct Buffers {
        uint32_t *keys, *values, *weights, *queries, *codes;
        float *scores, *units, *query_units;  // what an integer is worth, of a row's weights and of its query
        State chunk;
        T *rows, *nothing;  // of 8-bit pages, widened; a row of zeros
    };

    explicit Attention(const Attend& op)
        : op(op), group(op.heads / op.kv_heads), lanes((op.head + LANES - 1) / LANES * LANES),
          whole(sizeof(T) == 2 && op.scales && in_one_part(op.key_offset) && in_one_part(op.value_offset)) {}

    bool in_one_part(long offset) const { return op.split <= offset || op.split >= offset + op.head; }
    template <Words W>
    long inner() const {
        return lanes / PER_WORD<W>;
    }

    // The row of a token: in the step's rows, or its place on the pages.
    const T* step_row(const Unit& u, long position) const {
        const long row = op.start[u.request] + position - op.context[u.request];
        return static_cast<const T*>(op.step) + (row * op.kv_heads + u.kv_head) * op.width;
    }
    long place(const Unit& u, long position) const {
        const long past = position - op.first[u.request];
        const long slot = op.table[u.request * op.table_width + past / op.slots] * op.slots + past % op.slots;
        return slot * op.kv_heads + u.kv_head;
    }
    bool is_past(const Unit& u, long position) const { return position < op.context[u.request]; }

    // The row of a token in its own type: where it lies, or widened into `space`.
    const T* own_row(const Unit& u, long position, T* space) const {
        if (!is_past(u, position)) return step_row(u, position);
        const long row = place(u, position);
        if (!op.scales) return static_cast<const T*>(op.pages) + row * op.width;
        const auto* codes = static_cast<const int8_t*>(op.pages) + row * op.width;
        for (long part = 0; part < 2; ++part)
            for (long i = part * op.split; i < (part ? op.width : op.split); i += LANES) {
                const long left = (part ? op.width : op.split) - i;
                put(space + i, get(codes + i, left) * op.scales[row * 2 + part], left);
            }
        return space;
    }

    // The rows that come next: they lie on pages here and there, where the CPU looks for none by itself.
    void look_ahead(const Unit& u, long from, long until, Ahead& ahead) const {
        ahead.at = ahead.end, ahead.rows = 0;
        ahead.bytes = op.width * (op.scales ? 1 : sizeof(T));
        for (long j = least(from + KEYS, until) - 1; j >= from; --j) {  // the first one asked for is the last one here
            if (!is_past(u, j)) {
                ahead.row[ahead.rows++] = reinterpret_cast<const char*>(step_row(u, j));
                continue;
            }
            const long row = place(u, j);
            ahead.row[ahead.rows++] = static_cast<const char*>(op.pages) + row * ahead.bytes;
            if (op.scales) __builtin_prefetch(op.scales + row * 2);
        }
    }

    long last_key(long row) const { return op.window ? op.see_until[row] : op.position[row]; }
    long first_key(long row) const { return op.window ? op.position[row] - op.window + 1 : 0; }

    // Query rows as left values, [rows, inner].
    void gather_queries(const Unit& u, const Buffers& b) const {
        for (long r = 0; r < u.count * group; ++r) {
            const long token = u.first + r / group, head = u.kv_head * group + r % group;
            const T* q = static_cast<const T*>(op.q) + (token * op.heads + head) * op.head;
            uint32_t* to = b.queries + r * inner<OWN>();
            if constexpr (OWN == PAIRS_OF_BF16) {
                memset(to, 0, inner<OWN>() * 4);
                memcpy(to, q, op.head * 2);
            } else {
                for (long i = 0; i < op.head; i += LANES) store(to + i, get(q + i, op.head - i));
            }
            if (whole) b.query_units[r] = round_query(q, b.codes + r * inner<PAIRS_OF_INTS>());
        }
    }

    // Sums over all of a head stay below 2^31. Returns what an integer is worth; no number if any of `q` is none.
    float round_query(const T* q, uint32_t* to) const {
        const float limit = least(32767, 0x7fffffff / (127 * lanes));
        F16 top = zero(), odd = zero();
        for (long i = 0; i < op.head; i += LANES) {
            const F16 v = get(q + i, op.head - i);
            top = larger(larger(v, 0.0f - v), top), odd = odd + (v - v);
        }
        const float largest = maximum(top), inverse = largest > 0 ? limit / largest : 0;
        for (long i = 0; i < lanes; i += LANES)
            put_shorts(to + i / 2, as<U16>(rounded(get(q + i, op.head - i) * inverse)));
        return largest / limit + sum(odd);
    }

    // Keys [from, from + 64) transposed to [inner, KEYS], values as [KEYS or KEYS / 2, lanes]; zero where nobody looks.
    template <Words W, class E>
    void gather_block(const E* const (&row)[KEYS], const Buffers& b, Ahead& ahead) const {
        for (long j = 0; j < KEYS; j += LANES)
            for (long i = 0; i < inner<W>(); i += LANES) {
                U16 block[LANES];
                for (long lane = 0; lane < LANES; ++lane) block[lane] = key_words<W>(row[j + lane] + op.key_offset, i);
                transpose(block, b.keys + i * KEYS + j, KEYS);
                for (int line = 0; line < 8; ++line) ahead();
            }
        for (long j = 0; j < KEYS; j += PER_WORD<W>)
            for (long i = 0; i < lanes; i += 2 * LANES) {
                const E *a = row[j] + op.value_offset + i, *next = row[j + PER_WORD<W> - 1] + op.value_offset + i;
                put_values<W>(a, next, op.head - i, b.values + j / PER_WORD<W> * lanes + i);
                ahead();
            }
    }

    template <Words W, class E>
    U16 key_words(const E* key, long word) const {
        const long left = op.head - word * PER_WORD<W>;
        if constexpr (W == FLOATS) {
            return as<U16>(get(key + word, left));
        } else {
            if (left >= 2 * LANES) return pairs_of(key + 2 * word);
            E some[2 * LANES] = {};
            memcpy(some, key + 2 * word, left * sizeof(E));
            return pairs_of(some);
        }
    }

    // Up to 32 values of one token, or of two side by side.
    template <Words W, class E>
    void put_values(const E* a, const E* b, long left, uint32_t* to) const {
        if constexpr (W == FLOATS) {
            for (long i = 0; i < least(left, 2 * LANES); i += LANES) store(to + i, get(a + i, left - i));
        } else {
            if (left >= 2 * LANES) return put_side_by_side(a, b, to);
            E first[2 * LANES] = {}, second[2 * LANES] = {};
            memcpy(first, a, left * sizeof(E)), memcpy(second, b, left * sizeof(E));
            for (long i = 0; i < left; i += LANES) store(to + i, side_by_side(first + i, second + i));
        }
    }

    // What a key's scores and a value's weights are multiplied with where those are codes.
    struct Scales {
        float key[KEYS], value[KEYS];
    };

    // Scores to weights of one block for one row; rescales what the row has so far.
    template <Words W>
    void weigh(float* scores, uint32_t* weights, float* unit, const Scales& scales, long from, long low, long high, const State& s,
               long r) const {
        F16 v[KEYS / LANES];
        static const int32_t counted[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const I16 lane = load<I16>(counted);
        F16 top = splat(-__builtin_inff());
        for (long i = 0; i < KEYS / LANES; ++i) {
            const I16 at = lane + int32_t(from + i * LANES);
            v[i] = get(scores + i * LANES);
            if constexpr (W == PAIRS_OF_INTS) v[i] = v[i] * get(scales.key + i * LANES);
            v[i] = select((at >= splat(int32_t(low))) & (splat(int32_t(high)) >= at), v[i], splat(-__builtin_inff()));
            top = larger(v[i], top);
        }
        const float block_top = maximum(top), now = block_top > s.top[r] ? block_top : s.top[r];
        const float keep = lane_zero(exponential(splat(s.top[r] - now)));
        F16 total = zero();
        for (long i = 0; i < KEYS / LANES; ++i) {
            v[i] = exponential(v[i] - now);
            if constexpr (W == PAIRS_OF_BF16) {
                const U16 narrow_w = narrow(v[i]);
                v[i] = widen(narrow_w);
                put_shorts(weights + i * LANES / 2, narrow_w);
            } else if constexpr (W == FLOATS) {
                store(weights + i * LANES, v[i]);
            }
            total = total + v[i];
        }
        if constexpr (W == PAIRS_OF_INTS) *unit = round_weights(v, scales.value, weights);
        s.weight[r] = s.weight[r] * keep + sum(total);
        if (keep != 1.0f)
            for (long i = 0; i < lanes; i += LANES) put(s.acc + r * lanes + i, get(s.acc + r * lanes + i) * keep);
        s.top[r] = now;
    }

    float round_weights(F16 (&v)[KEYS / LANES], const float* scales, uint32_t* to) const {
        F16 top = zero();
        for (long i = 0; i < KEYS / LANES; ++i) {
            v[i] = v[i] * get(scales + i * LANES);
            top = larger(v[i], top);
        }
        const float largest = maximum(top), inverse = largest > 0 ? 32767.0f / largest : 0;
        for (long i = 0; i < KEYS / LANES; ++i) put_shorts(to + i * LANES / 2, as<U16>(rounded(v[i] * inverse)));
        return largest / 32767.0f;
    }

    Buffers buffers() const {
        const long rows = rows_at_once(), widened = op.scales ? KEYS * op.width : 0;
        const size_t words = 2 * KEYS * lanes + 2 * rows * KEYS + 2 * rows * lanes + 2 * rows + State::floats(rows, lanes) +
                             (widened + op.width) * sizeof(T) / 4 + 2 * LANES;
        auto* at = static_cast<uint32_t*>(scratch(ATTENTION, words * 4));
        const auto take = [&](long count) { return (at += count) - count; };
        Buffers b;
        b.keys = take(KEYS * lanes), b.values = take(KEYS * lanes), b.weights = take(rows * KEYS);
        b.scores = reinterpret_cast<float*>(take(rows * KEYS));
        b.chunk = State::in(reinterpret_cast<float*>(take(State::floats(rows, lanes))), rows, lanes);
        b.queries = take(rows * lanes), b.codes = take(rows * lanes);
        b.units = reinterpret_cast<float*>(take(rows)), b.query_units = reinterpret_cast<float*>(take(rows));
        b.rows = reinterpret_cast<T*>(at), b.nothing = b.rows + widened;
        memset(b.nothing, 0, op.width * sizeof(T));
        return b;
    }

    long tokens_at_once() const { return most(1, TILE / group); }
    long rows_at_once() const { return tokens_at_once() * group; }

    // A block of rows that were gathered, onto b.chunk.
    template <Words W>
    void walk_block(const Unit& u, long from, const Scales& scales, const Buffers& b, Ahead& ahead) const {
        const long rows = u.count * group, width = KEYS / PER_WORD<W>;
        const Left queries = W == PAIRS_OF_INTS ? Left{b.codes, inner<W>(), b.query_units} : Left{b.queries, inner<W>(), nullptr};
        multiply<W>(rows, KEYS, queries, {b.keys, KEYS}, inner<W>(), b.scores, KEYS, false, ahead);
        for (long r = 0; r < rows; ++r) {
            const long row = u.first + r / group, low = most(first_key(row), u.low), high = last_key(row);
            if (high < from || low >= from + KEYS) {
                memset(b.weights + r * width, 0, width * 4);
                b.units[r] = 0;
            } else {
                weigh<W>(b.scores + r * KEYS, b.weights + r * width, b.units + r, scales, from, low, high, b.chunk, r);
            }
        }
        multiply<W>(rows, lanes, {b.weights, width, b.units}, {b.values, lanes}, width, b.chunk.acc, lanes, true, ahead);
    }

    void walk_own_block(const Unit& u, long from, const Buffers& b, Ahead& ahead) const {
        const T* row[KEYS];
        for (long j = 0; j < KEYS; ++j) {
            const bool seen = from + j >= u.low && from + j < u.high;
            row[j] = seen ? own_row(u, from + j, b.rows + j * op.width) : b.nothing;
        }
        gather_block<OWN>(row, b, ahead);
        walk_block<OWN>(u, from, {}, b, ahead);
    }

    void walk_coded_block(const Unit& u, long from, const Buffers& b, Ahead& ahead) const {
        const int8_t* row[KEYS];
        Scales scales = {};
        for (long j = 0; j < KEYS; ++j) {
            row[j] = reinterpret_cast<const int8_t*>(b.nothing);
            if (from + j < u.low || from + j >= u.high) continue;
            const long at = place(u, from + j);
            row[j] = static_cast<const int8_t*>(op.pages) + at * op.width;
            scales.key[j] = op.scales[at * 2 + (op.key_offset >= op.split)];
            scales.value[j] = op.scales[at * 2 + (op.value_offset >= op.split)];
        }
        gather_block<PAIRS_OF_INTS>(row, b, ahead);
        walk_block<PAIRS_OF_INTS>(u, from, scales, b, ahead);
    }

    // The keys of one chunk, from nothing, into b.chunk. This thread goes on up to the key `until`.
    void walk_chunk(const Unit& u, long chunk, long until, const Buffers& b) const {
        Ahead ahead;
        b.chunk.clear(u.count * group, lanes);
        for (long from = most(chunk * CHUNK, u.low / KEYS * KEYS); from < least((chunk + 1) * CHUNK, u.high); from += KEYS) {
            look_ahead(u, from + KEYS, until, ahead);
            if (whole && is_past(u, least(from + KEYS, u.high) - 1))
                walk_coded_block(u, from, b, ahead);
            else
                walk_own_block(u, from, b, ahead);
        }
    }

    void finish(const Unit& u, long r, const State& s) const {
        const long head = (u.first + r / group) * op.heads + u.kv_head * group + r % group;
        T* to = static_cast<T*>(op.out) + head * op.head;
        const F16 weight = splat(1.0f / s.weight[r]);
        for (long i = 0; i < op.head; i += LANES) put(to + i, get(s.acc + r * lanes + i) * weight, op.head - i);
    }

    // The units of all requests; returns how many.
    long plan(Unit* units) const {
        long n = 0;
        for (long r = 0; r < op.requests; ++r) {
            const long begin = op.table ? op.first[r] : op.context[r], end = op.context[r] + op.start[r + 1] - op.start[r];
            for (long row = op.row_start[r]; row < op.row_start[r + 1]; row += tokens_at_once()) {
                const long count = least(tokens_at_once(), op.row_start[r + 1] - row);
                long low = first_key(row), high = 0;
                for (long i = row; i < row + count; ++i) {
                    low = least(low, first_key(i));
                    high = most(high, last_key(i) + 1);
                }
                for (long kv = 0; kv < op.kv_heads; ++kv)
                    units[n++] = {int32_t(r), int32_t(kv), int32_t(row), int32_t(count), int32_t(most(low, begin)),
                                  int32_t(least(high, end))};
            }
        }
        return n;
    }

    void run() const {
        const long tiles = op.requests + op.row_start[op.requests] / tokens_at_once(), most_units = tiles * op.kv_heads;
        auto* units = static_cast<Unit*>(scratch(LISTS, most_units * sizeof(Unit) + (most_units + 1) * sizeof(long)));
        const long n = plan(units);
        auto* first = reinterpret_cast<long*>(units + most_units);
        first[0] = 0;
        for (long i = 0; i < n; ++i) first[i + 1] = first[i] + (units[i].high - 1) / CHUNK - units[i].low / CHUNK + 1;
        const size_t partial = first[n] * State::floats(rows_at_once(), lanes) * sizeof(float);
        partial < SHARED_BYTES ? walk_chunks(units, n, first) : walk_units(units, n);
    }

    // Much to do: a unit is one thread's from end to end.
    void walk_units(const Unit* units, long n) const {
        parallel(n, [&](long item) {
            const Unit& u = units[item];
            const long rows = u.count * group;
            const Buffers b = buffers();
            gather_queries(u, b);
            const State all = State::in(static_cast<float*>(scratch(RESULT, 4 * State::floats(rows, lanes))), rows, lanes);
            all.clear(rows, lanes);
            for (long chunk = u.low / CHUNK; chunk * CHUNK < u.high; ++chunk) {
                walk_chunk(u, chunk, u.high, b);
                for (long r = 0; r < rows; ++r) all.merge(b.chunk, r, lanes);
            }
            for (long r = 0; r < rows; ++r) finish(u, r, all);
        });
    }

    // Little to do (decode): threads share the chunks, then the rows.
    void walk_chunks(const Unit* units, long n, const long* first) const {
        const size_t size = State::floats(rows_at_once(), lanes);
        auto* partial = static_cast<float*>(scratch(HIDDEN, first[n] * size * 4));
        parallel(first[n], [&](long item, long end) {
            long i = 0;
            while (item >= first[i + 1]) ++i;
            const Unit& u = units[i];
            Buffers b = buffers();
            b.chunk = State::in(partial + item * size, u.count * group, lanes);
            gather_queries(u, b);
            const long chunk = u.low / CHUNK + item - first[i];
            walk_chunk(u, chunk, least(u.high, (chunk + end - item) * CHUNK), b);
        });
        const long rows = rows_at_once();
        parallel(n * rows, [&](long item) {
            const Unit& u = units[item / rows];
            const long i = item / rows, r = item % rows, count = u.count * group;
            if (r >= count) return;
            const State all = State::in(partial + first[i] * size, count, lanes);
            for (long later = first[i] + 1; later < first[i + 1]; ++later)
                all.merge(State::in(partial + later * size, count, lanes), r, lanes);
            finish(u, r, all);
        });
    }
};

void attend(const Attend& op) {
    if (op.dtype == FLOAT32)
        Attention<float>(op).run();
    else
        Attention<Bf16>(op).run();
}

}  // namespace
