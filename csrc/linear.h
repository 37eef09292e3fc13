// y = x W^T + bias + residual with packed weights, for every instruction set. The layout of packed weights is described
// in `weights/layout.py`; kernels of other ops that multiply by them use `linear_inner.h`.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"

namespace latentkv {

enum class WeightFormat : int {
  bf16 = 0,
  int8 = 1,
  int4 = 2,
  compact = 3,
  uint2 = 4,
  uint4 = 5,
  uint5 = 6,
  int5 = 7,
  int6 = 8,
  fp4 = 9,
  nl4 = 10,
  fp8 = 11
};

// `count` stacked matrices [outs, ins]. `group` weights along `ins` share a scale of type `scales`, and what is added to
// all of them, of the same type (uint*); or it is the number of exceptions that each block of outputs has room for
// (compact). bf16 has neither. Codes of integers may be multiplied by activations that are rounded to 8 bits.
struct PackedWeight {
  const std::uint8_t* data;
  WeightFormat format;
  std::int64_t count, outs, ins, group;
  DType scales;
  bool rounds_input;
};

// A packed weight as Python numbers its format: above it the scales' type, bf16 being 0, and whether it rounds its input.
inline PackedWeight packed_weight(std::uintptr_t data, int format, std::int64_t count, std::int64_t outs,
                                  std::int64_t ins, std::int64_t group) {
  constexpr int FORMATS = 16, KINDS = 4;
  constexpr DType SCALES[KINDS] = {DType::bf16, DType::f16, DType::f32};
  const DType scales = SCALES[format / FORMATS % KINDS];
  const bool rounds_input = format >= FORMATS * KINDS;
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(data);
  return {bytes, (WeightFormat)(format % FORMATS), count, outs, ins, group, scales, rounds_input};
}

// Rows of activations, `stride` elements apart. Row i is row index[i] of x where an index is given.
struct LinearInput {
  const void* x;
  DType dtype;  // f32 or bf16
  std::int64_t rows, stride;
  const std::int32_t* index;
};

// Where rows of results go, `stride` elements apart; bias [outs] and residual rows are added in float32 where not null.
struct LinearOutput {
  void* y;
  DType dtype;
  std::int64_t stride;
  const void* bias;
  DType bias_dtype;
  const void* residual;
  DType residual_dtype;
  std::int64_t residual_stride;
};

// What multiplies rows of type x by weights: by bf16 instructions a row of float32 could be multiplied only in parts.
inline Isa multiplying(Isa isa, DType x, bool all_round_input) {
  return isa > Isa::avx512 && x == DType::f32 && !all_round_input ? Isa::avx512 : isa;
}

struct LinearKernels {
  // The first of the stacked matrices times all rows.
  void (*linear)(const PackedWeight&, const LinearInput&, const LinearOutput&);
};
LATENTKV_AMX_TABLE(LinearKernels, linear_kernels)

}  // namespace latentkv
