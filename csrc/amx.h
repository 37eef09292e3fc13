// Tiles: eight registers of up to 16 rows of 64 bytes, and the product of two of them that is added to a third (AMX).
//
// Not by GCC 12's intrinsics, which do not tell the compiler that they read memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace latentkv {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64;  // of a row

// How many rows each of the eight tiles has, and bytes of a row.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, int count, int bytes = TILE_BYTES) {
    row_bytes[tile] = (std::uint16_t)bytes;
    rows[tile] = (std::uint8_t)count;
  }
};

// While it lives the calling thread's tiles have shapes; they are zero after each `shape`.
class TileUse {
 public:
  TileUse() = default;
  TileUse(const TileUse&) = delete;
  TileUse& operator=(const TileUse&) = delete;
  ~TileUse() { __asm__ volatile("tilerelease" ::: "memory"); }
  void shape(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }
};

template <int T>
__attribute__((always_inline)) inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
// Rows that lie `stride` bytes apart.
template <int T>
__attribute__((always_inline)) inline void tile_load(const void* from, std::ptrdiff_t stride) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(stride) : "memory");
}
template <int T>
__attribute__((always_inline)) inline void tile_store(void* to, std::ptrdiff_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(to), "r"(stride) : "memory");
}
// sums [rows][16] float32 += x [rows][32] bf16 times y [16][16] pairs of bf16, of two rows each: the products of even
// numbers and those of odd ones are each added up first, in order.
template <int SUMS, int X, int Y>
__attribute__((always_inline)) inline void tile_multiply_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(X), "i"(Y));
}

}  // namespace latentkv
