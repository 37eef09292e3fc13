// A block of outputs' weights as the inner loops of products read them, and where their sums go.
#pragma once

#include "linear_inner.h"

namespace latentkv::LATENTKV_ISA {

using Word = std::uint32_t;

// 32 outputs' weights, their words, or the units that `decode_panel` has made of them, beside each other in groups with
// one scale for each output (null: all are 1).
struct Panel {
  const Word* words;
  const void* scales;
  DType scales_dtype;
  const float* sums;  // of each group's activations [groups][rows], with AMX [rows][groups], where weights have minima
  int window;  // of compact weights
  std::int64_t groups, group_words;
  std::int64_t words_stride, scales_stride;  // from group to group
  bool continues = false, ends = true;       // a part of a panel: sums hold what the parts before it gave; it is the last
  const char* ahead;                         // what is fetched meanwhile:
  std::int64_t ahead_stride, ahead_step;     // bytes from group to group, and from word to word; two lines each time
  std::int64_t ahead_scales;                 // bytes before a group's words: its scales, and its minima
};

constexpr std::int64_t LINE = 64;

// Asks memory for the scales and minima before a group's words: one line, two, or more. A line that nobody asked for is
// waited for; a product with one row took 1.7 times as long where that was one of two.
LATENTKV_INLINE void fetch_scales(const Panel& panel, const char* words) {
  for (std::int64_t before = LINE; before < panel.ahead_scales + LINE; before += LINE)
    __builtin_prefetch(words - before, 0, 2);  // into the second-level cache
}

// A block of outputs; what follows it is fetched meanwhile: an equal part of it during each of so many passes.
inline Panel panel_of(const PackedWeight& w, const Layout& layout, const Word* block, std::int64_t fetches) {
  Panel panel = {};
  panel.words = block + layout.scale_words;
  if (layout.scale_words) panel.scales = block;
  panel.scales_dtype = w.scales;
  panel.groups = layout.groups;
  panel.group_words = layout.group_words;
  panel.words_stride = layout.group_stride();
  panel.scales_stride = (w.scales == DType::f32 ? 1 : 2) * layout.group_stride();
  panel.ahead_step = BLOCK_OUTS * sizeof(Word) / fetches;
  panel.ahead_stride = panel.words_stride * sizeof(Word) / fetches;
  panel.ahead_scales = layout.scale_words * sizeof(Word) / fetches;
  return panel;
}

// From a panel's first word to its last.
inline std::int64_t words_in(const Panel& panel) {
  return (panel.groups - 1) * panel.words_stride + panel.group_words * BLOCK_OUTS;
}

// How far ahead of one pass memory is asked for its weights: measured, and codes want twice what bf16 does.
LATENTKV_INLINE std::int64_t bytes_ahead(WeightFormat format) { return format == WeightFormat::bf16 ? 4096 : 8192; }

// The passes over a block that fetch the next one, the last of `turns`: what comes earlier, many rows of activations push
// out of the cache again, so earlier passes ask for its first part only. A power of two, so that parts are equal, and so
// few that a part is whole bytes a unit.
inline std::int64_t fetching_turns(std::int64_t turns) {
  constexpr std::int64_t MOST = 16;
  std::int64_t fetches = 1;
  while (2 * fetches <= turns && fetches < MOST) fetches *= 2;
  return fetches;
}

// What is fetched during one of so many passes over `size` words, before those at `next`: one pass streams through them;
// several find them in the cache, while the next ones come.
inline const char* ahead_of(WeightFormat format, const Word* words, const Word* next, std::int64_t size, std::int64_t turn,
                            std::int64_t turns, std::int64_t fetches) {
  if (turns == 1) return (const char*)words + bytes_ahead(format);
  const std::int64_t fetch = turn > turns - fetches ? turn - (turns - fetches) : 0;
  return (const char*)(next + size * fetch / fetches);
}

LATENTKV_INLINE bool has_minima(WeightFormat format) {
  return format == WeightFormat::uint2 || format == WeightFormat::uint4 || format == WeightFormat::uint5;
}

// Block b of all blocks of rows: as equal as can be, so that no block is nearly empty.
struct RowBlock {
  std::int64_t first, count;
};
LATENTKV_INLINE RowBlock row_block(std::int64_t rows, std::int64_t blocks, std::int64_t b) {
  const std::int64_t size = rows / blocks, larger = rows % blocks;
  return {b * size + (b < larger ? b : larger), size + (b < larger)};
}

// One block's sums [rows][32] to rows of results.
inline void write_rows(const float* sums, RowBlock rows, std::int64_t out, std::int64_t outs,
                       const LinearOutput& to) {
  const int valid = outs - out < BLOCK_OUTS ? (int)(outs - out) : BLOCK_OUTS;
  for (std::int64_t r = rows.first; r < rows.first + rows.count; r++, sums += BLOCK_OUTS) {
    const std::int64_t y = r * to.stride + out, residual = r * to.residual_stride + out;
    int o = 0;
    for (; o + W <= valid; o += W) {
      vf value = load(sums + o);
      if (to.bias) value += load_any(to.bias, to.bias_dtype, out + o);
      if (to.residual) value += load_any(to.residual, to.residual_dtype, residual + o);
      store_any(to.y, to.dtype, y + o, value);
    }
    for (; o < valid; o++) {
      float value = sums[o];
      if (to.bias) value += load_one(to.bias, to.bias_dtype, out + o);
      if (to.residual) value += load_one(to.residual, to.residual_dtype, residual + o);
      store_one(to.y, to.dtype, y + o, value);
    }
  }
}

}  // namespace latentkv::LATENTKV_ISA
