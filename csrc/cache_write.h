// New tokens into the paged cache, in each of the formats of `ops/kv_formats.py`.
#pragma once

#include "elementwise.h"

namespace latentkv {

// Where T tokens go: token t's row lies at pages + slots[t] * row_bytes.
struct CacheRows {
  unsigned char* pages;
  const std::int64_t* slots;
  std::ptrdiff_t row_bytes;
  std::int64_t num_slots;
  RowFormat format;
  int tokens, latent_dim, rope_dim;  // latent_dim + rope_dim <= MAX_ROW
};

// Where T index keys of `dim` numbers go, likewise; int8: codes of the key times the Hadamard matrix, then its scale.
struct KeyRows {
  unsigned char* pages;
  const std::int64_t* slots;
  std::ptrdiff_t row_bytes;
  std::int64_t num_slots;
  RowFormat format;
  int tokens, dim, rope_dim;
};

// All return the first token whose slot is not in the cache (nothing is written then), or -1.
struct CacheWriteKernels {
  // latents [T, L] and k_rope [T, R]
  int (*write)(CacheRows to, Matrix latents, Matrix k_rope);
  // kv_a [T, L + R]: the first L are normed, the others rotated, both rounded to kv_a's type
  int (*norm_rope_write)(CacheRows to, Matrix kv_a, const void* weight, DType weight_dtype, float eps, Angles angles);
  // k [T, dim] layer-normed, rounded to k's type, its first rope_dim numbers rotated and rounded again
  int (*write_index_keys)(KeyRows to, Matrix k, const void* weight, const void* bias, DType weight_dtype, float eps,
                          Angles angles);
};
LATENTKV_TABLE(CacheWriteKernels, cache_write)

}  // namespace latentkv
