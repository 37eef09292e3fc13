// Rows of the latent cache as bf16 numbers and scales that multiply them, one for each group of SCALE_GROUP latents and
// one for the rotated key.
#pragma once

#include "attention_decode.h"

#if defined(__AVX512BF16__)

namespace latentkv::LATENTKV_ISA {

// Numbers of two tokens, for 16 query vectors each, in bf16: each vector's two beside each other.
LATENTKV_INLINE __m512i side_by_side(__m512 first, __m512 second) {
  struct InTurn {
    std::uint16_t lanes[32];
    constexpr InTurn() : lanes() {
      for (int i = 0; i < 32; i++) lanes[i] = (std::uint16_t)(i / 2 + i % 2 * 16);
    }
  };
  alignas(64) static constexpr InTurn in_turn;
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  return _mm512_permutexvar_epi16(_mm512_load_si512(in_turn.lanes), both);
}

// The first `coded` of a row's numbers are codes that `decode` takes TOGETHER of.
struct Bf16Rows {
  using Number = bf16;
  static constexpr bool SCALED = false;
  static constexpr int TOGETHER = 64;
  LATENTKV_INLINE int coded(int, int) { return 0; }
  LATENTKV_INLINE void decode(const char*, bf16*) {}
};

// int8 codes are exact in bf16.
struct Int8Rows {
  using Number = bf16;
  static constexpr bool SCALED = true;
  static constexpr int TOGETHER = 64;
  LATENTKV_INLINE int coded(int latent_dim, int width) { return width % TOGETHER ? latent_dim : width; }

  LATENTKV_INLINE void decode(const char* p, bf16* out) {
    decode_32(p, out);
    decode_32(p + 32, out + 32);
  }
  // The other numbers of the row `out`, and all scales.
  LATENTKV_INLINE void decode_rest(const char* row, int latent_dim, int rope_dim, bf16* out, float* scales) {
    const int width = latent_dim + rope_dim;
    for (int d = coded(latent_dim, width); d < width; d += 32) decode_32(row + d, out + d);
    const char* stored = row + latent_dim + rope_dim;
    const int groups = (latent_dim + SCALE_GROUP - 1) / SCALE_GROUP + 1;
    for (int g = 0; g < groups; g += 16) {
      const __mmask16 some = groups - g < 16 ? (1 << (groups - g)) - 1 : 0xffff;
      const __m256i halves = _mm256_maskz_loadu_epi16(some, stored + g * sizeof(f16));
      _mm512_mask_storeu_ps(scales + g, some, _mm512_cvtph_ps(halves));
    }
  }

 private:
  LATENTKV_INLINE void decode_32(const char* p, bf16* out) {
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(sixteen(p + 16), sixteen(p)));
  }
  LATENTKV_INLINE __m512 sixteen(const char* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
};

// The low and the high byte of the bf16 of each e4m3 code without its sign.
struct E4m3Bytes {
  std::uint8_t low[128] = {}, high[128] = {};

  constexpr E4m3Bytes() {
    for (int code = 1; code < 128; code++) {
      int exponent = code >> 3, mantissa = code & 7;
      if (exponent == 0)  // subnormal: mantissa / 8 * 2^-6
        for (exponent = 1; mantissa < 8; mantissa *= 2) exponent--;
      const int bits = (exponent + 120) << 7 | (mantissa & 7) << 4;
      low[code] = bits & 0xff;
      high[code] = bits >> 8;
    }
  }
};

// e4m3 codes are exact in bf16 too: looked up.
class Fp8Rows {
 public:
  using Number = bf16;
  static constexpr bool SCALED = true;
  static constexpr int TOGETHER = 64;
  LATENTKV_INLINE int coded(int latent_dim, int) { return latent_dim; }

  LATENTKV_INLINE void decode(const char* p, bf16* out) {
    const __m512i in_turn = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // for unpacklo and unpackhi
    const __m512i codes = _mm512_permutexvar_epi64(in_turn, _mm512_loadu_si512(p));
    const __m512i low = _mm512_permutex2var_epi8(load(TABLE.low), codes, load(TABLE.low + 64));
    const __m512i magnitude = _mm512_permutex2var_epi8(load(TABLE.high), codes, load(TABLE.high + 64));
    const __m512i high =
        _mm512_ternarylogic_epi32(magnitude, codes, _mm512_set1_epi8((char)0x80), 0xf8);  // magnitude | codes & 0x80
    _mm512_storeu_si512(out, _mm512_unpacklo_epi8(low, high));
    _mm512_storeu_si512(out + 32, _mm512_unpackhi_epi8(low, high));
  }
  LATENTKV_INLINE void decode_rest(const char* row, int latent_dim, int rope_dim, bf16* out, float* scales) {
    const char* stored = row + latent_dim;
    for (int i = 0; i < latent_dim; i += SCALE_GROUP, stored += sizeof(float)) *scales++ = load_as<float>(stored);
    *scales = 1;
    std::memcpy(out + latent_dim, stored, rope_dim * sizeof(bf16));
  }

 private:
  alignas(64) static constexpr E4m3Bytes TABLE = {};

  LATENTKV_INLINE __m512i load(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
};

// Decodes the codes of some rows, TOGETHER at a time.
template <class Codes>
struct Decoder {
  const char* const* rows;
  typename Codes::Number* out;
  int coded, rest;  // numbers of a row
  int left;
  const char* codes;

  void some() {
    if (left == 0) {
      codes = *rows++;
      out += rest;
      left = coded;
    }
    Codes::decode(codes, out);
    codes += Codes::TOGETHER;
    out += Codes::TOGETHER;
    left -= Codes::TOGETHER;
  }
};

}  // namespace latentkv::LATENTKV_ISA

#endif
