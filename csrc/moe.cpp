#include "moe.h"

#include <omp.h>

#include "linear_inner.h"
#include "rows.h"
#include "scratch.h"
#include "team.h"

namespace latentkv::LATENTKV_ISA {
namespace {

LATENTKV_INLINE std::int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// The temporaries of a call, one after the other in the team's scratch.
struct Temporaries {
  char* x;          // packed rows
  char* inner;      // [rows, I]
  char* packed;     // the same, packed
  float* products;  // [rows, D], where they are still to be added
};

Temporaries allocate(const GatedProducts& p) {
  const auto whole_lines = [](std::int64_t bytes) { return (bytes + 63) / 64 * 64; };
  const std::int64_t x = whole_lines(packed_input_bytes(p.gate_up, p.rows));
  const std::int64_t inner = whole_lines(p.rows * p.down.ins * size_of(p.x.dtype));
  const std::int64_t packed = whole_lines(packed_input_bytes(p.down, p.rows));
  const std::int64_t products = p.row_of_choice ? p.rows * p.down.outs * 4 : 0;
  char* base = thread_scratch(Scratch::team, x + inner + packed + products);
  return {base, base + x, base + x + inner, (float*)(base + x + inner + packed)};
}

LinearInput rows_of(const GatedProducts& p, const Segment& s) {
  LinearInput in = p.x;
  in.rows = s.rows;
  if (p.row_of_choice) {
    in.index = p.token_of_row + s.first;
  } else {
    in.x = (const char*)p.x.x + s.first * p.x.stride * size_of(p.x.dtype);
  }
  return in;
}

LinearInput inner_of(const GatedProducts& p, const Temporaries& t, const Segment& s) {
  const std::int64_t inner = p.down.ins;
  return {t.inner + s.first * inner * size_of(p.x.dtype), p.x.dtype, s.rows, inner, nullptr};
}

// Packs the segments' rows, block by block in turn over the threads.
template <class InputOf>
void pack_rows(const GatedProducts& p, const PackedWeight& w, InputOf input_of, char* packed) {
  const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
  int turn = 0;
  for (std::int64_t i = 0; i < p.num_segments; i++) {
    const Segment& s = p.segments[i];
    const LinearInput in = input_of(s);
    for (std::int64_t b = 0; b < row_blocks(w, in.rows); b++)
      if (turn++ % threads == thread) pack_input(w, in, b, b + 1, packed + packed_input_bytes(w, s.first));
  }
}

// Outputs from `out` (the first of a block) on, at most `width` of them, into rows [width] of float32.
void multiply_into(float* rows, int width, const PackedWeight& w, const Segment& s, const char* packed, std::int64_t out,
                   std::int64_t end) {
  LinearOutput to{};
  to.y = rows - out;  // `multiply` counts from the matrix' output 0
  to.dtype = DType::f32;
  to.stride = width;
  multiply(w, s.expert, packed, s.rows, out / BLOCK_OUTS, ceil_div(end, BLOCK_OUTS), to);
}

// 32 columns of a segment's intermediate.
void activate(const GatedProducts& p, const Temporaries& t, const Segment& s, std::int64_t block) {
  const std::int64_t inner = p.down.ins, column = block * BLOCK_OUTS, up = inner + column;
  const int valid = inner - column < BLOCK_OUTS ? (int)(inner - column) : BLOCK_OUTS;
  const int skipped = (int)(up % BLOCK_OUTS);  // where the gate does not end with a block
  float* gates = (float*)thread_scratch(Scratch::own, s.rows * 3 * BLOCK_OUTS * sizeof(float));
  float* ups = gates + s.rows * BLOCK_OUTS;
  const char* packed = t.x + packed_input_bytes(p.gate_up, s.first);
  multiply_into(gates, BLOCK_OUTS, p.gate_up, s, packed, column, column + valid);
  multiply_into(ups, 2 * BLOCK_OUTS, p.gate_up, s, packed, up - skipped, up + valid);
  for (std::int64_t r = 0; r < s.rows; r++) {
    float* gate = gates + r * BLOCK_OUTS;
    const float* row_up = ups + r * 2 * BLOCK_OUTS + skipped;
    if (p.limit > 0)
      for (int i = 0; i < BLOCK_OUTS; i += W)
        store(gate + i, limited_silu_mul(load(gate + i), load(row_up + i), p.limit, p.bounds_gate));
    else
      for (int i = 0; i < BLOCK_OUTS; i += W) store(gate + i, silu_mul(load(gate + i), load(row_up + i)));
    convert_row(gate, DType::f32, valid, t.inner + ((s.first + r) * inner + column) * size_of(p.x.dtype), p.x.dtype);
  }
}

// 32 columns of a segment's products.
void project(const GatedProducts& p, const Temporaries& t, const Segment& s, std::int64_t block) {
  LinearOutput to = p.out;
  if (p.row_of_choice) {
    to = {t.products + s.first * p.down.outs, DType::f32, p.down.outs, nullptr, DType::f32, nullptr, DType::f32, 0};
  } else {
    to.y = (char*)p.out.y + s.first * p.out.stride * size_of(p.out.dtype);
    if (to.residual) to.residual = (const char*)p.out.residual + s.first * p.out.residual_stride * size_of(p.out.residual_dtype);
  }
  const char* packed = t.packed + packed_input_bytes(p.down, s.first);
  multiply(p.down, s.expert, packed, s.rows, block, block + 1, to);
}

// A token's result: what its choices give in their order, added in float32 and rounded once.
void combine(const GatedProducts& p, const Temporaries& t, std::int64_t token) {
  const std::int64_t outs = p.down.outs;
  const LinearOutput& to = p.out;
  const std::int32_t* rows = p.row_of_choice + token * p.chosen;
  const float* weights = p.weights + token * p.chosen;
  std::int64_t o = 0;
  for (; o + W <= outs; o += W) {
    vf sum = to.residual ? load_any(to.residual, to.residual_dtype, token * to.residual_stride + o) : vf{};
    for (std::int64_t k = 0; k < p.chosen; k++) {
      const vf given =
          rows[k] < 0 ? load_any(p.x.x, p.x.dtype, token * p.x.stride + o) : load(t.products + rows[k] * outs + o);
      sum = multiply_add(given, splat(weights[k]), sum);
    }
    store_any(to.y, to.dtype, token * to.stride + o, sum);
  }
  for (; o < outs; o++) {
    float sum = to.residual ? load_one(to.residual, to.residual_dtype, token * to.residual_stride + o) : 0;
    for (std::int64_t k = 0; k < p.chosen; k++) {
      const float given =
          rows[k] < 0 ? load_one(p.x.x, p.x.dtype, token * p.x.stride + o) : t.products[rows[k] * outs + o];
      sum = __builtin_fmaf(given, weights[k], sum);
    }
    store_one(to.y, to.dtype, token * to.stride + o, sum);
  }
}

// Blocks that a thread takes at a time: runs, because their weights lie together, but short enough that all end at once.
std::int64_t run_of(std::int64_t items) {
  const std::int64_t run = items / (8 * omp_get_num_threads());
  return run < 1 ? 1 : run;
}

constexpr std::int64_t SERIAL_PRODUCTS = 1 << 15;  // below, starting threads takes longer

void gated(const GatedProducts& p) {
  const Temporaries t = allocate(p);
  const std::int64_t inner_blocks = ceil_div(p.down.ins, BLOCK_OUTS), out_blocks = ceil_div(p.down.outs, BLOCK_OUTS);
  const std::int64_t inner_items = p.num_segments * inner_blocks, out_items = p.num_segments * out_blocks;
#pragma omp parallel if (forks(p.rows * p.down.ins * p.down.outs >= SERIAL_PRODUCTS))
  {
    pack_rows(p, p.gate_up, [&](const Segment& s) { return rows_of(p, s); }, t.x);
#pragma omp barrier
#pragma omp for schedule(dynamic, run_of(inner_items))
    for (std::int64_t i = 0; i < inner_items; i++)
      activate(p, t, p.segments[i / inner_blocks], i % inner_blocks);
    pack_rows(p, p.down, [&](const Segment& s) { return inner_of(p, t, s); }, t.packed);
#pragma omp barrier
#pragma omp for schedule(dynamic, run_of(out_items))
    for (std::int64_t i = 0; i < out_items; i++)
      project(p, t, p.segments[i / out_blocks], i % out_blocks);
    if (p.row_of_choice) {
#pragma omp for schedule(static)
      for (std::int64_t token = 0; token < p.x.rows; token++) combine(p, t, token);
    }
  }
}

std::int64_t row_bytes(const GatedProducts& p) {
  const std::int64_t packed = packed_row_bytes(p.gate_up) + packed_row_bytes(p.down);
  return packed + p.down.ins * size_of(p.x.dtype) + p.down.outs * (std::int64_t)sizeof(float);
}

}  // namespace

const MoeKernels moe = {gated, row_bytes};

}  // namespace latentkv::LATENTKV_ISA
