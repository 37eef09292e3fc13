// Attention of a group of query vectors over one tile of rows, by an arithmetic on rows of its elements.
#pragma once

#include "attention_softmax.h"

namespace latentkv::LATENTKV_ISA {

template <class A>
class RowsEngine : public Softmax<A> {
  using Element = typename A::Element;
  static constexpr int SCORE_BLOCK = 16;  // query vectors whose scores are computed together: they stay in L1
  static constexpr int WIDE = A::COLUMNS * A::STEP;

 public:
  using Softmax<A>::TILE;
  static constexpr int STEP = A::STEP;

  // For groups of at most `vectors` query vectors.
  RowsEngine(const Attention& a, int vectors)
      : Softmax<A>(a), key_width_(Tile<A>::padded(a.keys.width)), value_width_(Tile<A>::padded(a.values.width)),
        vectors_(vectors) {}

  int value_width() const { return value_width_; }

  void place(Memory& memory) {
    const std::size_t vectors = vectors_;
    const bool in_place = Tile<A>::reads_in_place(a_);
    const std::size_t scratch_rows = in_place ? 0 : TILE;
    Softmax<A>::place(memory, vectors);
    q_ = memory.take<Element>(vectors * key_width_);
    tile_.zeros = memory.take<Element>(widest());
    tile_.key_scratch = memory.take<Element>(scratch_rows * key_width_);
    tile_.value_scratch = memory.take<Element>(scratch_rows * value_width_);
    tile_.key_width = key_width_;
    tile_.value_width = value_width_;
    tile_.in_place = in_place;
  }

  void load_queries(const Group& group) {
    const int vectors = group.rows * group.heads, size = sizeof_dtype(a_.q_dtype);
    for (int v = 0; v < vectors; v++) {
      const std::int64_t row = group.row + v / group.heads, head = group.head + v % group.heads;
      decode_row(a_.q + (row * a_.q_row + head * a_.q_head) * size, (RowFormat)a_.q_dtype, a_.keys.width, 0, key_width_,
                 q_ + (std::ptrdiff_t)v * key_width_);
    }
    const int whole = (vectors + 3) / 4 * 4;
    std::memset(q_ + (std::ptrdiff_t)vectors * key_width_, 0, sizeof(Element) * (whole - vectors) * key_width_);
    std::memset(tile_.zeros, 0, sizeof(Element) * widest());
  }

  // Adds the tile of stored rows, whose first token is `first`, to the state; meanwhile the next tile is fetched.
  void attend(const Group& group, int first, const StoredTile<TILE>& stored, const StoredTile<TILE>& next,
              const State& state) {
    const int vectors = group.rows * group.heads;
    ranges_.find(a_, group, first, stored.tokens);
    const int scored = (vectors + 3) / 4 * ((stored.tokens + 3) / 4), summed = blocks_of_values(vectors);
    Fetcher keys(next.keys, next.tokens, a_.keys.bytes, scored + (a_.values_in_keys ? summed : 0));
    score(vectors, stored, keys);
    this->soften(vectors, stored.tokens, state);
    if (a_.values_in_keys) {
      accumulate(vectors, keys, state);
    } else {
      Fetcher values(next.values, next.tokens, a_.values.bytes, summed);
      accumulate(vectors, values, state);
    }
  }

  static void in_order(const float* accumulated, float* out) { A::in_order(accumulated, out); }

 protected:
  int widest() const { return key_width_ > value_width_ ? key_width_ : value_width_; }

  // Takes the tile's rows as it comes to them: they are still in L1 when they are used.
  void score(int vectors, const StoredTile<TILE>& stored, Fetcher& fetcher) {
    int taken = 0;
    for (int block = 0; block < vectors; block += SCORE_BLOCK) {
      const int block_end = block + SCORE_BLOCK < vectors ? block + SCORE_BLOCK : vectors;
      int until[SCORE_BLOCK / 4];
      for (int v = block; v < block_end; v += 4) until[(v - block) / 4] = ranges_.until(v, 4);
      for (int t = 0; t < stored.tokens; t += 4) {
        for (; block == 0 && taken < t + 4; taken++) tile_.take(a_, stored, taken);
        for (int v = block; v < block_end; v += 4) {
          if (block == 0 && taken < t + 8 && taken < TILE) tile_.take(a_, stored, taken++);
          fetcher.with_block(key_width_ / STEP, [&](Walk& ahead, auto fetches) {
            if (fetches() || t < until[(v - block) / 4])
              A::template scores<fetches()>(q_ + (std::ptrdiff_t)v * key_width_, key_width_, tile_.keys + t,
                                            scores_ + v * TILE + t, ahead);
          });
        }
      }
    }
  }

  void accumulate(int vectors, Fetcher& fetcher, const State& state) {
    int column = 0;
    for (; column + WIDE <= value_width_; column += WIDE)
      accumulate_columns<A::COLUMNS>(vectors, column, fetcher, state);
    for (; column < value_width_; column += STEP) accumulate_columns<1>(vectors, column, fetcher, state);
  }
  template <int C>
  void accumulate_columns(int vectors, int column, Fetcher& fetcher, const State& state) {
    for_vector_blocks<A::VECTORS>(
        vectors, [&](auto count, int v) { this->template accumulate_block<count(), C>(v, column, fetcher, state); });
  }
  template <int V, int C>
  void accumulate_block(int v, int column, Fetcher& fetcher, const State& state) {
    fetcher.with_block(TILE / A::TOKENS, [&](Walk& ahead, auto fetches) {
      float* out = state.out + (std::ptrdiff_t)v * value_width_ + column;
      A::template accumulate<V, C, fetches()>(weights_ + v * TILE, rescale_ + v, tile_.values,
                                              ranges_.until(v, V), column, out, value_width_, ahead);
    });
  }
  int blocks_of_values(int vectors) const {
    return (value_width_ / WIDE + value_width_ % WIDE / STEP) * num_vector_blocks<A::VECTORS>(vectors);
  }

  using Softmax<A>::a_;
  using Softmax<A>::scores_;
  using Softmax<A>::weights_;
  using Softmax<A>::rescale_;
  using Softmax<A>::ranges_;
  int key_width_, value_width_, vectors_;
  Element* q_;      // [vectors, padded key width]
  Tile<A> tile_;
};

}  // namespace latentkv::LATENTKV_ISA
