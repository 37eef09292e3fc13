// Which tokens each expert multiplies: every token's choices, sorted by expert and cut into segments of bounded size.
#pragma once

#include <vector>

#include "moe.h"

namespace latentkv {

struct Routing {
  std::vector<Segment> segments;
  std::vector<std::int32_t> token_of_row;   // of the choices of experts that compute, in sorted order
  std::vector<std::int32_t> row_of_choice;  // [tokens, chosen], the inverse; -1: a zero expert's

  // Choices ids [tokens, chosen]; an expert's rows keep the order of the tokens. Zero experts, numbered after the others,
  // have no rows.
  void sort(const std::int64_t* ids, std::int64_t tokens, std::int64_t chosen, std::int64_t experts);

  // Every token to the one expert there is.
  void all_to_one(std::int64_t tokens);

 private:
  void cut(std::int64_t expert, std::int64_t first, std::int64_t rows);
};

// The first of n choices that is none of the experts, or -1.
std::int64_t first_unknown(const std::int64_t* ids, std::int64_t n, std::int64_t experts);

}  // namespace latentkv
