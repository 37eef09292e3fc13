// A head's matrix and rows, as the kernels of recurrent layers hold them in their scratch.
#pragma once

#include "recurrence.h"
#include "rows.h"

namespace latentkv::LATENTKV_ISA {

constexpr int CHUNK = 16;   // rows that are made ready together
constexpr int VECTORS = 4;  // of columns, that are passed over together
constexpr int COLUMNS = VECTORS * W;
constexpr std::int64_t SERIAL_NUMBERS = 1 << 15;  // of matrices, below which starting threads takes longer

LATENTKV_INLINE int padded(int dim) { return (dim + COLUMNS - 1) / COLUMNS * COLUMNS; }

LATENTKV_INLINE const char* at(const Matrix& m, std::int64_t row, std::int64_t column) {
  return (const char*)m.data + (row * m.stride + column) * sizeof_dtype(m.dtype);
}

// n numbers as floats, and zeros up to `padded`.
LATENTKV_INLINE void read_row(const void* x, DType dtype, int n, float* out, int padded) {
  convert_row(x, dtype, n, out, DType::f32);
  for (int i = n; i < padded; i++) out[i] = 0;
}

// A matrix [D, D] by blocks of columns, so that what a few tokens pass over stays in the first-level cache.
struct Blocks {
  float* data;  // dim * padded(dim)
  int dim;

  float* cell(int i, int j) const { return data + (j / COLUMNS * dim + i) * COLUMNS + j % COLUMNS; }
  // From rows that follow one another; none: zeros.
  void fill(const float* matrix) const {
    for (int i = 0; i < dim; i++)
      for (int j = 0; j < padded(dim); j++) *cell(i, j) = matrix && j < dim ? matrix[i * dim + j] : 0;
  }
  void copy_to(float* matrix) const {
    for (int i = 0; i < dim; i++)
      for (int j = 0; j < dim; j += COLUMNS)
        std::memcpy(matrix + i * dim + j, cell(i, j), 4 * (std::size_t)(dim - j < COLUMNS ? dim - j : COLUMNS));
  }
};

}  // namespace latentkv::LATENTKV_ISA
