// Few rows of activations times 32 outputs by vectors, with the bits of tiles: of each 16 units the products of first
// numbers and those of second ones are added up apart, and then to the sum (`TDPBF16PS` in Intel's manual).
#pragma once

#include "linear_tile.h"

namespace latentkv::LATENTKV_ISA {

constexpr int STEP = 16;               // units that tiles are multiplied by at a time
constexpr int STEP_INS = STEP * UNIT;  // numbers
constexpr std::int64_t FEW = 2;        // rows

// While it lives numbers too small for float32's exponent count as zero, as tiles take and give them.
class FlushedToZero {
 public:
  FlushedToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushedToZero() { _mm_setcsr(before_); }
  FlushedToZero(const FlushedToZero&) = delete;
  FlushedToZero& operator=(const FlushedToZero&) = delete;

 private:
  unsigned before_;
};

// sums [R][32] = x [R][groups][steps of a group][32] times the panel.
template <class Decoder, int R>
void multiply_few(const Panel& panel, const float* x, float* sums) {
  constexpr int V = 2, WORDS = Decoder::words, PACKS = STEP / Decoder::units;
  constexpr std::ptrdiff_t AHEAD = 8192;  // bytes
  const Decoder decoder(panel);
  const std::int64_t packs = panel.group_words / WORDS, group_steps = (packs + PACKS - 1) / PACKS;
  const std::int64_t row = panel.groups * group_steps * STEP_INS;
  vf total[R][V] = {};
  for (std::int64_t g = 0; g < panel.groups; g++) {
    const Word* words = panel.words + g * panel.words_stride;
    fetch_scales(panel, (const char*)words + AHEAD);
    const float* numbers = x + g * group_steps * STEP_INS;
    vf acc[R][V] = {};
    for (std::int64_t left = packs; left > 0; left -= PACKS, numbers += STEP_INS) {
      vf sum[2][R][V] = {};
      const auto add_pack = [&](int pack) __attribute__((always_inline)) {
        vu w[V][WORDS];
#pragma GCC unroll 5
        for (int k = 0; k < WORDS; k++, words += BLOCK_OUTS) {
          __builtin_prefetch((const char*)words + AHEAD, 0, 2);
          __builtin_prefetch((const char*)words + AHEAD + 64, 0, 2);
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) w[v][k] = load_as<vu>(words + v * W);
        }
#pragma GCC unroll 16
        for (int u = 0; u < Decoder::units; u++)
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) {
            const vu pair = decoder.unit(w[v], u);
            const vf even = (vf)(pair << 16), odd = (vf)(pair & 0xffff0000);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
              const float* const at = numbers + r * row + 2 * (pack * Decoder::units + u);
              sum[0][r][v] = multiply_add(even, splat(at[0]), sum[0][r][v]);
              sum[1][r][v] = multiply_add(odd, splat(at[1]), sum[1][r][v]);
            }
          }
      };
      if (left >= PACKS) {
#pragma GCC unroll 16
        for (int pack = 0; pack < PACKS; pack++) add_pack(pack);
      } else {
        for (int pack = 0; pack < left; pack++) add_pack(pack);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) acc[r][v] += sum[0][r][v] + sum[1][r][v];
    }
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      const std::int64_t at = g * panel.scales_stride + v * W;
      const vf stored = panel.scales ? load_any(panel.scales, panel.scales_dtype, at) : splat(1);
      const vf scale = Decoder::scale * stored;
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        if constexpr (Decoder::has_minima) {
          const vf minimum = load_any(panel.scales, panel.scales_dtype, at + BLOCK_OUTS) + Decoder::middle * stored;
          total[r][v] = multiply_add(splat(panel.sums[r * panel.groups + g]), minimum, total[r][v]);
        }
        if constexpr (Decoder::short_groups)
          total[r][v] = multiply_add(acc[r][v], scale, total[r][v]);
        else
          total[r][v] = panel.scales ? acc[r][v] * scale : acc[r][v];
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) store(sums + r * BLOCK_OUTS + v * W, total[r][v]);
}

using FewRows = void (*)(const Panel&, const float*, float*);
template <class Decoder>
constexpr FewRows few_rows[FEW] = {multiply_few<Decoder, 1>, multiply_few<Decoder, 2>};

}  // namespace latentkv::LATENTKV_ISA
