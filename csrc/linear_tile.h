// The inner loop of products with packed weights: up to MAX_ROWS rows of activations times 32 outputs.
//
// One source for all instruction sets. The unit of work along the inner axis is what one instruction multiplies by: a
// pair of bf16 (vdpbf16ps) or one float32. Compact weights and codes of int8 and int4 ones are decoded to units exactly
// (bf16 holds every 8-bit integer); the scale multiplies the sum of its group, in float32. Each result is summed in
// order along a group and then over the groups in order, whatever the number of rows.
#pragma once

#include <type_traits>

#include "compact.h"
#include "linear_codes.h"
#include "linear_panel.h"

namespace latentkv::LATENTKV_ISA {

#if defined(__AVX512BF16__)
using Unit = std::uint32_t;  // two bf16
constexpr int UNIT = 2;
constexpr int MAX_ROWS = 14;  // 2 x 14 sums, 2 vectors of weights and an activation in 32 registers
LATENTKV_INLINE vf multiply_add(vf sum, vu weights, Unit x) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32((int)x));
}
#else
using Unit = float;
constexpr int UNIT = 1;
constexpr int MAX_ROWS = W == 16 ? 8 : W == 8 ? 6 : 4;  // 2 x 6 sums, 2 vectors of weights and an activation in 16
LATENTKV_INLINE vf multiply_add(vf sum, vu weights, Unit x) { return multiply_add((vf)weights, splat(x), sum); }
#endif

// How vectors of `words` words, one after the other of each output, become units: unit i of them, 1 / scale times the
// weights or codes.
struct PlainWords {
  static constexpr int words = 1;
  static constexpr bool fetches_pages = false;  // see multiply_tile
  static constexpr bool has_minima = false;     // beside the scales: what is added to all weights of a group
  static constexpr float middle = 0;            // what units lack of codes where there are minima
  explicit PlainWords(const Panel&) {}
};
struct Bf16Words : PlainWords {
  using PlainWords::PlainWords;
  static constexpr bool short_groups = false;
  static constexpr float scale = 1;
  static constexpr int units = 2 / UNIT;
  LATENTKV_INLINE vu unit(vu words, int i) {
    if (UNIT == 2) return words;
    return i == 0 ? words << 16 : words & 0xffff0000;
  }
  LATENTKV_INLINE vu unit(const vu (&w)[1], int i) { return unit(w[0], i); }
};
// See compact.h. Half of a word is a pair's first weight, the other half its second.
struct CompactWords {
  static constexpr bool short_groups = false, fetches_pages = true, has_minima = false;
  static constexpr float scale = 1, middle = 0;
  static constexpr int words = COMPACT_WORDS, units = COMPACT_WEIGHTS / UNIT;
#if defined(__AVX512BF16__)
  __m512i high_bytes;  // of the codes in the lower 4 bits of an index; a look-up by 6 bits takes no notice of the others

  explicit CompactWords(const Panel& panel) {
    const __m512i of_codes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -128, -127, -126, -125, -124,
                                                                  -123, -122, -121));
    high_bytes = _mm512_add_epi8(of_codes, _mm512_set1_epi8((char)(panel.window / 2)));
  }
  __attribute__((always_inline)) vu unit(const vu (&w)[3], int i) const {
    constexpr int A_OR_B_AND_C = 0xf8, B_WHERE_A_ELSE_C = 0xca;
    const __m512i low_byte = _mm512_set1_epi16(0xff);
    if (i < 3) {
      const __m512i word = (__m512i)w[i], high = _mm512_permutexvar_epi8(word, high_bytes);
      return (vu)_mm512_ternarylogic_epi32(low_byte, word, high, B_WHERE_A_ELSE_C);
    }
    const __m512i high = _mm512_permutexvar_epi8(_mm512_srli_epi16((__m512i)w[0], 4), high_bytes);
    const __m512i low4 = _mm512_srli_epi16((__m512i)w[1], 12), next4 = _mm512_srli_epi16((__m512i)w[2], 8);
    const __m512i low = _mm512_ternarylogic_epi32(low4, next4, _mm512_set1_epi16(0xf0), A_OR_B_AND_C);
    return (vu)_mm512_ternarylogic_epi32(low_byte, low, high, B_WHERE_A_ELSE_C);
  }
#elif defined(__AVX2__)
  vu high_bytes;  // of the codes in the lower 4 bits of an index

  explicit CompactWords(const Panel& panel) {
    const __m128i of_codes = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -128, -127, -126, -125, -124, -123, -122, -121);
    high_bytes = repeated(_mm_add_epi8(of_codes, _mm_set1_epi8((char)(panel.window / 2))));
  }
  __attribute__((always_inline)) vu unit(const vu (&w)[3], int i) const {
    const int pair = i / 2;
    const vu codes = pair < 3 ? w[pair] : w[0] >> 4;
    const vu low = pair < 3 ? w[pair] & 0x00ff00ff : (w[1] >> 12 & 0x000f000f) | (w[2] >> 8 & 0x00f000f0);
    // Indices with their highest bit set, those of the halves' low bytes, become zero.
    const vu halves = shuffle_bytes(high_bytes, (codes & 0x0f000f00) | 0x00800080) | low;
    return i % 2 ? halves & 0xffff0000 : halves << 16;
  }
#else
  std::uint32_t first_pair;

  explicit CompactWords(const Panel& panel) : first_pair(panel.window / 2) {}
  __attribute__((always_inline)) vu unit(const vu (&w)[3], int i) const {
    const int pair = i / 2, half = i % 2 * 16;
    vu code, low;
    if (pair < 3) {
      code = w[pair] >> (half + 8) & 15;
      low = w[pair] >> half & 255;
    } else {
      code = w[0] >> (half + 12) & 15;
      low = (w[1] >> (half + 12) & 15) | (w[2] >> (half + 12) & 15) << 4;
    }
    return code >> 3 << 31 | ((code & 7) + first_pair) << 24 | low << 16;
  }
#endif
};

// The signed byte `k` of each word as a float32 number, divided by BYTE_SCALE.
#if defined(__AVX2__)
constexpr float BYTE_SCALE = 0x1p-24f;
// Moved to the top of its word, other bytes zero: 2^24 times the code, without any sign to extend. The sum of a group of
// 2^n stays finite for activations below 2^(96 - n).
LATENTKV_INLINE vu byte_of(vu words, int k) {
  const vu order = repeated(_mm_setr_epi32(0x00808080, 0x04808080, 0x08808080, 0x0c808080));
  const vu integer = k == 3 ? words & 0xff000000 : shuffle_bytes(words, order + ((unsigned)k << 24));
  return (vu)__builtin_convertvector((vi)integer, vf);
}
#else
constexpr float BYTE_SCALE = 1;
LATENTKV_INLINE vu byte_of(vu words, int k) {
  return (vu)__builtin_convertvector((vi)(words << (24 - 8 * k)) >> 24, vf);
}
#endif

// Nibble i / 2 of the half i % 2 of each word, looked up in a table of small integers; divided by BYTE_SCALE.
template <class Table>
LATENTKV_INLINE vu nibble_of(vu words, int i) {
#if defined(__AVX2__)
  return byte_of(look_up<Table>((i / 2 % 2 ? words >> 4 : words) & 0x0f0f0f0f), i % 2 * 2 + i / 4);
#else
  const vu codes = words >> (i % 2 * 16 + i / 2 * 4) & 15;
  vf values;
  for (int k = 0; k < W; k++) values[k] = Table::numbers[codes[k]];
  return (vu)values;
#endif
}

struct Int8Words : PlainWords {
  using PlainWords::PlainWords;
  static constexpr bool short_groups = false;
  static constexpr float scale = BYTE_SCALE;
  static constexpr int units = 4 / UNIT;
#if defined(__AVX512BF16__)
  LATENTKV_INLINE vu unit(vu words, int i) { return byte_of(words, 2 * i + 1) | byte_of(words, 2 * i) >> 16; }
#else
  LATENTKV_INLINE vu unit(vu words, int i) { return byte_of(words, i); }
#endif
  LATENTKV_INLINE vu unit(const vu (&w)[1], int i) { return unit(w[0], i); }
};
struct GroupedInt8Words : Int8Words {
  using Int8Words::Int8Words;
  static constexpr bool short_groups = true;
};
// The integers from -count / 2 to count / 2 - 1 as bf16 numbers, over and over.
struct Integers {
  bf16 numbers[64];
  constexpr explicit Integers(int count) : numbers() {
    for (int i = 0; i < 64; i++) {
      const int value = i % count - count / 2, size = value < 0 ? -value : value;
      int exponent = 0;
      while (size >> (exponent + 1)) exponent++;
      if (size) numbers[i] = (bf16)((value < 0) << 15 | (127 + exponent) << 7 | (size << 7 >> exponent & 0x7f));
    }
  }
};
// Codes of other widths. The units of a pack of words are pairs of codes, the first in the low half: their lowest bits
// lie in the first words, as those of int4 do, and the others in the last, from the lowest bit on. A unit is a code less
// the middle one: what is added to all weights is then small, and so is what sums lose where the two nearly cancel.
template <int BITS, bool MINIMA>
struct CodeWords : PlainWords {
  using PlainWords::PlainWords;
  static constexpr bool short_groups = true, has_minima = MINIMA;
#if defined(__AVX2__)
  static constexpr bool by_bytes = (BITS == 4 || BITS == 6) && UNIT == 1;
#else
  static constexpr bool by_bytes = false;
#endif
  static constexpr float scale = by_bytes ? BYTE_SCALE : 1, middle = 1 << (BITS - 1);
  static constexpr int words = BITS == 5 ? 5 : BITS == 6 ? 3 : 1;
  static constexpr int units = 32 * words / BITS / UNIT;

  // What is above BITS in a half is not a part of the code.
  LATENTKV_INLINE vu pair(const vu (&w)[words], int i) {
    if constexpr (BITS == 2) return w[0] >> (2 * i);
    if constexpr (BITS == 4) return w[0] >> (4 * i);
    const vu low = w[i / 4] >> (i % 4 * 4) & 0x000f000f;
    if constexpr (BITS == 5) return low | (w[4] >> i & 0x00010001) << 4;
    return low | (w[2] >> (2 * i) & 0x00030003) << 4;
  }
#if defined(__AVX2__)
  // The codes of 6 bits, less the middle one, of which word `q` has the lower bits in its bytes' low or high nibbles.
  LATENTKV_INLINE vu six_bits(const vu (&w)[words], int q, int high) {
    // Byte q of each half twice: for the upper bits in its low nibble, and for those in its high one.
    const vu first = repeated(_mm_setr_epi32(0x02020000, 0x06060404, 0x0a0a0808, 0x0e0e0c0c));
    const vu pairs = shuffle_bytes(w[words - 1], first + (unsigned)q * 0x01010101);
    const vu nibbles = (pairs & 0x000f000f) | (pairs >> 4 & 0x0f000f00);
    const __m128i of_low = _mm_setr_epi8(-32, -16, 0, 16, -32, -16, 0, 16, -32, -16, 0, 16, -32, -16, 0, 16);
    const __m128i of_high = _mm_setr_epi8(-32, -32, -32, -32, -16, -16, -16, -16, 0, 0, 0, 0, 16, 16, 16, 16);
    const vu upper = shuffle_bytes(repeated(high ? of_high : of_low), nibbles);
    const vu lower = (high ? w[q] >> 4 : w[q]) & 0x0f0f0f0f;
    return (vu)((bytes)lower + (bytes)upper);
  }
#endif
  LATENTKV_INLINE vu unit(const vu (&w)[words], int i) {
#if defined(__AVX512BF16__)
    alignas(64) static constexpr Integers table(1 << BITS);  // looked up by 5 or 6 bits
    const __m512i codes = (__m512i)pair(w, i), first = _mm512_load_si512(table.numbers);
    if constexpr (BITS < 6) return (vu)_mm512_permutexvar_epi16(codes, first);
    return (vu)_mm512_permutex2var_epi16(first, codes, _mm512_load_si512(table.numbers + 32));
#else
    if constexpr (by_bytes && BITS == 4) return nibble_of<Int4Numbers>(w[0], i);
    if constexpr (by_bytes) return byte_of(six_bits(w, i / 8, i / 2 % 2), i % 2 * 2 + i / 4 % 2);
    constexpr Word CODE = (1 << BITS) - 1;
    return (vu)(__builtin_convertvector((vi)(pair(w, i / 2) >> (i % 2 * 16) & CODE), vf) - middle);
#endif
  }
};

// Codes of 4 bits that stand for the numbers of a table.
constexpr bf16 exact_bf16(float x) { return (bf16)(__builtin_bit_cast(std::uint32_t, x) >> 16); }
template <class Table>
struct TableWords : PlainWords {
  using PlainWords::PlainWords;
  static constexpr bool short_groups = true;
  static constexpr float scale = UNIT == 2 ? 1 : BYTE_SCALE;
  static constexpr int units = 8 / UNIT;

  LATENTKV_INLINE vu unit(const vu (&w)[1], int i) {
#if defined(__AVX512BF16__)
    struct Twice {
      bf16 values[32];
      constexpr Twice() : values() {
        for (int k = 0; k < 32; k++) values[k] = exact_bf16(Table::numbers[k % 16]);
      }
    };
    // Nibble i of both halves of a word is the pair 2i, 2i + 1; the look-up is by 5 bits, of which the fifth is not the
    // code's.
    alignas(64) static constexpr Twice table;
    return (vu)_mm512_permutexvar_epi16((__m512i)(w[0] >> (4 * i)), _mm512_load_si512(table.values));
#else
    return nibble_of<Table>(w[0], i);
#endif
  }
};

// E4M3: a sign, 4 bits of exponent (less 7) and 3 of mantissa; bf16 holds all numbers exactly. Codes are no NaN.
template <bool SHORT_GROUPS>
struct Fp8Words : PlainWords {
  using PlainWords::PlainWords;
  static constexpr bool short_groups = SHORT_GROUPS;
  static constexpr float scale = 1;
  static constexpr int units = 4 / UNIT;

  LATENTKV_INLINE vu unit(const vu (&w)[1], int i) {
#if defined(__AVX512BF16__)
    struct Subnormals {
      bf16 values[32];  // looked up by 5 bits, of which two are of an exponent that is 0
      constexpr Subnormals() : values() {
        for (int k = 0; k < 8; k++) values[k] = exact_bf16((float)k / 512);
      }
    };
    alignas(64) static constexpr Subnormals table;
    constexpr int A_OR_B_AND_C = 0xf8;
    // Bytes 2 i and 2 i + 1 to the tops of the halves, then their exponent and mantissa to where bf16 has its own.
    const vu order = (vu)_mm512_set4_epi32(0x0d800c80, 0x09800880, 0x05800480, 0x01800080) + (unsigned)i * 0x02000200;
    const __m512i tops = _mm512_shuffle_epi8((__m512i)w[0], (__m512i)order), moved = _mm512_srai_epi16(tops, 4);
    const __mmask32 subnormal = _mm512_testn_epi16_mask(moved, _mm512_set1_epi16(0x0780));
    const __m512i normal = _mm512_and_si512(moved, _mm512_set1_epi16(0x07f0));
    const __m512i biased = _mm512_add_epi16(normal, _mm512_set1_epi16((127 - 7) << 7));
    const __m512i size = _mm512_mask_permutexvar_epi16(biased, subnormal, _mm512_srli_epi16(moved, 4),
                                                       _mm512_load_si512(table.values));
    return (vu)_mm512_ternarylogic_epi32(size, tops, _mm512_set1_epi16((short)0x8000), A_OR_B_AND_C);
#else
    // To where float32 has its own, which is then 2^120 times as small: also if it is subnormal.
    const vi top = (vi)(w[0] << (24 - 8 * i));
    return (vu)((vf)((vu)(top >> 4) & 0x87f00000) * 0x1p120f);
#endif
  }
};

template <class Decoder>
struct Of {
  using type = Decoder;
};
// f(Of<what decodes such weights>{}).
template <class F>
decltype(auto) with_decoder(WeightFormat format, std::int64_t groups, F f) {
  switch (format) {
    case WeightFormat::int8: return groups > 1 ? f(Of<GroupedInt8Words>{}) : f(Of<Int8Words>{});
    case WeightFormat::int4: return f(Of<TableWords<Int4Numbers>>{});
    case WeightFormat::compact: return f(Of<CompactWords>{});
    case WeightFormat::uint2: return f(Of<CodeWords<2, true>>{});
    case WeightFormat::uint4: return f(Of<CodeWords<4, true>>{});
    case WeightFormat::uint5: return f(Of<CodeWords<5, true>>{});
    case WeightFormat::int5: return f(Of<CodeWords<5, false>>{});
    case WeightFormat::int6: return f(Of<CodeWords<6, false>>{});
    case WeightFormat::fp4: return f(Of<TableWords<Fp4Numbers>>{});
    case WeightFormat::nl4: return f(Of<TableWords<Nl4Numbers>>{});
    case WeightFormat::fp8: return groups > 1 ? f(Of<Fp8Words<true>>{}) : f(Of<Fp8Words<false>>{});
    default: return f(Of<Bf16Words>{});
  }
}

// sums [R][32] = x [groups * group_words * units][R] times the panel; where it continues another, with that one's sums.
template <class Decoder, int R>
void multiply_tile(const Panel& panel, const Unit* x, float* sums) {
  // Groups' sums and their totals fill the registers where groups are short: storing totals for each would cost more
  // than reading activations twice. Not where a unit is one number: a group is then twice as long, and one vector's sums
  // would wait for each other.
  constexpr int V = W <= 8 && R <= 2 ? 4 : Decoder::short_groups && UNIT == 2 && R > MAX_ROWS / 2 ? 1 : 2;
  // Groups whose sums do not wait for each other.
  constexpr int TOGETHER = Decoder::short_groups && R <= 2 && V == 2 ? 2 : 1;
  constexpr int WORDS = Decoder::words;  // that are decoded together
  // Few rows of compact weights are decoded to pairs as fast as a core fetches on by itself, up to the end of a page:
  // only the next one's beginning is fetched.
  constexpr bool PAGES_ONLY = Decoder::fetches_pages && UNIT == 2 && R <= 2;
  constexpr std::uintptr_t PAGE = 4096;
  const Decoder decoder(panel);
  const std::int64_t steps = panel.group_words / WORDS, group_units = steps * Decoder::units * R;
  const auto pass = [&](int first, auto fetches) __attribute__((always_inline)) {
    const auto so_far = [&](int r, int v) __attribute__((always_inline)) {
      return panel.continues ? load(sums + r * BLOCK_OUTS + first + v * W) : vf{};
    };
    vf total[R][V] = {};
    if (Decoder::short_groups)
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) total[r][v] = so_far(r, v);
    const auto add_groups = [&](std::int64_t g, auto together) __attribute__((always_inline)) {
      constexpr int G = together;
      const Unit* units = x + g * group_units;
      const Word* words = panel.words + g * panel.words_stride + first;
      const char* ahead = panel.ahead + g * panel.ahead_stride;
      vf acc[G][R][V] = {};
      if (!Decoder::short_groups)  // parts are of the one group
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
          for (int v = 0; v < V; v++) acc[0][r][v] = so_far(r, v);
      if (fetches())
        for (int j = 0; j < G; j++) fetch_scales(panel, ahead + j * panel.ahead_stride);
      for (std::int64_t i = 0; i < steps; i++) {
        vu w[G][V][WORDS];
#pragma GCC unroll 4
        for (int k = 0; k < WORDS; k++, words += BLOCK_OUTS, ahead += panel.ahead_step)
#pragma GCC unroll 2
          for (int j = 0; j < G; j++) {
            if (fetches() && (!PAGES_ONLY || (std::uintptr_t)(ahead + j * panel.ahead_stride) % PAGE < 128)) {
              __builtin_prefetch(ahead + j * panel.ahead_stride, 0, 2);  // into the second-level cache
              __builtin_prefetch(ahead + j * panel.ahead_stride + 64, 0, 2);
            }
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) w[j][v][k] = load_as<vu>(words + j * panel.words_stride + v * W);
          }
#pragma GCC unroll 32
        for (int u = 0; u < Decoder::units; u++, units += R)
#pragma GCC unroll 2
          for (int j = 0; j < G; j++) {
            vu decoded[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) decoded[v] = decoder.unit(w[j][v], u);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
              for (int v = 0; v < V; v++)
                acc[j][r][v] = multiply_add(acc[j][r][v], decoded[v], units[j * group_units + r]);
          }
      }
#pragma GCC unroll 2
      for (int j = 0; j < G; j++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
          const std::int64_t at = (g + j) * panel.scales_stride + first + v * W;
          const vf stored = panel.scales ? load_any(panel.scales, panel.scales_dtype, at) : splat(1);
          const vf scale = Decoder::short_groups || panel.ends ? Decoder::scale * stored : splat(1);
          if constexpr (Decoder::has_minima) {
            const vf minimum = load_any(panel.scales, panel.scales_dtype, at + BLOCK_OUTS) + Decoder::middle * stored;
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
              const vf sum = splat(panel.sums[(g + j) * R + r]);
              total[r][v] = multiply_add(acc[j][r][v], scale, multiply_add(sum, minimum, total[r][v]));
            }
            continue;
          }
#pragma GCC unroll 16
          for (int r = 0; r < R; r++) total[r][v] = multiply_add(acc[j][r][v], scale, total[r][v]);
        }
    };
    std::int64_t g = 0;
    for (; g + TOGETHER <= panel.groups; g += TOGETHER) add_groups(g, std::integral_constant<int, TOGETHER>{});
    if (g < panel.groups) add_groups(g, std::integral_constant<int, 1>{});
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) store(sums + r * BLOCK_OUTS + first + v * W, total[r][v]);
  };
  pass(0, std::true_type{});
  for (int first = V * W; first < BLOCK_OUTS; first += V * W) pass(first, std::false_type{});
}

// What `decode_panel` has made of weights: their units.
struct Units : PlainWords {
  using PlainWords::PlainWords;
  static constexpr bool short_groups = false;
  static constexpr float scale = 1;
  static constexpr int units = 1;
  LATENTKV_INLINE vu unit(const vu (&w)[1], int) { return w[0]; }
};
template <class Decoder>
struct UnitsLike : Units {
  using Units::Units;
  static constexpr bool short_groups = Decoder::short_groups, has_minima = Decoder::has_minima;
  static constexpr float scale = Decoder::scale, middle = Decoder::middle;
};
template <class Decoder>
using UnitsOf = std::conditional_t<Decoder::short_groups || Decoder::scale != 1, UnitsLike<Decoder>, Units>;

// A panel's units, the 32 outputs' beside each other, in groups without anything between.
template <class Decoder>
void decode_panel(const Panel& panel, Word* units) {
  constexpr int WORDS = Decoder::words;
  const Decoder decoder(panel);
  for (std::int64_t g = 0; g < panel.groups; g++) {
    const Word* words = panel.words + g * panel.words_stride;
    for (std::int64_t i = 0; i < panel.group_words; i += WORDS) {
      for (int first = 0; first < BLOCK_OUTS; first += W) {
        vu w[WORDS];
#pragma GCC unroll 4
        for (int k = 0; k < WORDS; k++) w[k] = load_as<vu>(words + k * BLOCK_OUTS + first);
#pragma GCC unroll 32
        for (int u = 0; u < Decoder::units; u++) {
          const vu unit = decoder.unit(w, u);
          std::memcpy(units + u * BLOCK_OUTS + first, &unit, sizeof unit);
        }
      }
      words += WORDS * BLOCK_OUTS;
      units += Decoder::units * BLOCK_OUTS;
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

// What can be done with a panel.
struct Product {
  const Tile* tiles;
  const Tile* tiles_of_units;
  void (*decode)(const Panel&, Word*);
  int units, words;  // so many units are in so many words
  bool short_groups;
};
template <class Decoder>
constexpr Product product = {Tiles<Decoder, MAX_ROWS>::for_rows, Tiles<UnitsOf<Decoder>, MAX_ROWS>::for_rows,
                             decode_panel<Decoder>, Decoder::units, Decoder::words, Decoder::short_groups};

}  // namespace latentkv::LATENTKV_ISA
