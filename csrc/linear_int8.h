// Products of codes with activations that are rounded to 8 bits, in integers: `linear.cpp` hands over to these where a
// weight asks for it. Each run of up to 32 activations of a row has a scale of its own, its largest number / 127; the sum
// of a run's products is exact, and runs and groups are added in float32 in their order. So here, too, a result depends
// on its row of activations and its matrix alone.
#pragma once

#include "linear_inner.h"

namespace latentkv::LATENTKV_ISA {

// See `linear_inner.h`; `multiply_rows` without the type of activations, which all are rounded.
std::int64_t int8_row_blocks(std::int64_t rows);
std::int64_t int8_input_bytes(const PackedWeight& w, std::int64_t rows);
void int8_pack_input(const PackedWeight& w, const LinearInput& in, std::int64_t first_block, std::int64_t end_block,
                     void* packed);
void int8_multiply_rows(const PackedWeight& w, std::int64_t e, const void* packed, std::int64_t rows,
                        std::int64_t first_rows, std::int64_t end_rows, std::int64_t first_block,
                        std::int64_t end_block, const LinearOutput& out);

}  // namespace latentkv::LATENTKV_ISA
