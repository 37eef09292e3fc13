// The bf16 engine for latent pages: query vectors lie in the lanes of a register.
//
// A pair of numbers of a key is broadcast against that pair of 16 query vectors. So neither scores nor the softmax need
// sums across lanes, and the scale that the cache keeps for a group of numbers multiplies sums of products (scores) or
// softmax weights (values) instead of the numbers: int8 and fp8 codes become bf16 as they are, exactly, between the
// products of the tokens before them.
#pragma once

#include "attention_bf16.h"
#include "attention_codes.h"
#include "attention_lane_softmax.h"
#include "transpose.h"

#if defined(__AVX512BF16__)

namespace latentkv::LATENTKV_ISA {

// One register of sums, for 16 query vectors or, faster, for 8.
struct Lanes16 {
  using Sums = __m512;
  LATENTKV_INLINE Sums zero() { return _mm512_setzero_ps(); }
  LATENTKV_INLINE __m512bh pairs(const std::uint32_t* p) { return (__m512bh)_mm512_load_si512(p); }
  LATENTKV_INLINE Sums add_products(Sums sums, __m512bh x, const bf16* pair) {
    return _mm512_dpbf16_ps(sums, x, (__m512bh)_mm512_set1_epi32(load_as<std::int32_t>(pair)));
  }
  LATENTKV_INLINE Sums add_scaled(Sums sums, Sums x, float scale) {
    return _mm512_fmadd_ps(x, _mm512_set1_ps(scale), sums);
  }
  LATENTKV_INLINE void store(float* p, Sums sums) { _mm512_store_ps(p, sums); }
};
struct Lanes8 {
  using Sums = __m256;
  LATENTKV_INLINE Sums zero() { return _mm256_setzero_ps(); }
  LATENTKV_INLINE __m256bh pairs(const std::uint32_t* p) { return (__m256bh)_mm256_load_si256((const __m256i*)p); }
  LATENTKV_INLINE Sums add_products(Sums sums, __m256bh x, const bf16* pair) {
    return _mm256_dpbf16_ps(sums, x, (__m256bh)_mm256_set1_epi32(load_as<std::int32_t>(pair)));
  }
  LATENTKV_INLINE Sums add_scaled(Sums sums, Sums x, float scale) {
    return _mm256_fmadd_ps(x, _mm256_set1_ps(scale), sums);
  }
  LATENTKV_INLINE void store(float* p, Sums sums) { _mm512_store_ps(p, _mm512_zextps256_ps512(sums)); }
};

// Codes says how the rows are stored; see attention_codes.h.
template <class Codes>
class LanesEngine : public LaneSoftmax<128> {
  static constexpr int TOKENS = 8;                // a block of scores, of 16 or 8 lanes
  static constexpr int VECTORS = 6, COLUMNS = 2;  // a block of sums of values
  // Numbers of a key for each line that is fetched ahead and TOGETHER codes that are decoded: TOKENS rows' worth.
  static constexpr int AHEAD = 8;

 public:
  static constexpr int STEP = Bf16Arithmetic::STEP;

  // Fewer heads would leave lanes empty.
  static bool takes(const Attention& a) {
    return a.values_in_keys && !a.gather && a.heads >= 8 && a.values.width % STEP == 0 && a.keys.width % STEP == 0 &&
           Codes::coded(a.values.width, a.keys.width) % Codes::TOGETHER == 0;
  }

  LanesEngine(const Attention& a, int vectors)
      : LaneSoftmax(a, vectors), width_(a.keys.width), latents_(a.values.width),
        latent_groups_(Codes::SCALED ? (latents_ + SCALE_GROUP - 1) / SCALE_GROUP : 1) {}

  int value_width() const { return latents_; }

  void place(Memory& memory) {
    LaneSoftmax::place(memory);
    q_ = memory.take<std::uint32_t>((std::size_t)vectors_ * width_ / 2);
    weights_ = memory.take<std::uint32_t>((std::size_t)TILE / 2 * stride_);
    zeros_ = memory.take<char>(width_ * sizeof(bf16));
    decoded_ = memory.take<bf16>(Codes::SCALED ? (std::size_t)TILE * width_ : 0);
    scales_ = memory.take<float>(Codes::SCALED ? TILE * (latent_groups_ + 1) : 0);
  }

  void load_queries(const Group& group) {
    const int vectors = group.rows * group.heads;
    std::memset(zeros_, 0, width_ * sizeof(bf16));
    for (int v = 0; v < vectors; v += LANES) {
      const char* rows[LANES];
      for (int i = 0; i < LANES; i++) {
        const std::int64_t row = group.row + (v + i) / group.heads, head = group.head + (v + i) % group.heads;
        rows[i] = v + i < vectors ? a_.q + (row * a_.q_row + head * a_.q_head) * sizeof(bf16) : zeros_;
      }
      for (int d = 0; d < width_; d += 32)
        transpose_16_words(rows, d * sizeof(bf16), q_ + ((std::ptrdiff_t)v * width_ + d * LANES) / 2, LANES);
    }
  }

  // Adds the tile of stored rows, whose first token is `first`, to the state; meanwhile the next tile is fetched.
  void attend(const Group& group, int first, const StoredTile<TILE>& stored, const StoredTile<TILE>& next,
              const State& state) {
    const int vectors = group.rows * group.heads, lanes = (vectors + LANES - 1) / LANES;
    const int scored = lanes * ((stored.tokens + TOKENS - 1) / TOKENS);
    const int summed = num_vector_blocks<VECTORS>(vectors) * ((latents_ + 63) / 64);
    Fetcher fetcher(next.keys, next.tokens, a_.keys.bytes, scored + summed);
    ranges_.find(a_, group, first, stored.tokens);
    score(vectors, stored, fetcher);
    for (int v = 0; v < vectors; v += LANES) soften(v, stored.tokens, state);
    for (int g = 0; g < latent_groups_; g++) {
      for (int v = 0; v < vectors; v += LANES) weigh(v, stored.tokens, g);
      accumulate(vectors, g, fetcher, state);
    }
  }

  static void in_order(const float* accumulated, float* out) { Bf16Arithmetic::in_order(accumulated, out); }

 private:
  // Numbers of scale group g; the last group is the rotated key's.
  int group_end(int g) const {
    if (!Codes::SCALED || g == latent_groups_) return width_;
    return (g + 1) * SCALE_GROUP < latents_ ? (g + 1) * SCALE_GROUP : latents_;
  }
  float* scales_of(int token) { return scales_ + token * (latent_groups_ + 1); }

  // Of rows t .. t + TOKENS - 1; their scales and what is not coded are taken at once.
  Decoder<Codes> start_decoding(const StoredTile<TILE>& stored, int t) {
    const int coded = Codes::coded(latents_, width_);
    for (int i = t; i < t + TOKENS; i++) {
      const char* row = i < stored.tokens ? stored.keys[i] : nullptr;
      codes_[i] = row ? row : zeros_;
      if constexpr (Codes::SCALED) {
        bf16* out = decoded_ + (std::ptrdiff_t)i * width_;
        keys_[i] = out;
        if (row) {
          Codes::decode_rest(row, latents_, width_ - latents_, out, scales_of(i));
        } else {
          std::memset(out + coded, 0, (width_ - coded) * sizeof(bf16));
          for (int g = 0; g <= latent_groups_; g++) scales_of(i)[g] = 0;
        }
      } else {
        keys_[i] = (const bf16*)codes_[i];
      }
    }
    const int rest = width_ - coded;
    return {codes_ + t, decoded_ + (std::ptrdiff_t)t * width_ - rest, coded, rest, 0, nullptr};
  }
  void decode_all(Decoder<Codes> decoder) {
    for (int i = 0; i < TOKENS * decoder.coded; i += Codes::TOGETHER) decoder.some();
  }

  void score(int vectors, const StoredTile<TILE>& stored, Fetcher& fetcher) {
    Decoder<Codes> decoder = start_decoding(stored, 0);
    if (Codes::SCALED) decode_all(decoder);
    for (int t = 0; t < stored.tokens; t += TOKENS) {
      bool more = t + TOKENS < stored.tokens;
      if (more) decoder = start_decoding(stored, t + TOKENS);
      for (int v = 0; v < vectors; v += LANES) {
        fetcher.with_block(width_ / AHEAD, [&](Walk& ahead, auto fetches) {
          if (!fetches() && t >= ranges_.until(v, LANES)) return;
          if (Codes::SCALED && more) {
            score_lanes<fetches(), Codes::SCALED>(v, vectors, t, ahead, decoder);
            more = false;
          } else {
            score_lanes<fetches(), false>(v, vectors, t, ahead, decoder);
          }
        });
      }
      if (Codes::SCALED && more) decode_all(decoder);
    }
  }
  template <bool FETCH, bool DECODE>
  void score_lanes(int v, int vectors, int t, Walk& ahead, Decoder<Codes>& decoder) {
    if (vectors - v > 8)
      score_block<Lanes16, FETCH, DECODE>(v, t, ahead, decoder);
    else
      score_block<Lanes8, FETCH, DECODE>(v, t, ahead, decoder);
  }
  template <class Lanes, bool FETCH, bool DECODE>
  __attribute__((noinline)) void score_block(int v, int t, Walk& ahead, Decoder<Codes>& decoder) {
    using Sums = typename Lanes::Sums;
    Walk walk = ahead;
    Decoder<Codes> codes = decoder;
    const std::uint32_t* q = q_ + (std::ptrdiff_t)v * width_ / 2;
    const bf16* keys[TOKENS];
    Sums sums[TOKENS], scaled[TOKENS];
#pragma GCC unroll 8
    for (int j = 0; j < TOKENS; j++) {
      keys[j] = keys_[t + j];
      sums[j] = scaled[j] = Lanes::zero();
    }
    std::ptrdiff_t d = 0;
    const auto products = [&](int end, auto decodes) __attribute__((always_inline)) {
      for (; d < end; d += AHEAD) {
        if (FETCH) walk.fetch();
        if (decodes()) codes.some();
#pragma GCC unroll 4
        for (int i = 0; i < AHEAD; i += 2) {
          const auto x = Lanes::pairs(q + (d + i) * (LANES / 2));
#pragma GCC unroll 8
          for (int j = 0; j < TOKENS; j++) sums[j] = Lanes::add_products(sums[j], x, keys[j] + d + i);
        }
      }
    };
    if constexpr (Codes::SCALED) {
      const float* scale = scales_of(t);
      for (int g = 0; g <= latent_groups_; g++, scale++) {
        if (group_end(g) <= Codes::coded(latents_, width_))
          products(group_end(g), std::bool_constant<DECODE>{});
        else
          products(width_, std::false_type{});
#pragma GCC unroll 8
        for (int j = 0; j < TOKENS; j++) {
          scaled[j] = Lanes::add_scaled(scaled[j], sums[j], scale[j * (latent_groups_ + 1)]);
          sums[j] = Lanes::zero();
        }
      }
    } else {
      products(width_, std::false_type{});
    }
#pragma GCC unroll 8
    for (int j = 0; j < TOKENS; j++)
      Lanes::store(scores(t + j, v), Codes::SCALED ? scaled[j] : sums[j]);
    if (FETCH) ahead = walk;
  }

  // Weights times the scales of group g, in bf16, the pair of tokens t and t + 1 of a query vector side by side.
  void weigh(int v, int tokens, int g) {
    const auto weight = [&](int t) {
      if (t >= tokens) return vf{};
      const vf w = load(scores(t, v));
      return Codes::SCALED ? w * scales_of(t)[g] : w;
    };
    for (int t = 0; t < tokens; t += 2) {
      const __m512i pairs = side_by_side((__m512)weight(t), (__m512)weight(t + 1));
      _mm512_store_si512(weights_ + (std::ptrdiff_t)t / 2 * stride_ + v, pairs);
    }
  }

  // The columns of scale group g.
  void accumulate(int vectors, int g, Fetcher& fetcher, const State& state) {
    constexpr int WIDE = COLUMNS * STEP;
    int column = Codes::SCALED ? g * SCALE_GROUP : 0;
    const int end = Codes::SCALED ? group_end(g) : latents_;
    for (; column + WIDE <= end; column += WIDE) accumulate_columns<COLUMNS>(vectors, column, fetcher, state);
    for (; column < end; column += STEP) accumulate_columns<1>(vectors, column, fetcher, state);
  }
  template <int C>
  void accumulate_columns(int vectors, int column, Fetcher& fetcher, const State& state) {
    for_vector_blocks<VECTORS>(
        vectors, [&](auto count, int v) { accumulate_block<count(), C>(v, column, fetcher, state); });
  }
  template <int V, int C>
  void accumulate_block(int v, int column, Fetcher& fetcher, const State& state) {
    fetcher.with_block(TILE / 2, [&](Walk& ahead, auto fetches) {
      accumulate_pairs<V, C, fetches(), 2>((const bf16*)(weights_ + v), 2 * stride_, rescale_ + v, keys_,
                                           ranges_.until(v, V), column,
                                           state.out + (std::ptrdiff_t)v * latents_ + column, latents_, ahead);
    });
  }

  int width_, latents_, latent_groups_;
  std::uint32_t* q_;        // [vectors / 16, width / 2, 16] pairs of numbers
  std::uint32_t* weights_;  // [TILE / 2, stride] pairs of tokens
  char* zeros_;             // a row
  bf16* decoded_;           // [TILE, width]
  float* scales_;           // [TILE, latent groups + 1]
  const char* codes_[TILE];
  const bf16* keys_[TILE];
};

}  // namespace latentkv::LATENTKV_ISA

#endif
