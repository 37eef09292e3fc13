// What kernels call to multiply by packed weights: pack the rows of activations once, then multiply them by any range
// of blocks of outputs of any of the stacked matrices. Nothing here starts threads; different threads may pack
// different blocks of rows and multiply by different blocks of outputs.
//
// A result depends on its row of activations and its matrix of weights alone: not on the other rows or on the number of
// rows or threads.
#pragma once

#include "linear.h"
#include "simd.h"

namespace latentkv::LATENTKV_ISA {

constexpr int BLOCK_OUTS = 32;  // outputs whose weights lie together

LATENTKV_INLINE std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The sizes of a packed weight, see `weights/layout.py`. A word holds 32 bits of one output's weights.
struct Layout {
  std::int64_t blocks;       // of outputs in a matrix
  std::int64_t groups;       // of weights along the inner axis
  std::int64_t group_words;  // words of an output in a group
  std::int64_t scale_words;  // before each group's words: the block's scales
  std::int64_t padded_ins;
  std::int64_t end_words;  // after a block's groups
  std::int64_t group_stride() const { return scale_words + group_words * BLOCK_OUTS; }
  std::int64_t block_stride() const { return groups * group_stride() + end_words; }
};
Layout layout_of(const PackedWeight& w);

// Activations are packed in blocks of a few rows; all but the number of rows of a block is private to the kernels.
std::int64_t row_blocks(const PackedWeight& w, std::int64_t rows);
std::int64_t packed_input_bytes(const PackedWeight& w, std::int64_t rows);
// What is written of it for each of many rows.
std::int64_t packed_row_bytes(const PackedWeight& w);
void pack_input(const PackedWeight& w, const LinearInput& in, std::int64_t first_block, std::int64_t end_block,
                void* packed);

// Outputs [32 first_block, 32 end_block) of matrix `e` for all `rows` that were packed; y is at the matrix' output 0.
void multiply(const PackedWeight& w, std::int64_t e, const void* packed, std::int64_t rows, std::int64_t first_block,
              std::int64_t end_block, const LinearOutput& out);
// The same for blocks [first_rows, end_rows) of the rows.
void multiply_rows(const PackedWeight& w, std::int64_t e, const void* packed, std::int64_t rows,
                   std::int64_t first_rows, std::int64_t end_rows, std::int64_t first_block, std::int64_t end_block,
                   const LinearOutput& out);

}  // namespace latentkv::LATENTKV_ISA
