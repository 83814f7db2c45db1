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

#define INLINE static inline __attribute__((always_inline))

// Sixteen numbers of four bytes in as many registers as it takes. (A plain 64-byte vector would do on AVX-512 alone:
// elsewhere GCC keeps it in memory.)
#if CABOCHON_AVX512
constexpr int REGISTER = 64;
#elif CABOCHON_AVX2
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
constexpr int PARTS = 64 / REGISTER, WIDTH = REGISTER / 4;

template <class E>
struct Lanes {
    typedef E Part __attribute__((vector_size(REGISTER)));
    Part part[PARTS];
    INLINE Lanes of(E value) {
        Lanes r;
        for (int i = 0; i < PARTS; ++i) r.part[i] = value - Part{};  // an addition would stay: it changes -0
        return r;
    }
};
typedef Lanes<float> F16;
typedef Lanes<int32_t> I16;
typedef Lanes<uint32_t> U16;

#define EACH(i) for (int i = 0; i < PARTS; ++i)
#define OPERATOR(op)                                                                                                     \
    template <class E>                                                                                                   \
    INLINE Lanes<E> operator op(Lanes<E> a, Lanes<E> b) {                                                                \
        EACH(i) a.part[i] = a.part[i] op b.part[i];                                                                      \
        return a;                                                                                                        \
    }                                                                                                                    \
    template <class E>                                                                                                   \
    INLINE Lanes<E> operator op(Lanes<E> a, decltype(E{}) b) {                                                           \
        return a op Lanes<E>::of(b);                                                                                     \
    }                                                                                                                    \
    template <class E>                                                                                                   \
    INLINE Lanes<E> operator op(decltype(E{}) a, Lanes<E> b) {                                                           \
        return Lanes<E>::of(a) op b;                                                                                     \
    }
OPERATOR(+)
OPERATOR(-)
OPERATOR(*)
OPERATOR(/)
OPERATOR(&)
OPERATOR(|)
OPERATOR(^)
#undef OPERATOR
#define SHIFT(op)                                                                                                        \
    template <class E>                                                                                                   \
    INLINE Lanes<E> operator op(Lanes<E> a, int count) {                                                                 \
        EACH(i) a.part[i] = a.part[i] op count;                                                                          \
        return a;                                                                                                        \
    }
SHIFT(<<)
SHIFT(>>)
#undef SHIFT
#define COMPARISON(op)                                                                                                   \
    template <class E>                                                                                                   \
    INLINE I16 operator op(Lanes<E> a, Lanes<E> b) {                                                                     \
        I16 r;                                                                                                           \
        EACH(i) r.part[i] = (I16::Part)(a.part[i] op b.part[i]);                                                         \
        return r;                                                                                                        \
    }
COMPARISON(>)
COMPARISON(>=)
COMPARISON(!=)
#undef COMPARISON

// The same bits as another kind of number.
template <class To, class From>
INLINE To as(From from) {
    To to;
    EACH(i) to.part[i] = (typename To::Part)from.part[i];
    return to;
}

template <class V>
inline __attribute__((always_inline)) V load(const void* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}
template <class V>
INLINE void store(void* to, V v) {
    memcpy(to, &v, sizeof v);
}
// Part by part: a copy of the whole would go through the stack.
template <class E>
INLINE void store(void* to, Lanes<E> v) {
    EACH(i) memcpy(static_cast<char*>(to) + i * REGISTER, &v.part[i], REGISTER);
}
template <class E>
INLINE Lanes<E> load_lanes(const void* from) {
    Lanes<E> v;
    EACH(i) memcpy(&v.part[i], static_cast<const char*>(from) + i * REGISTER, REGISTER);
    return v;
}
template <>
inline __attribute__((always_inline)) F16 load<F16>(const void* from) {
    return load_lanes<float>(from);
}
template <>
inline __attribute__((always_inline)) I16 load<I16>(const void* from) {
    return load_lanes<int32_t>(from);
}
template <>
inline __attribute__((always_inline)) U16 load<U16>(const void* from) {
    return load_lanes<uint32_t>(from);
}

INLINE F16 splat(float v) { return F16::of(v); }
INLINE I16 splat(int32_t v) { return I16::of(v); }
template <class E>
INLINE Lanes<E> select(I16 mask, Lanes<E> yes, Lanes<E> no) {
    EACH(i) no.part[i] = (typename Lanes<E>::Part)((mask.part[i] & (I16::Part)yes.part[i]) | (~mask.part[i] & (I16::Part)no.part[i]));
    return no;
}
INLINE F16 zero() { return splat(0.0f); }
template <class E>
INLINE E lane_zero(Lanes<E> v) {
    return v.part[0][0];
}
INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }

// a * b + c, rounded once where the CPU can. Contraction is off, so sums are the same in every instance of a template.
INLINE F16 fma(F16 a, F16 b, F16 c) {
#if CABOCHON_AVX512
    c.part[0] = (F16::Part)_mm512_fmadd_ps((__m512)a.part[0], (__m512)b.part[0], (__m512)c.part[0]);
#elif CABOCHON_AVX2
    EACH(i) c.part[i] = (F16::Part)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]);
#else
    EACH(i) c.part[i] = a.part[i] * b.part[i] + c.part[i];
#endif
    return c;
}

// To the nearest integer, ties to even.
INLINE I16 rounded(F16 v) {
    I16 r;
#if CABOCHON_AVX512
    r.part[0] = (I16::Part)_mm512_cvtps_epi32((__m512)v.part[0]);
#elif CABOCHON_AVX2
    EACH(i) r.part[i] = (I16::Part)_mm256_cvtps_epi32((__m256)v.part[i]);
#else
    EACH(i) for (int lane = 0; lane < WIDTH; ++lane) r.part[i][lane] = (int32_t)__builtin_rintf(v.part[i][lane]);
#endif
    return r;
}

INLINE F16 to_float(I16 v) {
    F16 r;
    EACH(i) r.part[i] = __builtin_convertvector(v.part[i], F16::Part);
    return r;
}

// Bytes and halves of words, sixteen at a time, to and from memory.
typedef int8_t ByteRun __attribute__((vector_size(REGISTER / 4)));
typedef uint16_t ShortRun __attribute__((vector_size(REGISTER / 2)));
INLINE void put_bytes(int8_t* to, I16 v) {
#if CABOCHON_AVX2
    // The lowest byte of each lane (GCC would take them out one by one): four of either half in each half of a register.
    const __m256i low = _mm256_setr_epi32(0x0c080400, -1, -1, -1, 0x0c080400, -1, -1, -1);
    const __m256i high = _mm256_setr_epi32(-1, 0x0c080400, -1, -1, -1, 0x0c080400, -1, -1);
    const __m256i both = _mm256_or_si256(_mm256_shuffle_epi8((__m256i)v.part[0], low), _mm256_shuffle_epi8((__m256i)v.part[1], high));
    store(to, _mm_unpacklo_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
#else
    EACH(i) store(to + i * WIDTH, __builtin_convertvector(v.part[i], ByteRun));
#endif
}
INLINE I16 get_bytes(const int8_t* from) {
    I16 r;
#if CABOCHON_AVX2
    EACH(i) r.part[i] = (I16::Part)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i * WIDTH)));
#else
    EACH(i) r.part[i] = __builtin_convertvector(load<ByteRun>(from + i * WIDTH), I16::Part);
#endif
    return r;
}
INLINE void put_shorts(void* to, U16 v) {  // numbers of 16 bits
#if CABOCHON_AVX2
    const __m256i mixed = _mm256_packus_epi32((__m256i)v.part[0], (__m256i)v.part[1]);
    store(to, _mm256_permute4x64_epi64(mixed, 0xd8));
#else
    EACH(i) store(static_cast<uint16_t*>(to) + i * WIDTH, __builtin_convertvector(v.part[i], ShortRun));
#endif
}
INLINE U16 get_shorts(const void* from) {
    U16 r;
#if CABOCHON_AVX2
    EACH(i) r.part[i] = (U16::Part)_mm256_cvtepu16_epi32(load<__m128i>(static_cast<const uint16_t*>(from) + i * WIDTH));
#else
    EACH(i) r.part[i] = __builtin_convertvector(load<ShortRun>(static_cast<const uint16_t*>(from) + i * WIDTH), U16::Part);
#endif
    return r;
}

// Sums and maxima over the lanes: always lane i with i + 8, then 4, 2, 1.
template <class E, class Op>
INLINE E fold(Lanes<E> v, Op op) {
    for (int apart = PARTS / 2; apart; apart /= 2)
        for (int i = 0; i < apart; ++i) v.part[i] = op(v.part[i], v.part[i + apart]);
    auto w = v.part[0];
#if CABOCHON_AVX512
    w = op(w, __builtin_shufflevector(w, w, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    w = op(w, __builtin_shufflevector(w, w, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    w = op(w, __builtin_shufflevector(w, w, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    w = op(w, __builtin_shufflevector(w, w, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif CABOCHON_AVX2
    w = op(w, __builtin_shufflevector(w, w, 4, 5, 6, 7, 0, 1, 2, 3));
    w = op(w, __builtin_shufflevector(w, w, 2, 3, 0, 1, 6, 7, 4, 5));
    w = op(w, __builtin_shufflevector(w, w, 1, 0, 3, 2, 5, 4, 7, 6));
#else
    w = op(w, __builtin_shufflevector(w, w, 2, 3, 0, 1));
    w = op(w, __builtin_shufflevector(w, w, 1, 0, 3, 2));
#endif
    return w[0];
}
template <class E>
INLINE E sum(Lanes<E> v) {
    return fold(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
template <class E>
INLINE E maximum(Lanes<E> v) {
    return fold(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}
template <class E>
INLINE Lanes<E> larger(Lanes<E> a, Lanes<E> b) {
    EACH(i) a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
    return a;
}
// The second one where either is no number.
INLINE F16 larger(F16 a, F16 b) {
#if CABOCHON_AVX512
    a.part[0] = (F16::Part)_mm512_max_ps((__m512)a.part[0], (__m512)b.part[0]);
    return a;
#elif CABOCHON_AVX2
    EACH(i) a.part[i] = (F16::Part)_mm256_max_ps((__m256)a.part[i], (__m256)b.part[i]);
    return a;
#else
    return select(a > b, a, b);
#endif
}
INLINE F16 smaller(F16 a, F16 b) {
#if CABOCHON_AVX512
    a.part[0] = (F16::Part)_mm512_min_ps((__m512)a.part[0], (__m512)b.part[0]);
    return a;
#elif CABOCHON_AVX2
    EACH(i) a.part[i] = (F16::Part)_mm256_min_ps((__m256)a.part[i], (__m256)b.part[i]);
    return a;
#else
    return select(b > a, a, b);
#endif
}

INLINE float square_root(float v) { return __builtin_sqrtf(v); }

// float32 and bfloat16 in memory, float32 in registers.
struct Bf16 {
    uint16_t raw;
};

INLINE F16 widen(U16 v) { return as<F16>(v << 16); }
INLINE U16 narrow(F16 v) {  // to nearest even; what is not a number stays so
    const U16 u = as<U16>(v), even = u + 0x7fffu + ((u >> 16) & 1u);
    return select(v != v, u | 0x400000u, even) >> 16;
}

INLINE F16 get(const float* from) { return load<F16>(from); }
INLINE F16 get(const Bf16* from) { return widen(get_shorts(from)); }
INLINE F16 get(const int8_t* from) { return to_float(get_bytes(from)); }
INLINE void put(float* to, F16 v) { store(to, v); }
INLINE void put(Bf16* to, F16 v) { put_shorts(to, narrow(v)); }

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
#if CABOCHON_AVX512
INLINE F16 get(const float* from, long n) {
    F16 v;
    v.part[0] = (F16::Part)_mm512_maskz_loadu_ps(n >= LANES ? 0xffff : (1u << n) - 1, from);
    return v;
}
INLINE F16 get(const Bf16* from, long n) {
    U16 v;
    v.part[0] = (U16::Part)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(n >= LANES ? 0xffff : (1u << n) - 1, from));
    return widen(v);
}
INLINE void put(float* to, F16 v, long n) { _mm512_mask_storeu_ps(to, n >= LANES ? 0xffff : (1u << n) - 1, (__m512)v.part[0]); }
INLINE void put(Bf16* to, F16 v, long n) {
    _mm512_mask_cvtepi32_storeu_epi16(to, n >= LANES ? 0xffff : (1u << n) - 1, (__m512i)narrow(v).part[0]);
}
#endif

INLINE F16 get_half(const void* from) {
    F16 r;
#if CABOCHON_AVX512
    r.part[0] = (F16::Part)_mm512_cvtph_ps(load<__m256i>(from));
#elif CABOCHON_AVX2
    EACH(i) r.part[i] = (F16::Part)_mm256_cvtph_ps(load<__m128i>(static_cast<const char*>(from) + i * 16));
#else
    // 5 exponent bits to 8: shift into place, then rescale by 2^112 so that subnormal halves come out right too.
    const U16 u = get_shorts(from);
    r = as<F16>((u & 0x7fffu) << 13) * 0x1p112f;
    r = as<F16>(as<U16>(r) | ((u & 0x8000u) << 16));
#endif
    return r;
}

// e^x to about 1 unit in the last place; 0 below -87 (so that a masked score weighs nothing).
INLINE F16 exponential(F16 x) {
    const I16 tiny = splat(-87.0f) > x;
    x = smaller(splat(88.0f), larger(splat(-87.0f), x));
    const I16 n = rounded(x * 1.44269504f);
    const F16 t = to_float(n);
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
    return select(tiny, zero(), p * as<F16>((n + 127) << 23));
}

// gelu with tanh is x * sigmoid(gelu_slope(x)), where that is 2 sqrt(2/pi) (x + 0.044715 x^3).
INLINE F16 gelu_slope(F16 x) { return x * fma(x * x, splat(0.0713548162726f), splat(1.59576912161f)); }
INLINE F16 gelu(F16 x) { return x / (1.0f + exponential(0.0f - gelu_slope(x))); }

// tanh by e^2x; the absolute error stays at float32's.
INLINE F16 hyperbolic_tangent(F16 x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

}  // namespace
