#include "cache_write.h"

#include "rows.h"
#include "team.h"

namespace latentkv::LATENTKV_ISA {
namespace {

constexpr int WORTH_A_FORK = 32;  // tokens

LATENTKV_INLINE std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
LATENTKV_INLINE float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Compared as integers, which order magnitudes as the numbers do and put NaN above infinity.
LATENTKV_INLINE float absmax(const float* x, int n) {
  std::int32_t most = 0;
  for (int i = 0; i < n; i++) {
    const std::int32_t magnitude = (std::int32_t)(bits_of(x[i]) & 0x7fffffff);
    most = magnitude > most ? magnitude : most;
  }
  return float_of((std::uint32_t)most);
}

// absmax / 127 in float16, one step larger where rounding down would clip by more than half a step. Infinity where a
// number is not finite: all codes are then 0, and 0 times infinity shows what was lost.
f16 int8_scale(float largest) {
  if (!(largest < __builtin_inff())) return 0x7c00;
  const float ratio = largest / 127.0f;
  const f16 nearest = float_to_f16(ratio > 65504.0f ? 65504.0f : ratio);
  const bool clips = f16_to_float(nearest) * 127.5f < largest;
  return clips && nearest < 0x7bff ? (f16)(nearest + 1) : nearest;
}

void encode_int8(const float* x, int n, f16 scale_bits, std::int8_t* codes) {
  const float scale = f16_to_float(scale_bits);
  for (int i = 0; i < n; i++) {
    float code = scale > 0.0f ? x[i] / scale : 0.0f;
    code = code < -127.0f ? -127.0f : code > 127.0f ? 127.0f : code;
    // 1.5 * 2^23 leaves the nearest integer (ties to even) in the low bits; NaN gives 0.
    codes[i] = code == code ? (std::int8_t)(bits_of(code + 12582912.0f) & 0xff) : 0;
  }
}

// The smallest power of two that brings the group within e4m3's range.
float fp8_scale(float largest) {
  if (!(largest < __builtin_inff())) return largest;
  const std::uint32_t ratio = bits_of((largest < 0x1p-100f ? 0x1p-100f : largest) / 448.0f);
  return float_of((ratio & 0x7fffff) ? (ratio & 0x7f800000) + 0x800000 : ratio);
}

// Round to nearest, ties to even; below 2^-6 an addition aligns the subnormal's bits.
LATENTKV_INLINE std::uint8_t float_to_e4m3(float x) {
  x = x < -448.0f ? -448.0f : x > 448.0f ? 448.0f : x;
  const std::uint32_t sign = bits_of(x) & 0x80000000, magnitude = bits_of(x) ^ sign;
  const std::uint32_t normal = (magnitude + 0xc407ffff + ((magnitude >> 20) & 1)) >> 20;
  const std::uint32_t subnormal = bits_of(float_of(magnitude) + 16384.0f) - 0x46800000;
  const std::uint32_t code = magnitude > 0x7f800000 ? 0x7f : magnitude < 0x3c800000 ? subnormal : normal;
  return (std::uint8_t)(code | sign >> 24);
}

void encode_fp8(const float* x, int n, float scale, std::uint8_t* codes) {
  for (int i = 0; i < n; i++) codes[i] = float_to_e4m3(x[i] / scale);
}

// L int8 | R int8 | float16 scales, one per 128 latents and one for k_rope. Returns the payload's end.
unsigned char* store_int8(const float* row, int latent_dim, int rope_dim, unsigned char* out) {
  unsigned char* scales = out + latent_dim + rope_dim;
  const auto group = [&](int from, int n) {
    const f16 scale = int8_scale(absmax(row + from, n));
    encode_int8(row + from, n, scale, (std::int8_t*)out + from);
    std::memcpy(scales, &scale, 2);
    scales += 2;
  };
  for (int i = 0; i < latent_dim; i += SCALE_GROUP) group(i, latent_dim - i < SCALE_GROUP ? latent_dim - i : SCALE_GROUP);
  group(latent_dim, rope_dim);
  return scales;
}

// L e4m3 | one float32 scale per 128 latents | R bf16. Returns the payload's end.
unsigned char* store_fp8(const float* row, int latent_dim, int rope_dim, unsigned char* out) {
  unsigned char* scales = out + latent_dim;
  for (int i = 0; i < latent_dim; i += SCALE_GROUP) {
    const int n = latent_dim - i < SCALE_GROUP ? latent_dim - i : SCALE_GROUP;
    const float scale = fp8_scale(absmax(row + i, n));
    encode_fp8(row + i, n, scale, out + i);
    std::memcpy(scales, &scale, 4);
    scales += 4;
  }
  convert_row(row + latent_dim, DType::f32, rope_dim, scales, DType::bf16);
  return scales + 2 * rope_dim;
}

// Quantised rows are padded with zeros to a multiple of 16 bytes; rows of floats end with their last number.
void store_row(const CacheRows& to, int t, const float* row) {
  unsigned char* out = to.pages + to.slots[t] * to.row_bytes;
  if (to.format != RowFormat::int8 && to.format != RowFormat::fp8) {
    convert_row(row, DType::f32, to.latent_dim + to.rope_dim, out, (DType)to.format);
    return;
  }
  const auto store = to.format == RowFormat::int8 ? store_int8 : store_fp8;
  const std::ptrdiff_t payload = store(row, to.latent_dim, to.rope_dim, out) - out;
  const std::ptrdiff_t padded = (payload + 15) / 16 * 16;
  std::memset(out + payload, 0, (padded < to.row_bytes ? padded : to.row_bytes) - payload);
}

template <class Rows>
int first_bad_slot(const Rows& to) {
  for (int t = 0; t < to.tokens; t++)
    if (to.slots[t] < 0 || to.slots[t] >= to.num_slots) return t;
  return -1;
}

LATENTKV_INLINE const char* row_at(const Matrix& m, int t) {
  return (const char*)m.data + t * m.stride * (m.dtype == DType::f32 ? 4 : 2);
}

int write(CacheRows to, Matrix latents, Matrix k_rope) {
  const int bad = first_bad_slot(to);
  if (bad >= 0) return bad;
#pragma omp parallel for schedule(static) if (forks(to.tokens >= WORTH_A_FORK))
  for (int t = 0; t < to.tokens; t++) {
    alignas(64) float row[MAX_ROW];
    convert_row(row_at(latents, t), latents.dtype, to.latent_dim, row, DType::f32);
    convert_row(row_at(k_rope, t), k_rope.dtype, to.rope_dim, row + to.latent_dim, DType::f32);
    store_row(to, t, row);
  }
  return -1;
}

int norm_rope_write(CacheRows to, Matrix kv_a, const void* weight, DType weight_dtype, float eps, Angles angles) {
  const int bad = first_bad_slot(to);
  if (bad >= 0) return bad;
  const int half = to.rope_dim / 2;
#pragma omp parallel for schedule(static) if (forks(to.tokens >= WORTH_A_FORK))
  for (int t = 0; t < to.tokens; t++) {
    alignas(64) float row[MAX_ROW];
    float* k_rope = row + to.latent_dim;
    for_dtype(kv_a.dtype, [&](auto dtype) {
      const char* x = row_at(kv_a, t);
      norm_row<dtype()>(x, weight, weight_dtype, to.latent_dim, eps, row, DType::f32);
      convert_row(x + to.latent_dim * (dtype() == DType::f32 ? 4 : 2), dtype(), to.rope_dim, k_rope, DType::f32);
      rotate_row(k_rope, angles.cos + (std::ptrdiff_t)t * half, angles.sin + (std::ptrdiff_t)t * half, half,
                 angles.interleaved);
      round_row(k_rope, to.rope_dim, dtype());
    });
    store_row(to, t, row);
  }
  return -1;
}

// Codes, then absmax / 127 in float32; where a number is not finite codes are 0 and the scale is infinity.
void store_int8_key(const float* key, int dim, unsigned char* out) {
  const float largest = absmax(key, dim), scale = largest < __builtin_inff() ? largest / 127.0f : __builtin_inff();
  for (int i = 0; i < dim; i++) {
    const float code = scale > 0.0f && scale < __builtin_inff() ? key[i] / scale : 0.0f;
    out[i] = (std::uint8_t)(bits_of(code + 12582912.0f) & 0xff);  // see encode_int8
  }
  std::memcpy(out + dim, &scale, 4);
}

void store_key(float* key, const KeyRows& to, unsigned char* out) {
  if (to.format == RowFormat::int8) {
    hadamard_row(key, to.dim);
    store_int8_key(key, to.dim, out);
  } else {
    convert_row(key, DType::f32, to.dim, out, (DType)to.format);
  }
}

int write_index_keys(KeyRows to, Matrix k, const void* weight, const void* bias, DType weight_dtype, float eps,
                     Angles angles) {
  const int bad = first_bad_slot(to);
  if (bad >= 0) return bad;
  const int half = to.rope_dim / 2;
#pragma omp parallel for schedule(static) if (forks(to.tokens >= WORTH_A_FORK))
  for (int t = 0; t < to.tokens; t++) {
    alignas(64) float row[MAX_ROW];
    for_dtype(k.dtype, [&](auto dtype) {
      layer_norm_row<dtype()>(row_at(k, t), weight, bias, weight_dtype, to.dim, eps, row);
      round_row(row, to.dim, dtype());
      rotate_row(row, angles.cos + (std::ptrdiff_t)t * half, angles.sin + (std::ptrdiff_t)t * half, half,
                 angles.interleaved);
      round_row(row, to.rope_dim, dtype());
    });
    store_key(row, to, to.pages + to.slots[t] * to.row_bytes);
  }
  return -1;
}

LATENTKV_INLINE unsigned char* ring_row(const PoolRows& to, std::int64_t page, int offset) {
  const std::ptrdiff_t row = 2 * to.keys.dim * (to.ring_dtype == DType::f32 ? 4 : 2);
  return to.rings + (page * to.ring + offset % to.ring) * row;
}

// The key of the pool that ends at `offset`, from the ring.
void pool_key(const PoolRows& to, std::int64_t page, int offset, float* key) {
  const int dim = to.keys.dim;
  for (int d = 0; d < dim; d += W) {
    const int n = dim - d < W ? dim - d : W;
    vf gates[MAX_POOL], most = {};
    alignas(64) float part[W] = {};
    const auto take = [&](int i, int from) {
      convert_row(ring_row(to, page, offset - to.pool + 1 + i) + (from + d) * (to.ring_dtype == DType::f32 ? 4 : 2),
                  to.ring_dtype, n, part, DType::f32);
      return load(part);
    };
    for (int i = 0; i < to.pool; i++) {
      gates[i] = take(i, dim);
      alignas(64) float ape[W] = {};
      std::memcpy(ape, to.ape + (std::ptrdiff_t)i * dim + d, n * sizeof(float));
      gates[i] += load(ape);
      most = i ? maximum(most, gates[i]) : gates[i];
    }
    vf weights = {}, sum = {};
    for (int i = 0; i < to.pool; i++) {
      const vf weight = exp(gates[i] - most);
      weights += weight;
      sum += weight * take(i, 0);
    }
    store(part, sum / weights);
    std::memcpy(key + d, part, n * sizeof(float));
  }
}

int write_pooled_keys(PoolRows to, Matrix k, Matrix gate, const void* weight, const void* bias, DType weight_dtype,
                      float eps) {
  const KeyRows& keys = to.keys;
  const int bad = first_bad_slot(keys), half = keys.dim * (to.ring_dtype == DType::f32 ? 4 : 2);
  if (bad >= 0) return bad;
  const auto page_of = [&](int t) { return keys.slots[t] / to.page_size; };
  // A page's tokens are one after the other, and only they write to it.
#pragma omp parallel for schedule(dynamic) if (forks(keys.tokens >= WORTH_A_FORK))
  for (int first = 0; first < keys.tokens; first++) {
    const std::int64_t page = page_of(first);
    if (first && page_of(first - 1) == page) continue;
    for (int t = first; t < keys.tokens && page_of(t) == page; t++) {
      alignas(64) float row[MAX_ROW];
      const int offset = (int)(keys.slots[t] % to.page_size);
      unsigned char* waiting = ring_row(to, page, offset);
      for_dtype(k.dtype, [&](auto dtype) {
        layer_norm_row<dtype()>(row_at(k, t), weight, bias, weight_dtype, keys.dim, eps, row);
        round_row(row, keys.dim, dtype());
      });
      convert_row(row, DType::f32, keys.dim, waiting, to.ring_dtype);
      convert_row(row_at(gate, t), gate.dtype, keys.dim, row, DType::f32);
      convert_row(row, DType::f32, keys.dim, waiting + half, to.ring_dtype);
      if ((offset + 1) % to.pool) continue;
      pool_key(to, page, offset, row);
      store_key(row, keys, keys.pages + (page * (to.page_size / to.pool) + offset / to.pool) * keys.row_bytes);
    }
  }
  return -1;
}

}  // namespace

const CacheWriteKernels cache_write = {write, norm_rope_write, write_index_keys, write_pooled_keys};

}  // namespace latentkv::LATENTKV_ISA
