// Element types as they cross from Python; `kernels.py` gives the same numbers.
#pragma once

#include <cstdint>

namespace latentkv {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
inline constexpr int sizeof_dtype(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// How a row of the latent cache is stored (`ops/kv_formats.py`): the floats are numbered as their types.
enum class RowFormat : int { fp32 = 0, bf16 = 1, fp16 = 2, int8 = 3, fp8 = 4 };
constexpr int SCALE_GROUP = 128;  // latents that share a scale

using bf16 = std::uint16_t;  // the upper half of a float32
using f16 = std::uint16_t;

}  // namespace latentkv
