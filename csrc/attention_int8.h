// Attention over int8 pages in int8 products (AVX-512 VNNI): faster than bf16's, with rounding of its own.
//
// A query vector gets a scale for each group of numbers that shares one in the cache, and so do the weights of a tile
// times those tokens' scales: everything that is multiplied is a byte, sums are exact, and scales multiply sums. What
// is lost: up to 1/254 of the largest number of a group of the query, and 1/510 of the largest of a query vector's
// weights times scales in 256 tokens.
//
// As in attention_lanes.h, query vectors lie in the lanes of a register; four numbers of a key are broadcast.
#pragma once

#include "attention_codes.h"
#include "attention_lane_softmax.h"
#include "transpose.h"

#if defined(__AVX512VNNI__)

namespace latentkv::LATENTKV_ISA {

// sum += a, unsigned bytes, times b, signed ones, four to a number. GCC 12 moves _mm512_dpbusd_epi32's sums about.
template <class Sums>
LATENTKV_INLINE Sums add_products(Sums sum, Sums a, Sums b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

// One register of sums, for 16 query vectors or, faster, for 8.
struct ByteLanes16 {
  using Sums = __m512i;
  using Floats = __m512;
  LATENTKV_INLINE Sums load(const void* p) { return _mm512_load_si512(p); }
  LATENTKV_INLINE Sums broadcast(const std::uint8_t* p) { return _mm512_set1_epi32(load_as<std::int32_t>(p)); }
  LATENTKV_INLINE Floats zero() { return _mm512_setzero_ps(); }
  LATENTKV_INLINE Floats add_scaled(Floats sums, Sums products, const float* lane_scales, float scale) {
    const Floats scales = _mm512_mul_ps(_mm512_load_ps(lane_scales), _mm512_set1_ps(scale));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scales, sums);
  }
  LATENTKV_INLINE void store(float* p, Floats sums) { _mm512_store_ps(p, sums); }
};
struct ByteLanes8 {
  using Sums = __m256i;
  using Floats = __m256;
  LATENTKV_INLINE Sums load(const void* p) { return _mm256_load_si256((const __m256i*)p); }
  LATENTKV_INLINE Sums broadcast(const std::uint8_t* p) { return _mm256_set1_epi32(load_as<std::int32_t>(p)); }
  LATENTKV_INLINE Floats zero() { return _mm256_setzero_ps(); }
  LATENTKV_INLINE Floats add_scaled(Floats sums, Sums products, const float* lane_scales, float scale) {
    const Floats scales = _mm256_mul_ps(_mm256_load_ps(lane_scales), _mm256_set1_ps(scale));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), scales, sums);
  }
  LATENTKV_INLINE void store(float* p, Floats sums) { _mm512_store_ps(p, _mm512_zextps256_ps512(sums)); }
};

// Codes + 128: the one operand of a product of bytes that has no sign.
struct RaisedCodes {
  using Number = std::uint8_t;
  static constexpr int TOGETHER = 64;
  LATENTKV_INLINE void decode(const char* p, std::uint8_t* out) {
    _mm512_store_si512(out, _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8((char)0x80)));
  }
};

class Int8Engine : public LaneSoftmax<256> {
  static constexpr int TOKENS = 8;                   // a block of scores, of 16 or 8 lanes
  static constexpr int VECTORS = 6, MIXED = 4 * 16;  // a block of sums of values
  static constexpr int PAD = 64;                     // groups of numbers are padded to whole registers
  // Numbers of a key for each line that is fetched ahead and TOGETHER codes that are raised: TOKENS rows' worth.
  static constexpr int AHEAD = 8;

 public:
  static constexpr int STEP = MIXED;

  Int8Engine(const Attention& a, int vectors)
      : LaneSoftmax(a, vectors), latent_dim_(a.values.width), rope_dim_(a.keys.width - latent_dim_),
        latents_(padded(latent_dim_)), width_(latents_ + padded(rope_dim_)),
        latent_groups_((latent_dim_ + SCALE_GROUP - 1) / SCALE_GROUP),
        in_place_(latents_ == latent_dim_ && width_ == a.keys.width) {}

  int value_width() const { return latents_; }

  void place(Memory& memory) {
    const std::size_t vectors = vectors_, groups = latent_groups_ + 1;
    LaneSoftmax::place(memory);
    q_ = memory.take<std::uint32_t>(vectors * width_ / 4);
    q_codes_ = memory.take<std::int8_t>((std::size_t)LANES * width_);
    q_row_ = memory.take<float>(width_);
    q_scale_ = memory.take<float>(vectors * groups);
    q_offset_ = memory.take<std::int32_t>(vectors * groups);
    token_scale_ = memory.take<float>(groups * TILE);
    raised_ = memory.take<std::uint8_t>((std::size_t)2 * TOKENS * width_);
    mixed_ = memory.take<std::uint8_t>((std::size_t)TILE * MIXED);
    levels_ = memory.take<std::uint32_t>((std::size_t)TILE / 4 * stride_);
    level_ = memory.take<float>(vectors);
    zeros_ = memory.take<char>(width_);
    padded_rows_ = memory.take<char>(in_place_ ? 0 : (std::size_t)TILE * width_);
  }

  void load_queries(const Group& group) {
    const int vectors = group.rows * group.heads;
    std::memset(zeros_, 0, width_);
    for (int v = 0; v < vectors; v += LANES) {
      const std::int8_t* rows[LANES];
      for (int i = 0; i < LANES; i++) {
        rows[i] = q_codes_ + (std::ptrdiff_t)i * width_;
        std::memset(q_row_, 0, sizeof(float) * width_);
        if (v + i < vectors) {
          const std::int64_t row = group.row + (v + i) / group.heads, head = group.head + (v + i) % group.heads;
          const char* q = a_.q + (row * a_.q_row + head * a_.q_head) * sizeof_dtype(a_.q_dtype);
          convert_row(q, a_.q_dtype, latent_dim_, q_row_, DType::f32);
          convert_row(q + latent_dim_ * sizeof_dtype(a_.q_dtype), a_.q_dtype, rope_dim_, q_row_ + latents_, DType::f32);
        }
        for (int g = 0; g <= latent_groups_; g++) quantise_query(v + i, g);
      }
      for (int d = 0; d < width_; d += 64)
        transpose_16_words(rows, d, q_ + ((std::ptrdiff_t)v * width_ + d * LANES) / 4, LANES);
    }
  }

  void attend(const Group& group, int first, const StoredTile<TILE>& stored, const StoredTile<TILE>& next,
              const State& state) {
    const int vectors = group.rows * group.heads, lanes = (vectors + LANES - 1) / LANES;
    const int scored = lanes * ((stored.tokens + TOKENS - 1) / TOKENS);
    const int summed = num_vector_blocks<VECTORS>(vectors) * (latents_ / MIXED);
    Fetcher fetcher(next.keys, next.tokens, a_.keys.bytes, scored + summed);
    ranges_.find(a_, group, first, stored.tokens);
    take(stored);
    score(vectors, stored.tokens, fetcher);
    for (int v = 0; v < vectors; v += LANES) soften(v, stored.tokens, state);
    for (int g = 0; g < latent_groups_; g++) {
      for (int v = 0; v < vectors; v += LANES) quantise_weights(v, stored.tokens, g);
      for (int column = g * SCALE_GROUP; column < group_end(g); column += MIXED) {
        mix((stored.tokens + 3) / 4 * 4, column);
        accumulate(vectors, state.out + column, fetcher);
      }
    }
  }

  // `mix` leaves 4 columns of each 16 in each register.
  static void in_order(const float* accumulated, float* out) {
    for (int j = 0; j < 4; j++)
      for (int k = 0; k < 4; k++) std::memcpy(out + 16 * k + 4 * j, accumulated + 16 * j + 4 * k, 4 * sizeof(float));
  }

 private:
  static int padded(int n) { return (n + PAD - 1) / PAD * PAD; }

  // Numbers of group g in padded rows; the last group is the rotated key's.
  int group_begin(int g) const { return g < latent_groups_ ? g * SCALE_GROUP : latents_; }
  int group_end(int g) const {
    if (g >= latent_groups_) return width_;
    return (g + 1) * SCALE_GROUP < latents_ ? (g + 1) * SCALE_GROUP : latents_;
  }

  // levels / most; 0 where that is no number: then all are rounded to zero.
  static float inverse_of(float most, float levels) { return most > 1e-36f && most < INFINITY ? levels / most : 0; }

  void quantise_query(int v, int g) {
    const int begin = group_begin(g), end = group_end(g);
    // Magnitudes as integers are ordered as the numbers are, with NaN above infinity: it reaches the scale.
    __m512i largest = _mm512_setzero_si512();
    for (int d = begin; d < end; d += W)
      largest = _mm512_max_epi32(largest, (__m512i)((vu)load(q_row_ + d) & 0x7fffffff));
    const int bits = _mm512_reduce_max_epi32(largest);
    const float most = load_as<float>(&bits), inverse = inverse_of(most, 127);
    __m512i total = _mm512_setzero_si512();
    for (int d = begin; d < end; d += W) {
      const vf exact = inverse == 0 ? vf{} : load(q_row_ + d) * inverse;  // not zero times NaN
      const __m512i codes = _mm512_cvtps_epi32((__m512)exact);
      total = _mm512_add_epi32(total, codes);
      _mm_storeu_si128((__m128i*)(q_codes_ + (std::ptrdiff_t)(v % LANES) * width_ + d), _mm512_cvtsepi32_epi8(codes));
    }
    q_scale_[g * vectors_ + v] = most / 127;
    // Keys are multiplied as code + 128.
    q_offset_[g * vectors_ + v] = -128 * _mm512_reduce_add_epi32(total);
  }

  // Where each token's codes lie, and its scales; a token that no query reads has zeros.
  void take(const StoredTile<TILE>& stored) {
    const int groups = latent_groups_ + 1, whole = (stored.tokens + TOKENS - 1) / TOKENS * TOKENS;
    for (int i = 0; i < whole; i++) {
      const char* row = i < stored.tokens ? stored.keys[i] : nullptr;
      codes_[i] = row ? in_place_ ? row : padded_row(row, i) : zeros_;
      for (int g = 0; g < groups; g++)
        token_scale_[i * groups + g] = row ? f16_to_float(load_as<f16>(row + a_.keys.width + g * sizeof(f16))) : 0;
    }
  }
  const char* padded_row(const char* row, int i) {
    char* out = padded_rows_ + (std::ptrdiff_t)i * width_;
    std::memcpy(out, row, latent_dim_);
    std::memset(out + latent_dim_, 0, latents_ - latent_dim_);
    std::memcpy(out + latents_, row + latent_dim_, rope_dim_);
    std::memset(out + latents_ + rope_dim_, 0, width_ - latents_ - rope_dim_);
    return out;
  }

  // Codes of tokens t .. t + TOKENS - 1 into one half of `raised_`.
  Decoder<RaisedCodes> start_raising(int t) { return {codes_ + t, raised(t), width_, 0, 0, nullptr}; }
  std::uint8_t* raised(int t) { return raised_ + (std::ptrdiff_t)(t / TOKENS % 2) * TOKENS * width_; }

  void score(int vectors, int tokens, Fetcher& fetcher) {
    Decoder<RaisedCodes> raising = start_raising(0);
    for (int i = 0; i < TOKENS * width_; i += RaisedCodes::TOGETHER) raising.some();
    for (int t = 0; t < tokens; t += TOKENS) {
      const bool more = t + TOKENS < tokens;
      for (int v = 0; v < vectors; v += LANES) {
        fetcher.with_block(width_ / AHEAD, [&](Walk& ahead, auto fetches) {
          if (v == 0 && more)
            score_lanes<fetches(), true>(v, vectors, t, ahead);
          else if (fetches() || t < ranges_.until(v, LANES))
            score_lanes<fetches(), false>(v, vectors, t, ahead);
        });
      }
    }
  }
  template <bool FETCH, bool RAISE>
  void score_lanes(int v, int vectors, int t, Walk& ahead) {
    if (vectors - v > 8)
      score_block<ByteLanes16, FETCH, RAISE>(v, t, ahead);
    else
      score_block<ByteLanes8, FETCH, RAISE>(v, t, ahead);
  }
  template <class Lanes, bool FETCH, bool RAISE>
  __attribute__((noinline)) void score_block(int v, int t, Walk& ahead) {
    const int groups = latent_groups_ + 1;
    Walk walk = ahead;
    Decoder<RaisedCodes> raising = start_raising(t + TOKENS);
    const std::uint32_t* q = q_ + (std::ptrdiff_t)v * width_ / 4;
    const std::uint8_t* keys = raised(t);
    typename Lanes::Floats sums[TOKENS];
#pragma GCC unroll 8
    for (int j = 0; j < TOKENS; j++) sums[j] = Lanes::zero();
    std::ptrdiff_t d = 0;
    for (int g = 0; g < groups; g++) {
      typename Lanes::Sums products[TOKENS];
#pragma GCC unroll 8
      for (int j = 0; j < TOKENS; j++) products[j] = Lanes::load(q_offset_ + g * vectors_ + v);
      for (const int end = group_end(g); d < end; d += AHEAD) {
        if (FETCH) walk.fetch();
        if (RAISE) raising.some();
#pragma GCC unroll 2
        for (int i = 0; i < AHEAD; i += 4) {
          const auto x = Lanes::load(q + (d + i) * (LANES / 4));
#pragma GCC unroll 8
          for (int j = 0; j < TOKENS; j++)
            products[j] = add_products(products[j], Lanes::broadcast(keys + (std::ptrdiff_t)j * width_ + d + i), x);
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < TOKENS; j++)
        sums[j] = Lanes::add_scaled(sums[j], products[j], q_scale_ + g * vectors_ + v,
                                    token_scale_[(t + j) * groups + g]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < TOKENS; j++) Lanes::store(scores(t + j, v), sums[j]);
    if (FETCH) ahead = walk;
  }

  // Weights times the tokens' scales of group g in 255 levels of the largest, those of 4 tokens side by side.
  void quantise_weights(int v, int tokens, int g) {
    const float* scale = token_scale_ + g;
    const int groups = latent_groups_ + 1;
    const auto weight = [&](int t) { return t < tokens ? load(scores(t, v)) * scale[t * groups] : vf{}; };
    // Magnitudes as integers are ordered as the numbers are, with NaN above infinity: it reaches the level.
    __m512i largest = _mm512_setzero_si512();
    for (int t = 0; t < tokens; t++) largest = _mm512_max_epi32(largest, (__m512i)((vu)weight(t) & 0x7fffffff));
    const vf most = (vf)largest;
    store(level_ + v, most / 255);
    const vf inverse = (most > 1e-36f) & (most < INFINITY) ? 255 / most : vf{};
    for (int t = 0; t < tokens; t += 4) {
      vu word{};
      for (int i = 0; i < 4; i++) {
        const vf exact = weight(t + i) * inverse;
        word |= (vu)_mm512_min_epu32(_mm512_cvtps_epu32((__m512)exact), _mm512_set1_epi32(255)) << (8 * i);
      }
      std::memcpy(levels_ + (std::ptrdiff_t)t / 4 * stride_ + v, &word, sizeof word);
    }
  }
  // Four tokens' codes of each column side by side.
  void mix(int tokens, int column) {
    for (int t = 0; t < tokens; t += 4) {
      const __m512i a = _mm512_loadu_si512(codes_[t] + column), b = _mm512_loadu_si512(codes_[t + 1] + column);
      const __m512i c = _mm512_loadu_si512(codes_[t + 2] + column), d = _mm512_loadu_si512(codes_[t + 3] + column);
      const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
      const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
      std::uint8_t* out = mixed_ + t * MIXED;
      _mm512_store_si512(out, _mm512_unpacklo_epi16(ab_low, cd_low));
      _mm512_store_si512(out + 64, _mm512_unpackhi_epi16(ab_low, cd_low));
      _mm512_store_si512(out + 128, _mm512_unpacklo_epi16(ab_high, cd_high));
      _mm512_store_si512(out + 192, _mm512_unpackhi_epi16(ab_high, cd_high));
    }
  }

  void accumulate(int vectors, float* out, Fetcher& fetcher) {
    for_vector_blocks<VECTORS>(vectors, [&](auto count, int v) { accumulate_block<count()>(v, out, fetcher); });
  }
  template <int V>
  void accumulate_block(int v, float* out, Fetcher& fetcher) {
    fetcher.with_block(TILE / 4, [&](Walk& ahead, auto fetches) {
      accumulate<V, fetches()>(v, ranges_.until(v, V), out + (std::ptrdiff_t)v * latents_, ahead);
    });
  }
  template <int V, bool FETCH>
  __attribute__((noinline)) void accumulate(int v, int tokens, float* out, Walk& ahead) {
    constexpr int C = MIXED / 16;
    Walk walk = ahead;
    const std::uint32_t* levels = levels_ + v;
    __m512i sums[V][C];
#pragma GCC unroll 8
    for (int i = 0; i < V; i++)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) sums[i][c] = _mm512_setzero_si512();
    for (int t = 0; t < tokens; t += 4, levels += stride_) {
      if (FETCH) walk.fetch();
      __m512i value[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) value[c] = _mm512_load_si512(mixed_ + t * MIXED + c * 64);
#pragma GCC unroll 8
      for (int i = 0; i < V; i++) {
        const __m512i four = _mm512_set1_epi32((int)levels[i]);
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) sums[i][c] = add_products(sums[i][c], four, value[c]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) {
      const __m512 level = _mm512_set1_ps(level_[v + i]), rescale = _mm512_set1_ps(rescale_[v + i]);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) {
        float* to = out + (std::ptrdiff_t)i * latents_ + c * 16;
        const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(to), rescale);
        _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i][c]), level, old));
      }
    }
    if (FETCH) ahead = walk;
  }

  int latent_dim_, rope_dim_;
  int latents_, width_;  // padded: of the latents, of a row
  int latent_groups_;
  bool in_place_;
  std::uint32_t* q_;               // [vectors / 16, width / 4, 16] four codes
  std::int8_t* q_codes_;           // [16, width]
  float *q_row_, *q_scale_;        // [width], [groups, vectors]
  std::int32_t* q_offset_;         // [groups, vectors]
  float* token_scale_;             // [TILE, groups]
  std::uint8_t *raised_, *mixed_;  // [2, TOKENS, width], [TILE / 4, MIXED, 4 tokens]
  std::uint32_t* levels_;          // [TILE / 4, stride] four tokens
  float* level_;                   // [vectors] weight of a level
  char *zeros_, *padded_rows_;     // [width], [TILE, width] where rows are not padded as they are stored
  const char* codes_[TILE];
};

}  // namespace latentkv::LATENTKV_ISA

#endif
