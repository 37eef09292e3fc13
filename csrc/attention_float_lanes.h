// AVX2's engine for latent pages and for prompts: query vectors lie in the lanes of registers, products are float32.
//
// A number of a key is broadcast against that number of 16 query vectors. So neither scores nor the softmax need sums
// across lanes, and bf16 rows are taken as they lie: a pair of numbers is broadcast as one word, of which a shift and a
// mask make two float32 numbers beside the multiplications. Other formats are decoded a row at a time, and so are the
// rows of prompts: they lie far apart, and each is read by all of up to 128 query vectors.
#pragma once

#include "attention_fetch.h"
#include "attention_lane_softmax.h"

#if defined(__AVX2__) && !defined(__AVX512F__)

namespace latentkv::LATENTKV_ISA {

// Products take rows as Stored: bf16 in place, or float.
template <class Stored>
class FloatLanesEngine : public LaneSoftmax<64> {
  static constexpr bool PAIRS = sizeof(Stored) == 2;
  static constexpr int SCORES = 8;                // a block of scores, in registers
  static constexpr int VECTORS = 6, COLUMNS = 2;  // a block of sums of values
  static constexpr int AHEAD = 16;                // numbers of a key, or tokens' values / 4, for each line fetched ahead
  // So many numbers of all keys are multiplied before the next ones: 16 query vectors' stay in L1.
  static constexpr int STRETCH = 192;

 public:
  static constexpr int STEP = W;

  static bool takes(const Attention& a) {
    const bool of_latents = a.values_in_keys && !a.gather && a.heads > W / 2, of_prompt = !a.values_in_keys && a.gather;
    return (of_latents || of_prompt) && a.values.width % STEP == 0 && a.keys.width % AHEAD == 0 &&
           (!PAIRS || (a.kv_format == RowFormat::bf16 && !a.gather));
  }

  FloatLanesEngine(const Attention& a, int vectors)
      : LaneSoftmax(a, vectors), width_(a.keys.width), value_width_(a.values.width),
        in_place_(PAIRS || (a.kv_format == RowFormat::fp32 && !a.gather)) {}

  int value_width() const { return value_width_; }

  void place(Memory& memory) {
    LaneSoftmax::place(memory);
    q_ = memory.take<float>((std::size_t)vectors_ * width_);
    zeros_ = memory.take<Stored>(widest());
    keys_taken_ = memory.take<Stored>(in_place_ ? 0 : (std::size_t)TILE * width_);
    values_taken_ = memory.take<Stored>(a_.values_in_keys ? 0 : (std::size_t)TILE * value_width_);
  }

  void load_queries(const Group& group) {
    const int vectors = group.rows * group.heads, size = sizeof_dtype(a_.q_dtype);
    std::memset(zeros_, 0, widest() * sizeof(Stored));
    std::memset(q_, 0, sizeof(float) * vectors_ * width_);
    for (int v = 0; v < vectors; v++) {
      const std::int64_t row = group.row + v / group.heads, head = group.head + v % group.heads;
      const char* from = a_.q + (row * a_.q_row + head * a_.q_head) * size;
      float* to = q_ + (std::ptrdiff_t)(v / LANES * LANES) * width_ + v % LANES;
      for (int d = 0; d < width_; d += W) {
        const vf x = load_any(from, a_.q_dtype, d);
        for (int i = 0; i < W; i++) to[(d + i) * LANES] = x[i];
      }
    }
  }

  // Adds the tile of stored rows, whose first token is `first`, to the state; meanwhile the next tile is fetched.
  void attend(const Group& group, int first, const StoredTile<TILE>& stored, const StoredTile<TILE>& next,
              const State& state) {
    const int vectors = group.rows * group.heads;
    take_rows(stored);
    ranges_.find(a_, group, first, stored.tokens);
    int scored = 0;
    for (int v = 0; v < vectors; v += LANES)
      scored += stretches() * (full(v, vectors) ? num_vector_blocks<SCORES / 2>(stored.tokens)
                                                : num_vector_blocks<SCORES>(stored.tokens));
    const int summed = num_vector_blocks<VECTORS>(vectors) * ((value_width_ / W + COLUMNS - 1) / COLUMNS);
    Fetcher keys(next.keys, next.tokens, a_.keys.bytes, scored + (a_.values_in_keys ? summed : 0));
    for (int v = 0; v < vectors; v += LANES) score(v, vectors, stored.tokens, keys);
    for (int v = 0; v < vectors; v += W) soften(v, stored.tokens, state);
    if (a_.values_in_keys) {
      accumulate(vectors, keys, state);
    } else {
      Fetcher values(next.values, next.tokens, a_.values.bytes, summed);
      accumulate(vectors, values, state);
    }
  }

  static void in_order(const float* accumulated, float* out) { store(out, load(accumulated)); }

 private:
  int widest() const { return width_ > value_width_ ? width_ : value_width_; }

  void take_rows(const StoredTile<TILE>& stored) {
    for (int i = 0; i < TILE; i++) {
      const bool is_one = i < stored.tokens;
      keys_[i] = row(is_one ? stored.keys[i] : nullptr, width_, keys_taken_ + (std::ptrdiff_t)i * width_);
      values_[i] = a_.values_in_keys ? keys_[i]
                                     : row(is_one ? stored.values[i] : nullptr, value_width_,
                                           values_taken_ + (std::ptrdiff_t)i * value_width_);
    }
  }
  const Stored* row(const char* stored, int width, Stored* taken) const {
    if (!stored) return zeros_;
    if (in_place_) return (const Stored*)stored;
    if constexpr (!PAIRS) {
      const int rope = a_.values_in_keys ? width_ - value_width_ : 0;
      decode_row(stored, a_.kv_format, width, rope, width, taken);
    }
    return taken;
  }

  int stretches() const { return (width_ + STRETCH - 1) / STRETCH; }
  // Whether the query vectors from v on fill two registers, not one.
  static bool full(int v, int vectors) { return vectors - v > W; }

  void score(int v, int vectors, int tokens, Fetcher& fetcher) {
    for (int d = 0; d < width_; d += STRETCH) {
      const int end = d + STRETCH < width_ ? d + STRETCH : width_;
      full(v, vectors) ? score_stretch<2>(v, tokens, d, end, fetcher) : score_stretch<1>(v, tokens, d, end, fetcher);
    }
  }
  template <int R>
  void score_stretch(int v, int tokens, int d, int end, Fetcher& fetcher) {
    for_vector_blocks<SCORES / R>(tokens, [&](auto count, int t) {
      fetcher.with_block((end - d) / AHEAD, [&](Walk& ahead, auto fetches) {
        if (fetches() || t < ranges_.until(v, LANES)) score_block<R, count(), fetches()>(v, t, d, end, ahead);
      });
    });
  }
  // Adds the products of numbers d .. end - 1 of T keys and R registers of query vectors to their scores.
  template <int R, int T, bool FETCH>
  __attribute__((noinline)) void score_block(int v, int t, int d, int end, Walk& ahead) {
    Walk walk = ahead;
    const float* q = q_ + (std::ptrdiff_t)v * width_;
    const Stored* keys[T];
    vf sums[T][R];
#pragma GCC unroll 8
    for (int j = 0; j < T; j++) {
      keys[j] = keys_[t + j];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sums[j][r] = d ? load(scores(t + j, v + r * W)) : vf{};
    }
    const auto products = [&](const float* x, auto number) __attribute__((always_inline)) {
      vf y[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) y[r] = load(x + r * W);
#pragma GCC unroll 8
      for (int j = 0; j < T; j++) {
        const vf key = number(j);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sums[j][r] = multiply_add(y[r], key, sums[j][r]);
      }
    };
    for (; d < end; d += AHEAD) {
      if (FETCH) walk.fetch();
#pragma GCC unroll 8
      for (int i = 0; i < AHEAD; i += 2) {
        const float* x = q + (d + i) * LANES;
        if constexpr (PAIRS) {
          // Not left to GCC, which would take the word apart before it is broadcast, or keep more words than registers.
          const auto pair = [&](int j) __attribute__((always_inline)) {
            vu word;
            asm volatile("vpbroadcastd %1, %0" : "=x"(word) : "m"(*(const std::uint32_t*)(keys[j] + d + i)));
            return word;
          };
          products(x, [&](int j) __attribute__((always_inline)) { return (vf)(pair(j) << 16); });
          products(x + LANES, [&](int j) __attribute__((always_inline)) { return (vf)(pair(j) & 0xffff0000u); });
        } else {
          products(x, [&](int j) __attribute__((always_inline)) { return splat(keys[j][d + i]); });
          products(x + LANES, [&](int j) __attribute__((always_inline)) { return splat(keys[j][d + i + 1]); });
        }
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < T; j++)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) store(scores(t + j, v + r * W), sums[j][r]);
    if (FETCH) ahead = walk;
  }

  void accumulate(int vectors, Fetcher& fetcher, const State& state) {
    int column = 0;
    for (; column + COLUMNS * W <= value_width_; column += COLUMNS * W)
      accumulate_columns<COLUMNS>(vectors, column, fetcher, state);
    for (; column < value_width_; column += W) accumulate_columns<1>(vectors, column, fetcher, state);
  }
  template <int C>
  void accumulate_columns(int vectors, int column, Fetcher& fetcher, const State& state) {
    for_vector_blocks<VECTORS>(vectors, [&](auto count, int v) {
      fetcher.with_block(TILE / 4, [&](Walk& ahead, auto fetches) {
        accumulate_block<count(), C, fetches()>(v, column, ranges_.until(v, count()), ahead, state);
      });
    });
  }
  template <int V, int C, bool FETCH>
  __attribute__((noinline)) void accumulate_block(int v, int column, int tokens, Walk& ahead, const State& state) {
    Walk walk = ahead;
    float* out = state.out + (std::ptrdiff_t)v * value_width_ + column;
    const float* weights = scores(0, v);
    vf sums[V][C];
#pragma GCC unroll 8
    for (int i = 0; i < V; i++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) sums[i][c] = load(out + (std::ptrdiff_t)i * value_width_ + c * W) * rescale_[v + i];
    const auto add = [&](int t) __attribute__((always_inline)) {
      const Stored* row = values_[t] + column;
      vf y[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        if constexpr (PAIRS) y[c] = load_bf16(row + c * W);
        else y[c] = load(row + c * W);
      }
#pragma GCC unroll 8
      for (int i = 0; i < V; i++) {
        const vf weight = splat(weights[t * stride_ + i]);
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) sums[i][c] = multiply_add(y[c], weight, sums[i][c]);
      }
    };
    int t = 0;
    for (; t + 4 <= tokens; t += 4) {
      if (FETCH) walk.fetch();
      add(t); add(t + 1); add(t + 2); add(t + 3);
    }
    for (; t < tokens; t++) add(t);
#pragma GCC unroll 8
    for (int i = 0; i < V; i++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) store(out + (std::ptrdiff_t)i * value_width_ + c * W, sums[i][c]);
    if (FETCH) {
      for (int left = TILE / 4 - tokens / 4; left > 0; left--) walk.fetch();
      ahead = walk;
    }
  }

  int width_, value_width_;
  bool in_place_;
  float* q_;                            // [vectors / 16, width, 16]
  Stored* zeros_;                       // a row
  Stored *keys_taken_, *values_taken_;  // [TILE, width], where rows are not taken in place
  const Stored *keys_[TILE], *values_[TILE];
};

}  // namespace latentkv::LATENTKV_ISA

#endif
