// Which experts take a token, and with which weights.
#pragma once

#include <cstdint>

namespace latentkv {

// As `ops/routing.py` describes them.
struct Routes {
  const float* logits;  // [tokens, experts]
  const float* bias;    // [experts] or null: added to the scores for the choice alone
  std::int64_t tokens, experts, chosen;
  bool softmax;                      // else sigmoid
  std::int64_t groups, kept_groups;  // groups of experts, and how many of them a token may choose from; 0: no groups
  float excluded;  // what experts of other groups count in the choice
  bool group_max;                    // a group is worth its best expert; else the sum of its best two
  bool normalize;
  float scaling;
  std::int64_t* ids;  // [tokens, chosen]
  float* weights;     // [tokens, chosen]
};

void select_experts(const Routes& routes);

}  // namespace latentkv
