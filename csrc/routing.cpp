#include "routing.h"

namespace latentkv {

// Rows whose results for a block of outputs stay in the second-level cache, beside the weights.
constexpr std::int64_t SEGMENT_ROWS = 512;

std::int64_t first_unknown(const std::int64_t* ids, std::int64_t n, std::int64_t experts) {
  for (std::int64_t i = 0; i < n; i++)
    if (ids[i] < 0 || ids[i] >= experts) return i;
  return -1;
}

void Routing::sort(const std::int64_t* ids, std::int64_t tokens, std::int64_t chosen, std::int64_t experts) {
  const std::int64_t choices = tokens * chosen;
  std::vector<std::int32_t> next(experts + 1, 0);
  for (std::int64_t i = 0; i < choices; i++)
    if (ids[i] < experts) next[ids[i] + 1]++;
  segments.clear();
  for (std::int64_t e = 0; e < experts; e++) {
    cut(e, next[e], next[e + 1]);
    next[e + 1] += next[e];
  }
  token_of_row.resize(next[experts]);
  row_of_choice.resize(choices);
  for (std::int64_t i = 0; i < choices; i++) {
    if (ids[i] >= experts) {
      row_of_choice[i] = -1;
      continue;
    }
    const std::int32_t row = next[ids[i]]++;
    token_of_row[row] = (std::int32_t)(i / chosen);
    row_of_choice[i] = row;
  }
}

void Routing::all_to_one(std::int64_t tokens) {
  segments.clear();
  cut(0, 0, tokens);
}

void Routing::cut(std::int64_t expert, std::int64_t first, std::int64_t rows) {
  const std::int64_t parts = (rows + SEGMENT_ROWS - 1) / SEGMENT_ROWS;
  for (std::int64_t part = 0; part < parts; part++) {
    const std::int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
    segments.push_back({expert, first + begin, end - begin});
  }
}

}  // namespace latentkv
