// Attention over rows of keys and values with an online softmax (arXiv 1805.02867), tile by tile.
//
// Tiles and chunks are counted from a sequence's token 0, every query vector goes through the same operations in the
// same order whatever shares its group, and the chunks' partial results are merged in their order: a result does not
// depend, bit for bit, on the rest of the batch, on the number of threads or on where the rows lie.
#include "attention.h"

#include <math.h>
#include <omp.h>

#include "attention_bf16.h"
#include "attention_float.h"
#include "attention_tile.h"
#include "scratch.h"

namespace latentkv::LATENTKV_ISA {
namespace {

// Fewer multiplications than this take less time than waking other threads.
constexpr std::int64_t WORTH_THREADS = 1 << 20;
constexpr int SCORE_BLOCK = 16;  // query vectors whose scores are computed together: they stay in L1

// Partial result of the query vectors of a group: sum over tokens of exp(score - peak) and of that times the values.
struct State {
  float *peak, *total;  // [vectors]
  float* out;           // [vectors, padded value width], columns in the arithmetic's order
};

template <class A>
struct Sizes {
  int key_width, value_width, vectors;

  explicit Sizes(const Attention& a)
      : key_width(Tile<A>::padded(a.keys.width)), value_width(Tile<A>::padded(a.values.width)), vectors(0) {
    for (int g = 0; g < a.num_groups; g++) {
      const int own = a.groups[g].rows * a.groups[g].heads;
      vectors = own > vectors ? own : vectors;
    }
    vectors = (vectors + W - 1) / W * W;
  }
  std::size_t state_floats() const { return (std::size_t)vectors * (value_width + 2); }
  State state(float* memory) const { return {memory, memory + vectors, memory + 2 * vectors}; }
};

LATENTKV_INLINE void merge(const State& into, const State& part, int v, int width) {
  if (part.total[v] == 0) return;
  const float peak = into.peak[v] > part.peak[v] ? into.peak[v] : part.peak[v];
  const float x = exp(splat(into.peak[v] - peak))[0], y = exp(splat(part.peak[v] - peak))[0];
  into.peak[v] = peak;
  into.total[v] = into.total[v] * x + part.total[v] * y;
  float *o = into.out + (std::ptrdiff_t)v * width, *p = part.out + (std::ptrdiff_t)v * width;
  for (int d = 0; d < width; d += W) store(o + d, load(o + d) * x + load(p + d) * y);
}

// One thread's memory and the work on one group of query vectors.
template <class A>
class Worker {
  using Element = typename A::Element;
  using Weight = typename A::Weight;
  static constexpr int TILE = A::TILE;

 public:
  Worker(const Attention& a, const Sizes<A>& sizes) : a_(a), sizes_(sizes) {
    const std::size_t vectors = sizes.vectors, keys = sizes.key_width, values = sizes.value_width;
    const bool in_place = Tile<A>::reads_in_place(a);
    const std::size_t scratch_rows = in_place ? 0 : TILE;
    const std::size_t bytes = 2 * sizeof(float) * sizes.state_floats() + vectors * TILE * (sizeof(float) + sizeof(Weight)) +
                              ((vectors + 1 + scratch_rows) * keys + scratch_rows * values) * sizeof(Element) +
                              3 * vectors * sizeof(float) + 64 * 16;
    memory_ = thread_scratch(Scratch::own, bytes);
    own_ = sizes.state(take<float>(sizes.state_floats()));
    chunk_ = sizes.state(take<float>(sizes.state_floats()));
    scores_ = take<float>(vectors * TILE);
    weights_ = take<Weight>(vectors * TILE);
    rescale_ = take<float>(vectors);
    sum_ = take<float>(vectors);
    q_ = take<Element>(vectors * keys);
    tile_.zeros = take<Element>(keys);
    std::memset(tile_.zeros, 0, keys * sizeof(Element));
    tile_.key_scratch = take<Element>(scratch_rows * keys);
    tile_.value_scratch = take<Element>(scratch_rows * values);
    tile_.key_width = sizes.key_width;
    tile_.value_width = sizes.value_width;
    tile_.in_place = in_place;
  }

  void whole_group(const Group& group) {
    one_chunk(group, 0, own_);
    for (int i = 1; i < group.chunks; i++) {
      one_chunk(group, i, chunk_);
      for (int v = 0; v < group.rows * group.heads; v++) merge(own_, chunk_, v, sizes_.value_width);
    }
    for (int v = 0; v < group.rows * group.heads; v++) write(group, own_, v);
  }

  void one_chunk(const Group& group, int index, const State& state) {
    load_queries(group);
    const int vectors = group.rows * group.heads;
    for (int v = 0; v < sizes_.vectors; v++) {
      state.peak[v] = -INFINITY;
      state.total[v] = 0;
    }
    std::memset(state.out, 0, sizeof(float) * vectors * sizes_.value_width);
    const int begin = (group.first / group.chunk + index) * group.chunk;
    const int first = begin > group.first ? begin : group.first;
    const int last = begin + group.chunk < group.last ? begin + group.chunk : group.last;
    StoredTile<TILE>*now = &stored_[0], *next = &stored_[1];
    int end = first;
    if (first < last) end = locate_tile(group, first, last, *now);
    for (int s = first; s < last;) {
      const int next_end = end < last ? locate_tile(group, end, last, *next) : end;
      if (next_end == end) next->tokens = 0;
      tile_.take(a_, *now);
      attend_tile(group, s, end, *next, state);
      s = end;
      end = next_end;
      StoredTile<TILE>* swap = now;
      now = next;
      next = swap;
    }
  }

  // The output and log-sum-exp of one query vector.
  void write(const Group& group, const State& state, int v) {
    const std::int64_t row = group.row + v / group.heads, head = group.head + v % group.heads;
    const float total = state.total[v], inverse = total == 0 ? 0 : 1 / total;
    a_.lse[row * a_.heads + head] = total == 0 ? -INFINITY : state.peak[v] + logf(total);
    const float* from = state.out + (std::ptrdiff_t)v * sizes_.value_width;
    const std::int64_t to = row * a_.out_row + head * a_.out_head;
    float part[A::STEP];
    for (int d = 0; d < a_.values.width; d += A::STEP) {
      A::in_order(from + d, part);
      int i = 0;
      for (; i < A::STEP && d + i + W <= a_.values.width; i += W)
        store_any(a_.out, a_.out_dtype, to + d + i, load(part + i) * inverse);
      for (; i < A::STEP && d + i < a_.values.width; i++) store_one(a_.out, a_.out_dtype, to + d + i, part[i] * inverse);
    }
  }

 private:
  template <class T>
  T* take(std::size_t count) {
    T* taken = (T*)memory_;
    memory_ += (count * sizeof(T) + 63) / 64 * 64;
    return taken;
  }

  // The tile from token `first` to the next multiple of TILE; returns its end.
  int locate_tile(const Group& group, int first, int last, StoredTile<TILE>& tile) {
    const int full = (first / TILE + 1) * TILE, end = full < last ? full : last;
    locate(a_, group, first, end, tile);
    hide_unread(a_, group, first, tile);
    return end;
  }

  void load_queries(const Group& group) {
    const int vectors = group.rows * group.heads, size = sizeof_dtype(a_.q_dtype);
    for (int v = 0; v < vectors; v++) {
      const std::int64_t row = group.row + v / group.heads, head = group.head + v % group.heads;
      decode_row(a_.q + (row * a_.q_row + head * a_.q_head) * size, a_.q_dtype, a_.keys.width, sizes_.key_width,
                 q_ + (std::ptrdiff_t)v * sizes_.key_width);
    }
    const int whole = (vectors + 3) / 4 * 4;
    std::memset(q_ + (std::ptrdiff_t)vectors * sizes_.key_width, 0,
                sizeof(Element) * (whole - vectors) * sizes_.key_width);
  }

  void attend_tile(const Group& group, int first, int last, const StoredTile<TILE>& next, const State& state) {
    const int vectors = group.rows * group.heads;
    for (int v = 0; v < vectors; v++) {
      const int t = group.row + v / group.heads;
      const int from = (a_.start ? a_.start[t] : 0) - first, to = a_.stop[t] - first, tokens = last - first;
      from_[v] = from > 0 ? from : 0;
      to_[v] = to < tokens ? to : tokens;
    }
    score(vectors, last - first, next);
    soften(vectors, last - first, state);
    accumulate(vectors, state);
  }

  // The end of the last range among query vectors v .. v + count - 1.
  int read_until(int v, int count, int vectors) const {
    int end = 0;
    for (int i = v; i < v + count && i < vectors; i++) end = to_[i] > end ? to_[i] : end;
    return end;
  }

  void score(int vectors, int tokens, const StoredTile<TILE>& next) {
    const int row_bytes = tile_.in_place ? sizes_.key_width * (int)sizeof(Element) : 0;
    for (int block = 0; block < vectors; block += SCORE_BLOCK) {
      const int block_end = block + SCORE_BLOCK < vectors ? block + SCORE_BLOCK : vectors;
      int until[SCORE_BLOCK / 4];
      for (int v = block; v < block_end; v += 4) until[(v - block) / 4] = read_until(v, 4, vectors);
      for (int t = 0; t < tokens; t += 4) {
        for (int v = block; v < block_end; v += 4) {
          const int ahead = t + (v - block) / 4;
          if (block == 0 && ahead < next.tokens && next.keys[ahead]) prefetch_row(next.keys[ahead], row_bytes);
          if (t < until[(v - block) / 4])
            A::scores(q_ + (std::ptrdiff_t)v * sizes_.key_width, sizes_.key_width, tile_.keys + t,
                      scores_ + v * TILE + t);
        }
      }
    }
  }

  // Scores -> weights exp(scale * score - peak), the new peaks and totals, and what the sums so far are rescaled by.
  void soften(int vectors, int tokens, const State& state) {
    for (int v = 0; v < vectors; v++) {
      const float old_peak = state.peak[v];
      sum_[v] = weigh(scores_ + v * TILE, weights_ + v * TILE, tokens, from_[v], to_[v], state.peak[v]);
      rescale_[v] = old_peak == state.peak[v] ? 0 : old_peak - state.peak[v];
    }
    for (int v = 0; v < vectors; v += W) {
      const vf rescale = exp(load(rescale_ + v));
      store(rescale_ + v, rescale);
      store(state.total + v, load(state.total + v) * rescale + load(sum_ + v));
    }
  }

  float weigh(float* s, Weight* p, int tokens, int from, int to, float& peak) {
    if (from >= to) {
      std::memset(p, 0, sizeof(Weight) * TILE);
      return 0;
    }
    vi lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    const int end = (tokens + W - 1) / W * W;
    vf largest = splat(-INFINITY);
    for (int i = 0; i < end; i += W) {
      vf x = load(s + i) * a_.scale;
      if (i < from || i + W > to) x = (lane + i >= from) & (lane + i < to) ? x : splat(-INFINITY);
      store(s + i, x);
      largest = maximum(x, largest);
    }
    const float tile_peak = max_of(largest);
    peak = tile_peak > peak ? tile_peak : peak;
    vf total{};
    for (int i = 0; i < end; i += W) {
      const vf weight = exp(load(s + i) - peak);
      A::store_weights(p + i, weight);
      total += weight;
    }
    return sum(total);
  }

  void accumulate(int vectors, const State& state) {
    constexpr int WIDE = A::COLUMNS * A::STEP;
    int column = 0;
    for (; column + WIDE <= sizes_.value_width; column += WIDE) accumulate_columns<A::COLUMNS>(vectors, column, state);
    for (; column < sizes_.value_width; column += A::STEP) accumulate_columns<1>(vectors, column, state);
  }
  template <int C>
  void accumulate_columns(int vectors, int column, const State& state) {
    int v = 0;
    for (; v + A::VECTORS <= vectors; v += A::VECTORS) accumulate_block<A::VECTORS, C>(v, column, state);
    for (; v + 4 <= vectors; v += 4) accumulate_block<4, C>(v, column, state);
    for (; v + 2 <= vectors; v += 2) accumulate_block<2, C>(v, column, state);
    for (; v < vectors; v++) accumulate_block<1, C>(v, column, state);
  }
  template <int V, int C>
  void accumulate_block(int v, int column, const State& state) {
    A::template accumulate<V, C>(weights_ + v * TILE, rescale_ + v, tile_.values, read_until(v, V, v + V), column,
                                 state.out + (std::ptrdiff_t)v * sizes_.value_width + column, sizes_.value_width);
  }

  const Attention& a_;
  const Sizes<A>& sizes_;
  char* memory_;
  State own_, chunk_;
  float *scores_, *rescale_, *sum_;  // [vectors, TILE], [vectors], [vectors]
  Weight* weights_;                  // [vectors, TILE]
  Element* q_;                       // [vectors, padded key width]
  Tile<A> tile_;
  StoredTile<TILE> stored_[2];
  int from_[GROUP_VECTORS], to_[GROUP_VECTORS];  // tokens of the tile that each query vector reads
};

template <class A>
void attend_with(const Attention& a) {
  const Sizes<A> sizes(a);
  int threads = a.multiplications < WORTH_THREADS ? 1 : omp_get_max_threads();
  // With few groups the chunks are the work items, and their partial results wait to be merged.
  const bool by_chunk = threads > 1 && a.num_groups < 4 * threads && a.num_groups < a.num_items;
  const int items = by_chunk ? a.num_items : a.num_groups;
  threads = threads < items ? threads : items;
  float* partials = nullptr;
  if (by_chunk) partials = (float*)thread_scratch(Scratch::team, sizeof(float) * sizes.state_floats() * items);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Worker<A> worker(a, sizes);
    if (!by_chunk) {
#pragma omp for schedule(dynamic, 1)
      for (int g = 0; g < items; g++) worker.whole_group(a.groups[g]);
    } else {
      const Group* group = a.groups;
#pragma omp for schedule(dynamic, 1)
      for (int item = 0; item < items; item++) {
        while (item >= group->first_item + group->chunks) group++;
        worker.one_chunk(*group, item - group->first_item, sizes.state(partials + item * sizes.state_floats()));
      }
      for (int g = 0; g < a.num_groups; g++) {
        const Group& group = a.groups[g];
        float* first = partials + group.first_item * sizes.state_floats();
#pragma omp for schedule(static) nowait
        for (int v = 0; v < group.rows * group.heads; v++) {
          const State state = sizes.state(first);
          for (int i = 1; i < group.chunks; i++)
            merge(state, sizes.state(first + i * sizes.state_floats()), v, sizes.value_width);
          worker.write(group, state, v);
        }
      }
    }
  }
}

void attend(const Attention& a) {
  if (a.num_groups == 0) return;
#if defined(__AVX512BF16__)
  if (a.q_dtype == DType::bf16 && a.kv_dtype == DType::bf16) return attend_with<Bf16Arithmetic>(a);
#endif
  attend_with<FloatArithmetic>(a);
}

}  // namespace

const AttentionKernels attention = {attend};

}  // namespace latentkv::LATENTKV_ISA
