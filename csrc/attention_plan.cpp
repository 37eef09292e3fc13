#include "attention_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace latentkv {
namespace {

constexpr int SMALLEST_CHUNK = 256, LARGEST_CHUNK = 2048, CHUNKS = 8;
// A sequence of so many query vectors is not cut into chunks: it has enough work items.
constexpr int MANY_VECTORS = 64 * GROUP_VECTORS;

struct Range {
  int first = 0, last = 0;
};

Range read_by(const std::int32_t* start, const std::int32_t* stop, int first_row, int last_row) {
  Range all;
  for (int t = first_row; t < last_row; t++) {
    const int a = start ? start[t] : 0, b = stop[t];
    if (a >= b) continue;
    const bool none = all.first == all.last;
    all.first = none ? a : std::min(all.first, a);
    all.last = none ? b : std::max(all.last, b);
  }
  return all;
}

// A function of the sequence alone, so that its result does not depend on the rest of the batch.
int chunk_tokens(int tokens, std::int64_t vectors) {
  if (vectors >= MANY_VECTORS) return std::max(tokens, 1);
  const int wanted = (tokens / CHUNKS + SMALLEST_CHUNK - 1) / SMALLEST_CHUNK * SMALLEST_CHUNK;
  return std::clamp(wanted, SMALLEST_CHUNK, LARGEST_CHUNK);
}

void check_q_start(const RaggedRows& rows) {
  const std::int32_t* q_start = rows.q_start;
  if (q_start[0] == 0 && q_start[rows.sequences] == rows.rows && std::is_sorted(q_start, q_start + rows.sequences + 1))
    return;
  std::string bounds;
  for (int b = 0; b <= std::min(rows.sequences, 7); b++) bounds += (b ? ", " : "") + std::to_string(q_start[b]);
  throw std::invalid_argument("q_start must rise from 0 to the " + std::to_string(rows.rows) + " rows of q, not [" +
                              bounds + "]");
}

void check_pages(Range range, const std::int32_t* pages, const PageTable& table) {
  if (range.first == range.last) return;
  if (range.first < 0 || range.last > (std::int64_t)table.pages_per_sequence * table.page_size)
    throw std::invalid_argument("tokens " + std::to_string(range.first) + " to " + std::to_string(range.last) +
                                " lie outside the " + std::to_string(table.pages_per_sequence) + " pages of " +
                                std::to_string(table.page_size) + " tokens that the sequence has");
  for (int i = range.first / table.page_size; i <= (range.last - 1) / table.page_size; i++)
    if (pages[i] < 0 || pages[i] >= table.num_pages)
      throw std::invalid_argument("page " + std::to_string(pages[i]) + " is not one of the cache's " +
                                  std::to_string(table.num_pages));
}

}  // namespace

void check_ranges(const RaggedRows& rows, const PageTable& table) {
  check_q_start(rows);
  for (int b = 0; b < rows.sequences; b++)
    check_pages(read_by(rows.start, rows.stop, rows.q_start[b], rows.q_start[b + 1]), table.pages + b * table.row_stride,
                table);
}

void AttentionPlan::clear() {
  sequences_.clear();
  groups_.clear();
  slots_.clear();
  starts_.clear();
  stops_.clear();
  num_items_ = 0;
  pairs_ = 0;
}

void AttentionPlan::of_pages(const RaggedRows& rows, const PageTable& table) {
  clear();
  check_ranges(rows, table);
  start_ = rows.start;
  stop_ = rows.stop;
  for (int b = 0; b < rows.sequences; b++)
    cut(rows, rows.q_start[b], rows.q_start[b + 1], {table.pages + b * table.row_stride, 0, table.page_size}, true);
}

void AttentionPlan::of_slots(const RaggedRows& rows, const std::int32_t* slots, int slots_per_row,
                             std::int64_t num_slots) {
  clear();
  check_q_start(rows);
  slots_.resize((std::size_t)rows.rows * slots_per_row);
  stops_.resize(rows.rows);
  start_ = nullptr;
  stop_ = stops_.data();
  for (int t = 0; t < rows.rows; t++) read_slots(rows, t, slots, slots_per_row, num_slots);
}

void AttentionPlan::of_longer_ranges(const RaggedRows& rows, const PageTable& table, const std::int32_t* slots,
                                     int slots_per_row) {
  clear();
  check_ranges(rows, table);
  slots_.resize((std::size_t)rows.rows * slots_per_row);
  starts_.assign(rows.rows, 0);
  if (rows.start) starts_.assign(rows.start, rows.start + rows.rows);
  stops_.assign(rows.stop, rows.stop + rows.rows);
  start_ = rows.start ? starts_.data() : nullptr;
  stop_ = stops_.data();
  const auto is_longer = [&](int t) { return (std::int64_t)stops_[t] - starts_[t] > slots_per_row; };
  for (int b = 0; b < rows.sequences; b++)
    for (int t = rows.q_start[b], end; t < rows.q_start[b + 1]; t = end) {
      end = t + 1;
      if (is_longer(t)) {
        starts_[t] = 0;
        read_slots(rows, t, slots, slots_per_row, (std::int64_t)table.num_pages * table.page_size);
        continue;
      }
      while (end < rows.q_start[b + 1] && !is_longer(end)) end++;
      cut(rows, t, end, {table.pages + b * table.row_stride, 0, table.page_size}, true);
    }
}

void AttentionPlan::read_slots(const RaggedRows& rows, int row, const std::int32_t* slots, int slots_per_row,
                               std::int64_t num_slots) {
  const std::int32_t* own = slots + (std::int64_t)row * slots_per_row;
  std::int32_t* used = slots_.data() + (std::int64_t)row * slots_per_row;
  std::int32_t* end = std::copy_if(own, own + slots_per_row, used, [](std::int32_t slot) { return slot >= 0; });
  if (end > used && *std::max_element(used, end) >= num_slots)
    throw std::invalid_argument("row " + std::to_string(row) + " names a cache slot past the last, " +
                                std::to_string(num_slots - 1));
  stops_[row] = (std::int32_t)(end - used);
  cut(rows, row, row + 1, {used, 0, 1}, true);
}

void AttentionPlan::of_new_tokens(const RaggedRows& rows, const std::int32_t* kv_start, bool causal) {
  clear();
  for (int b = 0; b < rows.sequences; b++) {
    const int tokens = kv_start[b + 1] - kv_start[b];
    for (int t = rows.q_start[b]; t < rows.q_start[b + 1]; t++)
      stops_.push_back(causal ? std::max(0, tokens - (rows.q_start[b + 1] - 1 - t)) : tokens);
  }
  start_ = nullptr;
  stop_ = stops_.data();
  for (int b = 0; b < rows.sequences; b++)
    cut(rows, rows.q_start[b], rows.q_start[b + 1], {nullptr, kv_start[b], 1}, false);
}

void AttentionPlan::cut(const RaggedRows& rows, int first_row, int last_row, const Sequence& where, bool chunked) {
  const Range all = read_by(start_, stop_, first_row, last_row);
  const std::int64_t vectors = (std::int64_t)(last_row - first_row) * rows.heads;
  const int chunk = chunked ? chunk_tokens(all.last - all.first, vectors) : std::max(all.last, 1);
  // One chunk cannot be shared out, its query vectors can: how they are grouped changes no result.
  const std::int64_t fair = ((std::int64_t)rows.rows * rows.heads / rows.threads + 3) / 4 * 4;
  const int most = all.last <= chunk ? (int)std::clamp<std::int64_t>(fair, 4, GROUP_VECTORS) : GROUP_VECTORS;
  const int sharing = rows.heads / rows.kv_heads;  // query heads of one key/value head
  const int heads_a_group = std::min(sharing, most), rows_a_group = std::max(1, most / sharing);
  const int sequence = (int)sequences_.size();
  sequences_.push_back(where);
  for (int g = 0; g < rows.kv_heads; g++)
    for (int head = 0; head < sharing; head += heads_a_group)
      for (int row = first_row; row < last_row; row += rows_a_group) {
        Group group{};
        group.sequence = sequence;
        group.row = row;
        group.rows = std::min(rows_a_group, last_row - row);
        group.kv_head = g;
        group.head = g * sharing + head;
        group.heads = std::min(heads_a_group, sharing - head);
        const Range own = read_by(start_, stop_, row, row + group.rows);
        group.first = own.first;
        group.last = own.last;
        group.chunk = chunk;
        group.first_item = num_items_;
        // Not (last + chunk - 1) / chunk, which may not be an int.
        group.chunks = own.last > own.first ? (own.last - 1) / chunk - own.first / chunk + 1 : 1;
        num_items_ += group.chunks;
        pairs_ += (std::int64_t)group.rows * group.heads * (own.last - own.first);
        groups_.push_back(group);
      }
}

void AttentionPlan::fill(Attention& attention) const {
  attention.start = start_;
  attention.stop = stop_;
  attention.sequences = sequences_.data();
  attention.groups = groups_.data();
  attention.num_groups = (int)groups_.size();
  attention.num_items = num_items_;
  attention.multiplications = pairs_ * (attention.keys.width + attention.values.width);
}

}  // namespace latentkv
