// Attention over rows of keys and values with an online softmax (arXiv 1805.02867), tile by tile.
//
// Tiles and chunks are counted from a sequence's token 0, every query vector goes through the same operations in the
// same order whatever shares its group, and the chunks' partial results are merged in their order: a result does not
// depend, bit for bit, on the rest of the batch, on the number of threads or on where the rows lie.
#include "attention.h"

#include <math.h>
#include <omp.h>

#if LATENTKV_TILES
#include "attention_amx.h"
#endif
#include "attention_bf16.h"
#include "attention_float.h"
#include "attention_float_lanes.h"
#include "attention_int8.h"
#include "attention_lanes.h"
#include "attention_packed.h"
#include "attention_rows.h"
#include "scratch.h"
#include "team.h"

namespace latentkv::LATENTKV_ISA {
namespace {

// Fewer multiplications than this take less time than waking other threads.
constexpr std::int64_t WORTH_THREADS = 1 << 20;

// How large the groups and their partial results are.
struct Sizes {
  int vectors, value_width;

  std::size_t state_floats() const { return (std::size_t)vectors * (value_width + 2); }
  State state(float* memory) const { return {memory, memory + vectors, memory + 2 * vectors}; }
};

int most_vectors(const Attention& a) {
  int most = 0;
  for (int g = 0; g < a.num_groups; g++) {
    const int own = a.groups[g].rows * a.groups[g].heads;
    most = own > most ? own : most;
  }
  return (most + 15) / 16 * 16;
}

// The tokens of a group that lie in one chunk: none where its range is empty.
struct Chunk {
  const Group* group;
  int index;

  int begin() const { return (group->first / group->chunk + index) * group->chunk; }
  // Down to where a vector of weights, or a tile of values, could begin: what lies beside what does not depend on the
  // group.
  int first() const { return begin() > group->first / 32 * 32 ? begin() : group->first / 32 * 32; }
  int last() const { return group->last - begin() > group->chunk ? begin() + group->chunk : group->last; }
};

// One thread's memory and the work on one group of query vectors.
//
// An engine adds a tile of TILE tokens to a State; it may leave columns in another order inside each STEP.
template <class Engine>
class Worker {
  static constexpr int TILE = Engine::TILE;

 public:
  Worker(const Attention& a, const Sizes& sizes) : a_(a), sizes_(sizes), engine_(a, sizes.vectors) {
    Memory memory;
    place(memory);
    memory.at = (std::uintptr_t)thread_scratch(Scratch::own, memory.at);
    place(memory);
  }

  template <class Upcoming>
  void whole_group(const Group& group, Upcoming upcoming) {
    for (int i = 0; i < group.chunks; i++) {
      const auto next = [&] { return i + 1 < group.chunks ? Chunk{&group, i + 1} : upcoming(); };
      one_chunk({&group, i}, next, i ? part_ : own_);
      for (int v = 0; i && v < group.rows * group.heads; v++) merge(own_, part_, v, sizes_.value_width);
    }
    for (int v = 0; v < group.rows * group.heads; v++) write(group, own_, v);
  }

  // Leaves the partial result of one chunk in `state`. At its last tile it asks for the upcoming chunk, whose first
  // tile is fetched into L2 meanwhile.
  template <class Upcoming>
  void one_chunk(Chunk chunk, Upcoming upcoming, const State& state) {
    const Group& group = *chunk.group;
    engine_.load_queries(group);
    for (int v = 0; v < sizes_.vectors; v++) {
      state.peak[v] = -INFINITY;
      state.total[v] = 0;
    }
    std::memset(state.out, 0, sizeof(float) * group.rows * group.heads * sizes_.value_width);
    StoredTile<TILE>*now = &stored_[0], *next = &stored_[1];
    const int last = chunk.last();
    int s = chunk.first();
    if (s < last) {
      locate_tile(chunk, s, *now);
    } else {
      upcoming();
    }
    for (int end; s < last; s = end) {
      end = s + now->tokens;
      const Chunk following = end < last ? chunk : upcoming();
      next->tokens = 0;
      if (following.group) locate_tile(following, end < last ? end : following.first(), *next);
      engine_.attend(group, s, *now, *next, state);
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
    float part[Engine::STEP];
    for (int d = 0; d < a_.values.width; d += Engine::STEP) {
      Engine::in_order(from + d, part);
      int i = 0;
      for (; i < Engine::STEP && d + i + W <= a_.values.width; i += W)
        store_any(a_.out, a_.out_dtype, to + d + i, load(part + i) * inverse);
      for (; i < Engine::STEP && d + i < a_.values.width; i++)
        store_one(a_.out, a_.out_dtype, to + d + i, part[i] * inverse);
    }
  }

 private:
  void place(Memory& memory) {
    own_ = sizes_.state(memory.take<float>(sizes_.state_floats()));
    part_ = sizes_.state(memory.take<float>(sizes_.state_floats()));
    engine_.place(memory);
  }

  // The chunk's tile from token `first` to the next multiple of TILE.
  void locate_tile(Chunk chunk, int first, StoredTile<TILE>& tile) {
    const int left = TILE - first % TILE, last = chunk.last();
    locate(a_, *chunk.group, first, last - first > left ? first + left : last, tile);
    hide_unread(a_, *chunk.group, first, tile);
  }

  const Attention& a_;
  const Sizes& sizes_;
  Engine engine_;
  State own_, part_;
  StoredTile<TILE> stored_[2];
};

Chunk chunk_of(const Attention& a, int item) {
  int low = 0;
  for (int high = a.num_groups; high - low > 1;) {
    const int middle = (low + high) / 2;
    (a.groups[middle].first_item <= item ? low : high) = middle;
  }
  return {&a.groups[low], item - a.groups[low].first_item};
}

template <class Engine>
void attend_with(const Attention& a) {
  const int vectors = most_vectors(a);
  const Sizes sizes = {vectors, Engine(a, vectors).value_width()};
  int threads = a.multiplications < WORTH_THREADS ? 1 : omp_get_max_threads();
  // With few groups the chunks are the work items, and their partial results wait to be merged.
  const bool by_chunk = threads > 1 && a.num_groups < 4 * threads && a.num_groups < a.num_items;
  const int items = by_chunk ? a.num_items : a.num_groups;
  threads = threads < items ? threads : items;
  float* partials = nullptr;
  if (by_chunk) partials = (float*)thread_scratch(Scratch::team, sizeof(float) * sizes.state_floats() * items);
  int claimed = 0;
#pragma omp parallel num_threads(threads) if (forks(threads > 1))
  {
    Worker<Engine> worker(a, sizes);
    const int team = omp_get_num_threads();
    for (int item = omp_get_thread_num(), next; item < items; item = next) {
      const auto upcoming = [&] {
        next = team + __atomic_fetch_add(&claimed, 1, __ATOMIC_RELAXED);
        if (next >= items) return Chunk{};
        return by_chunk ? chunk_of(a, next) : Chunk{&a.groups[next], 0};
      };
      if (by_chunk) {
        worker.one_chunk(chunk_of(a, item), upcoming, sizes.state(partials + item * sizes.state_floats()));
      } else {
        worker.whole_group(a.groups[item], upcoming);
      }
    }
    if (by_chunk) {
#pragma omp barrier
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

#if LATENTKV_TILES
template <class Codes>
bool attend_by_tiles(const Attention& a) {
  if (!AmxEngine<Codes>::takes(a)) return false;
  attend_with<AmxEngine<Codes>>(a);
  return true;
}
bool attend_by_tiles(const Attention& a) {
  switch (a.kv_format) {
    case RowFormat::int8: return attend_by_tiles<Int8Rows>(a);
    case RowFormat::fp8: return attend_by_tiles<Fp8Rows>(a);
    default: return attend_by_tiles<Bf16Rows>(a);
  }
}
#endif

#if defined(__AVX512BF16__)
// bf16 does not hold a code times its scale.
template <class Codes>
using PagesArithmetic = std::conditional_t<Codes::SCALED, FloatArithmetic, Bf16Arithmetic>;

template <class Codes>
void attend_pages(const Attention& a) {
  if (LanesEngine<Codes>::takes(a)) return attend_with<LanesEngine<Codes>>(a);
  attend_with<RowsEngine<PagesArithmetic<Codes>>>(a);
}
#endif

void attend(const Attention& a) {
  if (a.num_groups == 0) return;
#if defined(__AVX512VNNI__)
  if (a.int8_products) return attend_with<Int8Engine>(a);
#endif
#if defined(__AVX512BF16__)
  if (a.q_dtype == DType::bf16 && a.kv_format != RowFormat::fp32 && a.kv_format != RowFormat::fp16) {
#if LATENTKV_TILES
    if (attend_by_tiles(a)) return;
#endif
    if (a.gather) return attend_with<PackedEngine>(a);
    switch (a.kv_format) {
      case RowFormat::int8: return attend_pages<Int8Rows>(a);
      case RowFormat::fp8: return attend_pages<Fp8Rows>(a);
      default: return attend_pages<Bf16Rows>(a);
    }
  }
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (FloatLanesEngine<bf16>::takes(a)) return attend_with<FloatLanesEngine<bf16>>(a);
  if (FloatLanesEngine<float>::takes(a)) return attend_with<FloatLanesEngine<float>>(a);
#endif
  attend_with<RowsEngine<FloatArithmetic>>(a);
}

}  // namespace

const AttentionKernels attention = {attend};

}  // namespace latentkv::LATENTKV_ISA
