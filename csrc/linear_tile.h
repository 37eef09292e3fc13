// The inner loop of products with packed weights: up to MAX_ROWS rows of activations times 32 outputs.
//
// One source for all instruction sets. The unit of work along the inner axis is what one instruction multiplies by: a
// pair of bf16 (vdpbf16ps) or one float32. Codes of int8 and int4 weights are decoded to units exactly (bf16 holds every
// 8-bit integer); the scale multiplies the sum of its group, in float32. Each result is summed in order along a group and
// then over the groups in order, whatever the number of rows.
#pragma once

#include "linear_inner.h"

namespace latentkv::LATENTKV_ISA {

using Word = std::uint32_t;

#if defined(__AVX512BF16__)
using Unit = std::uint32_t;  // two bf16
constexpr int UNIT = 2;
constexpr int MAX_ROWS = 14;  // 2 x 14 sums, 2 vectors of weights and an activation in 32 registers
constexpr int FUSED_ROWS = 8;
LATENTKV_INLINE vf multiply_add(vf sum, vu weights, Unit x) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32((int)x));
}
#else
using Unit = float;
constexpr int UNIT = 1;
constexpr int MAX_ROWS = W == 16 ? 8 : 4;
constexpr int FUSED_ROWS = MAX_ROWS;
LATENTKV_INLINE vf multiply_add(vf sum, vu weights, Unit x) { return multiply_add((vf)weights, splat(x), sum); }
#endif

// How a vector of words becomes units: unit i of each word.
struct UnitWords {
  static constexpr int units = 1;
  LATENTKV_INLINE vu unit(vu words, int) { return words; }
};
struct Bf16Words {
  static constexpr int units = 2 / UNIT;
  LATENTKV_INLINE vu unit(vu words, int i) {
    if (UNIT == 2) return words;
    return i == 0 ? words << 16 : words & 0xffff0000;
  }
};
#if defined(__AVX512BF16__)
// The halves of bf16 1..128, by the low 7 bits.
struct Bf16Integers {
  alignas(64) std::uint8_t low[128], high[128];
  constexpr Bf16Integers() : low(), high() {
    for (int size = 1; size <= 128; size++) {
      int exponent = 0;
      while (size >> (exponent + 1)) exponent++;
      const int bits = (127 + exponent) << 7 | ((size << 7 >> exponent) & 127);
      low[size % 128] = (std::uint8_t)bits;
      high[size % 128] = (std::uint8_t)(bits >> 8);
    }
  }
};
constexpr Bf16Integers bf16_integers{};
#endif

struct Int8Words {
  static constexpr int units = 4 / UNIT;
#if defined(__AVX512BF16__)
  // The halves of bf16 |code| are looked up by byte: entry 0 is 128, which no positive code has, and codes of zero are
  // masked. Bytes 0 and 2 of a word are its first pair, bytes 1 and 3 its second.
  LATENTKV_INLINE vu unit(vu words, int i) {
    const __m512i codes = (__m512i)words, size = _mm512_abs_epi8(codes), low_bytes = _mm512_set1_epi16(0xff);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(bf16_integers.low), size, _mm512_load_si512(bf16_integers.low + 64));
    __m512i high = _mm512_maskz_permutex2var_epi8(_mm512_test_epi8_mask(codes, codes), _mm512_load_si512(bf16_integers.high), size,
                                                  _mm512_load_si512(bf16_integers.high + 64));
    high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8((char)0x80), 0xf8);  // high | (codes & 0x80)
    if (i == 0) return (vu)_mm512_ternarylogic_epi32(low_bytes, low, _mm512_slli_epi16(high, 8), 0xca);
    return (vu)_mm512_ternarylogic_epi32(low_bytes, _mm512_srli_epi16(low, 8), high, 0xca);
  }
#else
  LATENTKV_INLINE vu unit(vu words, int i) {
    constexpr int left[4] = {24, 8, 16, 0};  // weights 0, 2, 1, 3 are bytes 0, 1, 2, 3
    return (vu)__builtin_convertvector((vi)(words << left[i]) >> 24, vf);
  }
#endif
};
struct Int4Words {
  static constexpr int units = 8 / UNIT;
#if defined(__AVX512BF16__)
  // Nibble i of both halves of a word is the pair 2i, 2i + 1; a table look-up by 5 bits takes no notice of the fifth.
  LATENTKV_INLINE vu unit(vu words, int i) {
    alignas(64) static constexpr bf16 integers[32] = {
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
        0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
        0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    return (vu)_mm512_permutexvar_epi16((__m512i)(words >> (4 * i)), _mm512_load_si512(integers));
  }
#else
  LATENTKV_INLINE vu unit(vu words, int i) {
    const vi code = (vi)(words >> (i % 2 * 16 + i / 2 * 4) & 15) - 8;
    return (vu)__builtin_convertvector(code, vf);
  }
#endif
};

// 32 outputs' weights, their words beside each other in groups with one scale for each output (null: all are 1).
struct Panel {
  const Word* words;
  const bf16* scales;
  std::int64_t groups, group_words;
  std::int64_t words_stride, scales_stride;  // from group to group
  const char* ahead;                         // what is fetched meanwhile:
  std::int64_t ahead_stride, ahead_step;     // bytes from group to group, and from word to word; two lines each time
};

// sums [R][32] += x [groups * group_words * units][R] times the panel.
template <class Decoder, int R>
void multiply_tile(const Panel& panel, const Unit* x, float* sums) {
  constexpr int V = 2;
  for (int first = 0; first < BLOCK_OUTS; first += V * W) {
    const Unit* units = x;
    for (std::int64_t g = 0; g < panel.groups; g++) {
      const Word* words = panel.words + g * panel.words_stride + first;
      const char* ahead = panel.ahead + g * panel.ahead_stride;
      vf acc[R][V] = {};
      for (std::int64_t i = 0; i < panel.group_words; i++, words += BLOCK_OUTS, ahead += panel.ahead_step) {
        __builtin_prefetch(ahead);
        __builtin_prefetch(ahead + 64);
        vu w[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) w[v] = load_as<vu>(words + v * W);
#pragma GCC unroll 8
        for (int u = 0; u < Decoder::units; u++, units += R) {
          vu decoded[V];
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) decoded[v] = Decoder::unit(w[v], u);
#pragma GCC unroll 16
          for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) acc[r][v] = multiply_add(acc[r][v], decoded[v], units[r]);
        }
      }
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        const vf scale = panel.scales ? load_bf16(panel.scales + g * panel.scales_stride + first + v * W) : splat(1);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
          float* sum = sums + r * BLOCK_OUTS + first + v * W;
          store(sum, multiply_add(acc[r][v], scale, load(sum)));
        }
      }
    }
  }
}

using Tile = void (*)(const Panel&, const Unit*, float*);

// The tile for each number of rows, from 1.
template <class Decoder, int MAX, int... R>
struct Tiles : Tiles<Decoder, MAX - 1, MAX, R...> {};
template <class Decoder, int... R>
struct Tiles<Decoder, 0, R...> {
  static constexpr Tile for_rows[] = {multiply_tile<Decoder, R>...};
};

// One group's words as units, [group_words * units][32].
template <class Decoder>
void decode_group(const Panel& panel, std::int64_t g, Word* out) {
  const Word* words = panel.words + g * panel.words_stride;
  const char* ahead = panel.ahead + g * panel.ahead_stride;
  for (std::int64_t i = 0; i < panel.group_words; i++, words += BLOCK_OUTS, ahead += panel.ahead_step) {
    __builtin_prefetch(ahead);
    __builtin_prefetch(ahead + 64);
    for (int o = 0; o < BLOCK_OUTS; o += W) {
      const vu w = load_as<vu>(words + o);
#pragma GCC unroll 8
      for (int u = 0; u < Decoder::units; u++) {
        const vu decoded = Decoder::unit(w, u);
        std::memcpy(out + u * BLOCK_OUTS + o, &decoded, sizeof decoded);
      }
    }
    out += Decoder::units * BLOCK_OUTS;
  }
}

}  // namespace latentkv::LATENTKV_ISA
