#include "index.h"

#include <omp.h>

#include "best_tokens.h"
#include "index_scores.h"
#include "scratch.h"
#include "team.h"

namespace latentkv::LATENTKV_ISA {
namespace {

// Fewer multiplications than this take less time than waking other threads.
constexpr std::int64_t WORTH_THREADS = 1 << 20;
// The same where weights have to come from memory.
constexpr std::int64_t WORTH_A_FORK = 1 << 17;
// Bytes that a team may keep for rows that several threads look through together.
constexpr std::int64_t TEAM_BYTES = 64 << 20;

// out[r, h] for R rows and C heads, each in one float32 sum a lane.
template <int R, int C>
void weigh(const Matrix& x, int row, const float* weight, int head, float scale, float* out, int dim, int heads) {
  const int size = sizeof_dtype(x.dtype);
  const char* rows = (const char*)x.data + row * x.stride * size;
  const float* w = weight + (std::ptrdiff_t)head * dim;
  for_dtype(x.dtype, [&](auto dtype) {
    vf a[R][C] = {};
    int d = 0;
    for (; d + W <= dim; d += W)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) {
        const vf y = load(w + (std::ptrdiff_t)c * dim + d);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) a[r][c] = multiply_add(load_any(rows + r * x.stride * size, dtype(), d), y, a[r][c]);
      }
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) {
        float total = sum(a[r][c]);
        for (int i = d; i < dim; i++)
          total += load_one(rows + r * x.stride * size, dtype(), i) * w[(std::ptrdiff_t)c * dim + i];
        out[(std::ptrdiff_t)(row + r) * heads + head + c] = total * scale;
      }
  });
}

template <int R>
void weigh_rows(const Matrix& x, int row, const float* weight, float scale, float* out, int dim, int heads, int first,
                int last) {
  constexpr int C = 8 / R;
  int h = first;
  for (; h + C <= last; h += C) weigh<R, C>(x, row, weight, h, scale, out, dim, heads);
  for (; h < last; h++) weigh<R, 1>(x, row, weight, h, scale, out, dim, heads);
}

void weigh_heads(Matrix x, const float* weight, float scale, float* out, int tokens, int dim, int heads) {
  constexpr int ROWS = 4, HEADS = 8;
  const int across = (heads + HEADS - 1) / HEADS, items = (tokens + ROWS - 1) / ROWS * across;
#pragma omp parallel for schedule(static) if (forks((std::int64_t)tokens * dim * heads >= WORTH_A_FORK))
  for (int item = 0; item < items; item++) {
    const int row = item / across * ROWS, first = item % across * HEADS;
    const int last = first + HEADS < heads ? first + HEADS : heads;
    if (row + ROWS <= tokens) {
      weigh_rows<ROWS>(x, row, weight, scale, out, dim, heads, first, last);
    } else {
      for (int r = row; r < tokens; r++) weigh_rows<1>(x, r, weight, scale, out, dim, heads, first, last);
    }
  }
}

// One row's keys: its tokens, or pools of them.
struct Row {
  int first = 0, last = 0;
  const std::int32_t* pages = nullptr;

  int tokens() const { return last > first ? last - first : 0; }
};

Row row_of(const IndexChoice& c, int t) {
  int b = 0;
  while (c.q_start[b + 1] <= t) b++;
  return {c.start ? c.start[t] : 0, c.stop[t] / c.pool, c.pages + b * c.pages_row};
}

LATENTKV_INLINE std::int32_t slot_of(const IndexChoice& c, const Row& row, int token) {
  return row.pages[token / c.page_size] * c.page_size + token % c.page_size;
}

// A row that sees no more than it may choose chooses it all.
void choose_all(const IndexChoice& c, const Row& row, std::int32_t* slots) {
  const int tokens = row.tokens();
  for (int i = 0; i < tokens; i++) slots[i] = slot_of(c, row, row.first + i);
  for (int i = tokens; i < c.count; i++) slots[i] = -1;
}

void choose_part(const IndexChoice& c, const Row& row, const Part& part, std::uint32_t lowest, std::int32_t* slots) {
  take(part, lowest, [&](int place, int token) { slots[place] = slot_of(c, row, token); });
}

// Rows whose tokens are cut into parts, so that all threads work on each of them.
struct SharedRows {
  Row row;
  std::int32_t* slots;
  Part* parts;
  int num_parts, count;
  std::uint32_t bucket, lowest;
};

// Every row by one thread.
template <class A>
void choose_by_row(const IndexChoice& c, int threads) {
  int longest = 0;
  for (int t = 0; t < c.rows; t++) {
    const int tokens = row_of(c, t).tokens();
    longest = tokens > c.count && tokens > longest ? tokens : longest;
  }
  int claimed = 0;
#pragma omp parallel num_threads(threads) if (forks(threads > 1))
  {
    Scorer<A> scorer(c);
    Part part{};
    const auto place = [&](Memory& memory) {
      scorer.place(memory);
      part.ranks = memory.take<std::uint32_t>(longest);
      part.candidates = memory.take<std::uint32_t>(longest);
      part.histogram = memory.take<std::int32_t>(BUCKETS);
    };
    Memory memory;
    place(memory);
    memory.at = (std::uintptr_t)thread_scratch(Scratch::own, memory.at);
    place(memory);
    for (int t; (t = __atomic_fetch_add(&claimed, 1, __ATOMIC_RELAXED)) < c.rows;) {
      const Row row = row_of(c, t);
      std::int32_t* slots = c.slots + t * c.width();
      if (row.tokens() <= c.count) {
        choose_all(c, row, slots);
        continue;
      }
      part.first = row.first;
      part.tokens = row.tokens();
      scorer.load_row(t, row.pages);
      scorer.score(row.first, row.last, (float*)part.ranks);
      rank(part);
      int count = c.count;
      const std::uint32_t bucket = last_bucket_of(&part, 1, count);
      collect(part, bucket);
      choose_part(c, row, part, lowest_rank(&part, 1, bucket, count), slots);
    }
  }
}

// Few rows: their tokens are cut into parts of which every thread takes some.
template <class A>
void choose_by_part(const IndexChoice& c, int threads, int part_tokens) {
  int num_parts = 0;
  std::int64_t tokens = 0;
  for (int t = 0; t < c.rows; t++) {
    const int own = row_of(c, t).tokens();
    if (own <= c.count) continue;
    num_parts += (own + part_tokens - 1) / part_tokens;
    tokens += own;
  }
  SharedRows* rows;
  Part* parts;
  int* row_of_part;
  std::uint32_t *ranks, *candidates;
  std::int32_t* histograms;
  const auto place = [&](Memory& memory) {
    rows = memory.take<SharedRows>(c.rows);
    parts = memory.take<Part>(num_parts);
    row_of_part = memory.take<int>(num_parts);
    ranks = memory.take<std::uint32_t>(tokens);
    candidates = memory.take<std::uint32_t>(tokens);
    histograms = memory.take<std::int32_t>((std::size_t)num_parts * BUCKETS);
  };
  Memory memory;
  place(memory);
  memory.at = (std::uintptr_t)thread_scratch(Scratch::team, memory.at);
  place(memory);
  for (int t = 0, p = 0; t < c.rows; t++) {
    SharedRows& own = rows[t];
    own = {row_of(c, t), c.slots + t * c.width(), parts + p, 0, c.count, 0, 0};
    if (own.row.tokens() <= c.count) {
      choose_all(c, own.row, own.slots);
      continue;
    }
    for (int s = own.row.first; s < own.row.last; s += part_tokens, p++, own.num_parts++) {
      const int n = own.row.last - s < part_tokens ? own.row.last - s : part_tokens;
      parts[p] = {s, n, ranks, candidates, histograms + (std::ptrdiff_t)p * BUCKETS, 0, 0, 0, 0};
      row_of_part[p] = t;
      ranks += n;
      candidates += n;
    }
  }
  int claimed = 0;
#pragma omp parallel num_threads(threads) if (forks(threads > 1))
  {
    Scorer<A> scorer(c);
    Memory own;
    scorer.place(own);
    own.at = (std::uintptr_t)thread_scratch(Scratch::own, own.at);
    scorer.place(own);
    int loaded = -1;
    for (int p; (p = __atomic_fetch_add(&claimed, 1, __ATOMIC_RELAXED)) < num_parts;) {
      if (loaded != row_of_part[p]) scorer.load_row(loaded = row_of_part[p], rows[row_of_part[p]].row.pages);
      scorer.score(parts[p].first, parts[p].first + parts[p].tokens, (float*)parts[p].ranks);
      rank(parts[p]);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int t = 0; t < c.rows; t++)
      if (rows[t].num_parts) rows[t].bucket = last_bucket_of(rows[t].parts, rows[t].num_parts, rows[t].count);
#pragma omp for schedule(static)
    for (int p = 0; p < num_parts; p++) collect(parts[p], rows[row_of_part[p]].bucket);
#pragma omp for schedule(static)
    for (int t = 0; t < c.rows; t++)
      if (rows[t].num_parts) rows[t].lowest = lowest_rank(rows[t].parts, rows[t].num_parts, rows[t].bucket, rows[t].count);
#pragma omp for schedule(static)
    for (int p = 0; p < num_parts; p++) {
      const SharedRows& row = rows[row_of_part[p]];
      choose_part(c, row.row, parts[p], row.lowest, row.slots);
    }
  }
}

// Each chosen pool as its tokens, and the tokens after the last pool.
void expand_pools(const IndexChoice& c, int t) {
  const Row row = row_of(c, t);
  std::int32_t* slots = c.slots + t * c.width();
  const int pools = row.tokens() < c.count ? row.tokens() : c.count;
  for (int i = pools - 1; i >= 0; i--) {  // from the last on: what is read still stands there
    const std::int32_t first = slots[i] * c.pool;
    for (int j = 0; j < c.pool; j++) slots[i * c.pool + j] = first + j;
  }
  int filled = pools * c.pool;
  const int size = c.page_size * c.pool;
  for (int s = row.last * c.pool; c.open_pool && s < c.stop[t]; s++)
    slots[filled++] = row.pages[s / size] * size + s % size;
  for (; filled < c.width(); filled++) slots[filled] = -1;
}

template <class A>
void choose_with(const IndexChoice& c) {
  std::int64_t tokens = 0;
  for (int t = 0; t < c.rows; t++) {
    const int own = row_of(c, t).tokens();
    tokens += own > c.count ? own : 0;
  }
  const int all = omp_get_max_threads();
  const int threads = tokens * c.heads * c.dim < WORTH_THREADS ? 1 : all;
  // How the work is cut changes no result.
  const std::int64_t wanted = tokens / (4 * threads) + 1;
  const int part_tokens = (int)(wanted < 256 ? 256 : (wanted + 47) / 48 * 48);
  if (threads > 1 && c.rows < 4 * threads && tokens * 8 <= TEAM_BYTES)
    choose_by_part<A>(c, threads, part_tokens);
  else
    choose_by_row<A>(c, threads < c.rows ? threads : c.rows);
  for (int t = 0; c.pool > 1 && t < c.rows; t++) expand_pools(c, t);
}

void choose(const IndexChoice& c) {
  if (c.rows == 0) return;
#if defined(__AVX512BF16__)
  const bool codes = c.key_format == RowFormat::bf16 || c.key_format == RowFormat::int8;
  if (c.q.dtype == DType::bf16 && codes && c.dim % Bf16Scores::STEP == 0) return choose_with<Bf16Scores>(c);
#endif
  choose_with<FloatScores>(c);
}

}  // namespace

const IndexKernels index = {weigh_heads, choose};

}  // namespace latentkv::LATENTKV_ISA
