// Python's way to products with packed weights.
#include <nanobind/nanobind.h>

#include "linear.h"
#include "recording.h"

namespace nb = nanobind;

namespace latentkv {

using Address = std::uintptr_t;

static void linear(Isa isa, Address weight, int format, std::int64_t outs, std::int64_t ins, std::int64_t group,
                   Address x, int x_dtype, std::int64_t rows, std::int64_t x_stride, Address y, int y_dtype,
                   Address bias, int bias_dtype, Address residual, int residual_dtype, std::int64_t residual_stride) {
  const PackedWeight w = {(const std::uint8_t*)weight, (WeightFormat)format, 1, outs, ins, group};
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
  linear_kernels(isa).linear(w, in, out);
}

void bind_linear(nb::module_& m) {
  m.def("linear", recordable(&linear), nb::call_guard<nb::gil_scoped_release>(), "y = x W^T + bias + residual, W packed.");
}

}  // namespace latentkv
