// Attention over pages and the step's own rows, for decode and prefill alike.
//
// A unit of work is up to 48 query rows (tokens x the query heads of one KV head) against blocks of 64 keys. Blocks and
// chunks of blocks begin at fixed absolute positions, each chunk is summed up on its own (online softmax) and chunks are
// merged in order: so a row's result does not depend on the rows beside it, on how the prompt was cut into steps, nor on
// whether one thread walked all chunks or several shared them.
#pragma once

#include "rows.h"

namespace {

constexpr long KEYS = 64, CHUNK = 256, TILE = 48;
#if CABOCHON_AVX512
constexpr int QUERY_ROWS = 8, COLUMNS = 2;  // a decoded token brings eight rows in the small models
#elif CABOCHON_AVX2
constexpr int QUERY_ROWS = 2, COLUMNS = 2;
#else
constexpr int QUERY_ROWS = 1, COLUMNS = 4;
#endif

// Both products run as tiles of "one left value for all lanes times sixteen right values". With bfloat16 dot products a
// value is a pair of neighbours along the inner axis, else a float32.
#if CABOCHON_AVX512 && defined(__AVX512BF16__)
template <class T>
constexpr bool PAIRS = sizeof(T) == 2;
#else
template <class T>
constexpr bool PAIRS = false;
#endif

template <bool Pairs>
INLINE F16 step(F16 acc, uint32_t left, F16 right) {
#if CABOCHON_AVX512 && defined(__AVX512BF16__)
    if constexpr (Pairs)
    {
        acc.part[0] = (F16::Part)_mm512_dpbf16_ps((__m512)acc.part[0], (__m512bh)_mm512_set1_epi32(left), (__m512bh)right.part[0]);
        return acc;
    }
#endif
    float value;
    memcpy(&value, &left, 4);
    return fma(splat(value), right, acc);
}

// out[r][..] (+)= left[r][..] . right, over `columns` lanes (a multiple of 16).
template <bool Pairs, int R, int C>
void strip(const uint32_t* left, long left_stride, const uint32_t* right, long right_stride, long inner, float* out,
           long out_stride, bool onto) {
    F16 acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = onto ? get(out + r * out_stride + c * LANES) : zero();
    for (long k = 0; k < inner; ++k) {
        F16 b[C];
        for (int c = 0; c < C; ++c) b[c] = load<F16>(right + k * right_stride + c * LANES);
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) acc[r][c] = step<Pairs>(acc[r][c], left[r * left_stride + k], b[c]);
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) put(out + r * out_stride + c * LANES, acc[r][c]);
}

template <bool Pairs, int R, int C>
void fit_strip(long rows, long lanes, const uint32_t* left, long left_stride, const uint32_t* right, long right_stride,
               long inner, float* out, long out_stride, bool onto) {
    if constexpr (R > 1) {
        if (rows < R)
            return fit_strip<Pairs, R - 1, C>(rows, lanes, left, left_stride, right, right_stride, inner, out, out_stride, onto);
    }
    if constexpr (C > 1) {
        if (lanes < C * LANES)
            return fit_strip<Pairs, R, C - 1>(rows, lanes, left, left_stride, right, right_stride, inner, out, out_stride, onto);
    }
    strip<Pairs, R, C>(left, left_stride, right, right_stride, inner, out, out_stride, onto);
}

template <bool Pairs, int R = QUERY_ROWS, int C = COLUMNS>
void multiply(long rows, long lanes, const uint32_t* left, long left_stride, const uint32_t* right, long right_stride,
              long inner, float* out, long out_stride, bool onto) {
    for (long c = 0; c < lanes; c += C * LANES)
        for (long r = 0; r < rows; r += R)
            fit_strip<Pairs, R, C>(rows - r, lanes - c, left + r * left_stride, left_stride, right + c, right_stride, inner,
                                   out + r * out_stride + c, out_stride, onto);
}

// 16 x 16 words, transposed.
INLINE void transpose(const U16 (&in)[16], uint32_t* to, long stride) {
#if CABOCHON_AVX512
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = (__m512i)in[i].part[0];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)  // a[i + c]: of rows i .. i + 3, column c of each four
        for (int half = 0; half < 2; ++half) {
            a[i + 2 * half] = _mm512_unpacklo_epi64(b[i + half], b[i + 2 + half]);
            a[i + 2 * half + 1] = _mm512_unpackhi_epi64(b[i + half], b[i + 2 + half]);
        }
    for (int c = 0; c < 4; ++c) {
        const __m512i even[2] = {_mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88)};
        const __m512i odd[2] = {_mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd), _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd)};
        b[c] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
        b[4 + c] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        b[8 + c] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
        b[12 + c] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
    }
    for (int i = 0; i < 16; ++i) store(to + i * stride, b[i]);
#else
    for (int j = 0; j < 16; ++j) {
        uint32_t row[16];
        store(row, in[j]);
        for (int i = 0; i < 16; ++i) to[i * stride + j] = row[i];
    }
#endif
}

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
    // This, then `later`, as one.
    void merge(const State& later, long rows, long head) const {
        for (long r = 0; r < rows; ++r) {
            if (later.weight[r] == 0) continue;
            const float both = later.top[r] > top[r] ? later.top[r] : top[r];
            const float mine = lane_zero(exponential(splat(top[r] - both))), other = lane_zero(exponential(splat(later.top[r] - both)));
            top[r] = both;
            weight[r] = weight[r] * mine + later.weight[r] * other;
            for (long i = 0; i < head; i += LANES) {
                float* to = acc + r * head + i;
                put(to, fma(get(to), splat(mine), get(later.acc + r * head + i) * other));
            }
        }
    }
};

template <class T>
struct Attention {
    static constexpr bool pairs = PAIRS<T>;
    const Attend& op;
    long group;      // query heads per KV head
    long lanes;      // head width, filled up to whole registers
    long inner;      // left values of a query row
    struct Unit {
        int32_t request, kv_head, first, count, low, high;  // query rows (tokens), keys [low, high)
    };

    struct Buffers {
        uint32_t *queries, *keys, *values, *weights;
        float* scores;
        State chunk;
        T* rows;  // of 8-bit pages, widened
    };

    explicit Attention(const Attend& op)
        : op(op), group(op.heads / op.kv_heads), lanes((op.head + LANES - 1) / LANES * LANES), inner(pairs ? lanes / 2 : lanes) {}

    // The row of a token, where it lies or widened into `space`.
    const T* key_row(const Unit& u, long position, T* space) const {
        const long begin = op.context[u.request];
        if (position >= begin) {
            const long row = op.start[u.request] + position - begin;
            return static_cast<const T*>(op.step) + (row * op.kv_heads + u.kv_head) * op.width;
        }
        const long past = position - op.first[u.request];
        const long slot = op.table[u.request * op.table_width + past / op.slots] * op.slots + past % op.slots;
        const long row = slot * op.kv_heads + u.kv_head;
        if (!op.scales) return static_cast<const T*>(op.pages) + row * op.width;
        const auto* codes = static_cast<const int8_t*>(op.pages) + row * op.width;
        for (long part = 0; part < 2; ++part)
            for (long i = part * op.split; i < (part ? op.width : op.split); i += LANES) {
                const long left = (part ? op.width : op.split) - i;
                put(space + i, get(codes + i, left) * op.scales[row * 2 + part], left);
            }
        return space;
    }

    // Rows of the next block lie on pages here and there, where the CPU looks for none by itself.
    void prefetch_keys(const Unit& u, long from) const {
        if (op.scales) return;
        for (long j = from; j < least(from + KEYS, u.high); ++j) {
            const auto* row = reinterpret_cast<const char*>(key_row(u, j, nullptr));
            for (long line = 0; line < op.width * long(sizeof(T)); line += 64) __builtin_prefetch(row + line, 0, 2);
        }
    }

    long last_key(long row) const { return op.window ? op.see_until[row] : op.position[row]; }
    long first_key(long row) const { return op.window ? op.position[row] - op.window + 1 : 0; }

    // Query rows as left values, [rows, inner].
    void gather_queries(const Unit& u, uint32_t* to) const {
        for (long token = 0; token < u.count; ++token)
            for (long h = 0; h < group; ++h, to += inner) {
                const T* q = static_cast<const T*>(op.q) + ((u.first + token) * op.heads + u.kv_head * group + h) * op.head;
                if constexpr (pairs) {
                    memset(to, 0, inner * 4);
                    memcpy(to, q, op.head * 2);
                } else {
                    for (long i = 0; i < op.head; i += LANES) store(to + i, get(q + i, op.head - i));
                }
            }
    }

    // Keys [from, from + 64) transposed to [inner, KEYS], values as [KEYS (/ 2), lanes]; zero where nobody looks.
    void gather_keys(const Unit& u, long from, const Buffers& b) const {
        const T* row[KEYS];
        for (long j = 0; j < KEYS; ++j)
            row[j] = from + j >= u.low && from + j < u.high ? key_row(u, from + j, b.rows + j * op.width) : nullptr;
        for (long j = 0; j < KEYS; j += LANES)
            for (long i = 0; i < inner; i += LANES) {
                U16 block[LANES];
                for (long lane = 0; lane < LANES; ++lane) block[lane] = row[j + lane] ? key_words(row[j + lane], i) : U16::of(0);
                transpose(block, b.keys + i * KEYS + j, KEYS);
            }
        for (long j = 0; j < KEYS; j += pairs ? 2 : 1)
            for (long i = 0; i < lanes; i += LANES)
                store(b.values + (pairs ? j / 2 : j) * lanes + i, value_words(row[j], pairs ? row[j + 1] : nullptr, i));
    }

    U16 key_words(const T* row, long word) const {
        row += op.key_offset;
        if constexpr (pairs) {
            const long left = op.head - 2 * word;
            if (left >= 2 * LANES) return load<U16>(row + 2 * word);
            U16 some = U16::of(0);
            memcpy(&some, row + 2 * word, left * sizeof(T));
            return some;
        } else {
            return as<U16>(get(row + word, op.head - word));
        }
    }

    U16 value_words(const T* a, const T* b, long i) const {
        const U16 low = a ? as<U16>(get(a + op.value_offset + i, op.head - i)) : U16::of(0);
        if constexpr (!pairs) return low;
        return low >> 16 | (b ? as<U16>(get(b + op.value_offset + i, op.head - i)) : U16::of(0));
    }

    // Scores to weights of one block for one row; rescales what the row has so far.
    void weigh(float* scores, uint32_t* weights, long from, long low, long high, const State& s, long r) const {
        F16 v[KEYS / LANES];
        static const int32_t counted[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const I16 lane = load<I16>(counted);
        F16 top = splat(-__builtin_inff());
        for (long i = 0; i < KEYS / LANES; ++i) {
            const I16 at = lane + int32_t(from + i * LANES);
            v[i] = select((at >= splat(int32_t(low))) & (splat(int32_t(high)) >= at), get(scores + i * LANES), splat(-__builtin_inff()));
            top = larger(v[i], top);
        }
        const float block_top = maximum(top), now = block_top > s.top[r] ? block_top : s.top[r];
        const float keep = lane_zero(exponential(splat(s.top[r] - now)));
        F16 total = zero();
        for (long i = 0; i < KEYS / LANES; ++i) {
            F16 w = exponential(v[i] - now);
            if constexpr (pairs) {
                const U16 narrow_w = narrow(w);
                w = widen(narrow_w);
                put_shorts(weights + i * LANES / 2, narrow_w);
            } else {
                store(weights + i * LANES, w);
            }
            total = total + w;
        }
        s.weight[r] = s.weight[r] * keep + sum(total);
        if (keep != 1.0f)
            for (long i = 0; i < lanes; i += LANES) put(s.acc + r * lanes + i, get(s.acc + r * lanes + i) * keep);
        s.top[r] = now;
    }

    Buffers buffers() const {
        const long rows = rows_at_once();
        const size_t words = rows * inner + 2 * KEYS * lanes + 2 * rows * KEYS + State::floats(rows, lanes) + (op.scales ? KEYS * op.width : 0);
        auto* at = static_cast<uint32_t*>(scratch(ATTENTION, words * 4));
        Buffers b;
        b.queries = at, at += rows * inner;
        b.keys = at, at += KEYS * lanes;
        b.values = at, at += KEYS * lanes;
        b.weights = at, at += rows * KEYS;
        b.scores = reinterpret_cast<float*>(at), at += rows * KEYS;
        b.chunk = State::in(reinterpret_cast<float*>(at), rows, lanes), at += State::floats(rows, lanes);
        b.rows = reinterpret_cast<T*>(at);
        return b;
    }

    long tokens_at_once() const { return most(1, TILE / group); }
    long rows_at_once() const { return tokens_at_once() * group; }

    // The keys of one chunk, from nothing, into b.chunk.
    void walk_chunk(const Unit& u, long chunk, const Buffers& b) const {
        const long rows = u.count * group, weights_width = pairs ? KEYS / 2 : KEYS;
        b.chunk.clear(rows, lanes);
        for (long from = most(chunk * CHUNK, u.low / KEYS * KEYS); from < least((chunk + 1) * CHUNK, u.high); from += KEYS) {
            gather_keys(u, from, b);
            prefetch_keys(u, from + KEYS);
            multiply<pairs>(rows, KEYS, b.queries, inner, b.keys, KEYS, inner, b.scores, KEYS, false);
            for (long r = 0; r < rows; ++r) {
                const long row = u.first + r / group, low = most(first_key(row), u.low), high = last_key(row);
                if (high < from || low >= from + KEYS)
                    memset(b.weights + r * weights_width, 0, weights_width * 4);
                else
                    weigh(b.scores + r * KEYS, b.weights + r * weights_width, from, low, high, b.chunk, r);
            }
            multiply<pairs>(rows, lanes, b.weights, weights_width, b.values, lanes, weights_width, b.chunk.acc, lanes, true);
        }
    }

    void finish(const Unit& u, const State& s) const {
        for (long r = 0; r < u.count * group; ++r) {
            const long head = (u.first + r / group) * op.heads + u.kv_head * group + r % group;
            T* to = static_cast<T*>(op.out) + head * op.head;
            const F16 weight = splat(1.0f / s.weight[r]);
            for (long i = 0; i < op.head; i += LANES) put(to + i, get(s.acc + r * lanes + i) * weight, op.head - i);
        }
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
        const long tiles = op.requests + op.row_start[op.requests] / tokens_at_once();
        auto* units = static_cast<Unit*>(scratch(LISTS, tiles * op.kv_heads * sizeof(Unit)));
        const long n = plan(units);
        if (n >= 2 * threads() || n > 64) return walk_units(units, n);
        walk_chunks(units, n);
    }

    // Many units: each is one thread's from end to end.
    void walk_units(const Unit* units, long n) const {
        parallel(n, [&](long item) {
            const Unit& u = units[item];
            const long rows = u.count * group;
            const Buffers b = buffers();
            gather_queries(u, b.queries);
            const State all = State::in(static_cast<float*>(scratch(RESULT, 4 * State::floats(rows, lanes))), rows, lanes);
            all.clear(rows, lanes);
            for (long chunk = u.low / CHUNK; chunk * CHUNK < u.high; ++chunk) {
                walk_chunk(u, chunk, b);
                all.merge(b.chunk, rows, lanes);
            }
            finish(u, all);
        });
    }

    // Few units (decode): threads share their chunks.
    void walk_chunks(const Unit* units, long n) const {
        const size_t size = State::floats(rows_at_once(), lanes);
        long first[65] = {0};  
        for (long i = 0; i < n; ++i) first[i + 1] = first[i] + (units[i].high - 1) / CHUNK - units[i].low / CHUNK + 1;
        auto* partial = static_cast<float*>(scratch(HIDDEN, (first[n] + 1) * size * 4));
        parallel(first[n], [&](long item) {
            long i = 0;
            while (item >= first[i + 1]) ++i;
            const Unit& u = units[i];
            Buffers b = buffers();
            b.chunk = State::in(partial + item * size, u.count * group, lanes);
            gather_queries(u, b.queries);
            walk_chunk(u, u.low / CHUNK + item - first[i], b);
        });
        parallel(n, [&](long i) {
            const long rows = units[i].count * group;
            const State all = State::in(static_cast<float*>(scratch(RESULT, 4 * size)), rows, lanes);
            all.clear(rows, lanes);
            for (long item = first[i]; item < first[i + 1]; ++item)
                all.merge(State::in(partial + item * size, rows, lanes), rows, lanes);
            finish(units[i], all);
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
