// Row by row: RMS norm, rotary embedding and the gated activation. Strides are in elements; a row's own are consecutive.
#pragma once

#include <cstddef>

#include "dtypes.h"
#include "isa.h"

namespace latentkv {

// R of a rotated row and L + R of a cached one at most.
constexpr int MAX_ROW = 16384;
constexpr int MAX_RANK = 1024;

struct Matrix {
  void* data;
  std::ptrdiff_t stride;  // from one row to the next
  DType dtype;
};

struct Heads {
  void* data;
  std::ptrdiff_t token_stride, head_stride;
  DType dtype;
};

struct Angles {
  const float* cos;  // [T, R / 2], contiguous
  const float* sin;
  bool interleaved;
};

struct ElementwiseKernels {
  // out [T, D] in x's type = weight [D] * x / sqrt(mean(x^2) + eps)
  void (*rms_norm)(Matrix x, const void* weight, DType weight_dtype, float eps, Matrix out, int tokens, int dim);
  // out [T, H, R] in x's type; it may be x itself
  void (*rope)(Heads x, Angles angles, Heads out, int tokens, int heads, int half);
  // x [T, H, D] *= sigmoid(gate), one for each head or for each number
  void (*gate_heads)(Heads x, Heads gate, bool each, int tokens, int heads, int dim);
  // out [T, 2 D] = the normed x beside x itself
  void (*norm_beside)(Matrix x, const void* weight, DType weight_dtype, float eps, Matrix out, int tokens, int dim);
  // y sigmoid(up silu(down y)) of the normed x, y; down [rank, D], up [D, rank] of the weight's type; rank <= MAX_RANK
  void (*gated_rms_norm)(Matrix x, const void* weight, const void* down, const void* up, DType weight_dtype, float eps,
                         int rank, Matrix out, int tokens, int dim);
  // gate_up [T, 2I] -> out [T, I] in the same type
  void (*silu_mul)(Matrix gate_up, Matrix out, int tokens, int inner);
};
LATENTKV_TABLE(ElementwiseKernels, elementwise)

}  // namespace latentkv
