// The indexer of sparse attention (arXiv 2512.02556, section 2.1): which cached tokens each new token reads.
#pragma once

#include "elementwise.h"

namespace latentkv {

// Rows of queries over the paged keys of their sequences. Row t of sequence b chooses among the tokens
// start[t] <= s < stop[t]; its weights count what each head's scores are worth.
struct IndexChoice {
  Heads q;               // [rows, heads, dim]
  Matrix weights;        // [rows, heads] f32
  const char* keys;      // slot s at keys + s * key_bytes
  RowFormat key_format;  // int8: codes of the rotated key, then its float32 scale
  std::int64_t key_bytes;
  const std::int32_t* pages;  // [sequences, pages_row]
  std::int64_t pages_row;
  int page_size, sequences;
  const std::int32_t *q_start, *start, *stop;  // [sequences + 1], [rows] or null = 0, [rows]
  int rows, heads, dim, count;                 // dim <= MAX_INDEX_DIM
  std::int32_t* slots;                         // [rows, count], -1 where a row sees too few tokens
};

constexpr int MAX_INDEX_DIM = 1024;

struct IndexKernels {
  // out [T, heads] = scale * x [T, dim] weight [heads, dim], in float32
  void (*weigh_heads)(Matrix x, const float* weight, float scale, float* out, int tokens, int dim, int heads);
  void (*choose)(const IndexChoice& choice);
};
LATENTKV_TABLE(IndexKernels, index)

}  // namespace latentkv
