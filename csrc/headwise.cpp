#include "headwise.h"

#include <omp.h>

#include "linear_inner.h"
#include "scratch.h"
#include "team.h"

namespace latentkv::LATENTKV_ISA {
namespace {

constexpr std::int64_t ROWS_AT_A_TIME = 512;        // which stay in the second-level cache, packed
constexpr std::int64_t SERIAL_PRODUCTS = 1 << 15;  // below, starting threads takes longer

LATENTKV_INLINE char* head_at(const Heads& x, std::int64_t token, std::int64_t head) {
  return (char*)x.data + (token * x.token_stride + head * x.head_stride) * (x.dtype == DType::f32 ? 4 : 2);
}

// Blocks first .. end - 1 of one head's outputs.
void multiply_head(const PackedWeight& w, Heads x, Heads out, std::int64_t tokens, std::int64_t head,
                   std::int64_t first, std::int64_t end) {
  for (std::int64_t t = 0; t < tokens; t += ROWS_AT_A_TIME) {
    const std::int64_t rows = tokens - t < ROWS_AT_A_TIME ? tokens - t : ROWS_AT_A_TIME;
    const LinearInput in = {head_at(x, t, head), x.dtype, rows, x.token_stride, nullptr};
    LinearOutput to{};
    to.y = head_at(out, t, head);
    to.dtype = out.dtype;
    to.stride = out.token_stride;
    char* packed = thread_scratch(Scratch::own, packed_input_bytes(w, rows));
    pack_input(w, in, 0, row_blocks(w, rows), packed);
    multiply(w, head, packed, rows, first, end, to);
  }
}

void linear(const PackedWeight& w, Heads x, Heads out, int tokens) {
  const std::int64_t blocks = ceil_div(w.outs, BLOCK_OUTS), items = w.count * blocks;
#pragma omp parallel if (forks(items * BLOCK_OUTS * w.ins * tokens >= SERIAL_PRODUCTS))
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    std::int64_t item = items * thread / threads;
    const std::int64_t last = items * (thread + 1) / threads;
    while (item < last) {
      const std::int64_t head = item / blocks, first = item % blocks;
      const std::int64_t end = first + last - item < blocks ? first + last - item : blocks;
      multiply_head(w, x, out, tokens, head, first, end);
      item += end - first;
    }
  }
}

}  // namespace

const HeadwiseKernels headwise = {linear};

}  // namespace latentkv::LATENTKV_ISA
