// One head of one sequence at a time, in one thread, token by token: a row's bits depend on nothing but the tokens before.
//
//   S <- exp(g) S + k v^T,  o = S^T q
//
// A step's first token reads the matrix where it lies in its slot, and its last one writes it there: decoding passes over
// it once. What the heads of a group give is normed when all of them have given it.
#include "lightning.h"

#include <omp.h>

#include "recurrence_rows.h"
#include "scratch.h"
#include "team.h"

namespace latentkv::LATENTKV_ISA {
namespace {

// Columns first .. first + COLUMNS - 1 of a token's step, read from rows of `from` and written to those of `to`.
LATENTKV_INLINE void pass(const float* from, std::ptrdiff_t from_stride, float* to, std::ptrdiff_t to_stride, int dim,
                          float decay, const float* key, const float* value, const float* query, float* out) {
  const vf e = splat(decay);
  vf v[VECTORS], o[VECTORS] = {};
  for (int j = 0; j < VECTORS; j++) v[j] = load(value + j * W);
  for (int i = 0; i < dim; i++) {
    const vf k = splat(key[i]), q = splat(query[i]);
    for (int j = 0; j < VECTORS; j++) {
      const vf s = multiply_add(k, v[j], load(from + i * from_stride + j * W) * e);
      store(to + i * to_stride + j * W, s);
      o[j] = multiply_add(q, s, o[j]);
    }
  }
  for (int j = 0; j < VECTORS; j++) store(out + j * W, o[j]);
}

// What a call reads and gives, all heads of it.
struct Inputs {
  const LightningWeights& weights;
  Matrix qkv;
  const float *cos, *sin;  // [T, half]
  int half, heads, dim;
  float* out;  // [T, W]
};

class Head {
 public:
  Head(const Inputs& in, int head) : in_(in), dim_(in.dim), padded_(padded(in.dim)), head_(head) {
    float* next = (float*)thread_scratch(Scratch::own, (std::size_t)padded_ * (dim_ + 4 * CHUNK + 2) * sizeof(float));
    const auto take = [&](int n) { return (next += n * padded_) - n * padded_; };
    matrix_ = {take(dim_), dim_};
    query_ = take(CHUNK), key_ = take(CHUNK), value_ = take(CHUNK), out_ = take(CHUNK);
    query_norm_ = take(1), key_norm_ = take(1);
    read_row(in.weights.query_norm, in.weights.norm_dtype, dim_, query_norm_, padded_);
    read_row(in.weights.key_norm, in.weights.norm_dtype, dim_, key_norm_, padded_);
    decay_ = exp(splat(in.weights.log_decay[head]))[0];
  }

  // Begins with what a slot holds, or with nothing.
  void load(const float* matrix) {
    lies_ = dim_ == padded_ ? matrix : nullptr;
    if (!lies_) matrix_.fill(matrix);
  }

  // Takes in rows that have waited: keys and values [n, 2, W].
  void take_in(const float* rows, std::int64_t count, float* to) {
    advance(count, to, [&](std::int64_t row, int t) {
      const float* from = rows + 2 * row * width() + mine();
      read_row(from, DType::f32, dim_, key_ + t * padded_, padded_);
      read_row(from + width(), DType::f32, dim_, value_ + t * padded_, padded_);
      for (int i = 0; i < padded_; i++) query_[t * padded_ + i] = 0;
      return (float*)nullptr;
    });
  }

  // Rows first .. first + count - 1 of the call; their keys and values go to `wait`, if any.
  void read(std::int64_t first, std::int64_t count, float* to, float* wait) {
    advance(count, to, [&](std::int64_t row, int t) {
      make_ready(first + row, t);
      if (wait) {
        std::memcpy(wait + 2 * row * width() + mine(), key_ + t * padded_, (std::size_t)dim_ * 4);
        std::memcpy(wait + (2 * row + 1) * width() + mine(), value_ + t * padded_, (std::size_t)dim_ * 4);
      }
      return in_.out + (first + row) * width() + mine();
    });
  }

  void save(float* matrix) const { matrix_.copy_to(matrix); }

 private:
  std::int64_t width() const { return (std::int64_t)in_.heads * dim_; }
  std::int64_t mine() const { return (std::int64_t)head_ * dim_; }

  // `prepare` makes a row ready, and says where what it gives goes; the matrix goes to `to`, if any.
  template <class Prepare>
  void advance(std::int64_t count, float* to, Prepare prepare) {
    float* direct = dim_ == padded_ ? to : nullptr;
    for (std::int64_t done = 0; done < count; done += CHUNK) {
      const int n = count - done < CHUNK ? (int)(count - done) : CHUNK;
      float* given[CHUNK];
      for (int t = 0; t < n; t++) given[t] = prepare(done + t, t);
      for (int column = 0; column < padded_; column += COLUMNS) {
        float* s = matrix_.cell(0, column);
        for (int t = 0; t < n; t++) {
          const bool first = lies_ && done + t == 0, last = direct && done + t == count - 1;
          const std::ptrdiff_t row = t * padded_;
          pass(first ? lies_ + column : s, first ? dim_ : COLUMNS, last ? direct + column : s, last ? dim_ : COLUMNS,
               dim_, decay_, key_ + row, value_ + row + column, query_ + row, out_ + row + column);
        }
      }
      for (int t = 0; t < n; t++)
        if (given[t]) std::memcpy(given[t], out_ + t * padded_, (std::size_t)dim_ * 4);
    }
    lies_ = direct;
    if (to && !direct) save(to);
  }

  // Norms and turns a row's query and key.
  void make_ready(std::int64_t row, int t) {
    float* const rows[3] = {query_ + t * padded_, key_ + t * padded_, value_ + t * padded_};
    for (int part = 0; part < 3; part++)
      read_row(at(in_.qkv, row, part * width() + mine()), in_.qkv.dtype, dim_, rows[part], padded_);
    const float* cos = in_.cos + row * in_.half;
    const float* sin = in_.sin + row * in_.half;
    for (int part = 0; part < 2; part++) {
      float* x = rows[part];
      const float* norm = part ? key_norm_ : query_norm_;
      vf squares{};
      for (int i = 0; i < padded_; i += W)
        squares = multiply_add(LATENTKV_ISA::load(x + i), LATENTKV_ISA::load(x + i), squares);
      const float by = 1.0f / __builtin_sqrtf(sum(squares) / (float)dim_ + in_.weights.eps);
      for (int i = 0; i < padded_; i += W)
        store(x + i, LATENTKV_ISA::load(x + i) * by * LATENTKV_ISA::load(norm + i));
      rotate_row(x, cos, sin, in_.half, false);
    }
    const float scale = 1.0f / __builtin_sqrtf((float)dim_);
    for (int i = 0; i < padded_; i += W) store(rows[0] + i, LATENTKV_ISA::load(rows[0] + i) * scale);
  }

  const Inputs& in_;
  int dim_, padded_, head_;
  float decay_;
  const float* lies_ = nullptr;  // where the matrix lies before the next row; none: in the scratch
  Blocks matrix_;
  float *query_, *key_, *value_, *out_, *query_norm_, *key_norm_;
};

void attend_head(const Inputs& in, const LightningState& state, const SlotBatch& batch, int b, int h) {
  const std::int64_t first = batch.q_start[b], count = batch.q_start[b + 1] - first, slot = batch.slot_ids[b];
  const bool begins = count && batch.stop[first] == 1;
  const std::int64_t accepted = begins ? 0 : batch.pending[b], committed = batch.committed[b];
  float* matrix = state.matrices + (slot * in.heads + h) * in.dim * in.dim;
  float* waiting = state.waiting + slot * state.most * 2 * in.heads * in.dim;
  Head head(in, h);
  head.load(begins ? nullptr : matrix);
  if (begins && !committed) head.save(matrix);
  if (accepted) head.take_in(waiting, accepted, committed ? nullptr : matrix);
  if (committed) head.read(first, committed, matrix, nullptr);
  if (count > committed) head.read(first + committed, count - committed, nullptr, waiting);
}

// n numbers of one group.
template <DType X>
LATENTKV_INLINE void norm_and_gate(const float* x, const void* norm, DType norm_dtype, float eps, const void* gate, int n,
                                   void* out) {
  const float by = 1.0f / __builtin_sqrtf(sum_of_squares<DType::f32>(x, n) / (float)n + eps);
  int i = 0;
  for (; i + W <= n; i += W)
    store_any(out, X, i, load(x + i) * by * load_any(norm, norm_dtype, i) * sigmoid(load_any(gate, X, i)));
  for (; i < n; i++)
    store_one(out, X, i, x[i] * by * load_one(norm, norm_dtype, i) * sigmoid(splat(load_one(gate, X, i)))[0]);
}

void finish_row(const LightningWeights& w, const float* x, const char* gate, const char* out, DType dtype, int width) {
  const int n = width / w.groups;
  for (int column = 0; column < width; column += n) {
    const void* norm = (const char*)w.output_norm + column * sizeof_dtype(w.norm_dtype);
    const std::int64_t bytes = column * sizeof_dtype(dtype);
    for_dtype(dtype, [&](auto type) {
      norm_and_gate<decltype(type)::value>(x + column, norm, w.norm_dtype, w.eps, gate + bytes, n, (void*)(out + bytes));
    });
  }
}

void attend(const LightningWeights& weights, Matrix qkv, Matrix gate, const float* cos, const float* sin, int half,
            const LightningState& state, const SlotBatch& batch, float* heads_out, Matrix out, std::int64_t rows,
            int heads, int dim) {
  const Inputs in = {weights, qkv, cos, sin, half, heads, dim, heads_out};
  const std::int64_t items = (std::int64_t)batch.sequences * heads;
  const int width = heads * dim;
#pragma omp parallel if (forks(items > 1 && items * dim * dim >= SERIAL_NUMBERS))
  {
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t i = 0; i < items; i++) attend_head(in, state, batch, (int)(i / heads), (int)(i % heads));
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < rows; row++)
      finish_row(weights, heads_out + row * width, at(gate, row, 0), at(out, row, 0), out.dtype, width);
  }
}

}  // namespace

const LightningKernels lightning = {attend};

}  // namespace latentkv::LATENTKV_ISA
