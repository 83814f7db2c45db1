// Drawing a token from a row of logits, and the sum of a row's exponentials; `reference_drawing.py` is the definition.
//
// Who wants few candidates gets the largest of the row. With many or no limit the row is not sorted either: numbers fall
// into buckets by their distance from the best, whose masses are known, and only the few buckets in which a limit or the
// drawn token lies are looked into. All masses are in double: a sum of a quarter of a million must tell neighbours apart.
#pragma once

#include "largest.h"

namespace {

constexpr long NARROW = 1024;  // candidates that are sorted out
constexpr long BUCKETS = 4096, PER_UNIT = 64, RUN = 256;

struct Setting {
    double uniform, temperature;
    long top_k;
    double top_p, min_p;
};

// e^x for x <= 0, to some units in the last place; 0 below -700. Loops over it become vectors.
INLINE double power(double x) {
    const double magic = 0x1.8p52, shifted = x * 1.4426950408889634 + magic, n = shifted - magic;
    const double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
    static constexpr double SERIES[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                                        1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0};
    double p = 1.0 / 6227020800;
#pragma GCC unroll 13
    for (int i = 0; i < 13; ++i) p = p * r + SERIES[i];
    uint64_t bits, exponent;
    memcpy(&bits, &p, sizeof bits);
    memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 52;
    memcpy(&p, &bits, sizeof p);
    return x < -700 ? 0 : p;
}

// The best numbers of a row in descending order: how many, their mass, and where the last of them stands.
struct Best {
    long count = 0, last = 0;
    double mass = 0;
};

// How far they go: fewer than `count` before a number, less than `mass` of them, and its own at least `own`.
struct Limit {
    long count;
    double mass, own = 0;
    bool admits(const Best& before, double mine) const { return before.count < count && before.mass < mass && mine >= own; }
};

class Buckets {
public:
    Buckets(const float* row, long columns, float best, double temperature) : x(row), width(columns), top(best), scale(1 / temperature) {
        auto* memory = static_cast<char*>(scratch(LISTS, (BUCKETS + 1) * 16 + width * (sizeof(uint64_t) + sizeof(uint16_t))));
        mass = reinterpret_cast<double*>(memory);
        count = reinterpret_cast<int64_t*>(mass + BUCKETS + 1);
        inside = reinterpret_cast<uint64_t*>(count + BUCKETS + 1);
        bucket = reinterpret_cast<uint16_t*>(inside + width);
        memset(memory, 0, (BUCKETS + 1) * 16);
        for (long begin = 0; begin < width; begin += RUN) fill(begin, least(RUN, width - begin));
    }

    Best within(const Limit& limit) {
        Best best;
        for (long b = 0; b < BUCKETS; ++b) {
            if (!count[b]) continue;
            const Limit whole{limit.count - count[b] + 1, limit.mass - mass[b], limit.own * (1 + 1e-9)};
            const double least_mass = b == BUCKETS - 1 ? -1 : limit.own > 0 ? power(-double(b + 1) / PER_UNIT * scale) : 1;
            if (whole.admits(best, least_mass))
                best.count += count[b], best.mass += mass[b], best.last = -1 - b;
            else if (!step(best, b, limit))
                break;
        }
        if (best.last < 0) {  // the last one of a bucket that was taken whole
            sort(-1 - best.last);
            best.last = place_of(inside[sorted - 1]);
        }
        return best;
    }

private:
    const float* x;
    long width, sorted = 0;
    float top;
    double scale, *mass;
    int64_t* count;
    uint64_t* inside;  // keys of the numbers in a bucket
    uint16_t* bucket;  // of every number; those without mass lie behind all others

    double mass_of(float v) const { return power((double(v) - top) * scale); }

    void fill(long begin, long some) {
        double masses[RUN];
        int32_t at[RUN];
        for (long i = 0; i < some; ++i) masses[i] = mass_of(x[begin + i]);
        for (long i = 0; i < some; ++i) {
            const float away = (top - x[begin + i]) * PER_UNIT;
            at[i] = int32_t(away < BUCKETS - 1 ? away : BUCKETS - 1);
        }
        for (long i = 0; i < some; ++i) {
            const int32_t b = masses[i] > 0 ? at[i] : BUCKETS;
            bucket[begin + i] = b, mass[b] += masses[i], ++count[b];
        }
    }

    // The numbers of a bucket in descending order.
    void sort(long b) {
        sorted = 0;
        for (long begin = 0; begin < width; begin += RUN) {
            const long end = least(width, begin + RUN);
            int found = 0;
            for (long i = begin; i < end; ++i) found |= bucket[i] == b;
            for (long i = begin; found && i < end; ++i)
                if (bucket[i] == b) inside[sorted++] = ranked(x[i], i);
        }
        for (long at = sorted / 2; at--;) sink(inside, sorted, at);
        for (long left = sorted; --left > 0;) {  // the smallest goes last
            const uint64_t key = inside[0];
            inside[0] = inside[left], inside[left] = key;
            sink(inside, left, 0);
        }
    }

    // Numbers of a bucket one by one; false where the limit ends.
    bool step(Best& best, long b, const Limit& limit) {
        sort(b);
        for (long i = 0; i < sorted; ++i) {
            const long place = place_of(inside[i]);
            const double mine = mass_of(x[place]);
            if (!limit.admits(best, mine)) return false;
            ++best.count, best.mass += mine, best.last = place;
        }
        return true;
    }
};

// The token at `uniform` of the mass that the limits leave. `within(limit)` are the best numbers.
template <class Within>
long drawn(const Setting& s, const Within& within) {
    const double infinite = __builtin_inf();
    const double total = within(Limit{s.top_k, infinite}).mass;
    const Best kept = within(Limit{s.top_k, s.top_p * total, s.min_p});
    // The first one up to whose end there is more than that: the last one before which there is no more.
    return within(Limit{kept.count, __builtin_nextafter(s.uniform * kept.mass, infinite)}).last;
}

long draw_row(const float* x, long width, const Setting& s, float* best) {
    float values[NARROW];
    int64_t places[NARROW];
    const bool wide = s.top_k > NARROW && width > NARROW;
    const long some = wide ? 1 : least(s.top_k, width);
    largest_of_row(x, width, some, values, places);
    *best = values[0];
    if (some == 1 && !wide) return places[0];
    if (!(values[0] - values[0] == 0)) return places[0];  // there is nothing to be drawn
    if (wide) {
        Buckets buckets(x, width, values[0], s.temperature);
        return drawn(s, [&](const Limit& limit) { return buckets.within(limit); });
    }
    double masses[NARROW];
    for (long i = 0; i < some; ++i) masses[i] = power((double(values[i]) - values[0]) / s.temperature);
    return drawn(s, [&](const Limit& limit) {
        Best taken;
        for (long i = 0; i < some && masses[i] > 0 && limit.admits(taken, masses[i]); ++i)
            ++taken.count, taken.mass += masses[i], taken.last = places[i];
        return taken;
    });
}

void draw(const Draw& op) {
    over_rows(op.x.count, op.x.width, [&](long row) {
        const double* s = op.settings + row;
        const long rows = op.x.count;
        const Setting setting{s[0], s[rows], long(s[2 * rows]), s[3 * rows], s[4 * rows]};
        op.tokens[row] = draw_row(static_cast<const float*>(op.x.data) + row * op.x.stride, op.x.width, setting, op.best + row);
    });
}

// ln(sum(e^x)) of every row.
void log_sum(const LogSum& op) {
    over_rows(op.x.count, op.x.width, [&](long row) {
        const float* x = static_cast<const float*>(op.x.data) + row * op.x.stride;
        float top;
        int64_t place;
        largest_of_row(x, op.x.width, 1, &top, &place);
        const long whole = op.x.width & -LANES;
        double total = 0;
        for (long begin = 0; begin < whole; begin += 1024) {
            F16 part = zero();
            for (long i = begin; i < least(whole, begin + 1024); i += LANES) part = part + exponential(get(x + i) - top);
            total += sum(part);
        }
        for (long i = whole; i < op.x.width; ++i) total += __builtin_exp(double(x[i]) - top);
        op.y[row] = top - top == 0 ? top + float(__builtin_log(total)) : top;
    });
}

}  // namespace
