#include "elementwise.h"

#include "rows.h"
#include "team.h"

namespace latentkv::LATENTKV_ISA {
namespace {

// Numbers below which a second thread costs more than it saves.
constexpr std::ptrdiff_t WORTH_A_FORK = 1 << 15;

template <class Place>
LATENTKV_INLINE char* at(const Place& place, std::ptrdiff_t offset) {
  return (char*)place.data + offset * (place.dtype == DType::f32 ? 4 : 2);
}

void rms_norm(Matrix x, const void* weight, DType weight_dtype, float eps, Matrix out, int tokens, int dim) {
#pragma omp parallel for schedule(static) if (forks((std::ptrdiff_t)tokens * dim >= WORTH_A_FORK))
  for (int t = 0; t < tokens; t++)
    for_dtype(x.dtype, [&](auto dtype) {
      norm_row<dtype()>(at(x, t * x.stride), weight, weight_dtype, dim, eps, at(out, t * out.stride), dtype());
    });
}

void rope(Heads x, Angles angles, Heads out, int tokens, int heads, int half) {
#pragma omp parallel for schedule(static) if (forks((std::ptrdiff_t)tokens * heads * half * 2 >= WORTH_A_FORK))
  for (int t = 0; t < tokens; t++) {
    const std::ptrdiff_t angle = (std::ptrdiff_t)t * half;
    alignas(64) float row[MAX_ROW];
    for (int h = 0; h < heads; h++)
      for_dtype(x.dtype, [&](auto dtype) {
        convert_row(at(x, t * x.token_stride + h * x.head_stride), dtype(), 2 * half, row, DType::f32);
        rotate_row(row, angles.cos + angle, angles.sin + angle, half, angles.interleaved);
        convert_row(row, DType::f32, 2 * half, at(out, t * out.token_stride + h * out.head_stride), dtype());
      });
  }
}

void gate_heads(Heads x, Heads gate, bool each, int tokens, int heads, int dim) {
#pragma omp parallel for schedule(static) if (forks((std::ptrdiff_t)tokens * heads * dim >= WORTH_A_FORK))
  for (int t = 0; t < tokens; t++)
    for (int h = 0; h < heads; h++)
      for_dtype(x.dtype, [&](auto dtype) {
        constexpr DType X = dtype();
        char* row = at(x, t * x.token_stride + h * x.head_stride);
        const std::ptrdiff_t first = t * gate.token_stride + h * gate.head_stride;
        const vf one = sigmoid(splat(load_one(gate.data, gate.dtype, first)));
        int i = 0;
        for (; i + W <= dim; i += W)
          store_any(row, X, i, load_any(row, X, i) * (each ? sigmoid(load_any(gate.data, gate.dtype, first + i)) : one));
        for (; i < dim; i++)
          store_one(row, X, i, load_one(row, X, i) *
                                   (each ? sigmoid(splat(load_one(gate.data, gate.dtype, first + i)))[0] : one[0]));
      });
}

void norm_beside(Matrix x, const void* weight, DType weight_dtype, float eps, Matrix out, int tokens, int dim) {
#pragma omp parallel for schedule(static) if (forks((std::ptrdiff_t)tokens * dim >= WORTH_A_FORK))
  for (int t = 0; t < tokens; t++)
    for_dtype(x.dtype, [&](auto dtype) {
      const char* row = at(x, t * x.stride);
      norm_row<dtype()>(row, weight, weight_dtype, dim, eps, at(out, t * out.stride), dtype());
      std::memcpy(at(out, t * out.stride + dim), row, (std::size_t)dim * (dtype() == DType::f32 ? 4 : 2));
    });
}

LATENTKV_INLINE float dot(const void* a, DType a_dtype, std::ptrdiff_t a_at, const void* b, DType b_dtype,
                          std::ptrdiff_t b_at, int n) {
  vf sums = {};
  int i = 0;
  for (; i + W <= n; i += W) sums = multiply_add(load_any(a, a_dtype, a_at + i), load_any(b, b_dtype, b_at + i), sums);
  float total = sum(sums);
  for (; i < n; i++) total += load_one(a, a_dtype, a_at + i) * load_one(b, b_dtype, b_at + i);
  return total;
}

// As torch rounds it: what each product gives is of x's type.
template <DType X>
void gated_norm_row(const char* x, const void* weight, const void* down, const void* up, DType weight_dtype, float eps,
                    int rank, int dim, char* y) {
  norm_row<X>(x, weight, weight_dtype, dim, eps, y, X);
  float hidden[MAX_RANK];
  for (int j = 0; j < rank; j++) {
    const float h = rounded_one(dot(y, X, 0, down, weight_dtype, (std::ptrdiff_t)j * dim, dim), X);
    hidden[j] = rounded_one(silu_mul(splat(h), splat(1.0f))[0], X);
  }
  for (int d = 0; d < dim; d += W) {
    float gate[W] = {};
    const int n = dim - d < W ? dim - d : W;
    for (int i = 0; i < n; i++)
      gate[i] = rounded_one(dot(hidden, DType::f32, 0, up, weight_dtype, (std::ptrdiff_t)(d + i) * rank, rank), X);
    store(gate, sigmoid(load(gate)));
    for (int i = 0; i < n; i++) store_one(y, X, d + i, load_one(y, X, d + i) * gate[i]);
  }
}

void gated_rms_norm(Matrix x, const void* weight, const void* down, const void* up, DType weight_dtype, float eps,
                    int rank, Matrix out, int tokens, int dim) {
#pragma omp parallel for schedule(static) if (forks((std::ptrdiff_t)tokens * dim >= WORTH_A_FORK))
  for (int t = 0; t < tokens; t++)
    for_dtype(x.dtype, [&](auto dtype) {
      gated_norm_row<dtype()>(at(x, t * x.stride), weight, down, up, weight_dtype, eps, rank, dim,
                              at(out, t * out.stride));
    });
}

template <DType X>
void silu_mul_row(const void* gate_up, void* out, int inner) {
  int i = 0;
  for (; i + W <= inner; i += W)
    store_any(out, X, i, silu_mul(load_any(gate_up, X, i), load_any(gate_up, X, inner + i)));
  for (; i < inner; i++)
    store_one(out, X, i, silu_mul(splat(load_one(gate_up, X, i)), splat(load_one(gate_up, X, inner + i)))[0]);
}

void silu_mul_rows(Matrix gate_up, Matrix out, int tokens, int inner) {
#pragma omp parallel for schedule(static) if (forks((std::ptrdiff_t)tokens * inner >= WORTH_A_FORK))
  for (int t = 0; t < tokens; t++)
    for_dtype(out.dtype, [&](auto dtype) {
      silu_mul_row<dtype()>(at(gate_up, t * gate_up.stride), at(out, t * out.stride), inner);
    });
}

}  // namespace

const ElementwiseKernels elementwise = {rms_norm, rope, gate_heads, norm_beside, gated_rms_norm, silu_mul_rows};

}  // namespace latentkv::LATENTKV_ISA
