// Many rows times a bfloat16 matrix, as the towers need it: ranges cut on the way in and out, activations on the way out.
//
// The matrix is packed as it is read: in strips of 32 outputs that a thread keeps in its cache for all rows. That happens
// anew for every call; for several hundred rows it is a hundredth of the work, and a checkpoint may stay mapped as it lies.
// Meanwhile the strips that the thread will pack next are fetched from memory. Rows are only copied (and cut): a tile reads
// twelve of them side by side, a word of each for all outputs at a time.
#pragma once

#include "attend_all.h"

namespace {

constexpr int LOW = (UPRIGHT + 1) / 2;              // rows of a last tile, where that is enough
constexpr long STRIP = 2 * LANES;                   // outputs of a strip
constexpr long NEAR = 1 << 18;                      // bytes of strips that a thread packs together: its second-level cache holds four times as many
constexpr long ROWS_COPIED = 1536;                  // rows that are copied together
constexpr long PIECES = 4;                          // of the rows of a job's last strips, so that threads end together

// Not-a-numbers pass, as they do in torch.
INLINE F16 cut(F16 v, float low, float high) {
#if CABOCHON_AVX512
    v = peak(splat(low), v);
    v.part[0] = (F16::Part)_mm512_min_ps(_mm512_set1_ps(high), (__m512)v.part[0]);
    return v;
#else
    v = select(splat(low) > v, splat(low), v);
    return select(v > splat(high), splat(high), v);
#endif
}

// 1 / (1 + e^-v); to 2e-4 of its value where the result is rounded to bfloat16.
template <bool Rounded>
INLINE F16 logistic(F16 v) {
#if CABOCHON_AVX512
    if constexpr (Rounded) {
        F16 r;
        r.part[0] = (F16::Part)_mm512_rcp14_ps((__m512)(1.0f + power(v * -1.44269504f)).part[0]);
        return r;
    }
#endif
    return 1.0f / (1.0f + exponential(0.0f - v));
}

// Memory that will be read soon, in one run or two.
struct Soon {
    const char *from[2] = {}, *until[2] = {};

    long lines() const { return (until[0] - from[0] + until[1] - from[1]) / 64; }
    void add(int i, const Matrix& w, long first, long last) {
        const auto* start = static_cast<const char*>(w.codes);
        from[i] = start + least(w.rows, first) * w.cols * 2, until[i] = start + least(w.rows, last) * w.cols * 2;
    }
    // Where to ask for the next `lines` lines, and how far it is from one to the next: no way, if none are left or it is early.
    struct Walk {
        const char* at;
        long step;
    };
    Walk walk(bool late, long lines) {
        const int i = from[0] >= until[0];
        if (!late || from[i] >= until[i]) return {from[0], 0};
        const Walk found{from[i], 64};
        from[i] += 64 * lines;
        return found;
    }
};

struct Tower {
    static constexpr bool pairs = PAIRS<Bf16>;
    static constexpr long each = pairs ? 2 : 1;  // numbers in a word
    const Product& op;
    long inner = (op.x.width + each - 1) / each;
    long columns = op.how == GELU_TIMES || op.how == GATED ? LANES : STRIP;  // outputs that a strip gives
    long strips = (op.y.width + columns - 1) / columns;
    long stride = apart(inner);
    bool cuts_in = op.in.low > -__builtin_inff() || op.in.high < __builtin_inff();

    // Words from one row to the next where tiles read them: an odd number of cache lines, which spreads them.
    static long apart(long inner) { return ((inner + LANES - 1) / LANES | 1) * LANES; }

    // Sixteen words of `left` numbers, zero beyond.
    U16 words(const Bf16* from, long left, bool cutting) const {
        if constexpr (pairs) {
            const U16 some = some_pairs(from, left);
            if (!cutting) return some;
            const F16 even = cut(as<F16>(some << 16), op.in.low, op.in.high);
            const F16 odd = cut(as<F16>(some & 0xffff0000u), op.in.low, op.in.high);
            return as<U16>(odd) | as<U16>(even) >> 16;  // both are bfloat16 numbers: nothing is lost
        } else {
            const F16 some = get(from, left);
            return as<U16>(cutting ? cut(some, op.in.low, op.in.high) : some);
        }
    }

    // `count` outputs' weights, at most 16, as `to[word * STRIP + output]`; words are filled up to whole registers.
    void pack(const Bf16* rows, long count, uint32_t* to) const {
        const long width = op.x.width;
        for (long k = 0; k < inner; k += LANES) {
            U16 square[LANES];
#pragma GCC unroll 16
            for (long i = 0; i < LANES; ++i) square[i] = i < count ? words(rows + i * width + each * k, width - each * k, false) : U16::of(0);
            transpose(square, to + k * STRIP, STRIP);
        }
    }

    void pack_strip(long strip, uint32_t* to) const {
        for (long half = 0; half < 2; ++half) {
            const bool other = half && columns == LANES;  // the upper half is the second matrix's
            const Matrix& w = op.weight[other];
            const long from = strip * columns + (other ? 0 : half * LANES);
            const auto* rows = static_cast<const Bf16*>(w.codes) + from * w.cols;
            pack(rows, least(LANES, w.rows - from), to + half * LANES);
        }
    }

    // Sums to outputs: 32 of one matrix, or 16 of the two together.
    INLINE void finish(const Product& op, Bf16* to, const Bf16* onto, F16 a, F16 b, long left) {
        a = cut(a, op.out[0].low, op.out[0].high);
        if (op.how == GELU_TIMES || op.how == GATED) {
            b = cut(b, op.out[1].low, op.out[1].high);
            a = op.how == GATED ? a * logistic<true>(b) : a * logistic<true>(gelu_slope(a)) * b;
            a = cut(a, op.then.low, op.then.high);
            return left >= LANES ? put_rounded(to, a) : put(to, a, left);
        }
        b = cut(b, op.out[0].low, op.out[0].high);
        if (op.how == SILU) a = a * logistic<true>(a), b = b * logistic<true>(b);
        if (onto) a = a + get(onto, left), b = b + get(onto + LANES, most(0, left - LANES));
        a = cut(a, op.then.low, op.then.high), b = cut(b, op.then.low, op.then.high);
        if (left >= STRIP) {
            put_rounded(to, a);
            put_rounded(to + LANES, b);
        } else {
            put(to, a, least(left, LANES));
            if (left > LANES) put(to + LANES, b, left - LANES);
        }
    }

    // `next` are the rows of the tile that comes after this one.
    template <int R>
    void tile(const uint32_t* left, const uint32_t* right, long row, long output, const uint32_t* next, Soon::Walk soon) const {
        F16 acc[R][2];
#pragma GCC unroll 12  // else GCC keeps the sums in memory
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < 2; ++c) acc[r][c] = zero();
        const long s = stride, early = 3 * LANES;
        const uint32_t* rows[] = {left, left + 3 * s, left + 6 * s, left + 9 * s};
        for (long k = 0; k < inner;) {
            __builtin_prefetch(soon.at, 0, 2), soon.at += soon.step;
            // Of one row after the other; the strip's own stream is found by the CPU.
            const uint32_t* ahead = k + early < inner ? rows[0] + early : next + (k + early - inner);
            for (const long stop = least(k + R, inner); k < stop; ++k, ahead += s, right += STRIP) {
                __builtin_prefetch(ahead);
                const F16 low = load<F16>(right), high = load<F16>(right + LANES);
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) {
                    const uint32_t word = rows[r / 3][r % 3 * s];
                    acc[r][0] = step<pairs>(acc[r][0], word, low);
                    acc[r][1] = step<pairs>(acc[r][1], word, high);
                }
#pragma GCC unroll 4
                for (auto& row : rows) ++row;
            }
        }
        auto* to = static_cast<Bf16*>(op.y.data) + row * op.y.stride + output;
        const auto* onto = op.onto ? static_cast<const Bf16*>(op.onto) + row * op.onto_stride + output : nullptr;
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
            if (row + r < op.x.count)
                finish(op, to + r * op.y.stride, onto ? onto + r * op.onto_stride : nullptr, acc[r][0], acc[r][1], op.y.width - output);
    }

    // Strips first .. last over the rows `row` .. `row` + `count`, which lie at `left`.
    void item(const uint32_t* left, long row, long count, long first, long last, Soon soon) const {
        auto* packed = static_cast<uint32_t*>(scratch(SORTED, ((last - first) * inner + LANES) * STRIP * 4));
        for (long s = first; s < last; ++s) pack_strip(s, packed + (s - first) * STRIP * inner);
        const long lines = (inner + UPRIGHT - 1) / UPRIGHT, calls = (count + UPRIGHT - 1) / UPRIGHT * (last - first);
        const long late = calls - soon.lines() / lines - 2;
        for (long r = 0, call = 0; r < count; r += UPRIGHT)
            for (long s = first; s < last; ++s, ++call) {
                const auto some = count - r > LOW ? &Tower::tile<UPRIGHT> : &Tower::tile<LOW>;
                const uint32_t* rows = left + r * stride;
                const uint32_t* next = s + 1 < last || r + UPRIGHT >= count ? rows : rows + UPRIGHT * stride;
                (this->*some)(rows, packed + (s - first) * STRIP * inner, row + r, s * columns, next, soon.walk(call >= late, lines));
            }
    }

    // `count` numbers of a row as words, cut; whole registers are written.
    void copy(const Bf16* from, long count, uint32_t* to) const {
        for (long k = 0; each * k < count; k += LANES) store(to + k, words(from + each * k, count - each * k, cuts_in));
    }

    // The rows from `row`, at most ROWS_COPIED.
    const uint32_t* copied(long row, Slot slot) const {
        const long count = least(ROWS_COPIED, op.x.count - row), tiles = (count + UPRIGHT - 1) / UPRIGHT;
        auto* left = static_cast<uint32_t*>(scratch(slot, tiles * UPRIGHT * stride * 4));
        parallel(tiles, [&](long t) {
            for (long r = t * UPRIGHT; r < least(count, (t + 1) * UPRIGHT); ++r)
                copy(static_cast<const Bf16*>(op.x.data) + (row + r) * op.x.stride, op.x.width, left + r * stride);
        });
        return left;
    }

    // Where the weights of strips first .. last lie.
    Soon weights(long first, long last) const {
        Soon soon;
        for (int i = 0; i <= (columns == LANES); ++i) soon.add(i, op.weight[i], first * columns, last * columns);
        return soon;
    }
};

// A product over some rows, which lie as tiles read them, with as many more behind them as fill up a tile.
struct Part {
    Tower tower;
    const uint32_t* left;
    long row, count;
};

// The strips of several products, shared out together. Towards the end a thread fetches the first weights of the matrix `after`.
struct Job {
    const Part* parts;
    long count;
    const Matrix* after;  // or null
    long strips = 0, whole = 0;  // the other strips are shared out by pieces of their rows

    Job(const Part* parts, long count, const Matrix* after) : parts(parts), count(count), after(after) {
        for (long i = 0; i < count; ++i) strips += parts[i].tower.strips;
        whole = threads() > 1 ? most(0, strips - threads()) : strips;
    }

    // The part that `strip` belongs to, counted from its own first one then.
    const Part& of(long& strip) const {
        const Part* part = parts;
        for (; strip >= part->tower.strips; ++part) strip -= part->tower.strips;
        return *part;
    }

    Soon weights(long first, long some) const {
        if (first >= strips) {
            Soon soon;
            if (after) soon.add(0, *after, (first - strips) * STRIP, (first - strips + some) * STRIP);
            return soon;
        }
        const Tower& tower = of(first).tower;
        return tower.weights(first, first + some);
    }

    // So many strips from `at` are an item, which stays in a thread's cache.
    long run(long at) const {
        long strip = at;
        const Tower& tower = of(strip).tower;
        const long near = most(1, NEAR / (STRIP * tower.inner * 4)), share = most(1, (whole - at) / (2 * threads()));
        return least(least(near, share), least(whole - at, tower.strips - strip));
    }

    void whole_strips(long at, long some) const {
        const Soon soon = weights(at + threads() * some, some);
        const Part& part = of(at);
        part.tower.item(part.left, part.row, part.count, at, at + some, soon);
    }

    void piece(long strip, long number) const {
        const Part& part = of(strip);
        const long rows = ((part.count + UPRIGHT - 1) / UPRIGHT + PIECES - 1) / PIECES * UPRIGHT;
        const long begin = number * rows, some = least(rows, part.count - begin);
        if (some > 0) part.tower.item(part.left + begin * part.tower.stride, part.row + begin, some, strip, strip + 1, {});
    }

    void run() const {
        const long items = whole + (strips - whole) * PIECES;
        long next = 0;
        parallel(threads(), [&](long) {
            for (long at = __atomic_load_n(&next, __ATOMIC_RELAXED); at < items;) {
                const long some = at < whole ? run(at) : 1;
                if (!__atomic_compare_exchange_n(&next, &at, at + some, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
                at < whole ? whole_strips(at, some) : piece(whole + (at - whole) / PIECES, (at - whole) % PIECES);
                at = __atomic_load_n(&next, __ATOMIC_RELAXED);
            }
        });
    }
};

void product(const Product& op) {
    const Tower tower{op};
    for (long row = 0; row < op.x.count; row += ROWS_COPIED) {
        const Part part{tower, tower.copied(row, LEFT), row, least(ROWS_COPIED, op.x.count - row)};
        Job(&part, 1, nullptr).run();
    }
}

// A tile's steps on all threads without its loads: what no product can be faster than.
double spin(long rounds) {
    constexpr bool pairs = PAIRS<Bf16>;
    constexpr int SUMS = 8 / PARTS;
    float start[2 * LANES];
    for (int i = 0; i < 2 * LANES; ++i) start[i] = i;  // were they the same, one sum would be computed for all
    parallel(threads(), [&](long) {
        F16 acc[SUMS];
#pragma GCC unroll 8
        for (int i = 0; i < SUMS; ++i) acc[i] = get(start + i);
        for (long k = 0; k < rounds; ++k) {
            const F16 right = splat(float(k));
#pragma GCC unroll 8
            for (int i = 0; i < SUMS; ++i) acc[i] = step<pairs>(acc[i], ONES, right);
        }
        F16 all = zero();
#pragma GCC unroll 8
        for (int i = 0; i < SUMS; ++i) all = all + acc[i];
        *static_cast<volatile float*>(scratch(RESULT, sizeof(float))) = sum(all);
    });
    return double(threads()) * rounds * SUMS * LANES * (pairs ? 4 : 2);
}

}  // namespace
