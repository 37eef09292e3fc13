// One head of one sequence at a time, in one thread, token by token: a row's bits depend on nothing but the tokens before.
//
// A token's change of the matrix, k d^T, is put off until the next token's decay, so that each token passes over the
// matrix once, and by columns, so that what a few tokens pass over stays in the first-level cache:
//   S <- exp(g) (S + k' d'),  d = beta (v - S^T k),  o = S^T q + (k . q) d
#include "kda.h"

#include <omp.h>

#include "recurrence_rows.h"
#include "scratch.h"
#include "team.h"

namespace latentkv::LATENTKV_ISA {
namespace {

constexpr float L2_EPS = 1e-6f;

// log(1 + exp(x)): log(1 + u) = 2 artanh(u / (2 + u)), whose series converges fast up to u = 1.
LATENTKV_INLINE vf softplus(vf x) {
  const vf u = exp(x < 0.0f ? x : -x), z = u / (2.0f + u), square = z * z;
  vf p = splat(1.0f / 17);
  for (int n = 15; n > 0; n -= 2) p = p * square + 1.0f / (float)n;
  return (x > 0.0f ? x : vf{}) + 2.0f * z * p;
}

// Columns first .. first + COLUMNS - 1 of a token's step. `from` is where they lie, `s` [D, COLUMNS] where they go.
template <bool PUT_OFF>
LATENTKV_INLINE void pass(const float* from, std::ptrdiff_t stride, float* s, int dim, const float* key_before,
                          const float* change_before, const float* decay, const float* key, const float* query,
                          vf by_key[VECTORS], vf by_query[VECTORS]) {
  vf change[VECTORS], a[VECTORS] = {}, o[VECTORS] = {};
  for (int j = 0; j < VECTORS; j++) change[j] = load(change_before + j * W);
  for (int i = 0; i < dim; i++) {
    const vf e = splat(decay[i]), k = splat(key[i]), q = splat(query[i]);
    const vf before = PUT_OFF ? splat(key_before[i]) : vf{};
    for (int j = 0; j < VECTORS; j++) {
      vf t = load(from + i * stride + j * W);
      if (PUT_OFF) t = multiply_add(before, change[j], t);
      t *= e;
      store(s + i * COLUMNS + j * W, t);
      a[j] = multiply_add(k, t, a[j]);
      o[j] = multiply_add(q, t, o[j]);
    }
  }
  for (int j = 0; j < VECTORS; j++) by_key[j] = a[j], by_query[j] = o[j];
}

class Head {
 public:
  Head(const KdaWeights& weights, int heads, int dim, int head)
      : w_(weights), heads_(heads), dim_(dim), head_(head), width_((std::int64_t)heads * dim) {
    padded_ = padded(dim);
    float* next = (float*)thread_scratch(Scratch::own, floats(dim) * sizeof(float));
    const auto take = [&](std::int64_t n) { return (next += n * padded_) - n * padded_; };
    matrix_ = {take(dim), dim};
    taps_ = take(3 * KDA_TAPS);
    raw_ = take(3 * (KDA_PAST + CHUNK));
    query_ = take(CHUNK), key_ = take(CHUNK), value_ = take(CHUNK), decay_ = take(CHUNK), out_ = take(CHUNK);
    key_before_ = take(1), change_before_ = take(1), bias_ = take(1), norm_ = take(1);
    for (int part = 0; part < 3; part++)
      for (int tap = 0; tap < KDA_TAPS; tap++)
        read_row(weights.taps + (3 * tap + part) * width_ + head * dim, DType::f32, dim,
                 taps_ + (part * KDA_TAPS + tap) * padded_, padded_);
    read_row(weights.gate_bias + head * dim, DType::f32, dim, bias_, padded_);
    read_row(weights.norm, weights.norm_dtype, dim, norm_, padded_);
    rate_ = exp(splat(weights.log_rate[head]))[0];
  }

  // Begins with what a slot holds, or with nothing.
  void load(const float* matrix, const float* inputs) {
    put_off_ = false;
    for (int i = 0; i < padded_; i++) key_before_[i] = change_before_[i] = 0;
    for (int row = 0; row < KDA_PAST; row++)
      for (int part = 0; part < 3; part++)
        if (inputs)
          read_row(inputs + (3 * row + part) * width_ + head_ * dim_, DType::f32, dim_, raw(row, part), padded_);
        else
          read_row(nullptr, DType::f32, 0, raw(row, part), padded_);
    from_ = nullptr;
    if (matrix && dim_ == padded_) {
      from_ = matrix;  // passed over where it lies
    } else {
      matrix_.fill(matrix);
    }
  }

  // What the rows that it has seen leave, to a slot.
  void save(float* matrix, float* inputs) const {
    for (int i = 0; i < dim_; i++) {
      int j = 0;
      for (; j + W <= dim_; j += W) store(matrix + i * dim_ + j, settled(i, j));
      for (int rest = 0; j + rest < dim_; rest++) matrix[i * dim_ + j + rest] = settled(i, j)[rest];
    }
    for (int row = 0; row < KDA_PAST; row++)
      for (int part = 0; part < 3; part++)
        convert_row(raw(row, part), DType::f32, dim_, inputs + (3 * row + part) * width_ + head_ * dim_, DType::f32);
  }

  // Rows first .. first + count - 1; their results go to the same rows of `out`, if any.
  void advance(const KdaRows& rows, std::int64_t first, std::int64_t count, const Matrix* gate, const Matrix* out) {
    for (std::int64_t done = 0; done < count; done += CHUNK) {
      const int n = count - done < CHUNK ? (int)(count - done) : CHUNK;
      for (int t = 0; t < n; t++) make_ready(rows, first + done + t, t);
      for (int column = 0; column < padded_; column += COLUMNS) pass_over(column, n);
      from_ = nullptr;
      put_off_ = true;
      copy(key_ + (n - 1) * padded_, key_before_, padded_);
      for (int row = 0; row < KDA_PAST; row++) copy(raw(n + row, 0), raw(row, 0), 3 * padded_);
      if (out)
        for (int t = 0; t < n; t++) write(t, *gate, *out, first + done + t);
    }
  }

  static std::int64_t floats(int dim) {
    return (std::int64_t)padded(dim) * (dim + 3 * KDA_TAPS + 3 * (KDA_PAST + CHUNK) + 5 * CHUNK + 4);
  }

 private:
  float* raw(int row, int part) const { return raw_ + (3 * row + part) * padded_; }
  // A part of the matrix with what was put off.
  vf settled(int i, int j) const {
    return multiply_add(splat(key_before_[i]), LATENTKV_ISA::load(change_before_ + j), LATENTKV_ISA::load(matrix_.cell(i, j)));
  }
  static void copy(const float* from, float* to, int n) { std::memmove(to, from, (std::size_t)n * 4); }

  // Convolves, normalises and gates a row.
  void make_ready(const KdaRows& rows, std::int64_t row, int t) {
    const std::int64_t mine = (std::int64_t)head_ * dim_;
    float* const results[3] = {query_ + t * padded_, key_ + t * padded_, value_ + t * padded_};
    vf squares[3];
    for (int part = 0; part < 3; part++) {
      read_row(at(rows.qkv, row, part * width_ + mine), rows.qkv.dtype, dim_, raw(KDA_PAST + t, part), padded_);
      const float* taps = taps_ + part * KDA_TAPS * padded_;
      squares[part] = vf{};
      for (int i = 0; i < padded_; i += W) {
        vf sum{};
        for (int tap = 0; tap < KDA_TAPS; tap++)
          sum = multiply_add(LATENTKV_ISA::load(taps + tap * padded_ + i), LATENTKV_ISA::load(raw(t + tap, part) + i), sum);
        sum *= sigmoid(sum);
        store(results[part] + i, sum);
        squares[part] = multiply_add(sum, sum, squares[part]);
      }
    }
    scale(results[0], 1.0f / (__builtin_sqrtf(sum(squares[0]) + L2_EPS) * __builtin_sqrtf((float)dim_)));
    scale(results[1], 1.0f / __builtin_sqrtf(sum(squares[1]) + L2_EPS));
    vf product{};
    for (int i = 0; i < padded_; i += W)
      product = multiply_add(LATENTKV_ISA::load(results[0] + i), LATENTKV_ISA::load(results[1] + i), product);
    key_query_[t] = sum(product);
    float* decay = decay_ + t * padded_;
    read_row(at(rows.gate, row, mine), rows.gate.dtype, dim_, decay, padded_);
    for (int i = 0; i < padded_; i += W) {
      const vf x = LATENTKV_ISA::load(decay + i) + LATENTKV_ISA::load(bias_ + i);
      store(decay + i, exp(w_.bounded ? w_.lower_bound * sigmoid(rate_ * x) : -rate_ * softplus(x)));
    }
    beta_[t] = sigmoid(splat(load_one(at(rows.beta, row, head_), rows.beta.dtype, 0)))[0];
  }

  void scale(float* x, float by) const {
    for (int i = 0; i < padded_; i += W) store(x + i, LATENTKV_ISA::load(x + i) * by);
  }

  // n rows, over a block of columns.
  void pass_over(int column, int n) {
    float* s = matrix_.cell(0, column);
    float* change = change_before_ + column;
    for (int t = 0; t < n; t++) {
      const std::ptrdiff_t row = t * padded_;
      const float* key_before = t ? key_ + row - padded_ : key_before_;
      const float* from = t == 0 && from_ ? from_ + column : s;
      const std::ptrdiff_t stride = t == 0 && from_ ? dim_ : COLUMNS;
      vf by_key[VECTORS], by_query[VECTORS];
      if (t || put_off_)
        pass<true>(from, stride, s, dim_, key_before, change, decay_ + row, key_ + row, query_ + row, by_key, by_query);
      else
        pass<false>(from, stride, s, dim_, key_before, change, decay_ + row, key_ + row, query_ + row, by_key, by_query);
      for (int j = 0; j < VECTORS; j++) {
        const vf d = beta_[t] * (LATENTKV_ISA::load(value_ + row + column + j * W) - by_key[j]);
        store(change + j * W, d);
        store(out_ + row + column + j * W, multiply_add(splat(key_query_[t]), d, by_query[j]));
      }
    }
  }

  void write(int t, const Matrix& gate, const Matrix& out, std::int64_t row) {
    float* o = out_ + t * padded_;
    alignas(64) float gates[COLUMNS];
    vf squares{};
    for (int i = 0; i < padded_; i += W) squares = multiply_add(LATENTKV_ISA::load(o + i), LATENTKV_ISA::load(o + i), squares);
    const float by = 1.0f / __builtin_sqrtf(sum(squares) / (float)dim_ + w_.eps);
    for (int first = 0; first < dim_; first += COLUMNS) {
      const int n = dim_ - first < COLUMNS ? dim_ - first : COLUMNS;
      const std::int64_t column = (std::int64_t)head_ * dim_ + first;
      read_row(at(gate, row, column), gate.dtype, n, gates, COLUMNS);
      for (int i = 0; i < COLUMNS; i += W)
        store(o + first + i, LATENTKV_ISA::load(o + first + i) * by * LATENTKV_ISA::load(norm_ + first + i) *
                                 sigmoid(LATENTKV_ISA::load(gates + i)));
      convert_row(o + first, DType::f32, n, (void*)at(out, row, column), out.dtype);
    }
  }

  const KdaWeights& w_;
  int heads_, dim_, head_, padded_;
  std::int64_t width_;
  float rate_;
  bool put_off_ = false;         // the last row's change is not in the matrix yet
  const float* from_ = nullptr;  // where the matrix lies before the first row; then in the scratch
  Blocks matrix_;
  float *taps_, *raw_, *query_, *key_, *value_, *decay_, *out_, *key_before_, *change_before_, *bias_, *norm_;
  float key_query_[CHUNK], beta_[CHUNK];
};

KdaRows drafts_of(const KdaState& state, std::int64_t slot, std::int64_t heads, std::int64_t width) {
  const auto rows = [&](float* all, std::int64_t stride) {
    return Matrix{all + slot * state.most * stride, stride, DType::f32};
  };
  return {rows(state.qkv, 3 * width), rows(state.gate, width), rows(state.beta, heads)};
}

void attend_head(const KdaWeights& weights, const KdaRows& rows, const Matrix& gate, const KdaState& state,
                 const SlotBatch& batch, const Matrix& out, int heads, int dim, int b, int h) {
  const std::int64_t first = batch.q_start[b], count = batch.q_start[b + 1] - first, slot = batch.slot_ids[b];
  const std::int64_t width = (std::int64_t)heads * dim, mine = (std::int64_t)h * dim;
  const bool begins = count && batch.stop[first] == 1;
  float* matrix = state.matrices + (slot * heads + h) * dim * dim;
  float* inputs = state.inputs + slot * KDA_PAST * 3 * width;
  Head head(weights, heads, dim, h);
  head.load(begins ? nullptr : matrix, begins ? nullptr : inputs);
  const KdaRows drafts = drafts_of(state, slot, heads, width);
  const std::int64_t accepted = begins ? 0 : batch.pending[b], committed = batch.committed[b];
  if (accepted) head.advance(drafts, 0, accepted, nullptr, nullptr);
  if (committed) head.advance(rows, first, committed, &gate, &out);
  if (accepted || committed || begins) head.save(matrix, inputs);
  if (count == committed) return;
  head.advance(rows, first + committed, count - committed, &gate, &out);
  for (std::int64_t t = committed; t < count; t++) {
    const std::int64_t row = t - committed;
    for (int part = 0; part < 3; part++)
      convert_row(at(rows.qkv, first + t, part * width + mine), rows.qkv.dtype, dim,
                  (void*)at(drafts.qkv, row, part * width + mine), DType::f32);
    convert_row(at(rows.gate, first + t, mine), rows.gate.dtype, dim, (void*)at(drafts.gate, row, mine), DType::f32);
    convert_row(at(rows.beta, first + t, h), rows.beta.dtype, 1, (void*)at(drafts.beta, row, h), DType::f32);
  }
}

void attend(const KdaWeights& weights, const KdaRows& rows, Matrix gate, const KdaState& state, const SlotBatch& batch,
            Matrix out, int heads, int dim) {
  const std::int64_t items = (std::int64_t)batch.sequences * heads;
#pragma omp parallel for schedule(dynamic, 1) if (forks(items > 1 && items * dim * dim >= SERIAL_NUMBERS))
  for (std::int64_t i = 0; i < items; i++)
    attend_head(weights, rows, gate, state, batch, out, heads, dim, (int)(i / heads), (int)(i % heads));
}

}  // namespace

const KdaKernels kda = {attend};

}  // namespace latentkv::LATENTKV_ISA
