// Python's way to the row-by-row kernels and to writing the cache. Strides are in elements.
#include <nanobind/nanobind.h>

#include "cache_write.h"
#include "recording.h"

namespace nb = nanobind;

namespace latentkv {
namespace {

using Address = std::uintptr_t;

Matrix matrix(Address data, std::ptrdiff_t stride, int dtype) {
  return {reinterpret_cast<void*>(data), stride, static_cast<DType>(dtype)};
}

Heads heads_at(Address data, std::ptrdiff_t token_stride, std::ptrdiff_t head_stride, int dtype) {
  return {reinterpret_cast<void*>(data), token_stride, head_stride, static_cast<DType>(dtype)};
}

Angles angles(Address cos, Address sin, bool interleaved) {
  return {reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin), interleaved};
}

CacheRows cache_rows(Address pages, Address slots, std::ptrdiff_t row_bytes, std::int64_t num_slots, int format,
                     int tokens, int latent_dim, int rope_dim) {
  return {reinterpret_cast<unsigned char*>(pages),
          reinterpret_cast<const std::int64_t*>(slots),
          row_bytes,
          num_slots,
          static_cast<RowFormat>(format),
          tokens,
          latent_dim,
          rope_dim};
}

void bind_elementwise(nb::module_& m) {
  m.def(
      "rms_norm",
      recordable(+[](Isa isa, Address x, std::ptrdiff_t x_stride, int dtype, Address weight, int weight_dtype, double eps,
         Address out, int tokens, int dim) {
        elementwise(isa).rms_norm(matrix(x, x_stride, dtype), reinterpret_cast<const void*>(weight),
                                  static_cast<DType>(weight_dtype), (float)eps, matrix(out, dim, dtype), tokens, dim);
      }),
      nb::call_guard<nb::gil_scoped_release>(), "x [tokens, dim] -> out, contiguous in x's type.");
  m.def(
      "rope",
      recordable(+[](Isa isa, Address x, std::ptrdiff_t x_token, std::ptrdiff_t x_head, int dtype, Address cos, Address sin,
         bool interleaved, Address out, std::ptrdiff_t out_token, std::ptrdiff_t out_head, int tokens, int heads,
         int half) {
        elementwise(isa).rope(heads_at(x, x_token, x_head, dtype), angles(cos, sin, interleaved),
                              heads_at(out, out_token, out_head, dtype), tokens, heads, half);
      }),
      nb::call_guard<nb::gil_scoped_release>(), "x [tokens, heads, 2 half] -> out in x's type.");
  m.def(
      "gate_heads",
      recordable(+[](Isa isa, Address x, std::ptrdiff_t x_token, std::ptrdiff_t x_head, int dtype, Address gate,
         std::ptrdiff_t gate_token, std::ptrdiff_t gate_head, int gate_dtype, bool each, int tokens, int heads, int dim) {
        elementwise(isa).gate_heads(heads_at(x, x_token, x_head, dtype), heads_at(gate, gate_token, gate_head, gate_dtype), each,
                                    tokens, heads, dim);
      }),
      nb::call_guard<nb::gil_scoped_release>(), "x [tokens, heads, dim] *= sigmoid(gate), a head's or a number's.");
  m.def(
      "norm_beside",
      recordable(+[](Isa isa, Address x, std::ptrdiff_t x_stride, int dtype, Address weight, int weight_dtype, double eps,
         Address out, int tokens, int dim) {
        elementwise(isa).norm_beside(matrix(x, x_stride, dtype), reinterpret_cast<const void*>(weight),
                                     static_cast<DType>(weight_dtype), (float)eps, matrix(out, 2 * dim, dtype), tokens,
                                     dim);
      }),
      nb::call_guard<nb::gil_scoped_release>(), "x [tokens, dim] -> out [tokens, 2 dim], contiguous in x's type.");
  m.def(
      "gated_rms_norm",
      recordable(+[](Isa isa, Address x, std::ptrdiff_t x_stride, int dtype, Address weight, Address down, Address up,
         int weight_dtype, double eps, int rank, Address out, int tokens, int dim) {
        elementwise(isa).gated_rms_norm(matrix(x, x_stride, dtype), reinterpret_cast<const void*>(weight),
                                        reinterpret_cast<const void*>(down), reinterpret_cast<const void*>(up),
                                        static_cast<DType>(weight_dtype), (float)eps, rank, matrix(out, dim, dtype),
                                        tokens, dim);
      }),
      nb::call_guard<nb::gil_scoped_release>(), "x [tokens, dim] -> out, contiguous in x's type.");
  m.def(
      "silu_mul",
      recordable(+[](Isa isa, Address gate_up, std::ptrdiff_t stride, int dtype, Address out, int tokens, int inner) {
        elementwise(isa).silu_mul(matrix(gate_up, stride, dtype), matrix(out, inner, dtype), tokens, inner);
      }),
      nb::call_guard<nb::gil_scoped_release>(), "gate_up [tokens, 2 inner] -> out, contiguous in its type.");
}

void bind_cache_write(nb::module_& m) {
  m.def(
      "write_latents",
      recordable(+[](Isa isa, Address pages, Address slots, std::ptrdiff_t row_bytes, std::int64_t num_slots, int format,
         int tokens, int latent_dim, int rope_dim, Address latents, std::ptrdiff_t latents_stride, int latents_dtype,
         Address k_rope, std::ptrdiff_t k_rope_stride, int k_rope_dtype) {
        return cache_write(isa).write(
            cache_rows(pages, slots, row_bytes, num_slots, format, tokens, latent_dim, rope_dim),
            matrix(latents, latents_stride, latents_dtype), matrix(k_rope, k_rope_stride, k_rope_dtype));
      }),
      nb::call_guard<nb::gil_scoped_release>(), "The first token whose slot is not in the cache, or -1.");
  m.def(
      "norm_rope_write",
      recordable(+[](Isa isa, Address pages, Address slots, std::ptrdiff_t row_bytes, std::int64_t num_slots, int format,
         int tokens, int latent_dim, int rope_dim, Address kv_a, std::ptrdiff_t stride, int dtype, Address weight,
         int weight_dtype, double eps, Address cos, Address sin, bool interleaved) {
        return cache_write(isa).norm_rope_write(
            cache_rows(pages, slots, row_bytes, num_slots, format, tokens, latent_dim, rope_dim),
            matrix(kv_a, stride, dtype), reinterpret_cast<const void*>(weight), static_cast<DType>(weight_dtype),
            (float)eps, angles(cos, sin, interleaved));
      }),
      nb::call_guard<nb::gil_scoped_release>(), "The first token whose slot is not in the cache, or -1.");
}

}  // namespace

void bind_small(nb::module_& m) {
  bind_elementwise(m);
  bind_cache_write(m);
}

}  // namespace latentkv
