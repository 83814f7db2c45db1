// Sixteen lanes on every CPU: GCC's vector extensions for what they express well, intrinsics for the four things they don't
// (fused multiply-add, rounding to integers, byte dot products, bfloat16 dot products).
//
// This header is compiled once per instruction set. Everything is in an unnamed namespace and nothing of the standard
// library is called: a shared inline function might be kept in its AVX-512 version and then run on a lesser CPU.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define CABOCHON_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define CABOCHON_AVX2 1
#endif

namespace {

constexpr int LANES = 16;

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef int8_t B16 __attribute__((vector_size(16)));
typedef uint16_t H16 __attribute__((vector_size(32)));
typedef _Float16 Half16 __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))

template <class V>
INLINE V load(const void* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}
template <class V>
INLINE void store(void* to, V v) {
    memcpy(to, &v, sizeof v);
}

INLINE F16 splat(float v) { return F16{} + v; }
INLINE I16 splat(int32_t v) { return I16{} + v; }
INLINE F16 bits(I16 v) { return (F16)v; }
INLINE I16 bits(F16 v) { return (I16)v; }
INLINE F16 select(I16 mask, F16 yes, F16 no) { return (F16)((mask & (I16)yes) | (~mask & (I16)no)); }
INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }

#if CABOCHON_AVX2
INLINE __m256 low(F16 v) { return (__m256)__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
INLINE __m256 high(F16 v) { return (__m256)__builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
typedef float F8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
INLINE F16 join(__m256 a, __m256 b) {
    return __builtin_shufflevector((F8)a, (F8)b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
INLINE I16 join(__m256i a, __m256i b) {
    return __builtin_shufflevector((I8)a, (I8)b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
#endif

// a * b + c, rounded once where the CPU can. Contraction is off, so sums are the same in every instance of a template.
INLINE F16 fma(F16 a, F16 b, F16 c) {
#if CABOCHON_AVX512
    return (F16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif CABOCHON_AVX2
    return join(_mm256_fmadd_ps(low(a), low(b), low(c)), _mm256_fmadd_ps(high(a), high(b), high(c)));
#else
    return a * b + c;
#endif
}

// To the nearest integer, ties to even.
INLINE I16 rounded(F16 v) {
#if CABOCHON_AVX512
    return (I16)_mm512_cvtps_epi32((__m512)v);
#elif CABOCHON_AVX2
    return join(_mm256_cvtps_epi32(low(v)), _mm256_cvtps_epi32(high(v)));
#else
    I16 out;
    for (int i = 0; i < LANES; ++i) out[i] = (int32_t)__builtin_rintf(v[i]);
    return out;
#endif
}

INLINE F16 to_float(I16 v) { return __builtin_convertvector(v, F16); }

// Sums and maxima over the lanes, always in the same tree.
template <class V, class Op>
INLINE auto fold(V v, Op op) {
    V w = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v = op(v, w);
    v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    v = op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return v[0];
}
INLINE float sum(F16 v) {
    return fold(v, [](F16 a, F16 b) { return a + b; });
}
INLINE int32_t sum(I16 v) {
    return fold(v, [](I16 a, I16 b) { return a + b; });
}
INLINE F16 larger(F16 a, F16 b) { return select(a > b, a, b); }
INLINE float maximum(F16 v) { return fold(v, larger); }
INLINE int32_t maximum(I16 v) {
    return fold(v, [](I16 a, I16 b) { return (a > b) ? a : b; });
}

// Square roots only need one lane.
INLINE float square_root(float v) { return __builtin_sqrtf(v); }

// float32 and bfloat16 in memory, float32 in registers.
struct Bf16 {
    uint16_t raw;
};

INLINE F16 widen(H16 v) { return (F16)(__builtin_convertvector(v, U16) << 16); }
INLINE H16 narrow(F16 v) {  // to nearest even; what is not a number stays so
    U16 u = (U16)v;
    U16 even = u + 0x7fff + ((u >> 16) & 1);
    U16 quiet = u | 0x400000;
    U16 nan = (U16)(v != v);
    return __builtin_convertvector(((nan & quiet) | (~nan & even)) >> 16, H16);
}

INLINE F16 get(const float* from) { return load<F16>(from); }
INLINE F16 get(const Bf16* from) { return widen(load<H16>(from)); }
INLINE void put(float* to, F16 v) { store(to, v); }
INLINE void put(Bf16* to, F16 v) { store(to, narrow(v)); }

// The first n lanes; the others are zero, or left alone.
template <class T>
INLINE F16 get(const T* from, long n) {
    if (n >= LANES) return get(from);
    T some[LANES] = {};
    memcpy(some, from, n * sizeof(T));
    return get(some);
}
template <class T>
INLINE void put(T* to, F16 v, long n) {
    if (n >= LANES) return put(to, v);
    T some[LANES];
    put(some, v);
    memcpy(to, some, n * sizeof(T));
}

INLINE F16 get_half(const void* from) {
#if CABOCHON_AVX512
    return (F16)_mm512_cvtph_ps(load<__m256i>(from));
#elif CABOCHON_AVX2
    return join(_mm256_cvtph_ps(load<__m128i>(from)), _mm256_cvtph_ps(load<__m128i>((const char*)from + 16)));
#else
    // 5 exponent bits to 8: shift into place, then rescale by 2^112 so that subnormal halves come out right too.
    U16 u = __builtin_convertvector(load<H16>(from), U16);
    F16 magnitude = (F16)((u & 0x7fff) << 13) * splat(0x1p112f);
    return (F16)((U16)magnitude | ((u & 0x8000) << 16));
#endif
}

// e^x to about 1 unit in the last place; 0 below -87 (so that a masked score weighs nothing).
INLINE F16 exponential(F16 x) {
    I16 tiny = x < -87.0f;
    x = select(tiny, splat(-87.0f), x);
    x = select(x > 88.0f, splat(88.0f), x);
    I16 n = rounded(x * 1.44269504f);
    F16 t = to_float(n);
    F16 r = fma(t, splat(-0.693145752f), x);
    r = fma(t, splat(-1.42860677e-6f), r);
    F16 p = splat(1.0f / 5040);
    p = fma(p, r, splat(1.0f / 720));
    p = fma(p, r, splat(1.0f / 120));
    p = fma(p, r, splat(1.0f / 24));
    p = fma(p, r, splat(1.0f / 6));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    F16 y = p * bits((n + 127) << 23);
    return select(tiny, splat(0.0f), y);
}

// x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), which is gelu with tanh.
INLINE F16 gelu(F16 x) {
    F16 inner = x * fma(x * x, splat(0.0713548162726f), splat(1.59576912161f));
    return x / (1.0f + exponential(-inner));
}

// tanh by e^2x; the absolute error stays at float32's.
INLINE F16 hyperbolic_tangent(F16 x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

}  // namespace
