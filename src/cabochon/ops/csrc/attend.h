// Attention over pages and the step's own rows, for decode and prefill alike.
//
// A unit of work is up to 48 query rows (tokens x the query heads of one KV head) against blocks of 64 keys. Blocks and
// chunks of blocks begin at fixed absolute positions, each chunk is summed up on its own (online softmax) and chunks are
// merged in order: so a row's result does not depend on the rows beside it, on how the prompt was cut into steps, nor on
// whether one thread walked all chunks or several shared them.
//
// Blocks that lie whole in pages of 8 bits are multiplied in integers where the CPU can: codes as they are, queries and
// weights rounded to 16 bits, which is finer than bfloat16. Other rows of such pages are widened first.
#pragma once

#include "attend_tiles.h"

namespace {

constexpr long CHUNK = 256, TILE = 48;
constexpr size_t SHARED_BYTES = 16 << 20;  // of chunks' results while threads share them out
constexpr long FULL = 64, EDGE = 2 * ABREAST;  // numbers that fill any kind of register; keys that are left out together

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

// Rows of a block where they lie, or where they were widened to.
template <Words W>
struct Block {
    const Number<W>*key[KEYS], *value[KEYS];
};

// Where the rows of a block lie, and the scales of those in 8 bits; only [first, last) of them are seen.
struct Found {
    const char* row[KEYS];
    const float* scale[KEYS];
    long first, last;
};

template <class T>
struct Attention {
    static constexpr Words OWN = WORDS<T>;
    typedef Number<OWN> Wide;
    const Attend& op;
    long group;  // query heads per KV head
    long lanes;  // head width, filled up to whole columns and registers
    bool whole;  // are the keys and the values of a row of 8-bit pages under one scale each?
    struct Unit {
        int32_t request, kv_head, first, count, low, high;  // query rows (tokens), keys [low, high)
    };

    struct Buffers {
        uint32_t *queries, *codes, *weights;
        float *scores, *keep, *units, *query_units;  // what an integer is worth, of a row's weights and of its query
        State chunk;
        Wide *rows, *nothing;  // keys and values that don't lie as they are read; a row of zeros
    };

    explicit Attention(const Attend& op)
        : op(op), group(op.heads / op.kv_heads), lanes((op.head + FULL - 1) / FULL * FULL),
          whole(BYTES && sizeof(T) == 2 && op.scales && lanes == op.head && in_one_part(op.key_offset) && in_one_part(op.value_offset)) {}

    bool in_one_part(long offset) const { return op.split <= offset || op.split >= offset + op.head; }
    template <Words W>
    long inner() const {
        return lanes / PER_WORD<W>;
    }
    long code_words() const { return LANES + 2 * inner<QUADS_OF_BYTES>(); }

    // Where the keys [from, from + KEYS) of a unit lie, up to `until`: in the pages or among the step's rows.
    void find(const Unit& u, long from, long until, Found& found) const {
        const long context = op.context[u.request], low = most(from, u.low);
        const int32_t* page = nullptr;
        long slot = 0;
        if (low < least(context, until)) {
            const long past = low - op.first[u.request];
            page = op.table + u.request * op.table_width + past / op.slots, slot = past % op.slots;
        }
        found.first = low - from, found.last = least(KEYS, until - from);
        for (long j = found.first; j < found.last; ++j) {
            if (from + j >= context) {
                const long row = op.start[u.request] + from + j - context;
                found.row[j] = reinterpret_cast<const char*>(static_cast<const T*>(op.step) + (row * op.kv_heads + u.kv_head) * op.width);
                found.scale[j] = nullptr;
                continue;
            }
            const long row = (*page * op.slots + slot) * op.kv_heads + u.kv_head;
            found.row[j] = static_cast<const char*>(op.pages) + row * row_bytes();
            found.scale[j] = op.scales ? op.scales + row * 2 : nullptr;
            if (++slot == op.slots) slot = 0, ++page;
        }
    }
    long row_bytes() const { return op.width * (op.scales ? 1 : sizeof(T)); }

    // A slice of a token's row: where it lies if it can be read there, else put into `space`.
    const Wide* slice(const char* row, const float* scale, long offset, Wide* space) const {
        const T* from = reinterpret_cast<const T*>(row) + offset;
        if constexpr (sizeof(T) == sizeof(Wide)) {
            if (!scale && lanes == op.head) return reinterpret_cast<const Wide*>(from);
        }
        for (long i = op.head / LANES * LANES; i < lanes; i += LANES) put(space + i, zero());
        if (!scale) {
            for (long i = 0; i < op.head; i += LANES) put(space + i, get(from + i, op.head - i), op.head - i);
            return space;
        }
        const auto* codes = reinterpret_cast<const int8_t*>(row);
        for (long part = 0; part < 2; ++part) {
            const long until = least(offset + op.head, part ? op.width : op.split);
            for (long i = most(offset, part * op.split); i < until; i += LANES)
                put(space + i - offset, get(codes + i, until - i) * scale[part], until - i);
        }
        return space;
    }

    // The rows that come next: they lie on pages here and there, where the CPU looks for none by itself.
    void look_ahead(const Found& next, Ahead& ahead) const {
        ahead.row = next.row + next.first, ahead.last = next.row + most(next.first, next.last), ahead.at = ahead.end;
        ahead.bytes = row_bytes();
        for (long j = next.first; j < next.last; j += Ahead::LINE / (2 * sizeof(float)))
            if (next.scale[j]) __builtin_prefetch(next.scale[j]);
    }

    long last_key(long row) const { return op.window ? op.see_until[row] : op.position[row]; }
    long first_key(long row) const { return op.window ? op.position[row] - op.window + 1 : 0; }

    // Query rows as words, and as codes where they may meet some.
    void gather_queries(const Unit& u, const Buffers& b) const {
        for (long r = 0; r < u.count * group; ++r) {
            const long token = u.first + r / group, head = u.kv_head * group + r % group;
            const T* q = static_cast<const T*>(op.q) + (token * op.heads + head) * op.head;
            auto* to = reinterpret_cast<Wide*>(b.queries + r * inner<OWN>());
            for (long i = 0; i < lanes; i += LANES) put(to + i, i < op.head ? get(q + i, op.head - i) : zero());
            if (whole) b.query_units[r] = round_query(q, b.codes + r * code_words());
        }
    }

    // Into two bytes each; sums over all of a head stay below 2^31. Returns what an integer is worth; no number if any of `q`
    // is none.
    float round_query(const T* q, uint32_t* to) const {
        const float limit = least(127 * 256 + 127, 0x7fffffff / (127 * lanes));
        F16 top = zero(), odd = zero();
        for (long i = 0; i < lanes; i += LANES) {
            const F16 v = get(q + i);
            top = larger(larger(v, 0.0f - v), top), odd = odd + (v - v);
        }
        const float largest = maximum(top), inverse = largest > 0 ? limit / largest : 0;
        auto *high = reinterpret_cast<int8_t*>(to + LANES), *low = high + lanes;
        I16 all = splat(0);
        for (long i = 0; i < lanes; i += LANES) {
            const I16 v = rounded(get(q + i) * inverse), lower = v << 24 >> 24;
            put_bytes(high + i, (v - lower) >> 8);
            put_bytes(low + i, lower);
            all = all + v;
        }
        store(to, splat(0));
        *to = -128 * sum(all);
        return largest / limit + sum(odd);
    }

    // What a key's scores and a value's weights are multiplied with where those are codes.
    struct Scales {
        const float *key, *value;
    };

    // Scores to weights of one block for one row.
    template <Words W>
    void weigh(const Unit& u, const Scales& scales, long from, const Buffers& b, long r) const {
        constexpr long words = PLANES<W> * KEYS / PER_WORD<W>;
        uint32_t* weights = b.weights + r * words;
        const State& s = b.chunk;
        const long row = u.first + r / group, low = most(first_key(row), u.low), high = last_key(row);
        b.keep[r] = 1;
        if (high < from || low >= from + KEYS) {
            memset(weights, 0, words * 4);
            b.units[r] = 0;
            return;
        }
        F16 v[KEYS / LANES];
        F16 top = splat(-__builtin_inff());
        for (long i = 0; i < KEYS / LANES; ++i) {
            v[i] = get(b.scores + r * KEYS + i * LANES);
            if constexpr (W == QUADS_OF_BYTES) v[i] = v[i] * (b.query_units[r] * get(scales.key + i * LANES));
            if (low > from || high < from + KEYS - 1) {
                static const int32_t counted[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
                const I16 at = load<I16>(counted) + int32_t(from + i * LANES);
                v[i] = select((at >= splat(int32_t(low))) & (splat(int32_t(high)) >= at), v[i], splat(-__builtin_inff()));
            }
            top = larger(v[i], top);
        }
        const float block_top = maximum(top), now = block_top > s.top[r] ? block_top : s.top[r];
        if (now != s.top[r]) b.keep[r] = lane_zero(exponential(splat(s.top[r] - now)));
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
        if constexpr (W == QUADS_OF_BYTES) b.units[r] = round_weights(v, scales.value, reinterpret_cast<int8_t*>(weights));
        s.weight[r] = s.weight[r] * b.keep[r] + sum(total);
        s.top[r] = now;
    }

    // Into two bytes each, of which the lower one has no sign.
    float round_weights(F16 (&v)[KEYS / LANES], const float* scales, int8_t* to) const {
        F16 top = zero();
        for (long i = 0; i < KEYS / LANES; ++i) {
            v[i] = v[i] * get(scales + i * LANES);
            top = larger(v[i], top);
        }
        const float largest = maximum(top), inverse = largest > 0 ? 65535.0f / largest : 0;
        for (long i = 0; i < KEYS / LANES; ++i) {
            const I16 code = rounded(v[i] * inverse);
            put_bytes(to + i * LANES, code >> 8);
            put_bytes(to + KEYS + i * LANES, code);
        }
        return largest / 65535.0f;
    }

    Buffers buffers() const {
        const long rows = rows_at_once(), wide = 2 * KEYS * lanes;
        const size_t words = rows * (inner<OWN>() + code_words() + 2 * KEYS + 3) + State::floats(rows, lanes) +
                             (wide + lanes) * sizeof(Wide) / 4 + 8 * LANES;
        auto* at = static_cast<uint32_t*>(scratch(ATTENTION, words * 4));
        const auto take = [&](long count) { return (at += (count + LANES - 1) / LANES * LANES) - (count + LANES - 1) / LANES * LANES; };
        const auto floats = [&](long count) { return reinterpret_cast<float*>(take(count)); };
        Buffers b;
        b.queries = take(rows * inner<OWN>()), b.codes = take(rows * code_words()), b.weights = take(rows * KEYS);
        b.scores = floats(rows * KEYS), b.keep = floats(rows), b.units = floats(rows), b.query_units = floats(rows);
        b.chunk = State::in(floats(State::floats(rows, lanes)), rows, lanes);
        b.rows = reinterpret_cast<Wide*>(at), b.nothing = b.rows + wide;
        memset(b.nothing, 0, lanes * sizeof(Wide));
        return b;
    }

    long tokens_at_once() const { return most(1, TILE / group); }
    long rows_at_once() const { return tokens_at_once() * group; }

    // A block of keys onto b.chunk. Those that nobody sees are left out where whole tiles of them are.
    template <Words W>
    void walk_block(const Unit& u, long from, const Found& found, const Block<W>& block, const Scales& scales, const Buffers& b,
                    Ahead& ahead) const {
        constexpr bool codes = W == QUADS_OF_BYTES;
        const long rows = u.count * group, first = found.first / EDGE * EDGE, last = (found.last + EDGE - 1) / EDGE * EDGE;
        const Queries queries = {codes ? b.codes : b.queries, codes ? code_words() : inner<W>()};
        const long steps = (rows * PLANES<W> + SCORED - 1) / SCORED * KEYS / ABREAST * inner<W>() / LANES +
                           (rows * PLANES<W> + MIXED - 1) / MIXED * lanes / COLUMN * KEYS / PER_WORD<W>;
        ahead.burst = ((ahead.last - ahead.row) * ahead.bytes / Ahead::LINE + steps - 1) / steps;
        for (long k = first; k < last; k += EDGE) score_rows<W>(rows, queries, block.key, k, k + EDGE, inner<W>(), b.scores, ahead);
        for (long r = 0; r < rows; ++r) weigh<W>(u, scales, from, b, r);
        for (long i = 0; i < lanes; i += COLUMN)
            mix_rows<W>(rows, {b.weights, b.keep, b.units}, block.value, i, first / PER_WORD<W>, last / PER_WORD<W>,
                        b.chunk.acc + i, lanes, ahead);
    }

    void walk_own_block(const Unit& u, long from, const Found& found, const Buffers& b, Ahead& ahead) const {
        Block<OWN> block;
        for (long j = 0; j < KEYS; ++j) {
            const bool seen = j >= found.first && j < found.last;
            block.key[j] = seen ? slice(found.row[j], found.scale[j], op.key_offset, b.rows + j * lanes) : b.nothing;
            block.value[j] = seen ? slice(found.row[j], found.scale[j], op.value_offset, b.rows + (KEYS + j) * lanes) : b.nothing;
        }
        walk_block(u, from, found, block, {}, b, ahead);
    }

    void walk_coded_block(const Unit& u, long from, const Found& found, const Buffers& b, Ahead& ahead) const {
        const long key_part = op.key_offset >= op.split, value_part = op.value_offset >= op.split;
        Block<QUADS_OF_BYTES> block;
        alignas(64) float keys[KEYS], values[KEYS];
        for (long j = 0; j < KEYS; ++j) {
            const bool seen = j >= found.first && j < found.last;
            const auto* row = reinterpret_cast<const int8_t*>(found.row[j]);
            block.key[j] = seen ? row + op.key_offset : reinterpret_cast<const int8_t*>(b.nothing);
            block.value[j] = seen ? row + op.value_offset : reinterpret_cast<const int8_t*>(b.nothing);
            keys[j] = seen ? found.scale[j][key_part] : 0;
            values[j] = seen ? found.scale[j][value_part] : 0;
        }
        walk_block(u, from, found, block, {keys, values}, b, ahead);
    }

    // The keys of one chunk, from nothing, into b.chunk. This thread goes on up to the key `until`.
    void walk_chunk(const Unit& u, long chunk, long until, const Buffers& b) const {
        Found blocks[2], *now = blocks, *next = blocks + 1;
        Ahead ahead;
        b.chunk.clear(u.count * group, lanes);
        const long begin = most(chunk * CHUNK, u.low / KEYS * KEYS);
        find(u, begin, u.high, *now);
        for (long from = begin; from < least((chunk + 1) * CHUNK, u.high); from += KEYS) {
            find(u, from + KEYS, until, *next);
            look_ahead(*next, ahead);
            walk_found(u, from, *now, b, ahead);
            Found* done = now;
            now = next, next = done;
        }
    }

    void walk_found(const Unit& u, long from, const Found& found, const Buffers& b, Ahead& ahead) const {
        if constexpr (BYTES) {
            if (whole && found.scale[found.last - 1]) return walk_coded_block(u, from, found, b, ahead);
        }
        walk_own_block(u, from, found, b, ahead);
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
            Buffers b = buffers();
            long i = 0;
            while (item >= first[i + 1]) ++i;
            for (; item < end; ++i) {
                const Unit& u = units[i];
                gather_queries(u, b);
                for (; item < least(end, first[i + 1]); ++item) {
                    b.chunk = State::in(partial + item * size, u.count * group, lanes);
                    const long chunk = u.low / CHUNK + item - first[i];
                    walk_chunk(u, chunk, least(u.high, (chunk + end - item) * CHUNK), b);
                }
            }
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
