// The inner loop of products in integers: up to INT8_ROWS rows of activations of 8 bits times 32 outputs.
//
// The unit of work is a quad: 4 codes of an output in the bytes of a word, and the 4 activations that they meet. What is
// the cheapest multiplication of quads differs: `vpdpbusd` adds up 4 products of unsigned codes at once; `vpmaddubsw` two
// into 16 bits, where the sums of a few quads of narrow codes have room.
#pragma once

#include <type_traits>

#include "linear_codes.h"
#include "linear_panel.h"

namespace latentkv::LATENTKV_ISA {

constexpr int RUN = 32;  // activations that share a scale, at most
constexpr int INT8_ROWS = W == 16 ? 8 : 4;

// Measured with AVX2, where a block has few rows and few registers; not elsewhere.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool DECODES_ONCE = true;
#else
constexpr bool DECODES_ONCE = false;
#endif
#if defined(__AVX512BF16__)
constexpr bool MULTIPLIES_UNSIGNED = true;
#else
constexpr bool MULTIPLIES_UNSIGNED = false;
#endif

// Of which codes of a pack byte `byte` of quad `quad` is, where four bits of each lie as `code_words.py` has it.
constexpr int nibble_code(int quad, int byte) { return quad / 2 * 8 + quad % 2 * 2 + byte % 2 * 4 + byte / 2; }

// How the words of a pack become quads of codes: unsigned ones less `middle`, or signed ones.
struct Int8Quads {
  static constexpr bool is_signed = true, has_minima = false;
  static constexpr int words = 1, quads = 1, highest = 128, middle = 0;
  static constexpr int code(int, int byte) { return byte; }
  LATENTKV_INLINE vu quad(const vu (&w)[1], int) { return w[0]; }
};
template <int BITS, bool MINIMA>
struct CodeQuads {
  static constexpr bool is_signed = false, has_minima = MINIMA;
  static constexpr int words = BITS == 5 ? 5 : BITS == 6 ? 3 : 1, quads = 8 * words / BITS;
  static constexpr int highest = (1 << BITS) - 1, middle = 1 << (BITS - 1);
  static constexpr int code(int quad, int byte) {
    return BITS == 2 ? quad * 2 + byte % 2 * 8 + byte / 2 : nibble_code(quad, byte);
  }
  LATENTKV_INLINE vu quad(const vu (&w)[words], int i) {
    if constexpr (BITS == 2) return w[0] >> (2 * i) & 0x03030303;
    const vu low = w[i / 2] >> (4 * (i % 2)) & 0x0f0f0f0f;
    if constexpr (BITS == 4) return low;
    // The upper bits of a quad's codes: those of its halves' first bytes, and two codes further on those of the second.
    const int pair = i / 2 * 4 + i % 2;
    if constexpr (BITS == 5) {
      const vu above = w[words - 1] >> pair;
      return low | (above & 0x00010001) << 4 | (above & 0x00040004) << 10;
    }
    const vu above = w[words - 1] >> (2 * pair);
    return low | (above & 0x00030003) << 4 | (above & 0x00300030) << 8;
  }
};
template <class Table>
struct TableQuads {
  static constexpr bool is_signed = true, has_minima = false;
  static constexpr int words = 1, quads = 2, highest = 128, middle = 0;
  static constexpr int code(int quad, int byte) { return nibble_code(quad, byte); }
  LATENTKV_INLINE vu quad(const vu (&w)[1], int i) { return look_up<Table>(w[0] >> (4 * i) & 0x0f0f0f0f); }
};

// The same codes where each quad has been made a word of its own, which takes time with codes of other widths than 4 bits.
template <class Decoder>
struct DecodedQuads : Decoder {
  static constexpr int quads = Decoder::quads < 4 ? Decoder::quads : 4, words = quads;
  LATENTKV_INLINE vu quad(const vu (&w)[words], int i) { return w[i]; }
};
template <class Decoder>
constexpr bool is_decoded = false;
template <class Decoder>
constexpr bool is_decoded<DecodedQuads<Decoder>> = true;

// A panel's words to quads [groups][quads][32]; those of the next panel, which follow them, are fetched meanwhile.
template <class Decoder>
void decode_quads(const Panel& panel, Word* quads) {
  constexpr int WORDS = Decoder::words, QUADS = Decoder::quads;
  const std::int64_t packs = panel.group_words / WORDS, ahead = panel.groups * panel.words_stride;
  for (std::int64_t g = 0; g < panel.groups; g++) {
    const Word* words = panel.words + g * panel.words_stride;
    fetch_scales(panel, (const char*)(words + ahead));
    for (std::int64_t i = 0; i < packs; i++, words += WORDS * BLOCK_OUTS, quads += QUADS * BLOCK_OUTS) {
      for (int k = 0; k < WORDS * BLOCK_OUTS; k += 16) __builtin_prefetch(words + ahead + k, 0, 2);
      for (int v = 0; v < BLOCK_OUTS; v += W) {
        vu w[WORDS];
#pragma GCC unroll 8
        for (int k = 0; k < WORDS; k++) w[k] = load_as<vu>(words + k * BLOCK_OUTS + v);
#pragma GCC unroll 8
        for (int q = 0; q < QUADS; q++) {
          const vu quad = Decoder::quad(w, q);
          std::memcpy(quads + q * BLOCK_OUTS + v, &quad, sizeof quad);
        }
      }
    }
  }
}

// Sums of the products of quads of codes, as `Decoder` has them, with quads of activations.
#if defined(__AVX512BF16__)
template <class Decoder>
struct QuadSums {
  vi sums{};
  __attribute__((always_inline)) void add(vu codes, Word x) {
    sums = (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32((int)x));
  }
  __attribute__((always_inline)) void widen_after(int) {}
  __attribute__((always_inline)) vi total() { return sums; }
};
#elif defined(__AVX2__)
#if defined(__AVX512F__)
LATENTKV_INLINE vu madd_bytes(vu codes, vu x) { return (vu)_mm512_maddubs_epi16((__m512i)codes, (__m512i)x); }
LATENTKV_INLINE vi madd_halves(vu x) { return (vi)_mm512_madd_epi16((__m512i)x, _mm512_set1_epi16(1)); }
LATENTKV_INLINE vu add_halves(vu a, vu b) { return (vu)_mm512_add_epi16((__m512i)a, (__m512i)b); }
LATENTKV_INLINE vu sizes(vu codes) { return (vu)_mm512_abs_epi8((__m512i)codes); }
LATENTKV_INLINE vu with_signs(vu x, vu codes) {
  const __m512i from = (__m512i)x;
  return (vu)_mm512_mask_sub_epi8(from, _mm512_movepi8_mask((__m512i)codes), _mm512_setzero_si512(), from);
}
#else
LATENTKV_INLINE vu madd_bytes(vu codes, vu x) { return (vu)_mm256_maddubs_epi16((__m256i)codes, (__m256i)x); }
LATENTKV_INLINE vi madd_halves(vu x) { return (vi)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1)); }
LATENTKV_INLINE vu add_halves(vu a, vu b) { return (vu)_mm256_add_epi16((__m256i)a, (__m256i)b); }
LATENTKV_INLINE vu sizes(vu codes) { return (vu)_mm256_abs_epi8((__m256i)codes); }
LATENTKV_INLINE vu with_signs(vu x, vu codes) { return (vu)_mm256_sign_epi8((__m256i)x, (__m256i)codes); }
#endif
template <class Decoder>
struct QuadSums {
  // Quads whose sums of two products fit into 16 bits; sizes of signed codes times activations are 127 at most.
  static constexpr int fit = 32767 / (2 * 127 * Decoder::highest), most = RUN / 4;
  static_assert(fit >= 1);
  vi sums{};
  vu halves{};
  __attribute__((always_inline)) void add(vu codes, Word x) {
    const vu activations = vu{} + x;
    const vu products = Decoder::is_signed ? madd_bytes(sizes(codes), with_signs(activations, codes))
                                           : madd_bytes(codes, activations);
    if (fit == 1)
      sums += madd_halves(products);
    else
      halves = add_halves(halves, products);
    // One after the other: GCC would add up products first, for which there are no registers.
    if (fit > 2) asm("" : "+v"(halves));
  }
  // After so many quads of a pack.
  __attribute__((always_inline)) void widen_after(int quads) {
    if (fit > 1 && fit < most && quads % fit == 0) {
      sums += madd_halves(halves);
      halves = vu{};
    }
  }
  __attribute__((always_inline)) vi total() { return fit >= most ? madd_halves(halves) : sums; }
};
#else
template <class Decoder>
struct QuadSums {
  vi sums{};
  __attribute__((always_inline)) void add(vu codes, Word x) {
    for (int byte = 0; byte < 4; byte++) {
      const vi code = Decoder::is_signed ? (vi)(codes << (24 - 8 * byte)) >> 24 : (vi)(codes >> (8 * byte) & 255);
      sums += code * (std::int32_t)(std::int8_t)(x >> (8 * byte));
    }
  }
  __attribute__((always_inline)) void widen_after(int) {}
  __attribute__((always_inline)) vi total() { return sums; }
};
#endif

// By how much codes are multiplied as more than what they stand for. A sum of products that is too large by 128 times
// that of the activations is put right in integers: next to it, a float32 would have no room for the result. Less is put
// right with a group's minimum.
template <class Decoder>
constexpr int lift = MULTIPLIES_UNSIGNED && Decoder::is_signed ? 128 : 0;
template <class Decoder>
constexpr int offset = Decoder::has_minima ? 0 : Decoder::middle;

// sums [R][32] = the rows times the panel. Of each run: its quads [quads][R], the rows' scales and, times the scale but
// for codes that are lifted, the sums of their numbers.
template <class Decoder, int R>
void multiply_int8(const Panel& panel, const Word* x, float* sums) {
  constexpr int V = W <= 8 && R <= 2 ? 4 : 2, WORDS = Decoder::words, QUADS = Decoder::quads;
  constexpr std::int64_t RUN_PACKS = RUN / (4 * QUADS);
  using Sums = QuadSums<Decoder>;
  constexpr bool HAS_OFFSET = Decoder::has_minima || offset<Decoder> != 0;
  const std::int64_t packs = panel.group_words / WORDS;
  const auto pass = [&](int first, auto fetches) __attribute__((always_inline)) {
    vf total[R][V] = {};
    const Word* quads = x;
    for (std::int64_t g = 0; g < panel.groups; g++) {
      const Word* words = panel.words + g * panel.words_stride + first;
      const char* ahead = panel.ahead + g * panel.ahead_stride;
      if (fetches()) fetch_scales(panel, ahead);
      vf of_group[R][V] = {};
      float activations[R] = {};  // their sum
      for (std::int64_t begin = 0; begin < packs; begin += RUN_PACKS) {
        const std::int64_t end = packs - begin < RUN_PACKS ? packs : begin + RUN_PACKS;
        Sums of_run[R][V] = {};
        for (std::int64_t i = begin; i < end; i++) {
          vu w[V][WORDS];
#pragma GCC unroll 8
          for (int k = 0; k < WORDS; k++, words += BLOCK_OUTS, ahead += panel.ahead_step) {
            if (fetches()) {
              __builtin_prefetch(ahead, 0, 2);  // into the second-level cache
              __builtin_prefetch(ahead + 64, 0, 2);
            }
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) w[v][k] = load_as<vu>(words + v * W);
          }
#pragma GCC unroll 8
          for (int q = 0; q < QUADS; q++, quads += R) {
            vu codes[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
              codes[v] = Decoder::quad(w[v], q);
              if (MULTIPLIES_UNSIGNED && Decoder::is_signed) codes[v] ^= 0x80808080;
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
              for (int v = 0; v < V; v++) {
                of_run[r][v].add(codes[v], quads[r]);
                of_run[r][v].widen_after(q + 1);
              }
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const float scale = __builtin_bit_cast(float, quads[r]);
          const std::int32_t lifted = lift<Decoder> ? lift<Decoder> * (std::int32_t)quads[R + r] : 0;
          if (HAS_OFFSET) activations[r] += __builtin_bit_cast(float, quads[R + r]);
#pragma GCC unroll 4
          for (int v = 0; v < V; v++) {
            const vf exact = __builtin_convertvector(of_run[r][v].total() - lifted, vf);
            of_group[r][v] = multiply_add(exact, splat(scale), of_group[r][v]);
          }
        }
        quads += 2 * R;
      }
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        const std::int64_t at = g * panel.scales_stride + first + v * W;
        const vf scale = load_any(panel.scales, panel.scales_dtype, at);
        const vf minimum = Decoder::has_minima ? load_any(panel.scales, panel.scales_dtype, at + BLOCK_OUTS)
                                               : scale * (float)-offset<Decoder>;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          if (HAS_OFFSET) total[r][v] = multiply_add(splat(activations[r]), minimum, total[r][v]);
          total[r][v] = multiply_add(of_group[r][v], scale, total[r][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) store(sums + r * BLOCK_OUTS + first + v * W, total[r][v]);
  };
  pass(0, std::bool_constant<!is_decoded<Decoder>>{});
  for (int first = V * W; first < BLOCK_OUTS; first += V * W) pass(first, std::false_type{});
}

using Int8Tile = void (*)(const Panel&, const Word*, float*);

template <class Decoder, int MAX, int... R>
struct Int8Tiles : Int8Tiles<Decoder, MAX - 1, MAX, R...> {};
template <class Decoder, int... R>
struct Int8Tiles<Decoder, 0, R...> {
  static constexpr Int8Tile for_rows[] = {multiply_int8<Decoder, R>...};
};

// What can be done with a panel, and which code of a run is met by each byte of its quads.
struct Int8Product {
  const Int8Tile* tiles;
  const Int8Tile* tiles_of_quads;  // as `decode` gives them; null where that does not pay
  void (*decode)(const Panel&, Word* quads);
  int pack_codes, pack_words;
  bool is_lifted;
  std::uint8_t order[RUN];
};
template <class Decoder>
constexpr Int8Product int8_product_of() {
  Int8Product product = {};
  product.tiles = Int8Tiles<Decoder, INT8_ROWS>::for_rows;
  if constexpr (DECODES_ONCE && (Decoder::words > 1 || Decoder::quads > 2)) {
    product.tiles_of_quads = Int8Tiles<DecodedQuads<Decoder>, INT8_ROWS>::for_rows;
    product.decode = decode_quads<Decoder>;
  }
  product.pack_codes = 4 * Decoder::quads;
  product.pack_words = Decoder::words;
  product.is_lifted = lift<Decoder> != 0;
  for (int i = 0; i < RUN; i++) {
    const int pack = i / product.pack_codes * product.pack_codes, within = i - pack;
    product.order[i] = (std::uint8_t)(pack + Decoder::code(within / 4, within % 4));
  }
  return product;
}
template <class Decoder>
constexpr Int8Product int8_product = int8_product_of<Decoder>();

}  // namespace latentkv::LATENTKV_ISA
