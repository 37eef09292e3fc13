// The next token of each row of logits: filters, then the largest sum of logit and Gumbel noise. ops/choice.py is the
// definition; what this gives is the same token, unless two candidates lie within rounding of each other.
#pragma once

#include <cstdint>

namespace latentkv {

struct ChoiceRule {
  double temperature;  // 0: the largest logit, nothing else is read
  std::int64_t top_k;  // 0: all
  double top_p;        // 1: all
  double min_p;        // 0: all
  std::uint64_t seed, position;
};

struct Choices {
  const float* logits;  // [rows, vocabulary]; a row whose largest is not finite gets a token, any one
  std::int64_t rows, vocabulary;
  const ChoiceRule* rules;  // [rows]
  std::int64_t* tokens;     // [rows]
};

void choose_tokens(const Choices& choices);

}  // namespace latentkv
