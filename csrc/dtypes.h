// Element types as they cross from Python; `ops/native/core.py` gives the same numbers.
#pragma once

#include <cstdint>

namespace latentkv {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
inline constexpr int sizeof_dtype(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

using bf16 = std::uint16_t;  // the upper half of a float32
using f16 = std::uint16_t;

}  // namespace latentkv
