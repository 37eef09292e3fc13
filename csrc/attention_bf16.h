// Attention's arithmetic in bf16 with float32 sums (AVX512-BF16); see attention_float.h for what an arithmetic is.
//
// Nothing is repacked. Scores are dot products along the rows, 4 query vectors x 4 tokens in registers, finished by one
// transposed reduction. For the values, vdpbf16ps wants pairs of tokens side by side: two rows are interleaved as they
// are loaded, which permutes the columns inside each 32, put right once in `in_order`; a pair of weights is broadcast
// as one 32-bit word.
#pragma once

#include "attention_fetch.h"
#include "simd.h"

#if defined(__AVX512BF16__)

namespace latentkv::LATENTKV_ISA {

// Lane i of the result = sum of a[i]'s lanes, i < 16.
LATENTKV_INLINE __m512 sums_of_16(const __m512* a) {
  __m512 b[8], c[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
    c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  const __m512 lo = _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
  const __m512 hi = _mm512_add_ps(_mm512_shuffle_f32x4(c[2], c[3], 0x88), _mm512_shuffle_f32x4(c[2], c[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(lo, hi, 0x88), _mm512_shuffle_f32x4(lo, hi, 0xdd));
}

// out[v * width + c] = out[..] * rescale[v] + sum over tokens of weight * values[t][column + c], in the order that
// `Bf16Arithmetic::in_order` puts right; the weights of tokens t and t + 1 for vector v are the pair at
// p + v * PER_VECTOR + t / 2 * per_pair. A line ahead is fetched with every pair of tokens.
template <int V, int C, bool PREFETCH, int PER_VECTOR>
LATENTKV_INLINE void accumulate_pairs(const bf16* p, std::ptrdiff_t per_pair, const float* rescale,
                                      const bf16* const* values, int tokens, std::ptrdiff_t column, float* out,
                                      std::ptrdiff_t width, Walk& ahead) {
  Walk walk = ahead;
  __m512 a[V][2 * C];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++)
#pragma GCC unroll 8
    for (int c = 0; c < 2 * C; c++)
      a[v][c] = _mm512_mul_ps(_mm512_loadu_ps(out + v * width + c * 16), _mm512_set1_ps(rescale[v]));
  for (int t = 0; t < tokens; t += 2, p += per_pair) {
    if (PREFETCH) walk.fetch();
    const bf16 *even = values[t] + column, *odd = values[t + 1] + column;
    __m512bh y[2 * C];
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      const __m512i e = _mm512_loadu_si512(even + c * 32), o = _mm512_loadu_si512(odd + c * 32);
      y[2 * c] = (__m512bh)_mm512_unpacklo_epi16(e, o);
      y[2 * c + 1] = (__m512bh)_mm512_unpackhi_epi16(e, o);
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(load_as<std::int32_t>(p + v * PER_VECTOR));
#pragma GCC unroll 8
      for (int c = 0; c < 2 * C; c++) a[v][c] = _mm512_dpbf16_ps(a[v][c], pair, y[c]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; v++)
#pragma GCC unroll 8
    for (int c = 0; c < 2 * C; c++) _mm512_storeu_ps(out + v * width + c * 16, a[v][c]);
  if (PREFETCH) ahead = walk;
}

struct Bf16Arithmetic {
  using Element = bf16;
  using Weight = bf16;
  static constexpr DType DTYPE = DType::bf16;
  static constexpr int TILE = 128, STEP = 32;
  static constexpr int VECTORS = 6, COLUMNS = 2, TOKENS = 2;

  LATENTKV_INLINE __m512bh load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

  LATENTKV_INLINE void store_weights(Weight* p, vf v) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
  }

  template <bool PREFETCH>
  LATENTKV_INLINE void scores(const bf16* q, std::ptrdiff_t width, const bf16* const* keys, float* s,
                              Walk& ahead) {
    Walk walk = ahead;
    __m512 a[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_setzero_ps();
    const bf16 *k0 = keys[0], *k1 = keys[1], *k2 = keys[2], *k3 = keys[3];
    for (std::ptrdiff_t d = 0; d < width; d += STEP) {
      if (PREFETCH) walk.fetch();
      const __m512bh y[4] = {load_pairs(k0 + d), load_pairs(k1 + d), load_pairs(k2 + d), load_pairs(k3 + d)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const __m512bh x = load_pairs(q + i * width + d);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) a[4 * i + j] = _mm512_dpbf16_ps(a[4 * i + j], x, y[j]);
      }
    }
    const __m512 sums = sums_of_16(a);
    _mm_storeu_ps(s, _mm512_castps512_ps128(sums));
    _mm_storeu_ps(s + TILE, _mm512_extractf32x4_ps(sums, 1));
    _mm_storeu_ps(s + 2 * TILE, _mm512_extractf32x4_ps(sums, 2));
    _mm_storeu_ps(s + 3 * TILE, _mm512_extractf32x4_ps(sums, 3));
    if (PREFETCH) ahead = walk;
  }

  template <int V, int C, bool PREFETCH>
  LATENTKV_INLINE void accumulate(const Weight* p, const float* rescale, const bf16* const* values, int tokens,
                                  std::ptrdiff_t column, float* out, std::ptrdiff_t width, Walk& ahead) {
    accumulate_pairs<V, C, PREFETCH, TILE>(p, 2, rescale, values, tokens, column, out, width, ahead);
  }

  LATENTKV_INLINE void in_order(const float* accumulated, float* out) {
    // unpacklo took columns 0-3, 8-11, 16-19, 24-27 of each 32; unpackhi the others.
    const __m512 x = _mm512_loadu_ps(accumulated), y = _mm512_loadu_ps(accumulated + 16);
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(x, first, y));
    _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(x, _mm512_add_epi32(first, _mm512_set1_epi32(8)), y));
  }
};

}  // namespace latentkv::LATENTKV_ISA

#endif
