#include "linear_int8.h"

#include "linear_int8_tile.h"
#include "scratch.h"

namespace latentkv::LATENTKV_ISA {
namespace {

// All codes but those of fp8, whose products are no integers.
const Int8Product& product_with(WeightFormat format) {
  switch (format) {
    case WeightFormat::int4: return int8_product<CodeQuads<4, false>>;
    case WeightFormat::uint2: return int8_product<CodeQuads<2, true>>;
    case WeightFormat::uint4: return int8_product<CodeQuads<4, true>>;
    case WeightFormat::uint5: return int8_product<CodeQuads<5, true>>;
    case WeightFormat::int5: return int8_product<CodeQuads<5, false>>;
    case WeightFormat::int6: return int8_product<CodeQuads<6, false>>;
    case WeightFormat::fp4: return int8_product<TableQuads<Fp4Numbers>>;
    case WeightFormat::nl4: return int8_product<TableQuads<Nl4Numbers>>;
    default: return int8_product<Int8Quads>;
  }
}

// Words of a row: its quads, and of each run a scale and a sum.
std::int64_t row_words(const Layout& layout) {
  const std::int64_t codes = layout.padded_ins / layout.groups;
  return layout.groups * (codes / 4 + 2 * ceil_div(codes, RUN));
}

struct Rounded {
  float scale;
  std::int32_t sum;
  std::int8_t numbers[RUN];
};

// A run of activations as integers from -127 to 127 times a scale; NaN where one of them is not finite.
Rounded round_run(const float* x) {
  constexpr float LEAST = 1e-30f;  // below, 127 / largest might overflow: such numbers count as 0
  constexpr float NEAREST = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  Rounded run = {};
  vf largest{}, not_finite{};
  for (int i = 0; i < RUN; i += W) {
    const vf v = load(x + i);
    largest = maximum(largest, v < 0.0f ? -v : v);
    not_finite += v * 0.0f;
  }
  const float most = max_of(largest);
  run.scale = sum(not_finite) == 0 ? most / 127 : __builtin_nanf("");
  if (!(most >= LEAST) || run.scale != run.scale) {
    if (run.scale == run.scale) run.scale = 0;
    return run;
  }
  const float factor = 127 / most;
  vi sums{};
  for (int i = 0; i < RUN; i += W) {
    const vi numbers = (vi)(load(x + i) * factor + NEAREST) - 0x4b400000;
    const vb bytes = __builtin_convertvector(numbers, vb);
    std::memcpy(run.numbers + i, &bytes, sizeof bytes);
    sums += numbers;
  }
  for (int k = 0; k < W; k++) run.sum += sums[k];
  return run;
}

void load_run(const void* row, DType dtype, std::int64_t first, int count, float* x) {
  int i = 0;
  for (; i + W <= count; i += W) store(x + i, load_any(row, dtype, first + i));
  for (; i < count; i++) x[i] = load_one(row, dtype, first + i);
  for (; i < RUN; i++) x[i] = 0;
}

// One of a block of `rows` rows, to words that lie `rows` apart.
void pack_row(const void* row, DType dtype, std::int64_t ins, const Layout& layout, const Int8Product& product, int rows,
              Word* out) {
  const std::int64_t group = layout.padded_ins / layout.groups;
  for (std::int64_t g = 0; g < layout.groups; g++)
    for (std::int64_t begin = 0; begin < group; begin += RUN) {
      const std::int64_t first = g * group + begin, inside = ins - first;  // beyond is padding
      const int codes = group - begin < RUN ? (int)(group - begin) : RUN;
      alignas(64) float x[RUN];
      load_run(row, dtype, first, inside < 0 ? 0 : inside < codes ? (int)inside : codes, x);
      const Rounded run = round_run(x);
      for (int quad = 0; quad < codes / 4; quad++, out += rows) {
        Word word = 0;
        for (int byte = 0; byte < 4; byte++)
          word |= (Word)(std::uint8_t)run.numbers[product.order[4 * quad + byte]] << (8 * byte);
        *out = word;
      }
      out[0] = __builtin_bit_cast(Word, run.scale);
      out[rows] = product.is_lifted ? (Word)run.sum : __builtin_bit_cast(Word, run.scale * (float)run.sum);
      out += 2 * rows;
    }
}

// The same panel with a word for each quad.
Panel decode(const Int8Product& product, const Panel& panel) {
  Panel decoded = panel;
  decoded.group_words = panel.group_words / product.pack_words * product.pack_codes / 4;
  decoded.words_stride = decoded.group_words * BLOCK_OUTS;
  Word* const quads = (Word*)thread_scratch(Scratch::panel, panel.groups * decoded.words_stride * sizeof(Word));
  product.decode(panel, quads);
  decoded.words = quads;
  return decoded;
}

}  // namespace

std::int64_t int8_row_blocks(std::int64_t rows) { return ceil_div(rows, INT8_ROWS); }

std::int64_t int8_input_bytes(const PackedWeight& w, std::int64_t rows) {
  return rows * row_words(layout_of(w)) * (std::int64_t)sizeof(Word);
}

void int8_pack_input(const PackedWeight& w, const LinearInput& in, std::int64_t first_block, std::int64_t end_block,
                     void* packed) {
  const Layout layout = layout_of(w);
  const Int8Product& product = product_with(w.format);
  const std::int64_t row_bytes = in.stride * (in.dtype == DType::f32 ? 4 : 2);
  for (std::int64_t b = first_block; b < end_block; b++) {
    const RowBlock rows = row_block(in.rows, int8_row_blocks(in.rows), b);
    Word* const out = (Word*)packed + rows.first * row_words(layout);
    for (std::int64_t i = 0; i < rows.count; i++) {
      const std::int64_t row = in.index ? in.index[rows.first + i] : rows.first + i;
      pack_row((const char*)in.x + row * row_bytes, in.dtype, w.ins, layout, product, (int)rows.count, out + i);
    }
  }
}

void int8_multiply_rows(const PackedWeight& w, std::int64_t e, const void* packed, std::int64_t rows,
                        std::int64_t first_rows, std::int64_t end_rows, std::int64_t first_block,
                        std::int64_t end_block, const LinearOutput& out) {
  constexpr std::int64_t AT_ONCE = 1 << 20;  // bytes of activations that pass by each block of outputs
  constexpr std::int64_t FEWEST = 4;         // turns, that all weights are read for once more
  constexpr std::int64_t WORTH_DECODING = 3;  // turns
  const Layout layout = layout_of(w);
  const std::int64_t turns = end_rows - first_rows, blocks = int8_row_blocks(rows), words_of_row = row_words(layout);
  const std::int64_t bytes = turns * INT8_ROWS * words_of_row * (std::int64_t)sizeof(Word);
  if (turns >= 2 * FEWEST && bytes > AT_ONCE && end_block - first_block > 1) {
    const std::int64_t middle = first_rows + turns / 2;
    int8_multiply_rows(w, e, packed, rows, first_rows, middle, first_block, end_block, out);
    int8_multiply_rows(w, e, packed, rows, middle, end_rows, first_block, end_block, out);
    return;
  }
  const Int8Product& product = product_with(w.format);
  const bool decodes = turns >= WORTH_DECODING && product.tiles_of_quads;
  const Int8Tile* const tiles = decodes ? product.tiles_of_quads : product.tiles;
  const Word* const units = (const Word*)packed;
  const std::int64_t fetches = fetching_turns(turns), block_words = layout.block_stride();
  float* const sums = (float*)thread_scratch(Scratch::sums, INT8_ROWS * BLOCK_OUTS * sizeof(float));
  for (std::int64_t o = first_block; o < end_block; o++) {
    const Word* block = (const Word*)w.data + (e * layout.blocks + o) * block_words;
    const Panel stored = panel_of(w, layout, block, fetches);
    const std::int64_t words = words_in(stored);
    Panel panel = decodes ? decode(product, stored) : stored;
    for (std::int64_t turn = 0; turn < turns; turn++) {
      const RowBlock block_rows = row_block(rows, blocks, first_rows + turn);
      panel.ahead = ahead_of(w.format, stored.words, stored.words + block_words, words, turn, turns, fetches);
      tiles[block_rows.count - 1](panel, units + block_rows.first * words_of_row, sums);
      write_rows(sums, block_rows, o * BLOCK_OUTS, w.outs, out);
    }
  }
}

}  // namespace latentkv::LATENTKV_ISA
