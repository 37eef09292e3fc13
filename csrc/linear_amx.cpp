// Products of packed weights by tiles of AMX: 32 rows of activations times 32 outputs, 32 numbers of each at a time.
//
// A tile of weights is what a panel of units is already: pairs of 16 outputs beside each other. bf16 weights are
// multiplied where they lie, others are decoded before, a part that stays in the first-level cache while all rows pass
// by. A few rows are multiplied by vectors (`linear_amx_few.h`), which is faster and gives the same bits.
#include "amx.h"
#include "linear_amx_few.h"
#include "linear_exact.h"
#include "linear_panel.h"
#include "linear_tile.h"
#include "scratch.h"

namespace latentkv::LATENTKV_ISA {

namespace {

constexpr int ROWS = 2 * TILE_ROWS;      // of a block
constexpr std::int64_t PART_STEPS = 8;   // whose weights are decoded at once: 16 KB
constexpr std::int64_t AT_A_TIME = 2;    // steps, where they are decoded for one turn
constexpr int GROUPS_AT_A_TIME = 4;      // whose sums are scaled and added

// How weights become units, and are multiplied by a few rows.
struct Decoding {
  void (*decode)(const Panel&, Word*);  // null: they are units
  const FewRows* multiply_few;
  int units, words;                     // so many units are in so many words
  bool in_groups, has_minima;
  float scale, middle;
};
template <class Decoder>
constexpr Decoding decoding = {
    std::is_same_v<Decoder, Bf16Words> ? nullptr : decode_panel<Decoder>, few_rows<Decoder>, Decoder::units,
    Decoder::words, Decoder::short_groups, Decoder::has_minima, Decoder::scale, Decoder::middle};

const Decoding& decoding_of(WeightFormat format, std::int64_t groups) {
  return with_decoder(format, groups, [](auto decoder) -> const Decoding& {
    return decoding<typename decltype(decoder)::type>;
  });
}

// Steps of a group and of a row; the units that a group's last step lacks are zeros in both factors.
LATENTKV_INLINE std::int64_t steps_of(std::int64_t units) { return ceil_div(units, STEP); }
LATENTKV_INLINE std::int64_t group_units_of(const Layout& layout) { return layout.padded_ins / layout.groups / UNIT; }
LATENTKV_INLINE std::int64_t row_steps(const Layout& layout) {
  return layout.groups * steps_of(group_units_of(layout));
}

// Calls to(step, x, count) with each step's numbers of a row, of which the last of a group may have fewer.
template <class F>
LATENTKV_INLINE void for_steps(const bf16* x, std::int64_t ins, const Layout& layout, F to) {
  const std::int64_t group_ins = layout.padded_ins / layout.groups, steps = steps_of(group_units_of(layout));
  for (std::int64_t g = 0; g < layout.groups; g++)
    for (std::int64_t i = 0; i < steps; i++) {
      const std::int64_t first = g * group_ins + i * STEP_INS, in_group = group_ins - i * STEP_INS;
      const std::int64_t most = ins - first < in_group ? ins - first : in_group;
      to(g * steps + i, x + first, most < 0 ? 0 : most < STEP_INS ? most : STEP_INS);
    }
}

// Units of a row [steps][rows][16], from the row's place in the first step on.
void pack_row(const bf16* x, std::int64_t ins, const Layout& layout, std::int64_t rows, Unit* out) {
  for_steps(x, ins, layout, [&](std::int64_t step, const bf16* numbers, std::int64_t count) {
    bf16* const to = (bf16*)(out + step * rows * STEP);
    std::memcpy(to, numbers, count * sizeof(bf16));
    std::memset(to + count, 0, (STEP_INS - count) * sizeof(bf16));
  });
}

// The numbers of a row [steps][32] as float32.
void pack_row_of_few(const bf16* x, std::int64_t ins, const Layout& layout, float* out) {
  for_steps(x, ins, layout, [&](std::int64_t step, const bf16* numbers, std::int64_t count) {
    for (std::int64_t i = 0; i < STEP_INS; i++) out[step * STEP_INS + i] = i < count ? bf16_to_float(numbers[i]) : 0;
  });
}

// Weights of a few groups, or of a part of one, as tiles read them.
struct Part {
  const Word* units;          // null: still to be decoded
  Panel stored;
  std::int64_t group_stride;  // words from group to group
  std::int64_t groups, steps;
  const void* scales;
  DType scales_dtype;
  std::int64_t scales_stride;
  bool continues, ends;
};

// Tiles 0 to 3 are sums, of 16 rows and 16 outputs each; 4 and 5 activations; 6 and 7 weights.
template <bool TWO>
LATENTKV_INLINE void zero_sums() {
  tile_zero<0>();
  tile_zero<1>();
  if (TWO) tile_zero<2>();
  if (TWO) tile_zero<3>();
}
constexpr std::ptrdiff_t SUMS_STRIDE = BLOCK_OUTS * sizeof(float);
template <bool TWO>
LATENTKV_INLINE void load_sums(const float* sums) {
  tile_load<0>(sums, SUMS_STRIDE);
  tile_load<1>(sums + W, SUMS_STRIDE);
  if (TWO) tile_load<2>(sums + TILE_ROWS * BLOCK_OUTS, SUMS_STRIDE);
  if (TWO) tile_load<3>(sums + TILE_ROWS * BLOCK_OUTS + W, SUMS_STRIDE);
}
template <bool TWO>
LATENTKV_INLINE void store_sums(float* sums) {
  tile_store<0>(sums, SUMS_STRIDE);
  tile_store<1>(sums + W, SUMS_STRIDE);
  if (TWO) tile_store<2>(sums + TILE_ROWS * BLOCK_OUTS, SUMS_STRIDE);
  if (TWO) tile_store<3>(sums + TILE_ROWS * BLOCK_OUTS + W, SUMS_STRIDE);
}
// Adds `steps` steps of x [steps][rows][16] times weights.
template <bool TWO>
LATENTKV_INLINE void add_steps(const Unit* x, std::int64_t rows, const Word* weights, std::int64_t steps) {
  constexpr std::ptrdiff_t OUTS = BLOCK_OUTS * sizeof(Word);
  for (std::int64_t i = 0; i < steps; i++, x += rows * STEP, weights += STEP * BLOCK_OUTS) {
    tile_load<6>(weights, OUTS);
    tile_load<4>(x, TILE_BYTES);
    tile_multiply_bf16<0, 4, 6>();
    tile_load<7>(weights + W, OUTS);
    tile_multiply_bf16<1, 4, 7>();
    if (TWO) tile_load<5>(x + TILE_ROWS * STEP, TILE_BYTES);
    if (TWO) tile_multiply_bf16<2, 5, 6>();
    if (TWO) tile_multiply_bf16<3, 5, 7>();
  }
}

// The units of some steps of a group; zeros follow its last one.
void decode_group(const Decoding& d, const Panel& panel, std::int64_t group, std::int64_t first, std::int64_t steps,
                  Word* to) {
  const std::int64_t begin = first * STEP / d.units * d.words, end = (first + steps) * STEP / d.units * d.words;
  Panel part = panel;
  part.groups = 1;
  part.words += group * panel.words_stride + begin * BLOCK_OUTS;
  part.group_words = (end < panel.group_words ? end : panel.group_words) - begin;
  const std::int64_t units = part.group_words / d.words * d.units;
  if (d.decode)
    d.decode(part, to);
  else
    std::memcpy(to, part.words, units * BLOCK_OUTS * sizeof(Word));
  if (units < steps * STEP) std::memset(to + units * BLOCK_OUTS, 0, (steps * STEP - units) * BLOCK_OUTS * sizeof(Word));
}

// sums [rows][32] = x times the part; where it continues another, with that one's sums. Of each group the activations'
// sums lie `groups_of_row` apart from row to row.
template <bool TWO>
void multiply_part(const Decoding& d, const Part& part, const Unit* x, std::int64_t rows, const float* group_sums,
                   std::int64_t groups_of_row, float* sums) {
  alignas(64) Word decoded[2][AT_A_TIME * STEP * BLOCK_OUTS];
  // Where the weights are multiplied once they are decoded between the products of the steps before.
  const auto add_group = [&](const Unit* of_group, std::int64_t g) __attribute__((always_inline)) {
    if (part.units) return add_steps<TWO>(of_group, rows, part.units + g * part.group_stride, part.steps);
    for (std::int64_t i = 0; i < part.steps; i += AT_A_TIME) {
      const std::int64_t steps = part.steps - i < AT_A_TIME ? part.steps - i : AT_A_TIME;
      Word* const units = decoded[i / AT_A_TIME % 2];
      decode_group(d, part.stored, g, i, steps, units);
      add_steps<TWO>(of_group + i * rows * STEP, rows, units, steps);
    }
  };
  if (!d.in_groups) {
    if (part.continues)
      load_sums<TWO>(sums);
    else
      zero_sums<TWO>();
    add_group(x, 0);
    store_sums<TWO>(sums);
    if (!part.ends || !part.scales) return;
    for (int o = 0; o < BLOCK_OUTS; o += W) {
      const vf scale = d.scale * load_any(part.scales, part.scales_dtype, o);
      for (std::int64_t r = 0; r < rows; r++) store(sums + r * BLOCK_OUTS + o, load(sums + r * BLOCK_OUTS + o) * scale);
    }
    return;
  }
  if (!part.continues) std::memset(sums, 0, rows * BLOCK_OUTS * sizeof(float));
  alignas(64) float of_groups[GROUPS_AT_A_TIME][ROWS * BLOCK_OUTS];
  for (std::int64_t first = 0; first < part.groups; first += GROUPS_AT_A_TIME) {
    const int groups = (int)(part.groups - first < GROUPS_AT_A_TIME ? part.groups - first : GROUPS_AT_A_TIME);
    for (int j = 0; j < groups; j++) {
      zero_sums<TWO>();
      add_group(x + (first + j) * part.steps * rows * STEP, first + j);
      store_sums<TWO>(of_groups[j]);
    }
    for (int o = 0; o < BLOCK_OUTS; o += W) {
      vf scales[GROUPS_AT_A_TIME], minima[GROUPS_AT_A_TIME];
      for (int j = 0; j < groups; j++) {
        const std::int64_t at = (first + j) * part.scales_stride + o;
        const vf stored = load_any(part.scales, part.scales_dtype, at);
        scales[j] = d.scale * stored;
        if (d.has_minima) minima[j] = load_any(part.scales, part.scales_dtype, at + BLOCK_OUTS) + d.middle * stored;
      }
      for (std::int64_t r = 0; r < rows; r++) {
        vf total = load(sums + r * BLOCK_OUTS + o);
        for (int j = 0; j < groups; j++) {
          if (d.has_minima) total = multiply_add(splat(group_sums[r * groups_of_row + first + j]), minima[j], total);
          total = multiply_add(load(of_groups[j] + r * BLOCK_OUTS + o), scales[j], total);
        }
        store(sums + r * BLOCK_OUTS + o, total);
      }
    }
  }
}

// The units of groups or of a part of one, each group's steps whole.
const Word* decode(const Decoding& d, const Panel& panel, std::int64_t steps) {
  const std::int64_t stride = steps * STEP * BLOCK_OUTS;
  Word* const decoded = (Word*)thread_scratch(Scratch::panel, panel.groups * stride * sizeof(Word));
  for (std::int64_t g = 0; g < panel.groups; g++) decode_group(d, panel, g, 0, steps, decoded + g * stride);
  return decoded;
}

// How a block's weights are taken: so many groups at a time, or so many steps of one.
struct Cut {
  std::int64_t groups, steps;
  bool decodes, once;  // once: while they are multiplied, for one turn

  Cut(const Decoding& d, const Layout& layout, std::int64_t turns) {
    const std::int64_t units = group_units_of(layout), of_group = steps_of(units);
    decodes = d.decode || units % STEP;
    once = decodes && turns == 1;
    groups = once ? layout.groups : d.in_groups && of_group < PART_STEPS ? PART_STEPS / of_group : 1;
    steps = once || d.in_groups ? of_group : PART_STEPS;
  }
};

// The part from a step of a group on.
Part part_at(const Decoding& d, const Layout& layout, const Panel& panel, Cut cut, std::int64_t group,
             std::int64_t step) {
  const std::int64_t units = group_units_of(layout) - step * STEP, groups = layout.groups - group;
  const std::int64_t steps = steps_of(units) < cut.steps ? steps_of(units) : cut.steps;
  Panel stored = panel;
  stored.groups = groups < cut.groups ? groups : cut.groups;
  stored.words += group * panel.words_stride + step * STEP / d.units * d.words * BLOCK_OUTS;
  stored.group_words = (units < steps * STEP ? units : steps * STEP) / d.units * d.words;
  Part part = {};
  part.units = cut.once ? nullptr : cut.decodes ? decode(d, stored, steps) : stored.words;
  part.stored = stored;
  part.group_stride = cut.decodes ? steps * STEP * BLOCK_OUTS : stored.words_stride;
  part.groups = stored.groups;
  part.steps = steps;
  if (stored.scales) part.scales = (const Word*)stored.scales + group * panel.words_stride;
  part.scales_dtype = stored.scales_dtype;
  part.scales_stride = stored.scales_stride;
  part.continues = group + step > 0;
  part.ends = stored.groups == groups && steps == steps_of(units);
  return part;
}

// Adds what a block's exceptions contribute to sums [rows][32] of activations, of which activation(row, column) is one.
template <class F>
void add_exceptions(const CompactEnd& end, std::int64_t rows, float* sums, F activation) {
  const float stood_for_it = bf16_to_float((bf16)(end.window << 7));
  for (std::uint32_t i = 0; i < end.exceptions; i++) {
    const CompactException e = end.list()[i];
    for (std::int64_t r = 0; r < rows; r++) {
      const float x = activation(r, e.column);
      float& sum = sums[r * BLOCK_OUTS + e.out];
      sum = __builtin_fmaf(x, bf16_to_float(e.weight), __builtin_fmaf(x, -stood_for_it, sum));
    }
  }
}

TileShapes shapes_for(std::int64_t rows) {
  const int first = rows < TILE_ROWS ? (int)rows : TILE_ROWS, second = (int)rows - first;
  TileShapes shapes;
  shapes.set(0, first), shapes.set(1, first), shapes.set(4, first);
  if (second) shapes.set(2, second), shapes.set(3, second), shapes.set(5, second);
  shapes.set(6, TILE_ROWS), shapes.set(7, TILE_ROWS);
  return shapes;
}

// Sums of the activations of each group [rows][groups] lie behind all rows.
float* sums_behind(const void* packed, std::int64_t rows, std::int64_t steps) {
  return (float*)packed + rows * steps * STEP_INS;
}

}  // namespace

std::int64_t exact_row_blocks(const PackedWeight&, std::int64_t rows) { return ceil_div(rows, ROWS); }

// Room for rows of float32, which a few are, for segments of experts differ; of many rows half of it stays untouched.
std::int64_t exact_input_bytes(const PackedWeight& w, std::int64_t rows) {
  return rows * (exact_row_bytes(w) + row_steps(layout_of(w)) * TILE_BYTES);
}

std::int64_t exact_row_bytes(const PackedWeight& w) {
  const Layout layout = layout_of(w);
  const std::int64_t sums = has_minima(w.format) ? layout.groups : 0;
  return row_steps(layout) * TILE_BYTES + sums * (std::int64_t)sizeof(float);
}

void exact_pack_input(const PackedWeight& w, const LinearInput& in, std::int64_t first_block, std::int64_t end_block,
                      void* packed) {
  const Layout layout = layout_of(w);
  const std::int64_t blocks = exact_row_blocks(w, in.rows), steps = row_steps(layout), of_group = steps / layout.groups;
  float* const sums = sums_behind(packed, in.rows, steps);
  for (std::int64_t b = first_block; b < end_block; b++) {
    const RowBlock rows = row_block(in.rows, blocks, b);
    for (std::int64_t i = rows.first; i < rows.first + rows.count; i++) {
      const bf16* const x = (const bf16*)in.x + (in.index ? in.index[i] : i) * in.stride;
      if (in.rows <= FEW)
        pack_row_of_few(x, w.ins, layout, (float*)packed + i * steps * STEP_INS);
      else
        pack_row(x, w.ins, layout, rows.count, (Unit*)packed + (rows.first * steps + i - rows.first) * STEP);
      if (!has_minima(w.format)) continue;
      float* const of_row = sums + i * layout.groups;
      std::memset(of_row, 0, layout.groups * sizeof(float));
      for_steps(x, w.ins, layout, [&](std::int64_t step, const bf16* numbers, std::int64_t count) {
        for (std::int64_t k = 0; k < count; k++) of_row[step / of_group] += bf16_to_float(numbers[k]);
      });
    }
  }
}

void exact_multiply_rows(const PackedWeight& w, std::int64_t e, const void* packed, std::int64_t rows,
                         std::int64_t first_rows, std::int64_t end_rows, std::int64_t first_block,
                         std::int64_t end_block, const LinearOutput& out) {
  constexpr std::int64_t AT_ONCE = 1 << 20;  // bytes of activations that pass by each block of outputs from the L2, ..
  constexpr std::int64_t FEWEST = 4;         // .. unless so few turns would read all weights once more
  const Layout layout = layout_of(w);
  const std::int64_t turns = end_rows - first_rows, steps = row_steps(layout);
  if (turns >= 2 * FEWEST && turns * ROWS * steps * TILE_BYTES > AT_ONCE && end_block - first_block > 1) {
    const std::int64_t middle = first_rows + turns / 2;
    exact_multiply_rows(w, e, packed, rows, first_rows, middle, first_block, end_block, out);
    exact_multiply_rows(w, e, packed, rows, middle, end_rows, first_block, end_block, out);
    return;
  }
  const Decoding& d = decoding_of(w.format, layout.groups);
  const Cut cut(d, layout, turns);
  const std::int64_t group_steps = steps / layout.groups;
  const float* const group_sums = sums_behind(packed, rows, steps);
  const std::int64_t blocks = exact_row_blocks(w, rows), block_words = layout.block_stride();
  float* const sums = (float*)thread_scratch(Scratch::sums, turns * ROWS * BLOCK_OUTS * sizeof(float));
  TileUse tiles;
  const FlushedToZero as_tiles_do;
  std::int64_t shaped = 0;  // rows that tiles have shapes for
  for (std::int64_t o = first_block; o < end_block; o++) {
    const Word* block = (const Word*)w.data + (e * layout.blocks + o) * block_words;
    Panel panel = panel_of(w, layout, block, 1);
    const CompactEnd* end = nullptr;
    if (w.format == WeightFormat::compact) {
      end = (const CompactEnd*)(block + block_words - layout.end_words);
      panel.window = (int)end->window;
    }
    if (rows <= FEW) {
      panel.sums = group_sums;
      d.multiply_few[rows - 1](panel, (const float*)packed, sums);
      const auto activation = [&](std::int64_t r, std::int64_t column) {
        return ((const float*)packed)[r * steps * STEP_INS + column];
      };
      if (end) add_exceptions(*end, rows, sums, activation);
      write_rows(sums, {0, rows}, o * BLOCK_OUTS, w.outs, out);
      continue;
    }
    for (std::int64_t g = 0; g < layout.groups; g += cut.groups)
      for (std::int64_t i = 0; i < group_steps; i += cut.steps) {
        const Part part = part_at(d, layout, panel, cut, g, i);
        for (std::int64_t turn = 0; turn < turns; turn++) {
          const RowBlock block_rows = row_block(rows, blocks, first_rows + turn);
          if (block_rows.count != shaped) tiles.shape(shapes_for(shaped = block_rows.count));
          const Unit* const x = (const Unit*)packed + block_rows.first * steps * STEP;
          float* const of_rows = sums + turn * ROWS * BLOCK_OUTS;
          const auto multiplies = block_rows.count > TILE_ROWS ? multiply_part<true> : multiply_part<false>;
          multiplies(d, part, x + (g * group_steps + i) * block_rows.count * STEP, block_rows.count,
                     group_sums + block_rows.first * layout.groups + g, layout.groups, of_rows);
          if (!part.ends) continue;
          const auto activation = [&](std::int64_t r, std::int64_t column) {
            const bf16* const step = (const bf16*)(x + (column / STEP_INS * block_rows.count + r) * STEP);
            return bf16_to_float(step[column % STEP_INS]);
          };
          if (end) add_exceptions(*end, block_rows.count, of_rows, activation);
          write_rows(of_rows, block_rows, o * BLOCK_OUTS, w.outs, out);
        }
      }
  }
}

}  // namespace latentkv::LATENTKV_ISA
