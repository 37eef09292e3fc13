// Python's way to hyper-connections.
#include <nanobind/nanobind.h>

#include "hyper.h"
#include "recording.h"

namespace nb = nanobind;

namespace latentkv {
namespace {

using Address = std::uintptr_t;

float* floats(Address address) { return reinterpret_cast<float*>(address); }

Matrix matrix(Address data, std::ptrdiff_t stride, int dtype) {
  return {reinterpret_cast<void*>(data), stride, static_cast<DType>(dtype)};
}

}  // namespace

void bind_hyper(nb::module_& m) {
  m.def(
      "hyper_mix",
      recordable(+[](Isa isa, Address streams, int dtype, Address products, Address base, Address scale, double norm_eps,
         double eps, int iterations, int tokens, int count, int dim, Address pre, Address post, Address comb) {
        hyper(isa).mix({matrix(streams, (std::ptrdiff_t)count * dim, dtype), floats(products), floats(base),
                        floats(scale), (float)norm_eps, (float)eps, iterations, tokens, count, dim, floats(pre),
                        floats(post), floats(comb)});
      }),
      nb::call_guard<nb::gil_scoped_release>(), "How each token's streams are read and mixed.");
  m.def(
      "collapse_streams",
      recordable(+[](Isa isa, Address streams, int dtype, Address pre, Address out, int tokens, int count, int dim) {
        hyper(isa).collapse(matrix(streams, (std::ptrdiff_t)count * dim, dtype), floats(pre), matrix(out, dim, dtype),
                            tokens, count, dim);
      }),
      nb::call_guard<nb::gil_scoped_release>(), "streams [tokens, count, dim] -> out [tokens, dim].");
  m.def(
      "expand_streams",
      recordable(+[](Isa isa, Address streams, int dtype, Address block, std::ptrdiff_t block_stride, Address post,
         Address comb, Address out, int tokens, int count, int dim) {
        const std::ptrdiff_t row = (std::ptrdiff_t)count * dim;
        hyper(isa).expand(matrix(streams, row, dtype), matrix(block, block_stride, dtype), floats(post), floats(comb),
                          matrix(out, row, dtype), tokens, count, dim);
      }),
      nb::call_guard<nb::gil_scoped_release>(), "streams and block [tokens, dim] -> out [tokens, count, dim].");
}

}  // namespace latentkv
