// Attention's arithmetic in float32, for every instruction set.
//
// An arithmetic says what a tile is computed with: its element, how many tokens a tile has (TILE), the multiple that
// rows are padded to (STEP), the weights it takes, and two register blocks: 4 x 4 scores, and the sum of weighted
// values for V query vectors x C steps of columns, at most VECTORS x COLUMNS, of TOKENS tokens at a time.
#pragma once

#include "attention_fetch.h"
#include "simd.h"

namespace latentkv::LATENTKV_ISA {

// out[i] = sum of a[i]'s lanes, i < 4.
LATENTKV_INLINE void sums_of_4(const vf* a, float* out) {
#if defined(__AVX2__)
  __m256 h[4];
  for (int i = 0; i < 4; i++) {
#if defined(__AVX512F__)
    h[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)a[i]), _mm512_extractf32x8_ps((__m512)a[i], 1));
#else
    h[i] = (__m256)a[i];
#endif
  }
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(h[0], h[1]), _mm256_hadd_ps(h[2], h[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
#else
  for (int i = 0; i < 4; i++) out[i] = sum(a[i]);
#endif
}

struct FloatArithmetic {
  using Element = float;
  using Weight = float;
  static constexpr DType DTYPE = DType::f32;
  static constexpr int TILE = 64, STEP = W;
  static constexpr int VECTORS = W == 16 ? 6 : 4, COLUMNS = W == 16 ? 4 : 2, TOKENS = 1;

  LATENTKV_INLINE void store_weights(Weight* p, vf v) { store(p, v); }

  // s[i * TILE + j] = q[i * width ..] . keys[j], 4 x 4; a line ahead is fetched with every STEP.
  template <bool PREFETCH>
  LATENTKV_INLINE void scores(const float* q, std::ptrdiff_t width, const float* const* keys, float* s,
                              Walk& ahead) {
    constexpr int ROWS = W == 16 ? 4 : 2;  // query vectors at a time: what the registers hold
    for (int i = 0; i < 4; i += ROWS, q += ROWS * width, s += ROWS * TILE) {
      vf a[ROWS][4] = {};
      for (std::ptrdiff_t d = 0; d < width; d += W) {
        if (PREFETCH && i == 0) ahead.fetch();
        vf x[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) x[r] = load(q + r * width + d);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          const vf y = load(keys[j] + d);
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; r++) a[r][j] += x[r] * y;
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) sums_of_4(a[r], s + r * TILE);
    }
  }

  // out[v * width + c] = out[..] * rescale[v] + sum over tokens t of p[v * TILE + t] * values[t][column + c]; a
  // line ahead is fetched with every TOKENS tokens.
  template <int V, int C, bool PREFETCH>
  LATENTKV_INLINE void accumulate(const Weight* p, const float* rescale, const float* const* values, int tokens,
                                  std::ptrdiff_t column, float* out, std::ptrdiff_t width, Walk& ahead) {
    Walk walk = ahead;
    vf a[V][C];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) a[v][c] = load(out + v * width + c * W) * rescale[v];
    for (int t = 0; t < tokens; t++) {
      if (PREFETCH) walk.fetch();
      const float* row = values[t] + column;
      vf y[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) y[c] = load(row + c * W);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        const float weight = p[v * TILE + t];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) a[v][c] += y[c] * weight;
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; v++)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) store(out + v * width + c * W, a[v][c]);
    if (PREFETCH) ahead = walk;
  }

  // `accumulate` may leave columns in another order inside each STEP; this gives them in the order of the values.
  LATENTKV_INLINE void in_order(const float* accumulated, float* out) { store(out, load(accumulated)); }
};

}  // namespace latentkv::LATENTKV_ISA
