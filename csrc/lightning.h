// Lightning attention (arXiv 2401.04658) as Ling-2.5 has it: a matrix a head that forgets at a fixed pace.
#pragma once

#include <cstdint>

#include "elementwise.h"
#include "recurrence.h"

namespace latentkv {

// H heads of D dimensions, W = H D; the norms' weights are of one type.
struct LightningWeights {
  const float* log_decay;  // [H]
  const void *query_norm, *key_norm;  // [D]
  const void* output_norm;            // [W]
  DType norm_dtype;
  float eps;   // of the norms
  int groups;  // of the output's norm
};

// What is remembered, a slot a sequence.
struct LightningState {
  float* matrices;  // [S, H, D, D], a row for each channel of the key
  float* waiting;   // [S, most, 2, W], keys and values of drafts, which wait to be known for tokens
  std::int64_t slots, most;
};

struct LightningKernels {
  // out [T, W] = norm(o) * sigmoid(gate), over qkv [T, 3 W] and the angles [T, half] of each head's first 2 half
  // dimensions; heads [T, W] is room for o.
  void (*attend)(const LightningWeights&, Matrix qkv, Matrix gate, const float* cos, const float* sin, int half,
                 const LightningState&, const SlotBatch&, float* heads_out, Matrix out, std::int64_t rows, int heads,
                 int dim);
};
LATENTKV_TABLE(LightningKernels, lightning)

}  // namespace latentkv
