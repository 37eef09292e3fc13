// Hyper-connections (arXiv 2409.19606): n residual streams a token, which a block reads as one and writes to all.
#pragma once

#include "elementwise.h"

namespace latentkv {

constexpr int MAX_STREAMS = 16;

// How each of T tokens reads and mixes its n streams (mHC, arXiv 2512.24880), all in float32. Of m, its products
// divided by the root of the mean square of its streams:
// pre = sigmoid(m[:n] scale[0] + base[:n]) + eps, post = 2 sigmoid(m[n:2n] scale[1] + base[n:2n]), and comb, the rows of
// softmax(m[2n:] scale[2] + base[2n:]) + eps, made doubly stochastic by `iterations` of Sinkhorn and Knopp.
struct HyperMix {
  Matrix streams;         // [T, n D]
  const float* products;  // [T, (2 + n) n]
  const float *base, *scale;  // [(2 + n) n], [3]
  float norm_eps, eps;
  int iterations, tokens, count, dim;  // n <= MAX_STREAMS
  float *pre, *post, *comb;            // [T, n], [T, n], [T, n, n]
};

// Streams are [T, n D], rows of n D consecutive numbers.
struct HyperKernels {
  void (*mix)(const HyperMix& mix);
  // out [T, D] = sum_i pre[t, i] streams[t, i]; null: their mean
  void (*collapse)(Matrix streams, const float* pre, Matrix out, int tokens, int count, int dim);
  // out[t, k] = post[t, k] block[t] + sum_j comb[t, j, k] streams[t, j]; null: + streams[t, k]
  void (*expand)(Matrix streams, Matrix block, const float* post, const float* comb, Matrix out, int tokens, int count,
                 int dim);
};
LATENTKV_TABLE(HyperKernels, hyper)

}  // namespace latentkv
