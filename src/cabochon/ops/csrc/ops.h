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

// Every row times some rows of a dense table.
struct HeadAt {
    Rows x;
    Matrix table;
    const int64_t* ids;  // [count, some]
    long some;
    float* y;            // [count, some]
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
    const void* weight;  // in y's type, or null
    float eps;
    Rows y;              // in x's type, or narrower
};

// What every layer gets of a token's own embeddings: (norm(x * scale) + onto) / sqrt(2), row by row.
struct PerLayer {
    const float* x;  // [count, width]
    long count, width;
    const void *onto, *weight;  // [count, width], [width], in `dtype`, and so is y
    float eps, scale;
    void* y;
    Dtype dtype;
};

struct Rope {
    const float* x;  // [T, N, H]
    const float* cos;
    const float* sin;  // [T, rotated / 2]
    void* y;
    Dtype dtype;  // of y
    long tokens, heads, head, half_rotated;
};

struct Store {
    void* pages;        // [pages, S, K, W] in `dtype`; int8 where there are scales
    float* scales;      // [pages, S, K, 2] or null: of a row's first `split` numbers, and of the others
    const void* rows;   // [T, K, W]
    const int64_t* slots;  // [T], -1: not stored
    Dtype dtype;
    long tokens, kv_heads, width, split;
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

// Rows of a table, times `scale`.
struct Lookup {
    const int64_t* ids;  // [count]
    long count;
    Matrix table;
    bool panels;  // else rows, as a dense one's always are
    float scale;
    void* y;      // [count, table.cols]
    Dtype dtype;
};

struct Largest {
    Rows x;  // float32
    long k;  // 1 to x.width
    float* values;    // [R, k]
    int64_t* places;  // [R, k]
};

// A token from every row of logits.
struct Draw {
    Rows x;                  // float32
    const double* settings;  // [5, count]: uniform number, temperature, top-k, top-p, min-p
    int64_t* tokens;         // [count]
    float* best;             // [count], the largest logits
};

struct LogSum {
    Rows x;  // float32
    float* y;
};

// What comes in or goes out is cut to a range; infinite where nothing is.
struct Range {
    float low = -__builtin_inff(), high = __builtin_inff();
};

// What a product gives: its outputs, their SiLU, or of two matrices gelu(first) * second, or first * sigmoid(second).
enum How { PLAIN = 0, SILU = 1, GELU_TIMES = 2, GATED = 3 };

struct Product {
    Rows x;            // bfloat16, like all of it
    Matrix weight[2];  // the second one only where `how` wants it
    Range in, out[2];
    How how;
    Rows y;
    const void* onto;  // of `PLAIN` and `SILU`: [count, y.width] that is added, or null
    long onto_stride;
    Range then = {};   // what y is cut to at the very end, for its reader
};

struct Settle {
    Rows x;
    const void *weight, *onto;  // [width] in `dtype`, [count, width] or null
    float eps, bound, share;
    void* y;                    // in x's type, like `onto`
    long y_stride;
    Range then = {};
    Dtype dtype = BFLOAT16;     // x's, or narrower
    float factor = 1;
};

struct Turn {
    const void *x, *weight;   // [tokens, N, H], [H]
    const void *cos, *sin;    // [places, 2, H / 4]; a token's place is its number modulo `places`
    void* y;
    Dtype dtype;
    float eps;
    long tokens, places, heads, head;
};

struct Recent {
    const void *q, *k, *v, *relative;  // [A, N, H] three times, [reach, N, H]
    const float* scale;                // [H]
    void* out;
    Dtype dtype;
    float key_scale, cap;
    long tokens, heads, head, reach;  // reach <= 16
    long out_stride;                  // of tokens
    Range then = {};
};

struct Blend {
    Rows x;
    const void *taps, *weight;  // [count, width] oldest first, [width]
    long count;
    float eps, bound;
    void* y;
    long y_stride;
    Range then = {};
};

// The weights of a decoder layer with dense feed-forward, and its shape. Norms' weights are in `dtype`, and so is what
// matrices take and what is stored.
struct LayerWeights {
    Dtype dtype;
    float eps;
    long heads, kv_heads, head;
    const void *input_norm, *q_norm, *k_norm, *post_attention_norm, *pre_feedforward_norm, *post_feedforward_norm;
    const void *post_ple_norm, *scalar;
    Matrix q, k, v, o, gate, up, down;  // k and v without codes: the layer reads another one's keys and values
    Matrix ple_gate, ple_projection;
};

struct Layer {
    const LayerWeights* weights;
    Rows x;                 // float32
    float* y;               // [count, width]
    const float *cos, *sin;  // [count, half_rotated]
    long half_rotated;
    const void* kept_norm;  // where value = key: the weight of the key norm of the layer whose rows these are, [head]
    const void* ple;        // [count, ple width], or null
    long ple_stride;
    Attend attend;          // q and out are filled in; the layer writes the rows of `step` that it owns
};

struct Subsample {
    Rows mel;                               // bfloat16, like all of it
    const void *taps, *norm;                // [channels, 9], [channels]
    const void *second_taps, *second_norm;  // [outputs, 9, channels], [outputs]
    void* y;                                // [mel.count / 4, mel.width / 4, outputs], rounded up at either halving
    float eps;
    long channels, outputs;  // both in sixteens
};

// A matrix, and what the rows that it is multiplied with and its outputs are cut to.
struct Clipped {
    Matrix matrix;
    Range in, out;
};

// The weights of a conformer's layer, all in bfloat16.
struct ConformerWeights {
    const void *before_first, *after_first, *before_attention, *after_attention;  // norms, each [width]
    const void *before_convolution, *in_convolution, *before_second, *after_second, *last;
    const void* taps;  // [width, tap_count]
    long tap_count, heads;
    float eps, share, key_scale, cap;
    Clipped up[2], down[2], q, k, v, post, relative, start, end;
};

struct Conformer {
    const ConformerWeights* weights;
    Rows x;
    const void* distance;  // [reach, width]
    long reach;            // at most 16
    const float* scale;    // [width / heads], of queries
    float bound;
    void* y;               // [count, width]
    const Matrix* after;   // what is multiplied with next, or null
};

struct Ops {
    const char* name;
    void (*linear)(const Linear&);
    void (*head_at)(const HeadAt&);
    void (*gated)(const Gated&);
    void (*experts)(const Experts&);
    void (*norm)(const Norm&);
    void (*per_layer)(const PerLayer&);
    void (*rope)(const Rope&);
    void (*store)(const Store&);
    void (*attend)(const Attend&);
    void (*attend_all)(const AttendAll&);
    void (*largest)(const Largest&);
    void (*draw)(const Draw&);
    void (*log_sum)(const LogSum&);
    void (*quantize)(const Packing&);
    void (*pack)(const Packing&);
    void (*lookup)(const Lookup&);
    void (*layer)(const Layer&);
    void (*product)(const Product&);
    void (*settle)(const Settle&);
    void (*turn)(const Turn&);
    void (*recent)(const Recent&);
    void (*blend)(const Blend&);
    void (*subsample)(const Subsample&);
    void (*conformer)(const Conformer&);
    double (*spin)(long rounds);  // multiplies bfloat16 pairs (or floats) that stay in registers; returns the operations
};

// One table per instruction set; `supported` is asked before a table is used.
extern const Ops plain;
#if defined(__x86_64__)
extern const Ops avx2, avx512, avx512_bf16, amx, amx_emulated;
#endif

}  // namespace cabochon
