// Rows of the latent cache as an arithmetic's elements, from each of the formats of `ops/kv_formats.py`.
#pragma once

#include "rows.h"

namespace latentkv::LATENTKV_ISA {

template <class T>
LATENTKV_INLINE T read(const void* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

LATENTKV_INLINE void put(float* out, vf v) { store(out, v); }
LATENTKV_INLINE void put(bf16* out, vf v) { store_bf16(out, v); }
LATENTKV_INLINE void put_one(float* out, float x) { *out = x; }
LATENTKV_INLINE void put_one(bf16* out, float x) { *out = float_to_bf16(x); }

// int8 codes times a scale: W of them, one, or 32 as bf16.
struct Int8Codes {
  float scale;

  explicit Int8Codes(float scale) : scale(scale) {}
  vf many(const char* p) const {
    return __builtin_convertvector(__builtin_convertvector(load_as<vb>(p), vi), vf) * scale;
  }
  float one(const char* p) const { return read<std::int8_t>(p) * scale; }

#if defined(__AVX512BF16__)
  bool as_bf16() const { return true; }
  __m512i thirty_two(const char* p) const { return (__m512i)_mm512_cvtne2ps_pbh(sixteen(p + 16), sixteen(p)); }

 private:
  __m512 sixteen(const char* p) const {
    const __m512i codes = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(scale));
  }
#endif
};

// The same of e4m3 codes. Moved to a float32's exponent and mantissa they are 2^-120 times their value, subnormals
// included. Where the scale is a power of two, as in FlashMLA's caches, their bf16 needs no product.
struct E4m3Codes {
  float scale;

  explicit E4m3Codes(float scale) : scale(scale) {}
  vf many(const char* p) const {
    const vu code = __builtin_convertvector(load_as<vub>(p), vu);
    return (vf)((code & 0x7f) << 20 | (code & 0x80) << 24) * 0x1p120f * scale;
  }
  float one(const char* p) const {
    const std::uint32_t code = read<std::uint8_t>(p), bits = (code & 0x7f) << 20 | (code & 0x80) << 24;
    return read<float>(&bits) * 0x1p120f * scale;
  }

#if defined(__AVX512BF16__)
  // Whether every code's bf16 is its own with another exponent, never subnormal or infinite.
  bool as_bf16() const {
    const std::uint32_t bits = read<std::uint32_t>(&scale);
    return (bits & 0x807fffff) == 0 && bits >> 23 >= 127 - 117 && bits >> 23 <= 127 + 118;
  }
  __m512i thirty_two(const char* p) const {
    const __m512i power = _mm512_set1_epi16((short)(((int)(read<std::uint32_t>(&scale) >> 23) - 127) * 128));
    const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
    const __m512i magnitudes = _mm512_and_si512(codes, _mm512_set1_epi16(0x7f));
    // Four more bits of mantissa, and bf16's exponents are 120 larger; subnormals (m / 8 * 2^-6) are looked up.
    const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(magnitudes, 4), _mm512_set1_epi16(120 << 7));
    const __m512i subnormal = _mm512_castsi128_si512(
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    const __mmask32 small = _mm512_cmplt_epu16_mask(magnitudes, _mm512_set1_epi16(8));
    const __m512i values = _mm512_mask_permutexvar_epi16(_mm512_add_epi16(normal, power), small, magnitudes,
                                                         _mm512_mask_add_epi16(subnormal, 0xfe, subnormal, power));
    const __m512i signs = _mm512_slli_epi16(codes, 8);
    return _mm512_ternarylogic_epi32(values, signs, _mm512_set1_epi16((short)0x8000), 0xf8);  // values | signs & 0x8000
  }
#endif
};

template <class Codes, class Element>
LATENTKV_INLINE void decode_group(Codes codes, const char* p, int n, Element* out) {
  int i = 0;
#if defined(__AVX512BF16__)
  if (sizeof(Element) == sizeof(bf16) && codes.as_bf16())
    for (; i + 32 <= n; i += 32) _mm512_storeu_si512(out + i, codes.thirty_two(p + i));
#endif
  for (; i + W <= n; i += W) put(out + i, codes.many(p + i));
  for (; i < n; i++) put_one(out + i, codes.one(p + i));
}

LATENTKV_INLINE void decode_floats(const char* stored, DType dtype, int n, float* out) {
  convert_row(stored, dtype, n, out, DType::f32);
}
LATENTKV_INLINE void decode_floats(const char* stored, DType, int n, bf16* out) {
  std::memcpy(out, stored, n * sizeof(bf16));
}

template <class Element>
void decode_int8(const char* row, int latent_dim, int rope_dim, Element* out) {
  const char* scales = row + latent_dim + rope_dim;
  const auto group = [&](int from, int n) {
    decode_group(Int8Codes(f16_to_float(read<f16>(scales))), row + from, n, out + from);
    scales += sizeof(f16);
  };
  for (int i = 0; i < latent_dim; i += SCALE_GROUP) group(i, latent_dim - i < SCALE_GROUP ? latent_dim - i : SCALE_GROUP);
  group(latent_dim, rope_dim);
}

template <class Element>
void decode_fp8(const char* row, int latent_dim, int rope_dim, Element* out) {
  const char* scales = row + latent_dim;
  for (int i = 0; i < latent_dim; i += SCALE_GROUP) {
    const int n = latent_dim - i < SCALE_GROUP ? latent_dim - i : SCALE_GROUP;
    decode_group(E4m3Codes(read<float>(scales)), row + i, n, out + i);
    scales += sizeof(float);
  }
  decode_floats(scales, DType::bf16, rope_dim, out + latent_dim);
}

// A stored row of `width` numbers, the last `rope_dim` of them the rotated key's, as `padded` elements, zeros at the
// end; never reads past the row.
template <class Element>
LATENTKV_INLINE void decode_row(const char* stored, RowFormat format, int width, int rope_dim, int padded,
                                Element* row) {
  if (format == RowFormat::int8)
    decode_int8(stored, width - rope_dim, rope_dim, row);
  else if (format == RowFormat::fp8)
    decode_fp8(stored, width - rope_dim, rope_dim, row);
  else
    decode_floats(stored, (DType)format, width, row);
  std::memset(row + width, 0, (padded - width) * sizeof(Element));
}

}  // namespace latentkv::LATENTKV_ISA
