// The indexer of sparse attention (arXiv 2512.02556, section 2.1): which cached tokens each new token reads.
#pragma once

#include "elementwise.h"

namespace latentkv {

// Rows of queries over the paged keys of their sequences. Row t of sequence b chooses among the tokens
// start[t] <= s < stop[t]; its weights count what each head's scores are worth. Where a key stands for a pool of tokens
// it chooses among the pools that end before stop[t] (start is 0), and then takes all of their tokens, and where
// `open_pool` says so those after the last whole pool.
struct IndexChoice {
  Heads q;               // [rows, heads, dim]
  Matrix weights;        // [rows, heads] f32
  const char* keys;      // slot s at keys + s * key_bytes
  RowFormat key_format;  // int8: codes of the rotated key, then its float32 scale
  std::int64_t key_bytes;
  const std::int32_t* pages;  // [sequences, pages_row]
  std::int64_t pages_row;
  int page_size, sequences;  // keys a page
  const std::int32_t *q_start, *start, *stop;  // [sequences + 1], [rows] or null = 0, [rows]
  int rows, heads, dim, count;                 // dim <= MAX_INDEX_DIM; count of keys
  int pool;                                    // tokens a key
  bool open_pool;
  std::int32_t* slots;                         // [rows, width()], -1 where a row sees too few tokens

  std::ptrdiff_t width() const { return (std::ptrdiff_t)count * pool + (open_pool ? pool - 1 : 0); }
};

constexpr int MAX_INDEX_DIM = 1024;

struct IndexKernels {
  // out [T, heads] = scale * x [T, dim] weight [heads, dim], in float32
  void (*weigh_heads)(Matrix x, const float* weight, float scale, float* out, int tokens, int dim, int heads);
  void (*choose)(const IndexChoice& choice);
};
LATENTKV_TABLE(IndexKernels, index)

}  // namespace latentkv
