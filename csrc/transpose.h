// 16 rows of 16 words transposed.
#pragma once

#include "simd.h"

#if defined(__AVX512F__)

namespace latentkv::LATENTKV_ISA {

// out[i * stride ..] = word i of each of the 16 rows, 64 bytes each from byte `at` on, with the bits of FLIP turned over.
template <std::uint32_t FLIP = 0, class Row>
LATENTKV_INLINE void transpose_16_words(const Row* const* rows, std::ptrdiff_t at, std::uint32_t* out, int stride) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    a[i] = _mm512_loadu_si512((const char*)rows[i] + at);
    if (FLIP) a[i] = _mm512_xor_si512(a[i], _mm512_set1_epi32((int)FLIP));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 r + w] holds words w, 4 + w, 8 + w and 12 + w of rows 4 r .. 4 r + 3, one in each 128 bits.
#pragma GCC unroll 4
  for (int w = 0; w < 4; w++) {
    const __m512i x = _mm512_shuffle_i32x4(a[w], a[4 + w], 0x88), z = _mm512_shuffle_i32x4(a[8 + w], a[12 + w], 0x88);
    const __m512i y = _mm512_shuffle_i32x4(a[w], a[4 + w], 0xdd), u = _mm512_shuffle_i32x4(a[8 + w], a[12 + w], 0xdd);
    _mm512_storeu_si512(out + w * stride, _mm512_shuffle_i32x4(x, z, 0x88));
    _mm512_storeu_si512(out + (4 + w) * stride, _mm512_shuffle_i32x4(y, u, 0x88));
    _mm512_storeu_si512(out + (8 + w) * stride, _mm512_shuffle_i32x4(x, z, 0xdd));
    _mm512_storeu_si512(out + (12 + w) * stride, _mm512_shuffle_i32x4(y, u, 0xdd));
  }
}

}  // namespace latentkv::LATENTKV_ISA

#endif
