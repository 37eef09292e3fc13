// The query vectors of a group: how they are taken in blocks, and which tokens of a tile each of them reads.
#pragma once

#include <type_traits>

#include "attention.h"
#include "simd.h"

namespace latentkv::LATENTKV_ISA {

// Calls f(V, v) for blocks of V query vectors from v on, V a constant: MOST as often as can be, then 4, 2 and 1.
template <int MOST, class F>
LATENTKV_INLINE void for_vector_blocks(int vectors, F f) {
  int v = 0;
  for (; v + MOST <= vectors; v += MOST) f(std::integral_constant<int, MOST>{}, v);
  for (; v + 4 <= vectors; v += 4) f(std::integral_constant<int, 4>{}, v);
  for (; v + 2 <= vectors; v += 2) f(std::integral_constant<int, 2>{}, v);
  for (; v < vectors; v++) f(std::integral_constant<int, 1>{}, v);
}
// How often it calls.
template <int MOST>
LATENTKV_INLINE int num_vector_blocks(int vectors) {
  const int rest = vectors % MOST;
  return vectors / MOST + rest / 4 + rest % 4 / 2 + rest % 2;
}

// How far `token` lies after `first`, 0 where it does not: a row that reads nothing may name any tokens.
LATENTKV_INLINE int after(int first, int token) { return token > first ? token - first : 0; }

// The tokens from[v] <= t < to[v] of a tile that query vector v reads; those that fill up the last 16 read none.
struct Ranges {
  alignas(64) std::int32_t from[GROUP_VECTORS], to[GROUP_VECTORS];

  void find(const Attention& a, const Group& group, int first, int tokens) {
    const int vectors = group.rows * group.heads;
    for (int v = 0; v < (vectors + 15) / 16 * 16; v++) {
      from[v] = to[v] = 0;
      if (v >= vectors) continue;
      const int t = group.row + v / group.heads;
      from[v] = after(first, a.start ? a.start[t] : 0);
      const int end = after(first, a.stop[t]);
      to[v] = end < tokens ? end : tokens;
    }
  }

  // The end of the last range among query vectors v .. v + count - 1.
  int until(int v, int count) const {
    int end = 0;
    for (int i = v; i < v + count; i++) end = to[i] > end ? to[i] : end;
    return end;
  }
};

}  // namespace latentkv::LATENTKV_ISA
