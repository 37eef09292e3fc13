// What the small kernels do to one row of numbers, in float32 and in torch's order of roundings.
#pragma once

#include <type_traits>

#include "simd.h"

namespace latentkv::LATENTKV_ISA {

// Calls f with the element type as a constant, so that loops over a row do not branch on it.
template <class F>
LATENTKV_INLINE void for_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::bf16: f(std::integral_constant<DType, DType::bf16>{}); break;
    case DType::f16: f(std::integral_constant<DType, DType::f16>{}); break;
    default: f(std::integral_constant<DType, DType::f32>{});
  }
}

// v as it would be read back from an element of this type.
LATENTKV_INLINE vf rounded(vf v, DType dtype) {
  if (dtype == DType::f32) return v;
  std::uint16_t halves[W];
  store_any(halves, dtype, 0, v);
  return load_any(halves, dtype, 0);
}
LATENTKV_INLINE float rounded_one(float x, DType dtype) {
  if (dtype == DType::bf16) return bf16_to_float(float_to_bf16(x));
  return dtype == DType::f16 ? f16_to_float(float_to_f16(x)) : x;
}

LATENTKV_INLINE void convert_row(const void* x, DType from, int n, void* out, DType to) {
  int i = 0;
  for (; i + W <= n; i += W) store_any(out, to, i, load_any(x, from, i));
  for (; i < n; i++) store_one(out, to, i, load_one(x, from, i));
}

LATENTKV_INLINE void round_row(float* x, int n, DType dtype) {
  int i = 0;
  for (; i + W <= n; i += W) store(x + i, rounded(load(x + i), dtype));
  for (; i < n; i++) x[i] = rounded_one(x[i], dtype);
}

template <DType X>
LATENTKV_INLINE float sum_of_squares(const void* x, int n) {
  vf sums[4] = {};
  int i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; j++) {
      const vf v = load_any(x, X, i + j * W);
      sums[j] += v * v;
    }
  for (; i + W <= n; i += W) {
    const vf v = load_any(x, X, i);
    sums[0] += v * v;
  }
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; i++) total += load_one(x, X, i) * load_one(x, X, i);
  return total;
}

// weight * x / sqrt(mean(x^2) + eps); the normed x and the product are both rounded to x's type.
template <DType X>
LATENTKV_INLINE void norm_row(const void* x, const void* weight, DType weight_dtype, int n, float eps, void* out,
                              DType out_dtype) {
  const float scale = 1.0f / __builtin_sqrtf(sum_of_squares<X>(x, n) / (float)n + eps);
  int i = 0;
  for (; i + W <= n; i += W) {
    const vf normed = rounded(load_any(x, X, i) * scale, X);
    store_any(out, out_dtype, i, rounded(load_any(weight, weight_dtype, i) * normed, X));
  }
  for (; i < n; i++) {
    const float normed = rounded_one(load_one(x, X, i) * scale, X);
    store_one(out, out_dtype, i, rounded_one(load_one(weight, weight_dtype, i) * normed, X));
  }
}

// weight * (x - mean) / sqrt(variance + eps) + bias, in float32.
template <DType X>
LATENTKV_INLINE void layer_norm_row(const void* x, const void* weight, const void* bias, DType weight_dtype, int n,
                                    float eps, float* out) {
  float total = 0, squares = 0;
  for (int i = 0; i < n; i++) total += out[i] = load_one(x, X, i);
  const float mean = total / (float)n;
  for (int i = 0; i < n; i++) squares += (out[i] - mean) * (out[i] - mean);
  const float scale = 1.0f / __builtin_sqrtf(squares / (float)n + eps);
  for (int i = 0; i < n; i++)
    out[i] = (out[i] - mean) * scale * load_one(weight, weight_dtype, i) + load_one(bias, weight_dtype, i);
}

// Turns the pairs (2i, 2i + 1) or (i, i + half) of x by the angles whose cosines and sines these are.
LATENTKV_INLINE void rotate_row(float* x, const float* cos, const float* sin, int half, bool interleaved) {
  const int step = interleaved ? 2 : 1;
  float* second = x + (interleaved ? 1 : half);
  for (int i = 0; i < half; i++) {
    const float a = x[step * i], b = second[step * i];
    x[step * i] = a * cos[i] - b * sin[i];
    second[step * i] = b * cos[i] + a * sin[i];
  }
}

// x times the orthogonal Hadamard matrix of n, a power of two.
LATENTKV_INLINE void hadamard_row(float* x, int n) {
  for (int half = 1; half < n; half *= 2)
    for (int from = 0; from < n; from += 2 * half)
      for (int i = from; i < from + half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
  const float scale = 1.0f / __builtin_sqrtf((float)n);
  for (int i = 0; i < n; i++) x[i] *= scale;
}

// 1 / (1 + exp(-x)); exp of nothing positive, so that nothing overflows.
LATENTKV_INLINE vf sigmoid(vf x) {
  const vf e = exp(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

// silu(gate) * up.
LATENTKV_INLINE vf silu_mul(vf gate, vf up) { return gate * sigmoid(gate) * up; }

// silu(min(gate, limit)) or min(silu(gate), limit), times clamp(up, -limit, limit); NaN stays NaN.
LATENTKV_INLINE vf limited_silu_mul(vf gate, vf up, float limit, bool bounds_gate) {
  const vf most = splat(limit);
  if (bounds_gate) gate = gate > most ? most : gate;
  vf silu = gate * sigmoid(gate);
  if (!bounds_gate) silu = silu > most ? most : silu;
  return silu * (up > most ? most : up < -most ? -most : up);
}

}  // namespace latentkv::LATENTKV_ISA
