// The bf16 engine for groups of many query vectors over short keys: expanded prefill.
//
// The finishing reduction of a dot product costs as much as 90 of its numbers, half of a 192 wide key. So the keys of a
// tile are transposed once, pairs of numbers by tokens, and scores are summed for 16 tokens in the lanes of a register.
#pragma once

#include "attention_bf16.h"
#include "attention_rows.h"
#include "transpose.h"

#if defined(__AVX512BF16__)

namespace latentkv::LATENTKV_ISA {

class PackedEngine : public RowsEngine<Bf16Arithmetic> {
  static constexpr int VECTORS = 6, WORDS = 4;  // the register block: query vectors x 16 tokens

 public:
  using RowsEngine::RowsEngine;

  void place(Memory& memory) {
    RowsEngine::place(memory);
    transposed_ = memory.take<std::uint32_t>((std::size_t)key_width_ / 2 * TILE);
    tile_.in_place = key_width_ == a_.keys.width && value_width_ == a_.values.width;
  }

  void attend(const Group& group, int first, const StoredTile<TILE>& stored, const StoredTile<TILE>& next,
              const State& state) {
    const int vectors = group.rows * group.heads;
    for (int i = 0; i < (stored.tokens + 15) / 16 * 16; i++) tile_.take(a_, stored, i);
    transpose_keys(stored.tokens);
    if (tile_.in_place) gather_values(stored.tokens);
    ranges_.find(a_, group, first, stored.tokens);
    score(vectors, next);
    soften(vectors, stored.tokens, state);
    Fetcher values(next.values, next.tokens, a_.values.bytes, blocks_of_values(vectors));
    accumulate(vectors, values, state);
  }

 private:
  void transpose_keys(int tokens) {
    for (int t = 0; t < tokens; t += 16)
      for (int d = 0; d < key_width_; d += 32) transpose_16_words(tile_.keys + t, d * sizeof(bf16), transposed_ + d / 2 * TILE + t, TILE);
  }

  // Rows of one head lie so far apart that a few of them would fill their sets of the first-level cache.
  void gather_values(int tokens) {
    for (int i = 0; i < tokens; i++) {
      bf16* row = tile_.value_scratch + i * value_width_;
      for (int d = 0; d < value_width_; d += 32)
        _mm512_store_si512(row + d, _mm512_loadu_si512(tile_.values[i] + d));
      tile_.values[i] = row;
    }
  }

  void score(int vectors, const StoredTile<TILE>& next) {
    int v = 0;
    for (; v + VECTORS <= vectors; v += VECTORS) score_vectors<VECTORS>(v, vectors, next);
    for (; v < vectors; v += 2) score_vectors<2>(v, vectors, next);  // q has zeros after the last vector
  }
  template <int V>
  void score_vectors(int v, int vectors, const StoredTile<TILE>& next) {
    const int until = ranges_.until(v, V);
    for (int i = next.tokens * v / vectors; v < vectors && i < next.tokens * (v + V) / vectors && i < next.tokens; i++)
      prefetch_row(next.keys[i], a_.keys.bytes);
    int t = 0;
    for (; t + 16 * WORDS <= until; t += 16 * WORDS) score_block<V, WORDS>(v, t);
    for (; t < until; t += 16) score_block<V, 1>(v, t);
  }
  template <int V, int C>
  void score_block(int v, int t) {
    const bf16* q = q_ + (std::ptrdiff_t)v * key_width_;
    __m512 a[V][C];
#pragma GCC unroll 8
    for (int i = 0; i < V; i++)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) a[i][c] = _mm512_setzero_ps();
    for (int d = 0; d < key_width_; d += 2) {
      const std::uint32_t* words = transposed_ + d / 2 * TILE + t;
      __m512bh y[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) y[c] = (__m512bh)_mm512_load_si512(words + c * 16);
#pragma GCC unroll 8
      for (int i = 0; i < V; i++) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(load_as<std::int32_t>(q + i * key_width_ + d));
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) a[i][c] = _mm512_dpbf16_ps(a[i][c], x, y[c]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < V; i++)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) _mm512_store_ps(scores_ + (v + i) * TILE + t + c * 16, a[i][c]);
  }

  std::uint32_t* transposed_;  // [padded key width / 2, TILE] pairs of numbers
};

}  // namespace latentkv::LATENTKV_ISA

#endif
