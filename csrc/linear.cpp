#include "linear.h"

#include <omp.h>

#include "linear_inner.h"
#include "linear_tile.h"
#include "scratch.h"

namespace latentkv::LATENTKV_ISA {

namespace {

// Rows of float32 become two rows of bf16, high and low parts, where units are bf16: about 16 bits of each number.
LATENTKV_INLINE int planes(DType x) { return UNIT == 2 && x == DType::f32 ? 2 : 1; }

// Block b of all blocks of rows: as equal as can be, so that no block is nearly empty.
struct RowBlock {
  std::int64_t first, count;
};
LATENTKV_INLINE RowBlock row_block(std::int64_t rows, std::int64_t blocks, std::int64_t b) {
  const std::int64_t size = rows / blocks, larger = rows % blocks;
  return {b * size + (b < larger ? b : larger), size + (b < larger)};
}

LATENTKV_INLINE std::int64_t units_of(const Layout& layout) { return layout.padded_ins / UNIT; }

// One row into lane `lane` of a block of packed rows, `lanes` units apart; zeros where weights are padded.
void pack_row(const void* x, DType dtype, std::int64_t ins, std::int64_t padded_ins, Unit* out, int lanes) {
#if defined(__AVX512BF16__)
  for (std::int64_t i = 0; i < padded_ins / 2; i++, out += lanes) {
    Unit parts[2] = {0, 0};
    for (int half = 0; half < 2; half++) {
      const std::int64_t k = 2 * i + half;
      if (k >= ins) break;
      if (dtype == DType::bf16) {
        parts[0] |= (Unit)((const bf16*)x)[k] << (16 * half);
      } else {
        const float value = ((const float*)x)[k];
        const bf16 high = float_to_bf16(value);
        parts[0] |= (Unit)high << (16 * half);
        parts[1] |= (Unit)float_to_bf16(value - bf16_to_float(high)) << (16 * half);
      }
    }
    for (int p = 0; p < planes(dtype); p++) out[p] = parts[p];
  }
#else
  for (std::int64_t k = 0; k < padded_ins; k++) out[k * lanes] = k < ins ? load_one(x, dtype, k) : 0;
#endif
}

// One block's sums [planes * rows][32] to rows of results.
void write_rows(const float* sums, int planes, RowBlock rows, std::int64_t out, std::int64_t outs, const LinearOutput& to) {
  const int valid = outs - out < BLOCK_OUTS ? (int)(outs - out) : BLOCK_OUTS;
  for (std::int64_t r = rows.first; r < rows.first + rows.count; r++, sums += planes * BLOCK_OUTS) {
    const std::int64_t y = r * to.stride + out, residual = r * to.residual_stride + out;
    alignas(64) float row[BLOCK_OUTS];
    for (int o = 0; o < BLOCK_OUTS; o += W)
      store(row + o, planes == 2 ? load(sums + o) + load(sums + BLOCK_OUTS + o) : load(sums + o));
    int o = 0;
    for (; o + W <= valid; o += W) {
      vf value = load(row + o);
      if (to.bias) value += load_any(to.bias, to.bias_dtype, out + o);
      if (to.residual) value += load_any(to.residual, to.residual_dtype, residual + o);
      store_any(to.y, to.dtype, y + o, value);
    }
    for (; o < valid; o++) {
      float value = row[o];
      if (to.bias) value += load_one(to.bias, to.bias_dtype, out + o);
      if (to.residual) value += load_one(to.residual, to.residual_dtype, residual + o);
      store_one(to.y, to.dtype, y + o, value);
    }
  }
}

struct Kernel {
  const Tile* fused;  // decode in registers
  void (*decode)(const Panel&, std::int64_t, Word*);
  int units;  // of a word
};
template <class Decoder>
constexpr Kernel kernel_of = {Tiles<Decoder, MAX_ROWS>::for_rows, decode_group<Decoder>, Decoder::units};

const Kernel& kernel_for(WeightFormat format) {
  switch (format) {
    case WeightFormat::int8: return kernel_of<Int8Words>;
    case WeightFormat::int4: return kernel_of<Int4Words>;
    default: return kernel_of<Bf16Words>;
  }
}

// A block of outputs; what is fetched meanwhile is AHEAD bytes further on.
Panel panel_of(const Layout& layout, const Word* block) {
  constexpr std::int64_t AHEAD = 4096;
  Panel panel = {};
  panel.words = block + layout.scale_words;
  panel.groups = layout.groups * layout.parts;
  panel.group_words = layout.group_words / layout.parts;
  panel.words_stride = layout.parts > 1 ? panel.group_words * BLOCK_OUTS : layout.group_stride();
  panel.scales_stride = layout.parts > 1 ? 0 : 2 * layout.group_stride();
  if (layout.scale_words) panel.scales = (const bf16*)block;
  panel.ahead = (const char*)panel.words + AHEAD;
  panel.ahead_step = BLOCK_OUTS * sizeof(Word);
  panel.ahead_stride = panel.words_stride * sizeof(Word);
  return panel;
}

struct Rows {  // packed
  const Unit* units;
  std::int64_t rows, blocks, row_units;
  int planes;
};

// Each block of rows reads the weights of the block of outputs again, from the cache, while the next is fetched.
void multiply_fused(const Kernel& kernel, Panel panel, std::int64_t bytes, const Rows& in, std::int64_t o, std::int64_t outs,
                    const LinearOutput& out) {
  if (in.blocks > 1) panel.ahead_step /= in.blocks;
  for (std::int64_t b = 0; b < in.blocks; b++) {
    const RowBlock rows = row_block(in.rows, in.blocks, b);
    alignas(64) float sums[MAX_ROWS * BLOCK_OUTS] = {};
    if (in.blocks > 1) panel.ahead = (const char*)panel.words + bytes + bytes * b / in.blocks;
    kernel.fused[rows.count * in.planes - 1](panel, in.units + rows.first * in.planes * in.row_units, sums);
    write_rows(sums, in.planes, rows, o, outs, out);
  }
}

// Each group is decoded once, into the first-level cache, for all rows.
void multiply_decoded(const Kernel& kernel, const Panel& panel, const Rows& in, std::int64_t o, std::int64_t outs,
                      const LinearOutput& out) {
  const std::int64_t group_units = panel.group_words * kernel.units, packed_rows = in.rows * in.planes;
  Word* decoded = (Word*)thread_scratch(Scratch::weights, (group_units + packed_rows) * BLOCK_OUTS * sizeof(Word));
  float* sums = (float*)(decoded + group_units * BLOCK_OUTS);
  std::memset(sums, 0, packed_rows * BLOCK_OUTS * sizeof(float));
  for (std::int64_t g = 0; g < panel.groups; g++) {
    kernel.decode(panel, g, decoded);
    Panel group = {decoded, panel.scales ? panel.scales + g * panel.scales_stride : nullptr, 1, group_units, 0, 0, (const char*)decoded, 0, 0};
    for (std::int64_t b = 0; b < in.blocks; b++) {
      const RowBlock rows = row_block(in.rows, in.blocks, b);
      const std::int64_t first = rows.first * in.planes, count = rows.count * in.planes;
      const Unit* x = in.units + first * in.row_units + g * group_units * count;
      Tiles<UnitWords, MAX_ROWS>::for_rows[count - 1](group, x, sums + first * BLOCK_OUTS);
    }
  }
  for (std::int64_t b = 0; b < in.blocks; b++) {
    const RowBlock rows = row_block(in.rows, in.blocks, b);
    write_rows(sums + rows.first * in.planes * BLOCK_OUTS, in.planes, rows, o, outs, out);
  }
}

// Decoding once, to memory, pays when more than a few rows use it; bf16 is next to free to decode.
bool decodes_first(WeightFormat format, std::int64_t packed_rows) {
  return packed_rows > FUSED_ROWS && format != WeightFormat::bf16;
}

}  // namespace

Layout layout_of(const PackedWeight& w) {
  constexpr std::int64_t PART_INS = 128;
  const std::int64_t word_ins = w.format == WeightFormat::bf16 ? 2 : w.format == WeightFormat::int8 ? 4 : 8;
  const bool scaled = w.format != WeightFormat::bf16;
  Layout layout;
  layout.blocks = ceil_div(w.outs, BLOCK_OUTS);
  layout.groups = scaled ? ceil_div(w.ins, w.group) : 1;
  layout.group_words = ceil_div(scaled ? w.group : w.ins, word_ins);
  layout.parts = scaled && layout.groups == 1 ? ceil_div(layout.group_words * word_ins, PART_INS) : 1;
  layout.group_words = ceil_div(layout.group_words, layout.parts) * layout.parts;
  layout.scale_words = scaled ? BLOCK_OUTS / 2 : 0;
  layout.padded_ins = layout.groups * layout.group_words * word_ins;
  return layout;
}

std::int64_t row_blocks(DType x, std::int64_t rows) { return ceil_div(rows * planes(x), MAX_ROWS); }

std::int64_t packed_input_bytes(const PackedWeight& w, DType x, std::int64_t rows) {
  return rows * planes(x) * units_of(layout_of(w)) * (std::int64_t)sizeof(Unit);
}

void pack_input(const PackedWeight& w, const LinearInput& in, std::int64_t first_block, std::int64_t end_block, void* packed) {
  const Layout layout = layout_of(w);
  const std::int64_t blocks = row_blocks(in.dtype, in.rows);
  const int size = in.dtype == DType::f32 ? 4 : 2, per_row = planes(in.dtype);
  for (std::int64_t b = first_block; b < end_block; b++) {
    const RowBlock rows = row_block(in.rows, blocks, b);
    Unit* block = (Unit*)packed + rows.first * per_row * units_of(layout);
    for (std::int64_t i = 0; i < rows.count; i++) {
      const std::int64_t row = in.index ? in.index[rows.first + i] : rows.first + i;
      const char* x = (const char*)in.x + row * in.stride * size;
      pack_row(x, in.dtype, w.ins, layout.padded_ins, block + i * per_row, (int)rows.count * per_row);
    }
  }
}

void multiply(const PackedWeight& w, std::int64_t e, const void* packed, DType x, std::int64_t rows,
              std::int64_t first_block, std::int64_t end_block, const LinearOutput& out) {
  const Layout layout = layout_of(w);
  const Kernel& kernel = kernel_for(w.format);
  const Rows in = {(const Unit*)packed, rows, row_blocks(x, rows), units_of(layout), planes(x)};
  const Word* matrix = (const Word*)w.data + e * layout.blocks * layout.block_stride();
  const bool decode = decodes_first(w.format, rows * in.planes);
  for (std::int64_t o = first_block; o < end_block; o++) {
    const Panel panel = panel_of(layout, matrix + o * layout.block_stride());
    if (decode)
      multiply_decoded(kernel, panel, in, o * BLOCK_OUTS, w.outs, out);
    else
      multiply_fused(kernel, panel, layout.block_stride() * sizeof(Word), in, o * BLOCK_OUTS, w.outs, out);
  }
}

namespace {

constexpr std::int64_t SERIAL_PRODUCTS = 1 << 15;  // below, starting threads takes longer

struct Shares {  // of n things, those of one thread
  std::int64_t first, end;
};
LATENTKV_INLINE Shares share(std::int64_t n, int thread, int threads) { return {n * thread / threads, n * (thread + 1) / threads}; }

void linear(const PackedWeight& w, const LinearInput& in, const LinearOutput& out) {
  if (in.rows == 0) return;
  void* packed = thread_scratch(Scratch::team, packed_input_bytes(w, in.dtype, in.rows));
  const std::int64_t blocks = layout_of(w).blocks, inputs = row_blocks(in.dtype, in.rows);
  const bool serial = w.outs * w.ins * in.rows < SERIAL_PRODUCTS || blocks == 1;
  if (inputs == 1) pack_input(w, in, 0, 1, packed);
#pragma omp parallel if (!serial)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    if (inputs > 1) {
      const Shares mine = share(inputs, thread, threads);
      pack_input(w, in, mine.first, mine.end, packed);
#pragma omp barrier
    }
    const Shares mine = share(blocks, thread, threads);
    multiply(w, 0, packed, in.dtype, in.rows, mine.first, mine.end, out);
  }
}

}  // namespace

const LinearKernels linear_kernels = {linear};

}  // namespace latentkv::LATENTKV_ISA
