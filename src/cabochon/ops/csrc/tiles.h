// The six operations on tile registers that the kernels use: the CPU's (AMX), or loops that follow Intel's description of
// them and stop the process where the CPU would raise an exception.
//
// The compiler's intrinsics won't do: those of GCC 12 don't say what memory they read, so that a configuration or a
// panel may be written after it was loaded; and they take no template argument for a register's number.
#pragma once

#include "simd.h"

#if CABOCHON_TILES

namespace {

// What `ldtilecfg` reads. Tiles that are not used have no rows.
struct alignas(64) TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64);

#if !CABOCHON_EMULATED_TILES

INLINE void tile_configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
INLINE void tile_release() { asm volatile("tilerelease"); }
template <int T>
INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
INLINE void tile_load(const void* from, long stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
INLINE void tile_store(void* to, long stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
// C += A . B in signed bytes: a row of A against four bytes of every column in each row of B.
template <int C, int A, int B>
INLINE void tile_dot() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

constexpr int TILES = 8, TILE_BYTES = 64;

struct Tile {
    uint8_t row[16][TILE_BYTES];
};
thread_local TileShapes shapes;  // palette 0: not configured
thread_local Tile tiles[TILES];

INLINE void demand(bool what) {
    if (!what) __builtin_trap();
}

void tile_configure(const TileShapes& wanted) {
    demand(wanted.palette == 1 && wanted.start_row == 0);
    for (const uint8_t byte : wanted.reserved) demand(byte == 0);
    for (int t = 0; t < 16; ++t) {
        demand((wanted.rows[t] == 0) == (wanted.row_bytes[t] == 0));
        demand(t < TILES ? wanted.rows[t] <= 16 && wanted.row_bytes[t] <= TILE_BYTES : wanted.rows[t] == 0);
    }
    shapes = wanted;
    memset(tiles, 0, sizeof tiles);
}

void tile_release() {
    shapes = {};
    memset(tiles, 0, sizeof tiles);
}

// A tile whose first rows are written; the rest of each, and the rows below, become zero.
template <class RowOf>
void write_rows(int t, RowOf row_of) {
    Tile written = {};
    for (int r = 0; r < shapes.rows[t]; ++r) memcpy(written.row[r], row_of(r), shapes.row_bytes[t]);
    tiles[t] = written;
}

template <int T>
void tile_zero() {
    demand(shapes.palette && shapes.rows[T]);
    tiles[T] = {};
}
template <int T>
void tile_load(const void* from, long stride) {
    demand(shapes.palette && shapes.rows[T]);
    write_rows(T, [&](int row) { return static_cast<const char*>(from) + row * stride; });
}
template <int T>
void tile_store(void* to, long stride) {
    demand(shapes.palette && shapes.rows[T]);
    for (int r = 0; r < shapes.rows[T]; ++r) memcpy(static_cast<char*>(to) + r * stride, tiles[T].row[r], shapes.row_bytes[T]);
}
template <int C, int A, int B>
void tile_dot() {
    static_assert(C != A && A != B && B != C);
    demand(shapes.palette && shapes.rows[C] && shapes.rows[A] == shapes.rows[C] && shapes.row_bytes[B] == shapes.row_bytes[C]);
    demand(shapes.row_bytes[A] == 4 * shapes.rows[B] && shapes.row_bytes[C] % 4 == 0);
    const Tile sums = tiles[C];
    write_rows(C, [&](int m) {
        static thread_local uint32_t row[TILE_BYTES / 4];  // sums wrap around
        memcpy(row, sums.row[m], TILE_BYTES);
        for (int k = 0; k < shapes.rows[B]; ++k)
            for (int n = 0; n < shapes.row_bytes[C] / 4; ++n)
                for (int i = 0; i < 4; ++i)
                    row[n] += int8_t(tiles[A].row[m][4 * k + i]) * int8_t(tiles[B].row[k][4 * n + i]);
        return row;
    });
}

#endif

}  // namespace

#endif
