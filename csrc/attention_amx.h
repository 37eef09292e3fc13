// The bf16 engine by tiles of AMX: latents, and keys and values of heads.
//
// Scores are the product of 16 rows of keys as they lie and of 16 query vectors beside each other, so that query vectors
// are in lanes as they are in attention_lanes.h, whose way with scales this one shares. For the values the weights of
// 32 tokens are transposed, and pairs of tokens interleaved, which permutes the columns inside each 32 (`in_order`).
#pragma once

#include "amx.h"
#include "attention_bf16.h"
#include "attention_codes.h"
#include "attention_lane_softmax.h"
#include "transpose.h"

namespace latentkv::LATENTKV_ISA {

// Codes says how the rows are stored; see attention_codes.h.
template <class Codes>
class AmxEngine : public LaneSoftmax<128> {
  static constexpr int TOKENS = TILE_ROWS, PAIR = 2 * TILE_ROWS;  // of a tile; tiles are taken by twos

 public:
  static constexpr int STEP = 32;  // numbers that a row of a tile holds

  static bool takes(const Attention& a) {
    const int key = a.keys.width, value = a.values.width;
    const bool whole = key % STEP == 0 && value % STEP == 0;
    return whole && (!Codes::SCALED || (a.values_in_keys && Codes::coded(value, key) % Codes::TOGETHER == 0));
  }

  AmxEngine(const Attention& a, int vectors)
      : LaneSoftmax(a, vectors), key_width_(a.keys.width), value_width_(a.values.width),
        latent_groups_(Codes::SCALED ? (value_width_ + SCALE_GROUP - 1) / SCALE_GROUP : 1) {}

  int value_width() const { return value_width_; }

  void place(Memory& memory) {
    LaneSoftmax::place(memory);
    q_ = memory.take<std::uint32_t>((std::size_t)vectors_ * key_width_ / 2);
    weights_ = memory.take<std::uint32_t>((std::size_t)vectors_ * TILE / 2);
    zeros_ = memory.take<bf16>(key_width_ > value_width_ ? key_width_ : value_width_);
    rows_ = memory.take<bf16>((std::size_t)TILE * key_width_);
    scales_ = memory.take<float>(Codes::SCALED ? TILE * (latent_groups_ + 1) : 0);
    interleaved_ = memory.take<std::uint32_t>(TILE / 2 * STEP);
  }

  void load_queries(const Group& group) {
    const int vectors = group.rows * group.heads;
    std::memset(zeros_, 0, sizeof(bf16) * (key_width_ > value_width_ ? key_width_ : value_width_));
    for (int v = 0; v < vectors; v += LANES) {
      const char* rows[LANES];
      for (int i = 0; i < LANES; i++) {
        const std::int64_t row = group.row + (v + i) / group.heads, head = group.head + (v + i) % group.heads;
        rows[i] = v + i < vectors ? a_.q + (row * a_.q_row + head * a_.q_head) * sizeof(bf16) : (const char*)zeros_;
      }
      for (int d = 0; d < key_width_; d += STEP)
        transpose_16_words(rows, d * sizeof(bf16), q_ + ((std::ptrdiff_t)v * key_width_ + d * LANES) / 2, LANES);
    }
    TileShapes shapes;
    for (int tile = 0; tile < 8; tile++) shapes.set(tile, TILE_ROWS);
    tiles_.shape(shapes);
  }

  // Adds the tile of stored rows, whose first token is `first`, to the state; meanwhile the next tile is fetched.
  void attend(const Group& group, int first, const StoredTile<TILE>& stored, const StoredTile<TILE>& next,
              const State& state) {
    const int vectors = group.rows * group.heads;
    ranges_.find(a_, group, first, stored.tokens);
    take(stored);
    score(vectors, stored.tokens, next);
    for (int v = 0; v < vectors; v += LANES) soften(v, stored.tokens, state);
    for (int v = 0; v < vectors; v++)
      if (rescale_[v] != 1) rescale(state.out + (std::ptrdiff_t)v * value_width_, rescale_[v]);
    for (int g = 0; g < latent_groups_; g++) {
      if (Codes::SCALED || g == 0)
        for (int v = 0; v < vectors; v += LANES) weigh(v, stored.tokens, g);
      accumulate(vectors, stored.tokens, g, next, state);
    }
  }

  static void in_order(const float* accumulated, float* out) { Bf16Arithmetic::in_order(accumulated, out); }

 private:
  // Numbers of scale group g; the last group is the rotated key's.
  int group_end(int g) const {
    if (!Codes::SCALED || g == latent_groups_) return key_width_;
    return (g + 1) * SCALE_GROUP < value_width_ ? (g + 1) * SCALE_GROUP : value_width_;
  }
  float* scales_of(int token) { return scales_ + token * (latent_groups_ + 1); }

  void rescale(float* out, float by) {
    for (int d = 0; d < value_width_; d += W) store(out + d, load(out + d) * by);
  }

  // Rows as tiles take them, 16 at a time: where they lie if they lie one after the other, else decoded or copied.
  void take(const StoredTile<TILE>& stored) {
    const int taken = (stored.tokens + PAIR - 1) / PAIR * PAIR;  // the last ones are zeros
    for (int i = 0; i < taken; i++) {
      values_[i] = i < stored.tokens && stored.values[i] ? (const bf16*)stored.values[i] : zeros_;
      if constexpr (Codes::SCALED) values_[i] = decode(i, i < stored.tokens ? stored.keys[i] : nullptr);
    }
    for (int t = 0; t < taken; t += TOKENS) {
      KeyRows& keys = keys_[t / TOKENS];
      keys = {rows_ + (std::ptrdiff_t)t * key_width_, (std::ptrdiff_t)(key_width_ * sizeof(bf16))};
      if (Codes::SCALED) continue;
      if (lie_together(stored, t)) {
        keys = {(const bf16*)stored.keys[t], a_.keys.slot_bytes};
        continue;
      }
      for (int i = t; i < t + TOKENS; i++) {
        const char* row = i < stored.tokens && stored.keys[i] ? stored.keys[i] : (const char*)zeros_;
        std::memcpy(rows_ + (std::ptrdiff_t)i * key_width_, row, key_width_ * sizeof(bf16));
      }
    }
  }
  bool lie_together(const StoredTile<TILE>& stored, int t) const {
    if (a_.gather || t + TOKENS > stored.tokens || !stored.keys[t]) return false;
    for (int i = t + 1; i < t + TOKENS; i++)
      if (stored.keys[i] != stored.keys[i - 1] + a_.keys.slot_bytes) return false;
    return true;
  }
  const bf16* decode(int i, const char* row) {
    bf16* const out = rows_ + (std::ptrdiff_t)i * key_width_;
    if (!row) {
      std::memset(out, 0, key_width_ * sizeof(bf16));
      for (int g = 0; g <= latent_groups_; g++) scales_of(i)[g] = 0;
      return out;
    }
    if constexpr (Codes::SCALED) {
      const int coded = Codes::coded(value_width_, key_width_);
      for (int d = 0; d < coded; d += Codes::TOGETHER) Codes::decode(row + d, out + d);
      Codes::decode_rest(row, value_width_, key_width_ - value_width_, out, scales_of(i));
    }
    return out;
  }

  // A part of the next tile's rows.
  void fetch(const StoredTile<TILE>& next, int part, int parts) {
    for (int i = next.tokens * part / parts; i < next.tokens * (part + 1) / parts; i++) {
      prefetch_row(next.keys[i], a_.keys.bytes);
      if (!a_.values_in_keys) prefetch_row(next.values[i], a_.values.bytes);
    }
  }

  // Half of the next tile is fetched beside scores, half beside sums of values.
  void score(int vectors, int tokens, const StoredTile<TILE>& next) {
    const int blocks = (tokens + PAIR - 1) / PAIR;
    for (int b = 0; b < blocks; b++) {
      fetch(next, b, 2 * blocks);
      const int t = b * PAIR;
      for (int v = 0; v < vectors; v += PAIR) {
        const bool two_lanes = v + LANES < vectors;
        if (t >= ranges_.until(v, two_lanes ? PAIR : LANES)) continue;
        two_lanes ? score_block<true>(v, t) : score_block<false>(v, t);
      }
    }
  }
  // Tiles 0 to 3 are scores, of 16 tokens and 16 query vectors each; 4 and 5 keys; 6 and 7 query vectors.
  template <bool TWO>
  void score_block(int v, int t) {
    const KeyRows first = keys_[t / TOKENS], second = keys_[t / TOKENS + 1];
    const std::uint32_t* const q = q_ + (std::ptrdiff_t)v * key_width_ / 2;
    const std::uint32_t* const more_q = q + (std::ptrdiff_t)LANES * key_width_ / 2;
    const std::ptrdiff_t stride = stride_ * sizeof(float);
    int d = 0;
    const auto products = [&](int end, float* sums, std::ptrdiff_t sums_stride) __attribute__((always_inline)) {
      tile_zero<0>();
      tile_zero<1>();
      if (TWO) tile_zero<2>();
      if (TWO) tile_zero<3>();
      for (; d < end; d += STEP) {
        tile_load<4>(first.base + d, first.stride);
        tile_load<6>(q + d * (LANES / 2), TILE_BYTES);
        tile_multiply_bf16<0, 4, 6>();
        tile_load<5>(second.base + d, second.stride);
        tile_multiply_bf16<1, 5, 6>();
        if (TWO) tile_load<7>(more_q + d * (LANES / 2), TILE_BYTES);
        if (TWO) tile_multiply_bf16<2, 4, 7>();
        if (TWO) tile_multiply_bf16<3, 5, 7>();
      }
      const std::ptrdiff_t below = TOKENS * sums_stride / (std::ptrdiff_t)sizeof(float);
      tile_store<0>(sums, sums_stride);
      tile_store<1>(sums + below, sums_stride);
      if (TWO) tile_store<2>(sums + LANES, sums_stride);
      if (TWO) tile_store<3>(sums + LANES + below, sums_stride);
    };
    if constexpr (!Codes::SCALED) return products(key_width_, scores(t, v), stride);
    alignas(64) float sums[PAIR * PAIR];
    for (int g = 0; g <= latent_groups_; g++) {
      products(group_end(g), sums, PAIR * sizeof(float));
      for (int i = 0; i < PAIR; i++) {
        const vf scale = splat(scales_of(t + i)[g]);
        for (int l = 0; l < (TWO ? PAIR : LANES); l += LANES) {
          float* const score = scores(t + i, v + l);
          const vf sum = load(sums + i * PAIR + l);
          store(score, g ? multiply_add(sum, scale, load(score)) : sum * scale);
        }
      }
    }
  }

  // Weights times the scales of group g, in bf16: of 16 query vectors and 32 tokens at a time, tokens beside each other.
  void weigh(int v, int tokens, int g) {
    const auto weight = [&](int t) {
      if (t >= tokens) return vf{};
      const vf w = load(scores(t, v));
      return Codes::SCALED ? w * scales_of(t)[g] : w;
    };
    alignas(64) std::uint32_t words[LANES * LANES];
    const char* rows[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = (const char*)(words + i * LANES);
    for (int t = 0; t < tokens; t += PAIR) {
      for (int i = 0; i < LANES; i++) {
        const __m512i pairs = side_by_side((__m512)weight(t + 2 * i), (__m512)weight(t + 2 * i + 1));
        _mm512_store_si512(words + i * LANES, pairs);
      }
      transpose_16_words(rows, 0, weights_of(v, t), LANES);
    }
  }
  std::uint32_t* weights_of(int v, int t) { return weights_ + ((std::ptrdiff_t)v * TILE + t * LANES) / 2; }

  // The columns of scale group g.
  void accumulate(int vectors, int tokens, int g, const StoredTile<TILE>& next, const State& state) {
    const int end = Codes::SCALED ? group_end(g) : value_width_;
    const int blocks = value_width_ / STEP;
    for (int column = Codes::SCALED ? g * SCALE_GROUP : 0; column < end; column += STEP) {
      fetch(next, blocks + column / STEP, 2 * blocks);
      interleave(tokens, column);
      for (int v = 0; v < vectors; v += PAIR) {
        float* const out = state.out + (std::ptrdiff_t)v * value_width_ + column;
        v + LANES < vectors ? accumulate_block<true>(v, ranges_.until(v, PAIR), out)
                            : accumulate_block<false>(v, ranges_.until(v, LANES), out);
      }
    }
  }
  // 32 columns of the tile's values: of 32 tokens at a time two tiles of pairs.
  void interleave(int tokens, int column) {
    for (int t = 0; t < tokens; t += PAIR)
      for (int i = 0; i < TOKENS; i++) {
        const __m512i even = _mm512_loadu_si512(values_[t + 2 * i] + column);
        const __m512i odd = _mm512_loadu_si512(values_[t + 2 * i + 1] + column);
        std::uint32_t* const to = interleaved_ + t * LANES + i * LANES;
        _mm512_store_si512(to, _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(to + TOKENS * LANES, _mm512_unpackhi_epi16(even, odd));
      }
  }
  // Tiles 0 to 3 are sums, of 16 query vectors and 16 columns each; 4 and 5 weights; 6 and 7 values.
  template <bool TWO>
  void accumulate_block(int v, int until, float* out) {
    const std::ptrdiff_t stride = value_width_ * sizeof(float);
    float* const more = out + (std::ptrdiff_t)LANES * value_width_;
    tile_load<0>(out, stride);
    tile_load<1>(out + LANES, stride);
    if (TWO) tile_load<2>(more, stride);
    if (TWO) tile_load<3>(more + LANES, stride);
    for (int t = 0; t < until; t += PAIR) {
      const std::uint32_t* const values = interleaved_ + t * LANES;
      tile_load<4>(weights_of(v, t), TILE_BYTES);
      tile_load<6>(values, TILE_BYTES);
      tile_multiply_bf16<0, 4, 6>();
      tile_load<7>(values + TOKENS * LANES, TILE_BYTES);
      tile_multiply_bf16<1, 4, 7>();
      if (TWO) tile_load<5>(weights_of(v + LANES, t), TILE_BYTES);
      if (TWO) tile_multiply_bf16<2, 5, 6>();
      if (TWO) tile_multiply_bf16<3, 5, 7>();
    }
    tile_store<0>(out, stride);
    tile_store<1>(out + LANES, stride);
    if (TWO) tile_store<2>(more, stride);
    if (TWO) tile_store<3>(more + LANES, stride);
  }

  struct KeyRows {
    const bf16* base;
    std::ptrdiff_t stride;  // bytes
  };
  int key_width_, value_width_, latent_groups_;
  TileUse tiles_;
  std::uint32_t* q_;            // [vectors / 16, key width / 2, 16] pairs of numbers
  std::uint32_t* weights_;      // [vectors / 16, TILE / 32, 16, 16] pairs of tokens
  std::uint32_t* interleaved_;  // [TILE / 32, 2, 16, 16] pairs of tokens
  bf16* zeros_;                 // a row
  bf16* rows_;                  // [TILE, key width]
  float* scales_;               // [TILE, latent groups + 1]
  KeyRows keys_[TILE / TOKENS];
  const bf16* values_[TILE];
};

}  // namespace latentkv::LATENTKV_ISA
