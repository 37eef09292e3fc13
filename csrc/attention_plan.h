// Checks the lengths and pages of a call and cuts it into groups of query vectors and chunks of tokens.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"

namespace latentkv {

// B ragged sequences over T rows of queries.
struct RaggedRows {
  int sequences, rows, heads, kv_heads;
  const std::int32_t* q_start;  // [B + 1]
  const std::int32_t *start, *stop;  // [T]; start may be null
  int threads;                       // to share the work out to
};

struct PageTable {
  const std::int32_t* pages;  // [B, row_stride]
  std::int64_t row_stride;
  int pages_per_sequence, page_size, num_pages;
};

// Throws std::invalid_argument where q_start or the pages of what is read do not fit.
void check_ranges(const RaggedRows& rows, const PageTable& table);

// The methods throw std::invalid_argument with a sentence that names what does not fit.
class AttentionPlan {
 public:
  void of_pages(const RaggedRows& rows, const PageTable& table);
  // Row t reads the slots slots[t * slots_per_row ..] that are not negative.
  void of_slots(const RaggedRows& rows, const std::int32_t* slots, int slots_per_row, std::int64_t num_slots);
  // The same where its range holds more than slots_per_row tokens; else it reads the range.
  void of_longer_ranges(const RaggedRows& rows, const PageTable& table, const std::int32_t* slots, int slots_per_row);
  // Keys lie in consecutive slots kv_start[b] .. kv_start[b + 1]; causal rows are aligned to the end of them.
  void of_new_tokens(const RaggedRows& rows, const std::int32_t* kv_start, bool causal);

  void fill(Attention& attention) const;

 private:
  void clear();
  void read_slots(const RaggedRows& rows, int row, const std::int32_t* slots, int slots_per_row, std::int64_t num_slots);
  void cut(const RaggedRows& rows, int first_row, int last_row, const Sequence& where, bool chunked);

  std::vector<Sequence> sequences_;
  std::vector<Group> groups_;
  std::vector<std::int32_t> starts_, stops_, slots_;
  const std::int32_t *start_ = nullptr, *stop_ = nullptr;
  int num_items_ = 0;
  std::int64_t pairs_ = 0;  // (query vector, token)
};

}  // namespace latentkv
