// Python's way to products with packed weights.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>

#include "compact.h"
#include "linear.h"
#include "recording.h"

namespace nb = nanobind;

namespace latentkv {

using Address = std::uintptr_t;

static void linear(Isa isa, Address weight, int format, std::int64_t outs, std::int64_t ins, std::int64_t group,
                   Address x, int x_dtype, std::int64_t rows, std::int64_t x_stride, Address y, int y_dtype,
                   Address bias, int bias_dtype, Address residual, int residual_dtype, std::int64_t residual_stride) {
  const PackedWeight w = packed_weight(weight, format, 1, outs, ins, group);
  const LinearInput in = {(const void*)x, (DType)x_dtype, rows, x_stride, nullptr};
  LinearOutput out = {};
  out.y = (void*)y;
  out.dtype = (DType)y_dtype;
  out.stride = outs;
  out.bias = (const void*)bias;
  out.bias_dtype = (DType)bias_dtype;
  out.residual = (const void*)residual;
  out.residual_dtype = (DType)residual_dtype;
  out.residual_stride = residual_stride;
  linear_kernels(multiplying(isa, in.dtype, w.rounds_input)).linear(w, in, out);
}

void bind_linear(nb::module_& m) {
  m.def(
      "compact_window",
      [](Address weights, std::int64_t outs, std::int64_t ins, int block_outs) {
        const Window window = choose_window({(const bf16*)weights, outs, ins}, block_outs);
        return std::make_pair(window.first, window.exceptions);
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "The first exponent of the window that holds the most weights [outs, ins], and how many of a block are outside.");
  m.def(
      "pack_compact",
      [](Address weights, std::int64_t outs, std::int64_t ins, int window, std::int64_t room, int block_outs,
         Address words) {
        pack_compact({(const bf16*)weights, outs, ins}, window, room, block_outs, (std::uint32_t*)words);
      },
      nb::call_guard<nb::gil_scoped_release>(), "bf16 weights [outs, ins] in 12 bits, see weights/compact.py.");
  m.def("linear", recordable(&linear), nb::call_guard<nb::gil_scoped_release>(), "y = x W^T + bias + residual, W packed.");
}

}  // namespace latentkv
