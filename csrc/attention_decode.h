// Rows of the latent cache as an arithmetic's elements, from each of the formats of `ops/kv_formats.py`.
#pragma once

#include "rows.h"

namespace latentkv::LATENTKV_ISA {

LATENTKV_INLINE void put(float* out, vf v) { store(out, v); }
LATENTKV_INLINE void put(bf16* out, vf v) { store_bf16(out, v); }
LATENTKV_INLINE void put_one(float* out, float x) { *out = x; }
LATENTKV_INLINE void put_one(bf16* out, float x) { *out = float_to_bf16(x); }

// int8 codes times a scale: W of them, or one.
struct Int8Codes {
  float scale;

  explicit Int8Codes(float scale) : scale(scale) {}
  vf many(const char* p) const {
    return __builtin_convertvector(load_s8(p), vf) * scale;
  }
  float one(const char* p) const { return load_as<std::int8_t>(p) * scale; }
};

// The same of e4m3 codes. Moved to a float32's exponent and mantissa they are 2^-120 times their value, subnormals
// included.
struct E4m3Codes {
  float scale;

  explicit E4m3Codes(float scale) : scale(scale) {}
  vf many(const char* p) const {
    const vu code = load_u8(p);
    return (vf)((code & 0x7f) << 20 | (code & 0x80) << 24) * 0x1p120f * scale;
  }
  float one(const char* p) const {
    const std::uint32_t code = load_as<std::uint8_t>(p), bits = (code & 0x7f) << 20 | (code & 0x80) << 24;
    return load_as<float>(&bits) * 0x1p120f * scale;
  }
};

template <class Codes, class Element>
LATENTKV_INLINE void decode_group(Codes codes, const char* p, int n, Element* out) {
  int i = 0;
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
    decode_group(Int8Codes(f16_to_float(load_as<f16>(scales))), row + from, n, out + from);
    scales += sizeof(f16);
  };
  for (int i = 0; i < latent_dim; i += SCALE_GROUP)
    group(i, latent_dim - i < SCALE_GROUP ? latent_dim - i : SCALE_GROUP);
  group(latent_dim, rope_dim);
}

template <class Element>
void decode_fp8(const char* row, int latent_dim, int rope_dim, Element* out) {
  const char* scales = row + latent_dim;
  for (int i = 0; i < latent_dim; i += SCALE_GROUP) {
    const int n = latent_dim - i < SCALE_GROUP ? latent_dim - i : SCALE_GROUP;
    decode_group(E4m3Codes(load_as<float>(scales)), row + i, n, out + i);
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
