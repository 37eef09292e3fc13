// Each head's own matrix times its rows: the absorbed projections W_UK and W_UV.
#pragma once

#include "elementwise.h"
#include "linear.h"

namespace latentkv {

struct HeadwiseKernels {
  // x [tokens, H, D] -> out [tokens, H, O]: head h by matrix h of the H stacked ones
  void (*linear)(const PackedWeight& w, Heads x, Heads out, int tokens);
};
LATENTKV_AMX_TABLE(HeadwiseKernels, headwise)

}  // namespace latentkv
