// What codes of 4 bits stand for, and bytes looked up in tables of 16.
#pragma once

#include "simd.h"

namespace latentkv::LATENTKV_ISA {

#if defined(__AVX2__)
typedef std::uint8_t bytes __attribute__((vector_size(4 * W)));
#if defined(__AVX512F__)
LATENTKV_INLINE vu shuffle_bytes(vu from, vu order) {
  return (vu)_mm512_shuffle_epi8((__m512i)from, (__m512i)order);
}
LATENTKV_INLINE vu repeated(__m128i quarter) { return (vu)_mm512_broadcast_i32x4(quarter); }
#else
LATENTKV_INLINE vu shuffle_bytes(vu from, vu order) {
  return (vu)_mm256_shuffle_epi8((__m256i)from, (__m256i)order);
}
LATENTKV_INLINE vu repeated(__m128i half) { return (vu)_mm256_broadcastsi128_si256(half); }
#endif
#endif

// What codes of 4 bits stand for.
struct Int4Numbers {
  static constexpr std::int8_t numbers[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
};
struct Fp4Numbers {
  static constexpr std::int8_t numbers[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // twice E2M1's
};
struct Nl4Numbers {
  static constexpr std::int8_t numbers[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                              1,    13,   25,  38,  53,  69,  89,  113};
};

// The numbers that each byte of a word, from 0 to 15, stands for, in bytes.
template <class Table>
LATENTKV_INLINE vu look_up(vu nibbles) {
#if defined(__AVX2__)
  return shuffle_bytes(repeated(_mm_loadu_si128((const __m128i*)Table::numbers)), nibbles);
#else
  vu numbers{};
  for (int byte = 0; byte < 4; byte++)
    for (int k = 0; k < W; k++)
      numbers[k] |= (std::uint32_t)(std::uint8_t)Table::numbers[nibbles[k] >> (8 * byte) & 15] << (8 * byte);
  return numbers;
#endif
}

}  // namespace latentkv::LATENTKV_ISA
