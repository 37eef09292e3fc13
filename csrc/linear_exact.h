// Products with activations as they are: `linear.cpp` hands over to these where a weight does not round its input. They
// are written once for vectors (`linear_vectors.cpp`) and once for tiles of AMX (`linear_amx.cpp`).
#pragma once

#include "linear_inner.h"

namespace latentkv::LATENTKV_ISA {

// See `linear_inner.h`.
std::int64_t exact_row_blocks(const PackedWeight& w, std::int64_t rows);
std::int64_t exact_input_bytes(const PackedWeight& w, std::int64_t rows);
std::int64_t exact_row_bytes(const PackedWeight& w);
void exact_pack_input(const PackedWeight& w, const LinearInput& in, std::int64_t first_block, std::int64_t end_block,
                      void* packed);
void exact_multiply_rows(const PackedWeight& w, std::int64_t e, const void* packed, std::int64_t rows,
                         std::int64_t first_rows, std::int64_t end_rows, std::int64_t first_block,
                         std::int64_t end_block, const LinearOutput& out);

}  // namespace latentkv::LATENTKV_ISA
