// Attention as every instruction set's kernel is asked for it: groups of query vectors over rows of keys and values.
//
// Absorbed MLA, grouped-query attention and expanded prefill differ only in where rows lie and who shares them:
// a token has a slot, and the key and value of key/value head g start at base + slot * slot_bytes + g * head_bytes.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"

namespace latentkv {

// The most query vectors (heads of one or several rows) that read one tile of tokens together.
constexpr int GROUP_VECTORS = 128;

struct Rows {
  const char* base;
  std::int64_t slot_bytes, head_bytes;
  int width;  // numbers a row
  int bytes;  // that they take
};

// Where the tokens of one sequence lie: page pages[s / page_size], or slot first_slot + s where there are no pages.
struct Sequence {
  const std::int32_t* pages;
  std::int64_t first_slot;
  int page_size;
};

// Query vectors of one sequence that share a key/value head: heads `head ..` of rows `row ..`, row by row.
struct Group {
  int sequence;
  int row, rows;
  int kv_head, head, heads;
  int first, last;          // tokens that any of its rows reads; equal where none does
  int chunk;                // tokens a chunk, counted from the sequence's token 0
  int first_item, chunks;   // its chunks are work items first_item .. first_item + chunks - 1; at least one
};

struct Attention {
  const char* q;
  DType q_dtype;
  std::int64_t q_row, q_head;  // strides in numbers
  Rows keys, values;
  RowFormat kv_format;
  bool values_in_keys;  // a value is the first numbers of its key's row
  bool int8_products;   // where the kernels have them; int8 rows of latents only
  bool gather;          // copy rows together before use: worth it where many query vectors read far strided rows
  const std::int32_t *start, *stop;  // row t reads tokens start[t] <= s < stop[t]; start may be null = 0
  float scale;
  char* out;
  DType out_dtype;
  std::int64_t out_row, out_head;  // strides in numbers
  float* lse;                      // [T, heads]
  int heads;
  const Sequence* sequences;
  const Group* groups;
  int num_groups, num_items;
  std::int64_t multiplications;  // of the whole call, about
};

struct AttentionKernels {
  void (*attend)(const Attention&);
};

LATENTKV_AMX_TABLE(AttentionKernels, attention)

}  // namespace latentkv
