// Python's way to recurrent layers. Strides are in elements.
#include <nanobind/nanobind.h>

#include "kda.h"
#include "lightning.h"
#include "recording.h"

namespace nb = nanobind;

namespace latentkv {

using Address = std::uintptr_t;

std::int64_t first_unfit(const SlotBatch& batch, std::int64_t rows, std::int64_t slots, std::int64_t most) {
  for (int b = 0; b < batch.sequences; b++) {
    const std::int64_t first = batch.q_start[b], count = batch.q_start[b + 1] - first, slot = batch.slot_ids[b];
    const bool fits = first >= 0 && count >= 0 && first + count <= rows && slot >= 0 && slot < slots &&
                      batch.pending[b] >= 0 && batch.pending[b] <= most && batch.committed[b] >= 0 &&
                      batch.committed[b] <= count && count - batch.committed[b] <= most;
    if (!fits) return b;
    for (int other = 0; other < b; other++)
      if (batch.slot_ids[other] == slot) return b;
  }
  return -1;
}

void bind_recurrent(nb::module_& m) {
  m.def(
      "kda_attend",
      recordable(+[](Isa isa, Address qkv, std::ptrdiff_t qkv_stride, Address gate, std::ptrdiff_t gate_stride, Address beta,
                     std::ptrdiff_t beta_stride, Address output_gate, std::ptrdiff_t output_gate_stride, int dtype,
                     Address taps, Address log_rate, Address gate_bias, Address norm, int norm_dtype, double eps,
                     bool bounded, double lower_bound, Address matrices, Address inputs, Address waiting_qkv,
                     Address waiting_gate, Address waiting_beta, std::int64_t slots, std::int64_t most, Address q_start, Address stop, Address slot_ids,
                     Address pending, Address committed, int sequences, Address out, std::int64_t rows, int heads,
                     int dim) -> std::int64_t {
        const auto matrix = [&](Address data, std::ptrdiff_t stride) {
          return Matrix{reinterpret_cast<void*>(data), stride, static_cast<DType>(dtype)};
        };
        const auto numbers = [](Address data) { return reinterpret_cast<float*>(data); };
        const auto indices = [](Address data) { return reinterpret_cast<const std::int32_t*>(data); };
        const KdaWeights weights = {numbers(taps), numbers(log_rate), numbers(gate_bias),
                                    reinterpret_cast<const void*>(norm), static_cast<DType>(norm_dtype), (float)eps,
                                    bounded, (float)lower_bound};
        const KdaState state = {numbers(matrices),     numbers(inputs),       numbers(waiting_qkv),
                                numbers(waiting_gate), numbers(waiting_beta), slots, most};
        const SlotBatch batch = {indices(q_start), indices(stop), indices(slot_ids), indices(pending),
                                indices(committed), sequences};
        const std::int64_t bad = first_unfit(batch, rows, slots, most);
        if (bad >= 0) return bad;
        kda(isa).attend(weights, {matrix(qkv, qkv_stride), matrix(gate, gate_stride), matrix(beta, beta_stride)},
                        matrix(output_gate, output_gate_stride), state, batch, matrix(out, (std::ptrdiff_t)heads * dim),
                        heads, dim);
        return -1;
      }),
      nb::call_guard<nb::gil_scoped_release>(), "The first sequence whose slot or rows there are not, or -1.");
  m.def(
      "lightning_attend",
      recordable(+[](Isa isa, Address qkv, std::ptrdiff_t qkv_stride, Address gate, std::ptrdiff_t gate_stride, int dtype,
                     Address cos, Address sin, int half, Address log_decay, Address query_norm, Address key_norm,
                     Address output_norm, int norm_dtype, double eps, int groups, Address matrices, Address waiting,
                     std::int64_t slots, std::int64_t most, Address q_start, Address stop, Address slot_ids,
                     Address pending, Address committed, int sequences, Address heads_out, Address out,
                     std::int64_t rows, int heads, int dim) -> std::int64_t {
        const auto matrix = [&](Address data, std::ptrdiff_t stride) {
          return Matrix{reinterpret_cast<void*>(data), stride, static_cast<DType>(dtype)};
        };
        const auto weights_at = [](Address data) { return reinterpret_cast<const void*>(data); };
        const auto numbers = [](Address data) { return reinterpret_cast<float*>(data); };
        const auto indices = [](Address data) { return reinterpret_cast<const std::int32_t*>(data); };
        const LightningWeights weights = {numbers(log_decay),      weights_at(query_norm),         weights_at(key_norm),
                                          weights_at(output_norm), static_cast<DType>(norm_dtype), (float)eps, groups};
        const LightningState state = {numbers(matrices), numbers(waiting), slots, most};
        const SlotBatch batch = {indices(q_start), indices(stop), indices(slot_ids), indices(pending),
                                 indices(committed), sequences};
        const std::int64_t bad = first_unfit(batch, rows, slots, most);
        if (bad >= 0) return bad;
        lightning(isa).attend(weights, matrix(qkv, qkv_stride), matrix(gate, gate_stride), numbers(cos), numbers(sin),
                              half, state, batch, numbers(heads_out), matrix(out, (std::ptrdiff_t)heads * dim), rows,
                              heads, dim);
        return -1;
      }),
      nb::call_guard<nb::gil_scoped_release>(), "The first sequence whose slot or rows there are not, or -1.");
}

}  // namespace latentkv
