#include "linear_exact.h"
#include "linear_panel.h"
#include "linear_tile.h"
#include "scratch.h"

namespace latentkv::LATENTKV_ISA {

namespace {

LATENTKV_INLINE std::int64_t units_of(const Layout& layout) { return layout.padded_ins / UNIT; }

// Of a row's activations, which lie behind the units of all rows.
LATENTKV_INLINE std::int64_t sums_of(const PackedWeight& w, const Layout& layout) {
  return has_minima(w.format) ? layout.groups : 0;
}

// Units [first, end) of a row, `lanes` units apart; zeros where weights are padded.
#if defined(__AVX512BF16__)
void pack_units(const bf16* x, std::int64_t ins, std::int64_t first, std::int64_t end, Unit* out, int lanes) {
  std::int64_t i = first;
  for (; i < end && 2 * i + 1 < ins; i++) std::memcpy(out + i * lanes, x + 2 * i, sizeof(Unit));
  for (; i < end; i++) out[i * lanes] = 2 * i < ins ? x[2 * i] : 0;
}
// Float32 is multiplied in float32, see `multiplying`.
void pack_units(const float*, std::int64_t, std::int64_t, std::int64_t, Unit*, int) {}
#else
LATENTKV_INLINE float as_float(float x) { return x; }
LATENTKV_INLINE float as_float(bf16 x) { return bf16_to_float(x); }
template <class T>
void pack_units(const T* x, std::int64_t ins, std::int64_t first, std::int64_t end, Unit* out, int lanes) {
  for (std::int64_t i = first; i < end; i++) out[i * lanes] = i < ins ? as_float(x[i]) : 0;
}
#endif

// A block of rows into [units][rows], a part that stays in the first-level cache at a time.
template <class T>
void pack_rows(const LinearInput& in, RowBlock rows, std::int64_t ins, std::int64_t units, Unit* out) {
  constexpr std::int64_t PART = 256;
  for (std::int64_t first = 0; first < units; first += PART)
    for (std::int64_t i = 0; i < rows.count; i++) {
      const std::int64_t row = in.index ? in.index[rows.first + i] : rows.first + i;
      const std::int64_t end = first + PART < units ? first + PART : units;
      pack_units((const T*)in.x + row * in.stride, ins, first, end, out + i, (int)rows.count);
    }
}

// The sums of the activations x [groups][units][lanes] of each group: [groups][lanes].
void sum_groups(const Unit* x, std::int64_t groups, std::int64_t units, int lanes, float* sums) {
  for (std::int64_t g = 0; g < groups; g++, sums += lanes) {
    for (int lane = 0; lane < lanes; lane++) sums[lane] = 0;
    for (std::int64_t i = 0; i < units; i++, x += lanes)
      for (int lane = 0; lane < lanes; lane++) {
#if defined(__AVX512BF16__)
        sums[lane] += bf16_to_float((bf16)x[lane]) + bf16_to_float((bf16)(x[lane] >> 16));
#else
        sums[lane] += x[lane];
#endif
      }
  }
}

const Product& product_with(WeightFormat format, std::int64_t groups) {
  return with_decoder(format, groups, [](auto decoder) -> const Product& {
    return product<typename decltype(decoder)::type>;
  });
}

// Adds what a block's exceptions contribute to sums [lanes][32] of activations x [units][lanes].
void add_exceptions(const CompactEnd& end, const Unit* x, int lanes, float* sums) {
  const float stood_for_it = bf16_to_float((bf16)(end.window << 7));
  for (std::uint32_t i = 0; i < end.exceptions; i++) {
    const CompactException e = end.list()[i];
    const Unit* units = x + (std::ptrdiff_t)(e.column / UNIT) * lanes;
    for (int lane = 0; lane < lanes; lane++) {
#if defined(__AVX512BF16__)
      const float activation = bf16_to_float((bf16)(units[lane] >> (e.column % 2 * 16)));
#else
      const float activation = units[lane];
#endif
      float& sum = sums[lane * BLOCK_OUTS + e.out];
      sum = __builtin_fmaf(activation, bf16_to_float(e.weight), __builtin_fmaf(activation, -stood_for_it, sum));
    }
  }
}

// The same panel as units, the same fetches meanwhile.
Panel decode(const Product& product, const Panel& panel) {
  Panel decoded = panel;
  decoded.group_words = panel.group_words / product.words * product.units;
  decoded.words_stride = decoded.group_words * BLOCK_OUTS;
  Word* units = (Word*)thread_scratch(Scratch::panel, panel.groups * decoded.words_stride * sizeof(Word));
  product.decode(panel, units);
  decoded.words = units;
  decoded.ahead_step = panel.ahead_step * panel.group_words / decoded.group_words;
  return decoded;
}

// What is decoded and multiplied at once of each group, or how many groups: where weights take as much room as float32
// numbers, no more than stays in the first-level cache while all rows pass by.
struct PartSize {
  std::int64_t groups, group_words;
};
PartSize part_size(const Product& product, const Layout& layout) {
  constexpr std::int64_t MOST_UNITS = 128;  // of an output
  if (UNIT == 2) return {layout.groups, layout.group_words};
  const std::int64_t group_units = layout.group_words / product.words * product.units;
  if (!product.short_groups) return {1, MOST_UNITS / product.units * product.words};
  return {group_units < MOST_UNITS ? MOST_UNITS / group_units : 1, layout.group_words};
}

// The part of a panel from a word of a group on.
Panel part_of(const Panel& panel, PartSize size, std::int64_t group, std::int64_t word) {
  const std::int64_t groups = panel.groups - group, words = panel.group_words - word;
  Panel part = panel;
  part.words += group * panel.words_stride + word * BLOCK_OUTS;
  if (panel.scales) part.scales = (const Word*)panel.scales + group * panel.words_stride;
  part.groups = size.groups < groups ? size.groups : groups;
  part.group_words = size.group_words < words ? size.group_words : words;
  part.continues = group + word > 0;
  part.ends = part.groups == groups && part.group_words == words;
  return part;
}

// Where a tile of MAX_ROWS takes all 16 registers, none is left to decode weights in: few rows are multiplied in smaller
// tiles while weights are decoded, and for more the weights are decoded before.
constexpr bool FULL_TILES = UNIT == 1 && W == 8;
constexpr std::int64_t FEW = 8;
LATENTKV_INLINE int at_once(std::int64_t rows) { return FULL_TILES && rows <= FEW ? 4 : MAX_ROWS; }

// Whether a block of weights is decoded once, and multiplied by `turns` blocks of rows then.
bool decodes_once(const PackedWeight& w, std::int64_t rows, std::int64_t turns) {
  constexpr std::int64_t WORTH_IT = 3;
  const bool plain = w.format == WeightFormat::bf16;  // what is decoded by a shift
  if (!FULL_TILES) return turns >= WORTH_IT && !plain;
  return rows > FEW && (!plain || ceil_div(rows, exact_row_blocks(w, rows)) == MAX_ROWS);
}

}  // namespace

std::int64_t exact_row_blocks(const PackedWeight&, std::int64_t rows) { return ceil_div(rows, at_once(rows)); }

std::int64_t exact_input_bytes(const PackedWeight& w, std::int64_t rows) {
  const Layout layout = layout_of(w);
  return rows * (units_of(layout) + sums_of(w, layout)) * (std::int64_t)sizeof(Unit);
}

std::int64_t exact_row_bytes(const PackedWeight& w) { return exact_input_bytes(w, 1); }

void exact_pack_input(const PackedWeight& w, const LinearInput& in, std::int64_t first_block, std::int64_t end_block,
                      void* packed) {
  const Layout layout = layout_of(w);
  const std::int64_t blocks = exact_row_blocks(w, in.rows), units = units_of(layout), sums = sums_of(w, layout);
  for (std::int64_t b = first_block; b < end_block; b++) {
    const RowBlock rows = row_block(in.rows, blocks, b);
    Unit* out = (Unit*)packed + rows.first * units;
    if (in.dtype == DType::f32)
      pack_rows<float>(in, rows, w.ins, units, out);
    else
      pack_rows<bf16>(in, rows, w.ins, units, out);
    float* to = (float*)packed + in.rows * units + rows.first * sums;
    if (sums) sum_groups(out, sums, units / sums, (int)rows.count, to);
  }
}

void exact_multiply_rows(const PackedWeight& w, std::int64_t e, const void* packed, std::int64_t rows,
                         std::int64_t first_rows, std::int64_t end_rows, std::int64_t first_block,
                         std::int64_t end_block, const LinearOutput& out) {
  constexpr std::int64_t AT_ONCE = 1 << 22;   // bytes of activations that pass by each block of outputs from the L3, ..
  constexpr std::int64_t FEWEST = 4;          // .. unless so few turns would read all weights once more
  const Layout layout = layout_of(w);
  const Product& product = product_with(w.format, layout.groups);
  const std::int64_t row_units = units_of(layout), block_words = layout.block_stride();
  const std::int64_t group_units = layout.group_words / product.words * product.units;
  const std::int64_t turns = end_rows - first_rows, bytes = turns * MAX_ROWS * units_of(layout) * sizeof(Unit);
  if (turns >= 2 * FEWEST && bytes > AT_ONCE && end_block - first_block > 1) {
    const std::int64_t middle = first_rows + turns / 2;
    exact_multiply_rows(w, e, packed, rows, first_rows, middle, first_block, end_block, out);
    exact_multiply_rows(w, e, packed, rows, middle, end_rows, first_block, end_block, out);
    return;
  }
  const float* const group_sums = (const float*)packed + rows * row_units;  // read where the format has minima
  const std::int64_t fetches = fetching_turns(turns);
  const bool decodes = decodes_once(w, rows, turns);
  const Tile* tiles = decodes ? product.tiles_of_units : product.tiles;
  const PartSize size = decodes ? part_size(product, layout) : PartSize{layout.groups, layout.group_words};
  const bool whole = size.groups >= layout.groups && size.group_words >= layout.group_words;
  const std::int64_t turn_sums = whole ? 0 : MAX_ROWS * BLOCK_OUTS;  // none need be kept
  const std::int64_t all_sums = MAX_ROWS * BLOCK_OUTS + (turns - 1) * turn_sums;
  float* const sums = (float*)thread_scratch(Scratch::sums, all_sums * sizeof(float));
  for (std::int64_t o = first_block; o < end_block; o++) {
    const Word* block = (const Word*)w.data + (e * layout.blocks + o) * block_words;
    Panel panel = panel_of(w, layout, block, fetches);
    const CompactEnd* end = nullptr;
    if (w.format == WeightFormat::compact) {
      end = (const CompactEnd*)(block + block_words - layout.end_words);
      panel.window = (int)end->window;
    }
    for (std::int64_t g = 0; g < layout.groups; g += size.groups)
      for (std::int64_t i = 0; i < layout.group_words; i += size.group_words) {
        const Panel stored = part_of(panel, size, g, i);
        const std::int64_t words = words_in(stored);
        const Word* const next = stored.ends ? panel.words + block_words : stored.words + words;
        Panel part = decodes ? decode(product, stored) : stored;
        for (std::int64_t turn = 0; turn < turns; turn++) {
          const RowBlock block_rows = row_block(rows, exact_row_blocks(w, rows), first_rows + turn);
          part.ahead = ahead_of(w.format, stored.words, next, words, turn, turns, fetches);
          const int lanes = (int)block_rows.count;
          const Unit* const units = (const Unit*)packed + block_rows.first * row_units;
          part.sums = group_sums + block_rows.first * layout.groups + g * lanes;
          float* const of_rows = sums + turn * turn_sums;
          tiles[lanes - 1](part, units + (g * group_units + i / product.words * product.units) * lanes, of_rows);
          if (!part.ends) continue;
          if (end) add_exceptions(*end, units, lanes, of_rows);
          write_rows(of_rows, block_rows, o * BLOCK_OUTS, w.outs, out);
        }
      }
  }
}

}  // namespace latentkv::LATENTKV_ISA
