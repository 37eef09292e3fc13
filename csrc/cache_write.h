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

// Where the keys of pools go, of which one lies in each `pool` tokens of a page (GLM-5.3-Flash): pool j of page p at
// pages + (p * page_size / pool + j) * row_bytes. Tokens of open pools wait in their page's ring, [ring, 2 dim] numbers
// of ring_dtype, key and gate, at the place of their offset in the page modulo `ring`.
struct PoolRows {
  KeyRows keys;  // num_slots: of tokens; rope_dim 0
  unsigned char* rings;
  DType ring_dtype;
  int ring, page_size, pool;
  const float* ape;  // [pool, dim], added to the gates
};

constexpr int MAX_POOL = 64;

// All return the first token whose slot is not in the cache (nothing is written then), or -1.
struct CacheWriteKernels {
  // latents [T, L] and k_rope [T, R]
  int (*write)(CacheRows to, Matrix latents, Matrix k_rope);
  // kv_a [T, L + R]: the first L are normed, the others rotated, both rounded to kv_a's type
  int (*norm_rope_write)(CacheRows to, Matrix kv_a, const void* weight, DType weight_dtype, float eps, Angles angles);
  // k [T, dim] layer-normed, rounded to k's type, its first rope_dim numbers rotated and rounded again
  int (*write_index_keys)(KeyRows to, Matrix k, const void* weight, const void* bias, DType weight_dtype, float eps,
                          Angles angles);
  // k [T, dim] likewise, but never rotated, and gate [T, dim]; a pool's key is written with its last token: the mean of
  // their keys, weighted number by number by the softmax of gate + ape
  int (*write_pooled_keys)(PoolRows to, Matrix k, Matrix gate, const void* weight, const void* bias, DType weight_dtype,
                           float eps);
};
LATENTKV_TABLE(CacheWriteKernels, cache_write)

}  // namespace latentkv
