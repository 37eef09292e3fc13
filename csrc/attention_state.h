// A thread's memory, and the partial result of a group of query vectors.
#pragma once

#include "simd.h"

namespace latentkv::LATENTKV_ISA {

// Hands out a block of memory piece by piece, each aligned to a cache line. From 0 on it only counts.
struct Memory {
  std::uintptr_t at = 0;

  template <class T>
  T* take(std::size_t count) {
    T* taken = (T*)at;
    at += (count * sizeof(T) + 63) / 64 * 64;
    return taken;
  }
};

// Partial result of the query vectors of a group: sum over tokens of exp(score - peak) and of that times the values.
struct State {
  float *peak, *total;  // [vectors]
  float* out;           // [vectors, padded value width], columns in the arithmetic's order
};

LATENTKV_INLINE void merge(const State& into, const State& part, int v, int width) {
  if (part.total[v] == 0) return;
  const float peak = into.peak[v] > part.peak[v] ? into.peak[v] : part.peak[v];
  const float x = exp(splat(into.peak[v] - peak))[0], y = exp(splat(part.peak[v] - peak))[0];
  into.peak[v] = peak;
  into.total[v] = into.total[v] * x + part.total[v] * y;
  float *o = into.out + (std::ptrdiff_t)v * width, *p = part.out + (std::ptrdiff_t)v * width;
  for (int d = 0; d < width; d += W) store(o + d, load(o + d) * x + load(p + d) * y);
}

}  // namespace latentkv::LATENTKV_ISA
