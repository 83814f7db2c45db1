// What the module calls, and the arguments of each op. Shapes and meaning are those of ops/reference.py.
#pragma once

#include <cstdint>

namespace cabochon {

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1 };
enum Format { DENSE = 0, INT8 = 1, INT4 = 2 };

// Rows of a matrix in memory; the last axis is contiguous, `stride` counts elements.
struct Rows {
    void* data;
    Dtype dtype;
    long count, width, stride;
};

// A weight [rows, cols]: row-major for DENSE, panels (see quant.py) for INT8 and INT4.
struct Matrix {
    Format format;
    Dtype dtype;  // of a dense one
    const void* codes;
    const void* scales;
    long rows, cols;
};

struct Linear {
    Rows x;
    Matrix weight;
    Rows y;
    float softcap;  // 0: none
};

struct Gated {
    Rows x;
    Matrix gate, up, down;
    Rows y;
};

struct Experts {
    Rows x;
    const int64_t* chosen;  // [T, per_token]
    const void* weights;    // [T, per_token] in x's type
    long per_token, count;
    Matrix gate_up, down;             // of expert 0
    long gate_up_codes, gate_up_scales;  // bytes from one expert to the next
    long down_codes, down_scales;
    Rows y;
};

struct Norm {
    Rows x;
    const void* weight;  // in x's type, or null
    float eps;
    Rows y;
};

struct Rope {
    const void* x;  // [T, N, H]
    const void* cos;
    const void* sin;  // [T, rotated / 2]
    void* y;
    Dtype dtype;
    long tokens, heads, head, half_rotated;
};

struct Store {
    void* pages;        // [pages, S, K, W]
    const void* rows;   // [T, K, W]
    const int64_t* slots;  // [T], -1: not stored
    long tokens, bytes;    // of a token's row
};

struct Attend {
    const void* q;      // [Q, N, H]
    const void* step;   // [T, K, W]
    const void* pages;    // [pages, S, K, W] or null; int8 where there are scales
    const float* scales;  // [pages, S, K, 2] or null: of a row's first `split` numbers, and of the others
    void* out;          // [Q, N, H]
    Dtype dtype;
    const int32_t *row_start, *position, *see_until, *start, *context;
    const int32_t *table, *first;  // null without past
    long requests, heads, kv_heads, head, width, key_offset, value_offset;
    long window;  // 0: none
    long table_width, slots, split;
};

struct AttendAll {
    const void *q, *k, *v;  // [B, I, N, H]
    void* out;              // [B, I, N, H]
    Dtype dtype;
    long batch, count, heads, head;
};

// A matrix into codes: floats in `x`, or codes in rows with their scales, into rows or panels.
struct Packing {
    Rows x;
    const void* from_scales;
    Format format;
    bool panels;
    void* codes;
    void* scales;
};

struct Largest {
    Rows x;  // float32
    long k;  // 1 to x.width
    float* values;    // [R, k]
    int64_t* places;  // [R, k]
};

struct Ops {
    const char* name;
    void (*linear)(const Linear&);
    void (*gated)(const Gated&);
    void (*experts)(const Experts&);
    void (*norm)(const Norm&);
    void (*rope)(const Rope&);
    void (*store)(const Store&);
    void (*attend)(const Attend&);
    void (*attend_all)(const AttendAll&);
    void (*largest)(const Largest&);
    void (*quantize)(const Packing&);
    void (*pack)(const Packing&);
};

// One table per instruction set; `supported` is asked before a table is used.
extern const Ops plain;
#if defined(__x86_64__)
extern const Ops avx2, avx512, avx512_bf16;
#endif

}  // namespace cabochon
