// The online softmax over one tile: scores of a group's query vectors to weights, peaks and totals.
#pragma once

#include <math.h>

#include "attention_state.h"
#include "attention_tile.h"
#include "attention_vectors.h"

namespace latentkv::LATENTKV_ISA {

// A says how many tokens a tile has (TILE), and the type that weights are kept in (Weight, store_weights).
template <class A>
class Softmax {
  using Weight = typename A::Weight;

 public:
  static constexpr int TILE = A::TILE;

 protected:
  explicit Softmax(const Attention& a) : a_(a) {}

  void place(Memory& memory, std::size_t vectors) {
    scores_ = memory.take<float>(vectors * TILE);
    weights_ = memory.take<Weight>(vectors * TILE);
    rescale_ = memory.take<float>(vectors);
    sum_ = memory.take<float>(vectors);
  }

  // Scores -> weights exp(scale * score - peak), the new peaks and totals, and what the sums so far are rescaled by.
  void soften(int vectors, int tokens, const State& state) {
    for (int v = 0; v < vectors; v++) {
      const float old_peak = state.peak[v];
      sum_[v] = weigh(scores_ + v * TILE, weights_ + v * TILE, tokens, ranges_.from[v], ranges_.to[v], state.peak[v]);
      rescale_[v] = old_peak == state.peak[v] ? 0 : old_peak - state.peak[v];
    }
    for (int v = 0; v < vectors; v += W) {
      const vf rescale = exp(load(rescale_ + v));
      store(rescale_ + v, rescale);
      store(state.total + v, load(state.total + v) * rescale + load(sum_ + v));
    }
  }

  const Attention& a_;
  float *scores_, *rescale_, *sum_;  // [vectors, TILE], [vectors], [vectors]
  Weight* weights_;                  // [vectors, TILE]
  Ranges ranges_;

 private:
  float weigh(float* s, Weight* p, int tokens, int from, int to, float& peak) {
    if (from >= to) {
      std::memset(p, 0, sizeof(Weight) * TILE);
      return 0;
    }
    vi lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    const int end = (tokens + W - 1) / W * W;
    vf largest = splat(-INFINITY);
    for (int i = 0; i < end; i += W) {
      vf x = load(s + i) * a_.scale;
      if (i < from || i + W > to) x = (lane + i >= from) & (lane + i < to) ? x : splat(-INFINITY);
      store(s + i, x);
      largest = maximum(x, largest);
    }
    const float tile_peak = max_of(largest);
    peak = tile_peak > peak ? tile_peak : peak;
    vf total{};
    for (int i = 0; i < end; i += W) {
      const vf weight = exp(load(s + i) - peak);
      A::store_weights(p + i, weight);
      total += weight;
    }
    return sum(total);
  }
};

}  // namespace latentkv::LATENTKV_ISA
