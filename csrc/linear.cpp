#include "linear.h"

#include <omp.h>

#include "compact.h"
#include "linear_exact.h"
#include "linear_int8.h"
#include "linear_panel.h"
#include "scratch.h"
#include "team.h"

namespace latentkv::LATENTKV_ISA {

namespace {

// Words that are read together, and how many weights of an output they hold.
struct Pack {
  std::int64_t words, ins;
};
Pack pack_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::bf16: return {1, 2};
    case WeightFormat::int8: return {1, 4};
    case WeightFormat::int4: return {1, 8};
    case WeightFormat::compact: return {COMPACT_WORDS, COMPACT_WEIGHTS};
    case WeightFormat::uint2: return {1, 16};
    case WeightFormat::uint4: return {1, 8};
    case WeightFormat::uint5: return {5, 32};
    case WeightFormat::int5: return {5, 32};
    case WeightFormat::int6: return {3, 16};
    case WeightFormat::fp4: return {1, 8};
    case WeightFormat::nl4: return {1, 8};
    case WeightFormat::fp8: return {1, 4};
  }
  return {};
}

}  // namespace

Layout layout_of(const PackedWeight& w) {
  const bool compact = w.format == WeightFormat::compact, scaled = !compact && w.format != WeightFormat::bf16;
  const Pack pack = pack_of(w.format);
  Layout layout;
  layout.blocks = ceil_div(w.outs, BLOCK_OUTS);
  layout.groups = scaled ? ceil_div(w.ins, w.group) : 1;
  const std::int64_t packs = ceil_div(scaled ? w.group : w.ins, pack.ins);
  layout.group_words = packs * pack.words;
  layout.scale_words = scaled ? BLOCK_OUTS * (w.scales == DType::f32 ? 2 : 1) * (has_minima(w.format) ? 2 : 1) / 2 : 0;
  layout.padded_ins = layout.groups * packs * pack.ins;
  layout.end_words = compact ? CompactEnd::num_words(w.group) : 0;
  return layout;
}

std::int64_t row_blocks(const PackedWeight& w, std::int64_t rows) {
  return w.rounds_input ? int8_row_blocks(rows) : exact_row_blocks(w, rows);
}

std::int64_t packed_input_bytes(const PackedWeight& w, std::int64_t rows) {
  return w.rounds_input ? int8_input_bytes(w, rows) : exact_input_bytes(w, rows);
}

std::int64_t packed_row_bytes(const PackedWeight& w) {
  return w.rounds_input ? int8_input_bytes(w, 1) : exact_row_bytes(w);
}

void pack_input(const PackedWeight& w, const LinearInput& in, std::int64_t first_block, std::int64_t end_block,
                void* packed) {
  (w.rounds_input ? int8_pack_input : exact_pack_input)(w, in, first_block, end_block, packed);
}

void multiply(const PackedWeight& w, std::int64_t e, const void* packed, std::int64_t rows, std::int64_t first_block,
              std::int64_t end_block, const LinearOutput& out) {
  multiply_rows(w, e, packed, rows, 0, row_blocks(w, rows), first_block, end_block, out);
}

void multiply_rows(const PackedWeight& w, std::int64_t e, const void* packed, std::int64_t rows,
                   std::int64_t first_rows, std::int64_t end_rows, std::int64_t first_block, std::int64_t end_block,
                   const LinearOutput& out) {
  const auto multiplies = w.rounds_input ? int8_multiply_rows : exact_multiply_rows;
  multiplies(w, e, packed, rows, first_rows, end_rows, first_block, end_block, out);
}

namespace {

constexpr std::int64_t SERIAL_PRODUCTS = 1 << 15;  // below, starting threads takes longer

// Hands out [0, n) in runs that get shorter towards the end: long ones stream through memory, and threads whose cores
// are busy with something else take fewer, so that all end at once.
class Runs {
 public:
  Runs(std::int64_t n, int threads) : n_(n), threads_(threads) {}

  // The next run; false where none is left.
  bool take(std::int64_t& first, std::int64_t& end) {
    first = __atomic_load_n(&next_, __ATOMIC_RELAXED);
    do {
      if (first == n_) return false;
      end = first + ceil_div(n_ - first, 2 * threads_);
    } while (!__atomic_compare_exchange_n(&next_, &first, end, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return true;
  }

 private:
  const std::int64_t n_;
  const int threads_;
  std::int64_t next_ = 0;
};

// The parts of the rows that outputs are multiplied by one after the other: several where a few blocks of outputs would
// not share out evenly.
std::int64_t row_parts(std::int64_t blocks, std::int64_t inputs, int threads) {
  constexpr std::int64_t ITEMS = 8;  // for each thread
  const std::int64_t parts = ceil_div(ITEMS * threads, blocks);
  return parts < inputs ? parts : inputs;
}

void linear(const PackedWeight& w, const LinearInput& in, const LinearOutput& out) {
  if (in.rows == 0) return;
  void* packed = thread_scratch(Scratch::team, packed_input_bytes(w, in.rows));
  const std::int64_t blocks = layout_of(w).blocks, inputs = row_blocks(w, in.rows);
  const bool serial = w.outs * w.ins * in.rows < SERIAL_PRODUCTS || blocks * inputs == 1;
  const int threads = serial ? 1 : omp_get_max_threads();
  const std::int64_t parts = row_parts(blocks, inputs, threads);
  Runs to_pack(inputs, threads), to_multiply(parts * blocks, threads);
#pragma omp parallel num_threads(threads) if (forks(threads > 1))
  {
    std::int64_t first, end;
    while (to_pack.take(first, end)) pack_input(w, in, first, end, packed);
#pragma omp barrier
    while (to_multiply.take(first, end))
      for (std::int64_t part = first / blocks; part * blocks < end; part++) {
        const std::int64_t from = part * blocks < first ? first - part * blocks : 0;
        const std::int64_t to = end < (part + 1) * blocks ? end - part * blocks : blocks;
        multiply_rows(w, 0, packed, in.rows, inputs * part / parts, inputs * (part + 1) / parts, from, to, out);
      }
  }
}

}  // namespace

const LinearKernels linear_kernels = {linear};

}  // namespace latentkv::LATENTKV_ISA
