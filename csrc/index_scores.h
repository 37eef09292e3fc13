// Scores of cached tokens: sum over heads of weight * ReLU(D^-1/2 q . k), heads in the lanes of a register.
//
// Keys are taken a tile at a time, turned into the arithmetic's elements, and multiplied a few with a few vectors of
// heads in registers. Every product of a key goes through the same operations in the same order whatever lies beside
// it, so a score depends on its row and its key alone.
#pragma once

#include "attention_fetch.h"
#include "attention_state.h"
#include "index.h"
#include "rows.h"

namespace latentkv::LATENTKV_ISA {

// Elements are float32 numbers; an arithmetic multiplies STEP of them at a time.
struct FloatScores {
  using Element = float;
  using Vector = vf;
  static constexpr int STEP = 1;

  LATENTKV_INLINE void convert(const char* row, RowFormat format, int n, float* out) {
    if (format != RowFormat::int8) return convert_row(row, (DType)format, n, out, DType::f32);
    for (int i = 0; i < n; i++) out[i] = (float)((const std::int8_t*)row)[i];
  }
  LATENTKV_INLINE Vector spread(const float* p) { return splat(*p); }
  LATENTKV_INLINE vf multiply_add(Vector key, Vector q, vf sum) { return LATENTKV_ISA::multiply_add(key, q, sum); }
};

#if defined(__AVX512BF16__)
// Pairs of bf16 numbers; vdpbf16ps adds their products to float32 sums.
struct Bf16Scores {
  using Element = bf16;
  using Vector = __m512bh;
  static constexpr int STEP = 2;

  LATENTKV_INLINE void convert(const char* row, RowFormat format, int n, bf16* out) {
    if (format != RowFormat::int8) return (void)std::memcpy(out, row, 2 * n);
    for (int i = 0; i < n; i++) {
      const float code = (float)((const std::int8_t*)row)[i];  // 8 bits: exact in bf16
      std::uint32_t bits;
      std::memcpy(&bits, &code, 4);
      out[i] = (bf16)(bits >> 16);
    }
  }
  LATENTKV_INLINE Vector spread(const bf16* p) { return (__m512bh)_mm512_set1_epi32(load_as<std::int32_t>(p)); }
  LATENTKV_INLINE vf multiply_add(Vector key, Vector q, vf sum) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, q, key);
  }
};
#endif

// One thread's scores of one row after the other.
template <class A>
class Scorer {
  using Element = typename A::Element;
#if defined(__AVX512F__)
  static constexpr int SUMS = 24, VECTORS = 4;  // registers that hold sums; vectors of heads at a time
#else
  static constexpr int SUMS = 12, VECTORS = 2;
#endif

 public:
  static constexpr int TILE = 48;

  explicit Scorer(const IndexChoice& c) : c_(c), vectors_((c.heads + W - 1) / W) {}

  void place(Memory& memory) {
    q_ = memory.take<Element>((std::size_t)vectors_ * c_.dim * W);
    weights_ = memory.take<float>((std::size_t)vectors_ * W);
    mask_ = memory.take<std::uint32_t>((std::size_t)vectors_ * W);
    keys_ = memory.take<Element>((std::size_t)TILE * c_.dim);
    head_ = memory.take<float>(c_.dim);
  }

  void load_row(int row, const std::int32_t* pages) {
    pages_ = pages;
    const float scale = 1.0f / __builtin_sqrtf((float)c_.dim);
    const float* weights = (const float*)c_.weights.data + row * c_.weights.stride;
    for (int h = 0; h < vectors_ * W; h++) {
      weights_[h] = h < c_.heads ? weights[h] * scale : 0;
      mask_[h] = h < c_.heads ? ~0u : 0;
    }
    std::memset(q_, 0, sizeof(Element) * vectors_ * c_.dim * W);
    for (int h = 0; h < c_.heads; h++) load_head(row, h);
  }

  // scores[s - first] of the tokens first <= s < last.
  void score(int first, int last, float* scores) {
    const char* rows[TILE];
    const char* next[TILE];
    int tokens = locate(first, last, rows);
    for (int s = first; s < last; s += TILE) {
      const int upcoming = locate(s + TILE, last, next);
      float scales[TILE];
      for (int i = 0; i < tokens; i++) {
        A::convert(rows[i], c_.key_format, c_.dim, keys_ + i * c_.dim);
        scales[i] = 1;
        if (c_.key_format == RowFormat::int8) std::memcpy(&scales[i], rows[i] + c_.dim, 4);
      }
      vf sums[TILE] = {};
      int v = 0;
      // The next tile is fetched with the first vectors of heads.
      for (; v + VECTORS <= vectors_; v += VECTORS) products<VECTORS>(v, tokens, sums, next, v ? 0 : upcoming);
      for (; v < vectors_; v++) products<1>(v, tokens, sums, next, v ? 0 : upcoming);
      for (int i = 0; i < tokens; i++) scores[s - first + i] = sum(sums[i]) * scales[i];
      std::memcpy(rows, next, sizeof rows);
      tokens = upcoming;
    }
  }

 private:
  void load_head(int row, int h) {
    const char* x = (const char*)c_.q.data + (row * c_.q.token_stride + h * c_.q.head_stride) * sizeof_dtype(c_.q.dtype);
    convert_row(x, c_.q.dtype, c_.dim, head_, DType::f32);
    if (c_.key_format == RowFormat::int8) {
      hadamard_row(head_, c_.dim);
      for_dtype(c_.q.dtype, [&](auto dtype) { round_row(head_, c_.dim, dtype()); });
    }
    constexpr DType dtype = sizeof(Element) == 4 ? DType::f32 : DType::bf16;
    Element* to = q_ + (std::ptrdiff_t)(h / W) * c_.dim * W + h % W * A::STEP;
    for (int d = 0; d < c_.dim; d++)
      store_one(to + (std::ptrdiff_t)(d / A::STEP) * W * A::STEP + d % A::STEP, dtype, 0, head_[d]);
  }

  // Where the tile's keys lie; how many there are.
  int locate(int first, int last, const char** rows) const {
    const int tokens = last - first < TILE ? (last > first ? last - first : 0) : TILE;
    for (int i = 0; i < tokens; i++) {
      const int s = first + i;
      rows[i] = c_.keys + ((std::int64_t)pages_[s / c_.page_size] * c_.page_size + s % c_.page_size) * c_.key_bytes;
    }
    return tokens;
  }

  // Adds to each token's sums what V vectors of heads from `v` on say of it.
  template <int V>
  void products(int v, int tokens, vf* sums, const char* const* next, int upcoming) const {
    constexpr int K = SUMS / V;
    static_assert(TILE % K == 0);
    const Element* q = q_ + (std::ptrdiff_t)v * c_.dim * W;
    const std::ptrdiff_t dim = c_.dim;
    for (int t = 0; t < tokens; t += K) {
      for (int i = t; i < t + K && i < upcoming; i++) prefetch_row(next[i], (int)c_.key_bytes);
      // Tokens past the last are what the scratch holds of others; their sums are not used.
      const Element* keys = keys_ + t * dim;
      vf a[K][V];
#pragma GCC unroll 24
      for (int k = 0; k < K; k++)
#pragma GCC unroll 4
        for (int i = 0; i < V; i++) a[k][i] = vf{};
      for (std::ptrdiff_t d = 0; d < dim; d += A::STEP) {
        typename A::Vector x[V];
#pragma GCC unroll 4
        for (int i = 0; i < V; i++) x[i] = load_as<typename A::Vector>(q + i * dim * W + d * W);
#pragma GCC unroll 24
        for (int k = 0; k < K; k++) {
          const typename A::Vector y = A::spread(keys + k * dim + d);
#pragma GCC unroll 4
          for (int i = 0; i < V; i++) a[k][i] = A::multiply_add(y, x[i], a[k][i]);
        }
      }
#pragma GCC unroll 24
      for (int k = 0; k < K; k++)
#pragma GCC unroll 4
        for (int i = 0; i < V; i++) {
          const vf positive = a[k][i] < 0.0f ? vf{} : a[k][i];  // NaN stays
          const vf own = (vf)((vu)positive & load_as<vu>(mask_ + (v + i) * W));
          sums[t + k] = LATENTKV_ISA::multiply_add(own, load(weights_ + (v + i) * W), sums[t + k]);
        }
    }
  }

  const IndexChoice& c_;
  const int vectors_;
  const std::int32_t* pages_ = nullptr;
  Element *q_, *keys_;  // [vectors, dim / STEP, W, STEP], [TILE, dim]
  float *weights_, *head_;
  std::uint32_t* mask_;
};

}  // namespace latentkv::LATENTKV_ISA
