// One vector of W floats, the same code for every instruction set: GCC's vector types compile to AVX-512, AVX2 or
// SSE2. What only one instruction set can do is written with its intrinsics where it is used.
//
// This header belongs to LATENTKV_ISA's namespace. Do not use anything from the standard library that is not inlined
// for sure (containers, std::function): its out-of-line copy could be taken from another instruction set's object.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "dtypes.h"

#define LATENTKV_INLINE static inline __attribute__((always_inline))

namespace latentkv::LATENTKV_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef std::int32_t vi __attribute__((vector_size(4 * W)));
typedef std::uint32_t vu __attribute__((vector_size(4 * W)));
typedef std::uint16_t vh __attribute__((vector_size(2 * W)));
typedef std::int8_t vb __attribute__((vector_size(W)));
typedef std::uint8_t vub __attribute__((vector_size(W)));

template <class V, class T>
LATENTKV_INLINE V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
LATENTKV_INLINE vf load(const float* p) { return load_as<vf>(p); }
LATENTKV_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
LATENTKV_INLINE vf splat(float x) { return x - vf{}; }

// W integers of 8 or 16 bits as 32. AVX2 has an instruction for it; GCC 12 would take five.
#if defined(__AVX2__) && !defined(__AVX512F__)
LATENTKV_INLINE vu load_u16(const void* p) { return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
LATENTKV_INLINE vu load_u8(const void* p) { return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
LATENTKV_INLINE vi load_s8(const void* p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
#else
LATENTKV_INLINE vu load_u16(const void* p) { return __builtin_convertvector(load_as<vh>(p), vu); }
LATENTKV_INLINE vu load_u8(const void* p) { return __builtin_convertvector(load_as<vub>(p), vu); }
LATENTKV_INLINE vi load_s8(const void* p) { return __builtin_convertvector(load_as<vb>(p), vi); }
#endif

LATENTKV_INLINE vf load_bf16(const bf16* p) { return (vf)(load_u16(p) << 16); }
LATENTKV_INLINE float bf16_to_float(bf16 x) {
  const std::uint32_t bits = (std::uint32_t)x << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// Round to nearest, ties to even; NaN stays NaN.
LATENTKV_INLINE void store_bf16(bf16* p, vf v) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu nan = (vu)(v != v);
  const vh half = __builtin_convertvector((rounded & ~nan) | (((bits >> 16) | 0x40) & nan), vh);
  std::memcpy(p, &half, sizeof half);
}
LATENTKV_INLINE bf16 float_to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return (bf16)((bits >> 16) | 0x40);
  return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)
LATENTKV_INLINE vf load_f16(const f16* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
LATENTKV_INLINE void store_f16(f16* p, vf v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
LATENTKV_INLINE vf load_f16(const f16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
LATENTKV_INLINE void store_f16(f16* p, vf v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif
#if defined(__AVX2__)
LATENTKV_INLINE float f16_to_float(f16 x) { return _cvtsh_ss(x); }
#else
LATENTKV_INLINE float f16_to_float(f16 x) {
  // Shift the fields into place, then multiply away the difference of the exponents' biases: exact, subnormals included.
  std::uint32_t bits = (std::uint32_t)(x & 0x7fff) << 13;
  float y;
  std::memcpy(&y, &bits, 4);
  y *= 0x1p112f;
  std::memcpy(&bits, &y, 4);
  if ((x & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  bits |= (std::uint32_t)(x & 0x8000) << 16;
  std::memcpy(&y, &bits, 4);
  return y;
}
#endif
LATENTKV_INLINE f16 float_to_f16(float x) {
  const _Float16 half = (_Float16)x;
  f16 bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
#if !defined(__AVX2__)
LATENTKV_INLINE vf load_f16(const f16* p) {
  vf v;
  for (int i = 0; i < W; i++) v[i] = f16_to_float(p[i]);
  return v;
}
LATENTKV_INLINE void store_f16(f16* p, vf v) {
  for (int i = 0; i < W; i++) p[i] = float_to_f16(v[i]);
}
#endif

LATENTKV_INLINE vf load_any(const void* p, DType dtype, std::ptrdiff_t i) {
  switch (dtype) {
    case DType::bf16: return load_bf16((const bf16*)p + i);
    case DType::f16: return load_f16((const f16*)p + i);
    default: return load((const float*)p + i);
  }
}
LATENTKV_INLINE void store_any(void* p, DType dtype, std::ptrdiff_t i, vf v) {
  switch (dtype) {
    case DType::bf16: store_bf16((bf16*)p + i, v); break;
    case DType::f16: store_f16((f16*)p + i, v); break;
    default: store((float*)p + i, v);
  }
}
// These may lie at any address: fp8 rows hold bf16 after an odd number of codes.
LATENTKV_INLINE float load_one(const void* p, DType dtype, std::ptrdiff_t i) {
  if (dtype == DType::f32) {
    float x;
    std::memcpy(&x, (const char*)p + i * 4, 4);
    return x;
  }
  std::uint16_t half;
  std::memcpy(&half, (const char*)p + i * 2, 2);
  return dtype == DType::bf16 ? bf16_to_float(half) : f16_to_float(half);
}
LATENTKV_INLINE void store_one(void* p, DType dtype, std::ptrdiff_t i, float x) {
  if (dtype == DType::f32) {
    std::memcpy((char*)p + i * 4, &x, 4);
    return;
  }
  const std::uint16_t half = dtype == DType::bf16 ? float_to_bf16(x) : float_to_f16(x);
  std::memcpy((char*)p + i * 2, &half, 2);
}

// a b + c, rounded once where the instruction set can. The compiler fuses a plain `a * b + c` or not as it sees fit;
// this is for results that must not depend on how a loop was compiled.
LATENTKV_INLINE vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

LATENTKV_INLINE float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s[W];
  store(s, v);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) s[i] += s[i + n];
  return s[0];
#endif
}
LATENTKV_INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }
LATENTKV_INLINE float max_of(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float s[W];
  store(s, v);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) s[i] = s[i] > s[i + n] ? s[i] : s[i + n];
  return s[0];
#endif
}

// exp(x) to about 1 ulp for x <= 88, 0 below -87.3 (where float32 would become subnormal), NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts (Cody and Waite); the coefficients are Cephes' expf's.
LATENTKV_INLINE vf exp(vf x) {
  const vf n_float = x * 1.44269504088896341f;
  const vf shifted = n_float + 12582912.0f;  // 1.5 * 2^23 rounds to the nearest integer
  const vf n = shifted - 12582912.0f;
  const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vu exponent = ((vu)shifted - 0x4b400000u) << 23;  // unsigned: it may wrap where x is far below
  const vf y = (vf)((vu)p + exponent);
  return x < -87.3f ? vf{} : y;
}

}  // namespace latentkv::LATENTKV_ISA
