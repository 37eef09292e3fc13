#include "hyper.h"

#include "rows.h"
#include "team.h"

namespace latentkv::LATENTKV_ISA {
namespace {

// Numbers below which a second thread costs more than it saves.
constexpr std::ptrdiff_t WORTH_A_FORK = 1 << 15;
constexpr int MAX_PRODUCTS = (2 + MAX_STREAMS) * MAX_STREAMS;

LATENTKV_INLINE char* row_at(const Matrix& m, int t) {
  return (char*)m.data + t * m.stride * (m.dtype == DType::f32 ? 4 : 2);
}

// comb [n, n], rows and columns of sum 1 but for eps.
void sinkhorn(float* comb, int n, float eps, int iterations) {
  const auto divide = [&](int from, int step) {
    float total = 0;
    for (int i = 0; i < n; i++) total += comb[from + i * step];
    for (int i = 0; i < n; i++) comb[from + i * step] /= total + eps;
  };
  for (int round = 0; round < iterations; round++) {
    for (int r = 0; round && r < n; r++) divide(r * n, 1);
    for (int c = 0; c < n; c++) divide(c, n);
  }
}

void mix_row(const HyperMix& h, int t, float mean_square) {
  const int n = h.count, all = (2 + n) * n;
  const float norm = 1.0f / __builtin_sqrtf(mean_square + h.norm_eps);
  const float* products = h.products + (std::ptrdiff_t)t * all;
  float *pre = h.pre + (std::ptrdiff_t)t * n, *post = h.post + (std::ptrdiff_t)t * n;
  float* comb = h.comb + (std::ptrdiff_t)t * n * n;
  alignas(64) float z[MAX_PRODUCTS + W];
  for (int i = 0; i < all; i++)
    z[i] = products[i] * norm * h.scale[i < n ? 0 : i < 2 * n ? 1 : 2] + h.base[i];
  for (int r = 0; r < n; r++) {  // softmax has its own greatest number in each row
    float* row = z + (2 + r) * n;
    float most = row[0];
    for (int i = 1; i < n; i++) most = row[i] > most ? row[i] : most;
    for (int i = 0; i < n; i++) row[i] -= most;
  }
  for (int i = all; i < all + W; i++) z[i] = 0;
  alignas(64) float gates[2 * MAX_STREAMS + W];
  for (int i = 0; i < 2 * n; i += W) store(gates + i, sigmoid(load(z + i)));
  for (int i = 0; i < n; i++) pre[i] = gates[i] + h.eps;
  for (int i = 0; i < n; i++) post[i] = 2.0f * gates[n + i];
  for (int i = 2 * n; i < all; i += W) {
    alignas(64) float e[W];
    store(e, exp(load(z + i)));
    for (int j = 0; j < W && i + j < all; j++) comb[i + j - 2 * n] = e[j];
  }
  for (int r = 0; r < n; r++) {
    float total = 0;
    for (int i = 0; i < n; i++) total += comb[r * n + i];
    for (int i = 0; i < n; i++) comb[r * n + i] = comb[r * n + i] / total + h.eps;
  }
  sinkhorn(comb, n, h.eps, h.iterations);
}

void mix(const HyperMix& h) {
  const int numbers = h.count * h.dim;
#pragma omp parallel for schedule(static) if (forks((std::ptrdiff_t)h.tokens * numbers >= WORTH_A_FORK))
  for (int t = 0; t < h.tokens; t++)
    for_dtype(h.streams.dtype, [&](auto dtype) {
      mix_row(h, t, sum_of_squares<dtype()>(row_at(h.streams, t), numbers) / (float)numbers);
    });
}

// f(load, store) is given the numbers of one place at a time, W of them or one.
template <DType X, class F>
LATENTKV_INLINE void along(int dim, F f) {
  int d = 0;
  for (; d + W <= dim; d += W)
    f([&](const void* p, std::ptrdiff_t at) { return load_any(p, X, at + d); },
      [&](void* p, std::ptrdiff_t at, vf v) { store_any(p, X, at + d, v); });
  for (; d < dim; d++)
    f([&](const void* p, std::ptrdiff_t at) { return splat(load_one(p, X, at + d)); },
      [&](void* p, std::ptrdiff_t at, vf v) { store_one(p, X, at + d, v[0]); });
}

void collapse(Matrix streams, const float* pre, Matrix out, int tokens, int count, int dim) {
#pragma omp parallel for schedule(static) if (forks((std::ptrdiff_t)tokens * count * dim >= WORTH_A_FORK))
  for (int t = 0; t < tokens; t++)
    for_dtype(streams.dtype, [&](auto dtype) {
      const char* row = row_at(streams, t);
      const float* weights = pre ? pre + (std::ptrdiff_t)t * count : nullptr;
      along<dtype()>(dim, [&](auto load, auto store) {
        vf sum = {};
        for (int i = 0; i < count; i++) {
          const vf x = load(row, (std::ptrdiff_t)i * dim);
          sum += weights ? weights[i] * x : x;
        }
        store(row_at(out, t), 0, weights ? sum : sum / (float)count);
      });
    });
}

void expand(Matrix streams, Matrix block, const float* post, const float* comb, Matrix out, int tokens, int count,
            int dim) {
#pragma omp parallel for schedule(static) if (forks((std::ptrdiff_t)tokens * count * dim >= WORTH_A_FORK))
  for (int t = 0; t < tokens; t++)
    for_dtype(streams.dtype, [&](auto dtype) {
      const char *row = row_at(streams, t), *added = row_at(block, t);
      const float* weights = post + (std::ptrdiff_t)t * count;
      const float* mixed = comb ? comb + (std::ptrdiff_t)t * count * count : nullptr;
      along<dtype()>(dim, [&](auto load, auto store) {
        vf x[MAX_STREAMS];
        for (int j = 0; j < count; j++) x[j] = load(row, (std::ptrdiff_t)j * dim);
        const vf y = load(added, 0);
        for (int k = 0; k < count; k++) {
          vf sum = mixed ? vf{} : x[k];
          for (int j = 0; mixed && j < count; j++) sum += mixed[j * count + k] * x[j];
          store(row_at(out, t), (std::ptrdiff_t)k * dim, weights[k] * y + sum);
        }
      });
    });
}

}  // namespace

const HyperKernels hyper = {mix, collapse, expand};

}  // namespace latentkv::LATENTKV_ISA
