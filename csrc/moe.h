// Gated MLPs of packed weights: one for all tokens, or for each token those that a router chose.
#pragma once

#include "linear.h"

namespace latentkv {

// Rows first .. first + rows - 1 of those sorted by expert, all of one expert.
struct Segment {
  std::int64_t expert, first, rows;
};

// down (silu(gate x) * up x) of the rows of every segment; the intermediate has x's type. Where there is a limit, it bounds
// the two factors, see `limited_silu_mul`.
struct GatedProducts {
  PackedWeight gate_up, down;  // [E, 2I, D], the gate first, and [E, D, I]
  LinearInput x;               // the tokens
  const Segment* segments;
  std::int64_t num_segments, rows;    // rows of all segments
  const std::int32_t* token_of_row;   // [rows]
  // [tokens, chosen]; -1: a zero expert's, which gives the token itself. Null: row i is token i, its product is its result.
  const std::int32_t* row_of_choice;
  const float* weights;               // [tokens, chosen], by which a token's products are multiplied before they are added
  std::int64_t chosen;
  LinearOutput out;  // of each token; no bias
  float limit;       // 0: none
  bool bounds_gate;  // before silu, else what silu gives
};

struct MoeKernels {
  void (*gated)(const GatedProducts&);
  // Of temporaries for each of the rows.
  std::int64_t (*row_bytes)(const GatedProducts&);
};
LATENTKV_AMX_TABLE(MoeKernels, moe)

}  // namespace latentkv
