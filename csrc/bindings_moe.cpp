// Python's way to gated MLPs, routed experts and the projections of single heads. Strides are in elements.
#include <nanobind/nanobind.h>

#include <algorithm>

#include "headwise.h"
#include "recording.h"
#include "router.h"
#include "routing.h"

namespace nb = nanobind;

namespace latentkv {
namespace {

using Address = std::uintptr_t;

// Temporaries of the rows computed at a time; weights are read once for so many.
constexpr std::int64_t BYTES_AT_A_TIME = 128 << 20;

LinearOutput output(Address y, std::int64_t stride, int dtype, Address residual, int residual_dtype) {
  LinearOutput out{};
  out.y = reinterpret_cast<void*>(y);
  out.dtype = static_cast<DType>(dtype);
  out.stride = stride;
  out.residual = reinterpret_cast<const void*>(residual);
  out.residual_dtype = static_cast<DType>(residual_dtype);
  out.residual_stride = stride;
  return out;
}

void* skip_rows(const void* data, std::int64_t rows, std::int64_t stride, DType dtype) {
  char* begin = static_cast<char*>(const_cast<void*>(data));
  return begin ? begin + rows * stride * (dtype == DType::f32 ? 4 : 2) : nullptr;
}

// Computes as many tokens at a time as keep temporaries bounded: sort(first, p) says which rows of which experts p's
// tokens from `first` on are.
template <class F>
void in_passes(Isa isa, const GatedProducts& all, F sort) {
  const MoeKernels& kernels = moe(multiplying(isa, all.x.dtype, all.gate_up.rounds_input && all.down.rounds_input));
  const std::int64_t most = std::max<std::int64_t>(1, BYTES_AT_A_TIME / (kernels.row_bytes(all) * all.chosen));
  const std::int64_t passes = (all.x.rows + most - 1) / most;
  for (std::int64_t i = 0; i < passes; i++) {
    const std::int64_t first = all.x.rows * i / passes, end = all.x.rows * (i + 1) / passes;
    GatedProducts p = all;
    p.x.rows = end - first;
    p.x.x = skip_rows(p.x.x, first, p.x.stride, p.x.dtype);
    p.out.y = skip_rows(p.out.y, first, p.out.stride, p.out.dtype);
    p.out.residual = skip_rows(p.out.residual, first, p.out.residual_stride, p.out.residual_dtype);
    sort(first, p);
    kernels.gated(p);
  }
}

Routing& routing() {
  static thread_local Routing routing;
  return routing;
}

}  // namespace

void bind_moe(nb::module_& m) {
  m.def(
      "select_experts",
      recordable(+[](Address logits, Address bias, std::int64_t tokens, std::int64_t experts, std::int64_t chosen,
                     bool softmax, std::int64_t groups, std::int64_t kept_groups, float excluded, bool group_max, bool normalize,
                     float scaling, Address ids, Address weights) {
        select_experts({reinterpret_cast<const float*>(logits), reinterpret_cast<const float*>(bias), tokens, experts,
                        chosen, softmax, groups, kept_groups, excluded, group_max, normalize, scaling,
                        reinterpret_cast<std::int64_t*>(ids), reinterpret_cast<float*>(weights)});
      }),
      nb::call_guard<nb::gil_scoped_release>(), "logits [tokens, experts] -> ids and weights [tokens, chosen].");
  m.def(
      "moe_experts",
      recordable(+[](Isa isa, Address gate_up, int gate_up_format, std::int64_t gate_up_group, Address down, int down_format,
         std::int64_t down_group, std::int64_t experts, std::int64_t zero_experts, std::int64_t dim, std::int64_t inner,
         Address x, std::int64_t x_stride, int dtype, std::int64_t tokens, Address ids, Address weights, std::int64_t chosen,
         Address out, int out_dtype, Address residual, int residual_dtype, double limit,
         bool bounds_gate) -> std::int64_t {
        GatedProducts all{};
        all.gate_up = packed_weight(gate_up, gate_up_format, experts, 2 * inner, dim, gate_up_group);
        all.down = packed_weight(down, down_format, experts, dim, inner, down_group);
        all.x = {reinterpret_cast<const void*>(x), static_cast<DType>(dtype), tokens, x_stride, nullptr};
        all.limit = (float)limit;
        all.bounds_gate = bounds_gate;
        all.chosen = chosen;
        all.out = output(out, dim, out_dtype, residual, residual_dtype);
        const auto* choices = reinterpret_cast<const std::int64_t*>(ids);
        const std::int64_t bad = first_unknown(choices, tokens * chosen, experts + zero_experts);
        if (bad >= 0) return bad;
        in_passes(isa, all, [&](std::int64_t first, GatedProducts& p) {
          Routing& r = routing();
          r.sort(choices + first * chosen, p.x.rows, chosen, experts);
          p.segments = r.segments.data();
          p.num_segments = static_cast<std::int64_t>(r.segments.size());
          p.rows = static_cast<std::int64_t>(r.token_of_row.size());
          p.token_of_row = r.token_of_row.data();
          p.row_of_choice = r.row_of_choice.data();
          p.weights = reinterpret_cast<const float*>(weights) + first * chosen;
        });
        return -1;
      }),
      nb::call_guard<nb::gil_scoped_release>(), "The first choice that names none of the experts, or -1.");
  m.def(
      "gated_mlp",
      recordable(+[](Isa isa, Address gate_up, int gate_up_format, std::int64_t gate_up_group, Address down, int down_format,
         std::int64_t down_group, std::int64_t outs, std::int64_t dim, std::int64_t inner, Address x,
         std::int64_t x_stride, int dtype, std::int64_t tokens, Address out, int out_dtype, Address residual, int residual_dtype,
         double limit, bool bounds_gate) {
        GatedProducts all{};
        all.gate_up = packed_weight(gate_up, gate_up_format, 1, 2 * inner, dim, gate_up_group);
        all.down = packed_weight(down, down_format, 1, outs, inner, down_group);
        all.x = {reinterpret_cast<const void*>(x), static_cast<DType>(dtype), tokens, x_stride, nullptr};
        all.limit = (float)limit;
        all.bounds_gate = bounds_gate;
        all.chosen = 1;
        all.out = output(out, outs, out_dtype, residual, residual_dtype);
        in_passes(isa, all, [&](std::int64_t, GatedProducts& p) {
          Routing& r = routing();
          r.all_to_one(p.x.rows);
          p.segments = r.segments.data();
          p.num_segments = static_cast<std::int64_t>(r.segments.size());
          p.rows = p.x.rows;
        });
      }),
      nb::call_guard<nb::gil_scoped_release>(), "out = down (silu(gate x) * up x) + residual.");
  m.def(
      "headwise_linear",
      recordable(+[](Isa isa, Address weight, int format, std::int64_t heads, std::int64_t outs, std::int64_t ins,
         std::int64_t group, Address x, std::ptrdiff_t x_token, std::ptrdiff_t x_head, int x_dtype, Address out,
         std::ptrdiff_t out_token, std::ptrdiff_t out_head, int out_dtype, int tokens) {
        const PackedWeight w = packed_weight(weight, format, heads, outs, ins, group);
        const Heads in{reinterpret_cast<void*>(x), x_token, x_head, static_cast<DType>(x_dtype)};
        const Heads to{reinterpret_cast<void*>(out), out_token, out_head, static_cast<DType>(out_dtype)};
        headwise(multiplying(isa, in.dtype, w.rounds_input)).linear(w, in, to, tokens);
      }),
      nb::call_guard<nb::gil_scoped_release>(), "x [tokens, heads, ins] -> out [tokens, heads, outs].");
}

}  // namespace latentkv
