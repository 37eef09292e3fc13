// Kimi Delta Attention (arXiv 2510.26692): short convolutions, decay, the delta rule on a matrix a head, output norm.
#pragma once

#include <cstdint>

#include "elementwise.h"
#include "recurrence.h"

namespace latentkv {

constexpr int KDA_TAPS = 4;  // inputs that a convolution sees
constexpr int KDA_PAST = KDA_TAPS - 1;

// H heads of D dimensions, W = H D.
struct KdaWeights {
  const float* taps;       // [4, 3 W]: tap 3 is for the row itself
  const float* log_rate;   // [H]
  const float* gate_bias;  // [W]
  const void* norm;        // [D]
  DType norm_dtype;
  float eps;          // of the norm
  bool bounded;       // decay lower_bound * sigmoid(.), else -softplus(.)
  float lower_bound;
};

// Rows before anything is done to them.
struct KdaRows {
  Matrix qkv;   // [T, 3 W]
  Matrix gate;  // [T, W]
  Matrix beta;  // [T, H]
};

// What is remembered, a slot a sequence.
struct KdaState {
  float* matrices;  // [S, H, D, D], a row for each channel of the key
  float* inputs;    // [S, 3, 3 W], the last rows of qkv
  // Rows of drafts, which wait to be known for tokens: [S, most, 3 W], [S, most, W], [S, most, H].
  float *qkv, *gate, *beta;
  std::int64_t slots, most;
};

struct KdaKernels {
  // out [T, W] = norm(o) * sigmoid(output_gate)
  void (*attend)(const KdaWeights&, const KdaRows&, Matrix output_gate, const KdaState&, const SlotBatch&, Matrix out,
                 int heads, int dim);
};
LATENTKV_TABLE(KdaKernels, kda)

}  // namespace latentkv
