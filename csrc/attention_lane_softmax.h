// The online softmax over one tile with query vectors in the lanes of a register: no sums across lanes.
#pragma once

#include <math.h>

#include "attention_state.h"
#include "attention_tile.h"
#include "attention_vectors.h"

namespace latentkv::LATENTKV_ISA {

template <int TILE_>
class LaneSoftmax {
 public:
  static constexpr int TILE = TILE_, LANES = 16;  // query vectors that are scored together: whole registers

 protected:
  // For groups of at most `vectors` query vectors.
  LaneSoftmax(const Attention& a, int vectors)
      : a_(a), vectors_((vectors + LANES - 1) / LANES * LANES), stride_((vectors_ / LANES | 1) * LANES) {}

  void place(Memory& memory) {
    scores_ = memory.take<float>((std::size_t)TILE * stride_);
    rescale_ = memory.take<float>(vectors_);
  }

  float* scores(int token, int v) { return scores_ + (std::ptrdiff_t)token * stride_ + v; }

  // Scores of W query vectors -> weights exp(scale * score - peak), the new peaks and totals, and what the sums so far
  // are rescaled by.
  void soften(int v, int tokens, const State& state) {
    const vi from = load_as<vi>(ranges_.from + v), to = load_as<vi>(ranges_.to + v);
    bool all = true;
    for (int i = 0; i < W; i++) all = all && from[i] == 0 && to[i] == tokens;
    const vf none = splat(-INFINITY);
    vf peaks[2] = {none, none};
    for (int t = 0; t < tokens; t++) {
      vf x = load(scores(t, v)) * a_.scale;
      if (!all) x = (from <= t) & (t < to) ? x : none;
      store(scores(t, v), x);
      peaks[t % 2] = maximum(x, peaks[t % 2]);
    }
    const vf old = load(state.peak + v), peak = maximum(maximum(peaks[0], peaks[1]), old);
    // Not of a vector that reads nothing here; where all scores are -inf, exp(-inf + inf) shows it as NaN.
    const vf base = (peak == none) & (from >= to) ? vf{} : peak;
    vf totals[2] = {};
    for (int t = 0; t < tokens; t++) {
      const vf weight = exp(load(scores(t, v)) - base);
      store(scores(t, v), weight);
      totals[t % 2] += weight;
    }
    const vf rescale = exp(old == peak ? vf{} : old - peak);
    store(rescale_ + v, rescale);
    store(state.peak + v, peak);
    store(state.total + v, multiply_add(load(state.total + v), rescale, totals[0] + totals[1]));
  }

  const Attention& a_;
  int vectors_;  // a multiple of LANES
  int stride_;   // of a token's scores: an odd number of lines, or a vector's would share a few sets of the L1 cache
  float* scores_;   // [TILE, stride]; then weights
  float* rescale_;  // [vectors]
  Ranges ranges_;
};

}  // namespace latentkv::LATENTKV_ISA
