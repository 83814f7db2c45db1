// Attention over pages and the step's own rows, for decode and prefill alike.
//
// A unit of work is up to 48 query rows (tokens x the query heads of one KV head) against blocks of keys, which are walked in
// chunks of 128. Both begin at fixed absolute positions, each block is summed up on its own and they are merged in order (online
// softmax): so a row's result does not depend on the rows beside it, on how the prompt was cut into steps, nor on whether one
// thread walked all blocks or several shared them.
//
// Keys in pages of 8 bits are multiplied in integers where the CPU can, in blocks of 64 that lie whole in pages: codes as they
// are, queries and weights rounded to 8 bits (docs/numerics.md has the definition). Other rows of such pages are widened first.
#pragma once

#include "attend_codes.h"
#include "attend_state.h"

namespace {

constexpr long TILE = 48;                  // query rows of a unit
constexpr long BLOCKS = KEYS / CODED;      // of codes in a chunk
constexpr long SINGLE = 16, CHUNKS = 4;    // so many blocks are a chunk each, later ones so many chunks: by then there are enough
constexpr size_t SHARED_BYTES = 32 << 20;  // of blocks' results while threads share them out
constexpr long FULL = 64, EDGE = 2 * ABREAST;  // numbers that fill any kind of register; keys that are scored, or left out, together

// Where the rows of a chunk lie, and the scales of those in 8 bits. Only the keys [first, last) of it are seen, [begin, end) are
// filled up by rows of zeros; those before `coded` are multiplied as codes.
struct Found {
    const char* row[KEYS];
    const float* scale[KEYS];
    long first, last, begin, coded, end;
};

template <class T>
struct Attention {
    static constexpr Words OWN = WORDS<T>;
    typedef Number<OWN> Wide;
    const Attend& op;
    long group;        // query heads per KV head
    long lanes;        // head width, filled up to whole columns and registers
    long cut;          // where the second scale of a key in pages of 8 bits begins
    KeyPart parts[2];  // of such a key
    bool whole;        // are such keys and values multiplied as they lie?
    struct Unit {
        int32_t request, kv_head, first, count, low, high;  // query rows (tokens), keys [low, high)
    };

    struct Buffers {
        uint32_t *queries, *weights, *coded_weights;
        CodedQueries coded_queries;
        float *scores[2], *weight_units;  // by either part of keys; what an integer of a row's weights is worth, block by block
        State block;
        Wide* copies;   // of keys, or of a column of values, that don't lie as they are read
        char* nothing;  // a row of zeros
    };

    explicit Attention(const Attend& op)
        : op(op), group(op.heads / op.kv_heads), lanes((op.head + FULL - 1) / FULL * FULL),
          cut(least(most(op.split - op.key_offset, 0), op.head)), parts{{0, cut, 0}, {cut, op.head, 1}},
          whole(BYTES && sizeof(T) == 2 && op.scales && lanes == op.head && cut % FOLD == 0 && op.head <= WIDEST &&
                (op.split <= op.value_offset || op.split >= op.value_offset + op.head)) {}

    long inner() const { return lanes / PER_WORD<OWN>; }  // words of a head

    // Where the keys [from, from + KEYS) of a unit lie, up to `until`: in the pages or among the step's rows.
    void find(const Unit& u, long from, long until, const Buffers& b, Found& found) const {
        const long low = most(from, u.low), past = op.context[u.request] - from;
        found.first = low - from, found.last = most(least(KEYS, until - from), found.first);
        found.begin = found.first / EDGE * EDGE, found.end = (found.last + EDGE - 1) / EDGE * EDGE;
        found.coded = !whole ? 0 : past >= found.last ? found.end : most(past, 0) / CODED * CODED;
        const long first_own = least(most(past, found.first), found.last);
        find_nothing(found.begin, found.first, b, found);
        if (found.first < first_own) find_stored(u, low - op.first[u.request], found.first, first_own, found);
        for (long j = first_own; j < found.last; ++j) {
            const long row = (op.start[u.request] + j - past) * op.kv_heads + u.kv_head;
            found.row[j] = static_cast<const char*>(op.step) + row * op.width * sizeof(T), found.scale[j] = nullptr;
        }
        find_nothing(found.last, found.end, b, found);
    }

    void find_nothing(long begin, long end, const Buffers& b, Found& found) const {
        static const float no_scales[2] = {0, 0};
        for (long j = begin; j < end; ++j) found.row[j] = b.nothing, found.scale[j] = j < found.coded ? no_scales : nullptr;
    }

    // Rows [begin, end) from the place `at` on in a request's pages.
    void find_stored(const Unit& u, long at, long begin, long end, Found& found) const {
        const int32_t* page = op.table + u.request * op.table_width + at / op.slots;
        const long bytes = op.kv_heads * op.width * stored();
        for (long slot = at % op.slots; begin < end; slot = 0) {
            const long count = least(op.slots - slot, end - begin), row = (*page++ * op.slots + slot) * op.kv_heads + u.kv_head;
            const char* lies = static_cast<const char*>(op.pages) + row * op.width * stored();
            const float* scales = op.scales ? op.scales + row * 2 : nullptr;
            for (long i = 0; i < count; ++i) {
                found.row[begin + i] = lies + i * bytes;
                found.scale[begin + i] = scales ? scales + i * op.kv_heads * 2 : nullptr;
                if (scales) __builtin_prefetch(found.scale[begin + i]);
            }
            begin += count;
        }
    }
    long stored() const { return op.scales ? 1 : sizeof(T); }  // bytes of a number in the pages

    // Can the numbers of a row be read where they lie?
    bool lies_ready(const float* scale) const { return sizeof(T) == sizeof(Wide) && !scale && lanes == op.head; }

    // The numbers [begin, end) of a row and zeros after them, `room` in all.
    const Wide* copy(const char* row, const float* scale, long begin, long end, Wide* to, long room) const {
        for (long i = most(end - begin, 0) / LANES * LANES; i < room; i += LANES) put(to + i, zero());
        const T* numbers = reinterpret_cast<const T*>(row);
        for (long i = begin; !scale && i < end; i += LANES) put(to + i - begin, get(numbers + i, end - i), end - i);
        const auto* codes = reinterpret_cast<const int8_t*>(row);
        for (long part = 0; scale && part < 2; ++part) {
            const long until = part ? end : least(end, op.split);
            for (long i = most(begin, part * op.split); i < until; i += LANES)
                put(to + i - begin, get(codes + i, until - i) * scale[part], until - i);
        }
        return to;
    }

    // What comes next lies on pages here and there, where the CPU looks for none by itself: the rows of `next`, to be asked for
    // in as many `steps`. Whole rows: memory gives keys first and values later at two thirds of the speed.
    void look_ahead(const Found& next, long steps, Ahead& ahead) const {
        ahead.row = next.row + next.first, ahead.last = next.row + next.last;
        ahead.bytes = op.width * stored();
        ahead.burst = ((ahead.last - ahead.row) * ahead.bytes / Ahead::LINE + steps - 1) / steps;
    }

    long last_key(long row) const { return op.window ? op.see_until[row] : op.position[row]; }
    long first_key(long row) const { return op.window ? op.position[row] - op.window + 1 : 0; }

    // Query rows as words, and as codes where they may meet some.
    void gather_queries(const Unit& u, const Buffers& b) const {
        for (long r = 0; r < u.count * group; ++r) {
            const long token = u.first + r / group, head = u.kv_head * group + r % group;
            const T* q = static_cast<const T*>(op.q) + (token * op.heads + head) * op.head;
            auto* to = reinterpret_cast<Wide*>(b.queries + r * inner());
            for (long i = 0; i < lanes; i += LANES) put(to + i, i < op.head ? get(q + i, op.head - i) : zero());
            for (long i = 0; whole && i < 2; ++i) b.coded_queries.round(q, parts[i], r);
        }
    }

    // What the scores of a chunk's keys and the weights of its values are multiplied with where those are codes.
    struct Scales {
        alignas(64) float key[2][KEYS], value[KEYS];
    };

    void gather_scales(const Found& found, Scales& scales) const {
        const long value = op.value_offset >= op.split;
        for (long j = found.begin; j < found.coded; ++j) {
            scales.key[0][j] = found.scale[j][0], scales.key[1][j] = found.scale[j][1];
            scales.value[j] = found.scale[j][value];
        }
    }

    // The keys of a chunk that row r sees: [low, high].
    struct Seen {
        long low, high;
    };
    Seen seen(const Unit& u, const Found& found, long from, long r) const {
        const long row = u.first + r / group;
        return {most(first_key(row) - from, found.first), least(last_key(row) - from, found.last - 1)};
    }

    // The scores of row r as they count, minus infinity where a key is not seen. Returns the largest, or `top` if that is larger.
    // Whole blocks of codes, whatever lies in a buffer beyond the keys that were found: none of it is seen.
    float limit(const Found& found, const Seen& seen, const Scales& scales, float top, const Buffers& b, long r) const {
        float* v = b.scores[0] + r * KEYS;
        F16 best = splat(top);
        const long begin = found.begin / CODED * CODED, end = (found.end + CODED - 1) / CODED * CODED;
        for (long i = begin; i < end; i += LANES) {
            F16 score = get(v + i);
            if (i < found.coded) score = score_of_parts(score, scales, b, r, i);
            if (seen.low > i || seen.high < i + LANES - 1) {
                static const int32_t counted[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
                const I16 at = load<I16>(counted) + int32_t(i);
                score = select((at >= splat(int32_t(seen.low))) & (splat(int32_t(seen.high)) >= at), score, splat(-__builtin_inff()));
            }
            best = larger(score, best);
            put(v + i, score);
        }
        return maximum(best);
    }

    // Such scores to weights. Returns their sum.
    float weigh(const Found& found, const Scales& scales, float top, const Buffers& b, long rows, long r) const {
        const float* v = b.scores[0] + r * KEYS;
        F16 total = zero();
        for (long i = found.begin / CODED * CODED; i < found.coded; i += CODED) {
            auto* codes = reinterpret_cast<int8_t*>(b.coded_weights + (r * KEYS + i) / 4);
            b.weight_units[i / CODED * rows + r] = round_weights(v + i, scales.value + i, top, total, codes);
        }
        auto* weights = reinterpret_cast<Wide*>(b.weights + r * KEYS / PER_WORD<OWN>);
        for (long i = most(found.begin / LANES * LANES, found.coded); i < found.end; i += LANES) {
            F16 weight = decaying(get(v + i) - top);
            put(weights + i, weight);
            if constexpr (sizeof(Wide) == 2) weight = get(weights + i);
            total = total + weight;
        }
        return sum(total);
    }

    // Scores of a chunk to weights; what came before in the block then counts for less. Row by row in either loop, not in one
    // for both: so the CPU is on the next row while it waits for one's largest score.
    void weigh_chunk(const Unit& u, const Found& found, long from, const Scales& scales, const State& s, const Buffers& b) const {
        const long rows = u.count * group;
        for (long r = 0; r < rows; ++r) {
            const Seen some = seen(u, found, from, r);
            if (some.low <= some.high) s.lower(r, limit(found, some, scales, s.top[r], b, r), lanes);
        }
        for (long r = 0; r < rows; ++r) {
            const Seen some = seen(u, found, from, r);
            if (some.low <= some.high) {
                s.weight[r] += weigh(found, scales, s.top[r], b, rows, r);
            } else {
                b.weight_units[r] = b.weight_units[rows + r] = 0;
                memset(b.weights + r * KEYS / PER_WORD<OWN>, 0, KEYS / PER_WORD<OWN> * 4);
                memset(b.coded_weights + r * KEYS / 4, 0, KEYS);
            }
        }
    }

    // Sums of codes to scores.
    F16 score_of_parts(F16 first, const Scales& scales, const Buffers& b, long r, long i) const {
        if (cut == 0) return first * get(scales.key[1] + i);
        first = first * get(scales.key[0] + i);
        return cut == op.head ? first : fma(get(b.scores[1] + r * KEYS + i), get(scales.key[1] + i), first);
    }

    Buffers buffers() const {
        const long rows = rows_at_once(), wide = most(EDGE * lanes, KEYS * COLUMN);
        const size_t words = rows * (inner() + KEYS / PER_WORD<OWN> + KEYS / 4 + 2 * KEYS + BLOCKS) + CodedQueries::size(rows, lanes) +
                             State::floats(rows, lanes) + wide * sizeof(Wide) / 4 + op.width * sizeof(T) / 4 + 10 * LANES;
        auto* at = static_cast<uint32_t*>(scratch(ATTENTION, words * 4));
        const auto take = [&](long count) { return (at += (count + LANES - 1) / LANES * LANES) - (count + LANES - 1) / LANES * LANES; };
        const auto floats = [&](long count) { return reinterpret_cast<float*>(take(count)); };
        Buffers b;
        b.queries = take(rows * inner()), b.weights = take(rows * KEYS / PER_WORD<OWN>);
        b.coded_queries = {take(CodedQueries::size(rows, lanes)), lanes}, b.coded_weights = take(rows * KEYS / 4);
        b.scores[0] = floats(rows * KEYS), b.scores[1] = floats(rows * KEYS), b.weight_units = floats(rows * BLOCKS);
        b.block = State::in(floats(State::floats(rows, lanes)), rows, lanes);
        b.copies = reinterpret_cast<Wide*>(take(wide * sizeof(Wide) / 4));
        b.nothing = reinterpret_cast<char*>(at);
        memset(b.nothing, 0, op.width * sizeof(T));
        return b;
    }

    long tokens_at_once() const { return most(1, TILE / group); }
    long rows_at_once() const { return tokens_at_once() * group; }

    // Scores of the keys [begin, end) of a chunk.
    void score_keys(long rows, const Found& found, long begin, long end, const Buffers& b, Ahead& ahead) const {
        const Queries queries = {b.queries, inner()};
        for (long k = begin; k < end; k += EDGE) {
            const Wide* key[EDGE];
            for (long j = 0; j < EDGE; ++j) {
                const char* row = found.row[k + j];
                key[j] = reinterpret_cast<const Wide*>(row) + op.key_offset;
                if (!lies_ready(found.scale[k + j]))
                    key[j] = copy(row, found.scale[k + j], op.key_offset, op.key_offset + op.head, b.copies + j * lanes, lanes);
            }
            score_rows<OWN>(rows, queries, key, 0, EDGE, inner(), b.scores[0] + k, ahead);
        }
    }

    // The same of keys in codes, by parts.
    void score_stored(long rows, const Found& found, long begin, long end, const Buffers& b, Ahead& ahead) const {
        for (long i = cut == 0; i < (cut < op.head ? 2 : 1); ++i) {
            const int8_t* key[KEYS];
            for (long k = begin; k < end; ++k) key[k] = reinterpret_cast<const int8_t*>(found.row[k]) + op.key_offset + parts[i].begin;
            score_codes(b.coded_queries, rows, parts[i], key + begin, end - begin, b.scores[i && cut > 0] + begin, ahead);
        }
    }

    // Weighted values of the keys [begin, end), to or onto a chunk's result.
    void mix_values(long rows, const Found& found, long begin, long end, bool onto, const State& s, const Buffers& b, Ahead& ahead) const {
        const Wide* value[KEYS];
        bool ready = true;
        for (long j = begin; j < end; ++j) {
            value[j] = reinterpret_cast<const Wide*>(found.row[j]) + op.value_offset;
            ready = ready && lies_ready(found.scale[j]);
        }
        for (long i = 0; i < lanes; i += COLUMN) {
            const long from = op.value_offset + i, until = op.value_offset + least(op.head, i + COLUMN);
            for (long j = begin; !ready && j < end; ++j)
                value[j] = copy(found.row[j], found.scale[j], from, until, b.copies + j * COLUMN, COLUMN);
            mix_rows<OWN>(rows, b.weights, value, ready ? i : 0, begin / PER_WORD<OWN>, end / PER_WORD<OWN>, s.acc + i, lanes, onto, ahead);
        }
    }

    // The same of a block of values in codes.
    void mix_stored(long rows, const Found& found, long begin, long end, bool onto, const State& s, const Buffers& b, Ahead& ahead) const {
        const CodedWeights weights = {b.coded_weights + begin / 4, b.weight_units + begin / CODED * rows};
        const int8_t* value[CODED];
        for (long j = begin; j < end; ++j) value[j - begin] = reinterpret_cast<const int8_t*>(found.row[j]) + op.value_offset;
        mix_codes(rows, weights, value, end - begin, s.acc, lanes, onto, ahead);
    }

    // A chunk of keys to or onto `s`, while the rows of the next one are asked for.
    void walk_chunk(const Unit& u, long chunk, bool onto, const Found& found, const Found& next, const State& s, const Buffers& b) const {
        const long rows = u.count * group, begin = found.begin, coded = most(found.coded, begin), end = found.end;
        const long steps = most(rows * (2 * (end - begin) - (coded - begin)) * lanes / 512, 1);  // of 16 products, the widest there are
        Scales scales = {};
        Ahead ahead;
        look_ahead(next, steps, ahead);
        if constexpr (BYTES) score_stored(rows, found, begin, coded, b, ahead);
        score_keys(rows, found, coded, end, b, ahead);
        gather_scales(found, scales);
        if (!onto) s.forget(rows);
        weigh_chunk(u, found, chunk * KEYS, scales, s, b);
        for (long k = begin, until; BYTES && k < coded; k = until, onto = true) {
            until = least(k / CODED * CODED + CODED, coded);
            mix_stored(rows, found, k, until, onto, s, b, ahead);
        }
        if (coded < end) mix_values(rows, found, coded, end, onto, s, b, ahead);
    }

    // Blocks of keys by their number. Those of a window are a chunk each: there are few.
    long block_of(long chunk) const { return op.window || chunk < SINGLE ? chunk : SINGLE + (chunk - SINGLE) / CHUNKS; }
    long first_chunk(long block) const { return op.window || block < SINGLE ? block : SINGLE + (block - SINGLE) * CHUNKS; }
    long first_block(const Unit& u) const { return block_of(u.low / KEYS); }
    long last_block(const Unit& u) const { return block_of((u.high - 1) / KEYS); }

    // The blocks [first, last) of a unit, one after the other: state(block) says where to, done(block) is told. What is walked
    // next is asked for at the end; `asked`: and so was this.
    template <class Where, class Done>
    void walk(const Unit& u, long first, long last, const Unit* next, bool asked, const Buffers& b, const Where& state, const Done& done) const {
        Found chunks[2];
        const long begin = most(first_chunk(first), u.low / KEYS), until = least(u.high, first_chunk(last) * KEYS);
        find(u, begin * KEYS, until, b, chunks[begin & 1]);
        if (!asked) {
            Ahead ahead;
            look_ahead(chunks[begin & 1], 1, ahead);
            ahead();  // all at once: there is nothing to compute meanwhile
        }
        gather_queries(u, b);
        bool onto = false;
        for (long chunk = begin; chunk * KEYS < until; ++chunk) {
            const long block = block_of(chunk);
            if (next && (chunk + 1) * KEYS >= until)
                find(*next, next->low / KEYS * KEYS, next->high, b, chunks[~chunk & 1]);
            else
                find(u, (chunk + 1) * KEYS, until, b, chunks[~chunk & 1]);
            walk_chunk(u, chunk, onto, chunks[chunk & 1], chunks[~chunk & 1], state(block), b);
            onto = block_of(chunk + 1) == block;
            if (!onto || (chunk + 1) * KEYS >= until) done(block);
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
        long rows = 0;
        first[0] = 0;
        for (long i = 0; i < n; ++i) {
            first[i + 1] = first[i] + last_block(units[i]) - first_block(units[i]) + 1;
            rows = most(rows, units[i].count * group);
        }
        const size_t partial = first[n] * State::floats(rows, lanes) * sizeof(float);
        partial < SHARED_BYTES ? walk_blocks(units, n, first, rows) : walk_units(units, n);
    }

    // Much to do: a unit is one thread's from end to end.
    void walk_units(const Unit* units, long n) const {
        parallel(n, [&](long item) {
            const Unit& u = units[item];
            const long rows = u.count * group;
            const Buffers b = buffers();
            const State all = State::in(static_cast<float*>(scratch(RESULT, 4 * State::floats(rows, lanes))), rows, lanes);
            const long first = first_block(u);
            const auto merge = [&](long block) {
                for (long r = 0; r < rows && block > first; ++r) all.merge(b.block, 1, 0, r, lanes);
            };
            walk(u, first, last_block(u) + 1, nullptr, false, b, [&](long block) { return block > first ? b.block : all; }, merge);
            for (long r = 0; r < rows; ++r) finish(u, r, all);
        });
    }

    // Little to do (decode): threads share the blocks, then the rows, of which a unit has at most `rows`.
    void walk_blocks(const Unit* units, long n, const long* first, long rows) const {
        const size_t size = State::floats(rows, lanes);
        auto* partial = static_cast<float*>(scratch(HIDDEN, first[n] * size * 4));
        parallel_runs(first[n], [&](long item, long end) {
            const Buffers b = buffers();
            long i = 0;
            while (item >= first[i + 1]) ++i;
            for (bool asked = false; item < end; ++i, asked = true) {
                const Unit& u = units[i];
                const long zero = first_block(u) - first[i], last = least(end, first[i + 1]);  // item 0 would be this block
                const auto state = [&](long block) { return State::in(partial + (block - zero) * size, u.count * group, lanes); };
                walk(u, item + zero, last + zero, last < end ? &units[i + 1] : nullptr, asked, b, state, [](long) {});
                item = last;
            }
        });
        parallel(n * rows, [&](long item) {
            const Unit& u = units[item / rows];
            const long i = item / rows, r = item % rows, count = u.count * group;
            if (r >= count) return;
            const State all = State::in(partial + first[i] * size, count, lanes);
            all.merge(State::in(partial + (first[i] + 1) * size, count, lanes), first[i + 1] - first[i] - 1, size, r, lanes);
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
