// What the kernels of recurrent layers share: states in slots, and whose rows a step's are.
#pragma once

#include <cstdint>

namespace latentkv {

struct SlotBatch {
  const std::int32_t* q_start;    // [B + 1]
  const std::int32_t* stop;       // [T]; 1: the row is its sequence's first
  const std::int32_t* slot_ids;   // [B]
  const std::int32_t* pending;    // [B], rows that wait and are tokens after all
  const std::int32_t* committed;  // [B], rows that change the state; those after them wait
  int sequences;
};

// The first sequence of T rows whose numbers name what there is not, or a slot that another has; -1: none. Of `slots`
// slots each has room for `most` rows that wait.
std::int64_t first_unfit(const SlotBatch& batch, std::int64_t rows, std::int64_t slots, std::int64_t most);

}  // namespace latentkv
