// Attention over int8 pages in int8 products (AVX-512 VNNI): faster than bf16's, with rounding of its own.
//
// A query vector gets a scale for each group of numbers that shares one in the cache, and so do the weights of a tile
// times those tokens' scales: everything that is multiplied is a byte, sums are exact, and scales multiply sums. What is
// lost: up to 1/254 of the largest number of a group of the query, and 1/510 of the largest weight in 256 tokens (times how
// much their scales differ).
#pragma once

#include "attention_softmax.h"
#include "turn.h"

#if defined(__AVX512VNNI__)

namespace latentkv::LATENTKV_ISA {

struct Int8Weights {
  using Weight = float;
  static constexpr int TILE = 256;
  LATENTKV_INLINE void store_weights(float* p, vf v) { store(p, v); }
};

// sum += a, unsigned bytes, times b, signed ones, four to a number. GCC 12 moves _mm512_dpbusd_epi32's sums about.
LATENTKV_INLINE __m512i add_products(__m512i sum, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

class Int8Engine : public Softmax<Int8Weights> {
  static constexpr int VECTORS = 6, BLOCK = 32, MIXED = 4 * 16;  // query vectors, tokens and columns at a time
  static constexpr int PAD = 64;                                 // groups of numbers are padded to whole registers

 public:
  static constexpr int STEP = MIXED;

  Int8Engine(const Attention& a, int vectors)
      : Softmax(a), latent_dim_(a.values.width), rope_dim_(a.keys.width - latent_dim_),
        latents_(padded(latent_dim_)), width_(latents_ + padded(rope_dim_)), vectors_(vectors),
        latent_groups_((latent_dim_ + SCALE_GROUP - 1) / SCALE_GROUP),
        in_place_(latents_ == latent_dim_ && width_ == a.keys.width) {}

  int value_width() const { return latents_; }

  void place(Memory& memory) {
    const std::size_t vectors = vectors_, groups = latent_groups_ + 1;
    Softmax::place(memory, vectors);
    q_ = memory.take<std::int8_t>(vectors * width_);
    q_scale_ = memory.take<float>(vectors * groups);
    q_offset_ = memory.take<std::int32_t>(vectors * groups);
    q_row_ = memory.take<float>(width_);
    token_scale_ = memory.take<float>(groups * TILE);
    turned_ = memory.take<std::uint32_t>((std::size_t)width_ / 4 * BLOCK);
    mixed_ = memory.take<std::uint8_t>((std::size_t)TILE * MIXED);
    levels_ = memory.take<std::uint8_t>(vectors * TILE);
    largest_weight_ = memory.take<float>(vectors);
    level_ = memory.take<float>(vectors);
    zeros_ = memory.take<char>(width_);
    padded_rows_ = memory.take<char>(in_place_ ? 0 : (std::size_t)TILE * width_);
  }

  void load_queries(const Group& group) {
    std::memset(zeros_, 0, width_);
    for (int v = 0; v < group.rows * group.heads; v++) {
      const std::int64_t row = group.row + v / group.heads, head = group.head + v % group.heads;
      const char* q = a_.q + (row * a_.q_row + head * a_.q_head) * sizeof_dtype(a_.q_dtype);
      std::memset(q_row_, 0, sizeof(float) * width_);
      convert_row(q, a_.q_dtype, latent_dim_, q_row_, DType::f32);
      convert_row(q + latent_dim_ * sizeof_dtype(a_.q_dtype), a_.q_dtype, rope_dim_, q_row_ + latents_, DType::f32);
      for (int g = 0; g <= latent_groups_; g++) quantise_query(v, g);
    }
  }

  void attend(const Group& group, int first, const StoredTile<TILE>& stored, const StoredTile<TILE>& next,
              const State& state) {
    const int vectors = group.rows * group.heads, blocks = (vectors + VECTORS - 1) / VECTORS;
    find_ranges(group, first, stored.tokens);
    take(stored);
    Fetcher fetcher = {next, a_.keys.bytes, blocks * (TILE / BLOCK + latents_ / MIXED)};
    for (int t = 0; t < stored.tokens; t += BLOCK) {
      turn(t);
      for_blocks(vectors, [&](auto count, int v) {
        fetcher.some();
        if (t < read_until(v, count(), vectors)) score<count()>(v, t);
      });
    }
    soften(vectors, stored.tokens, state);
    const int tokens = (stored.tokens + 3) / 4 * 4;
    for (int v = 0; v < vectors; v++) largest_weight_[v] = largest(weights_ + v * TILE, tokens);
    for (int g = 0; g < latent_groups_; g++) {
      quantise_weights(vectors, stored.tokens, g);
      for (int column = g * SCALE_GROUP; column < group_end(g); column += MIXED) {
        mix(tokens, column);
        for_blocks(vectors, [&](auto count, int v) {
          fetcher.some();
          accumulate<count()>(v, read_until(v, count(), vectors), state.out + (std::ptrdiff_t)v * latents_ + column);
        });
      }
    }
  }

  // `mix` leaves 4 columns of each 16 in each register.
  static void in_order(const float* accumulated, float* out) {
    for (int j = 0; j < 4; j++)
      for (int k = 0; k < 4; k++) std::memcpy(out + 16 * k + 4 * j, accumulated + 16 * j + 4 * k, 4 * sizeof(float));
  }

 private:
  // Fetches the next tile's rows, an equal share each time.
  struct Fetcher {
    const StoredTile<TILE>& next;
    int bytes, times, time = 0, row = 0;

    void some() {
      for (time++; row < next.tokens * time / times && row < next.tokens; row++) prefetch_row(next.keys[row], bytes);
    }
  };

  static int padded(int n) { return (n + PAD - 1) / PAD * PAD; }

  // Numbers of group g in padded rows; the last group is the rotated key's.
  int group_begin(int g) const { return g < latent_groups_ ? g * SCALE_GROUP : latents_; }
  int group_end(int g) const {
    if (g >= latent_groups_) return width_;
    return (g + 1) * SCALE_GROUP < latents_ ? (g + 1) * SCALE_GROUP : latents_;
  }

  template <class F>
  LATENTKV_INLINE void for_blocks(int vectors, F f) {
    int v = 0;
    for (; v + VECTORS <= vectors; v += VECTORS) f(std::integral_constant<int, VECTORS>{}, v);
    for (; v + 4 <= vectors; v += 4) f(std::integral_constant<int, 4>{}, v);
    for (; v < vectors; v++) f(std::integral_constant<int, 1>{}, v);
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
    const float most = read<float>(&bits), inverse = inverse_of(most, 127);
    __m512i total = _mm512_setzero_si512();
    for (int d = begin; d < end; d += W) {
      const vf exact = inverse == 0 ? vf{} : load(q_row_ + d) * inverse;  // not zero times NaN
      const __m512i codes = _mm512_cvtps_epi32((__m512)exact);
      total = _mm512_add_epi32(total, codes);
      _mm_storeu_si128((__m128i*)(q_ + (std::ptrdiff_t)v * width_ + d), _mm512_cvtsepi32_epi8(codes));
    }
    q_scale_[v * (latent_groups_ + 1) + g] = most / 127;
    // Keys are multiplied as code + 128.
    q_offset_[v * (latent_groups_ + 1) + g] = -128 * _mm512_reduce_add_epi32(total);
  }

  // Where each token's codes lie, and its scales; a token that no query reads has zeros.
  void take(const StoredTile<TILE>& stored) {
    const int groups = latent_groups_ + 1, whole = (stored.tokens + BLOCK - 1) / BLOCK * BLOCK;
    for (int i = 0; i < whole; i++) {
      const char* row = i < stored.tokens ? stored.keys[i] : nullptr;
      codes_[i] = row ? in_place_ ? row : padded_row(row, i) : zeros_;
      for (int g = 0; g < groups; g++)
        token_scale_[g * TILE + i] = row ? f16_to_float(read<f16>(row + a_.keys.width + g * sizeof(f16))) : 0;
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

  void turn(int t) {
    for (int half = 0; half < BLOCK; half += 16)
      for (int d = 0; d < width_; d += 64)
        turn_16_words<0x80808080>(codes_ + t + half, d, turned_ + d / 4 * BLOCK + half, BLOCK);
  }

  template <int V>
  __attribute__((noinline)) void score(int v, int t) {
    constexpr int C = BLOCK / 16;
    const int groups = latent_groups_ + 1;
    const std::int8_t* q = q_ + (std::ptrdiff_t)v * width_;
    __m512 sums[V][C];
#pragma GCC unroll 8
    for (int i = 0; i < V; i++)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) sums[i][c] = _mm512_setzero_ps();
    for (int g = 0; g < groups; g++) {
      __m512i products[V][C];
#pragma GCC unroll 8
      for (int i = 0; i < V; i++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) products[i][c] = _mm512_set1_epi32(q_offset_[(v + i) * groups + g]);
      for (int d = group_begin(g); d < group_end(g); d += 4) {
        const std::uint32_t* words = turned_ + d / 4 * BLOCK;
        __m512i key[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) key[c] = _mm512_load_si512(words + c * 16);
#pragma GCC unroll 8
        for (int i = 0; i < V; i++) {
          const __m512i x = _mm512_set1_epi32(read<std::int32_t>(q + i * width_ + d));
#pragma GCC unroll 8
          for (int c = 0; c < C; c++) products[i][c] = add_products(products[i][c], key[c], x);
        }
      }
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) {
        const __m512 scale = _mm512_load_ps(token_scale_ + g * TILE + t + c * 16);
#pragma GCC unroll 8
        for (int i = 0; i < V; i++) {
          const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(products[i][c]), scale);
          sums[i][c] = _mm512_fmadd_ps(product, _mm512_set1_ps(q_scale_[(v + i) * groups + g]), sums[i][c]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < V; i++)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) _mm512_store_ps(scores_ + (v + i) * TILE + t + c * 16, sums[i][c]);
  }

  static float largest(const float* x, int n) {
    vf most{};
    for (int i = 0; i < n; i += W) most = maximum(load(x + i), most);
    return max_of(most);
  }

  // weight * the token's scale in 255 levels of the largest weight times the largest scale, among the tokens that the
  // query vector reads: what it shares the group with changes nothing.
  void quantise_weights(int vectors, int tokens, int g) {
    const float* scale = token_scale_ + g * TILE;
    const float most_scale = largest(scale, tokens);
    const auto most_read = [&](int v) {
      if (from_[v] == 0 && to_[v] == tokens) return most_scale;
      float most = 0;
      for (int t = from_[v]; t < to_[v]; t++) most = scale[t] > most ? scale[t] : most;
      return most;
    };
    for (int v = 0; v < vectors; v++) {
      const float* weight = weights_ + v * TILE;
      std::uint8_t* levels = levels_ + v * TILE;
      const float most = largest_weight_[v] * most_read(v), inverse = inverse_of(most, 255);
      level_[v] = most / 255;
      for (int t = 0; t < tokens; t += W) {
        const vf exact = load(weight + t) * (load(scale + t) * inverse);
        _mm_storeu_si128((__m128i*)(levels + t), _mm512_cvtusepi32_epi8(_mm512_cvtps_epu32((__m512)exact)));
      }
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

  template <int V>
  __attribute__((noinline)) void accumulate(int v, int tokens, float* out) {
    constexpr int C = MIXED / 16;
    const std::uint8_t* levels = levels_ + v * TILE;
    __m512i sums[V][C];
#pragma GCC unroll 8
    for (int i = 0; i < V; i++)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) sums[i][c] = _mm512_setzero_si512();
    for (int t = 0; t < tokens; t += 4) {
      __m512i value[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) value[c] = _mm512_load_si512(mixed_ + t * MIXED + c * 64);
#pragma GCC unroll 8
      for (int i = 0; i < V; i++) {
        const __m512i four = _mm512_set1_epi32(read<std::int32_t>(levels + i * TILE + t));
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
  }

  int latent_dim_, rope_dim_;
  int latents_, width_;  // padded: of the latents, of a row
  int vectors_, latent_groups_;
  bool in_place_;
  std::int8_t* q_;                   // [vectors, width] codes
  float* q_scale_;                   // [vectors, groups]
  std::int32_t* q_offset_;           // [vectors, groups]
  float *q_row_, *token_scale_;      // [width], [groups, TILE]
  std::uint32_t* turned_;            // [width / 4, BLOCK] four numbers of each token
  std::uint8_t *mixed_, *levels_;    // [TILE / 4, MIXED, 4 tokens], [vectors, TILE]
  float *largest_weight_, *level_;   // [vectors] of the tile; weight of a level
  char *zeros_, *padded_rows_;       // [width], [TILE, width] where rows are not padded as they are stored
  const char* codes_[TILE];
};

}  // namespace latentkv::LATENTKV_ISA

#endif
