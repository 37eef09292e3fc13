#include "compact.h"

#include <algorithm>
#include <vector>

#include "team.h"

namespace latentkv {
namespace {

constexpr int EXPONENTS = 256;

int exponent_of(bf16 weight) { return weight >> 7 & 255; }

bool is_inside(bf16 weight, int window) {
  return exponent_of(weight) >= window && exponent_of(weight) < window + WINDOW;
}

// Puts eight weights of one output into three words. Each half of a word holds one of the first six: its lower byte,
// and its sign and pair of exponents in 4 bits. The upper 4 bits of the halves hold a third of one of the last two.
void put_eight(const bf16* weights, int window, std::uint32_t* words, int stride) {
  const auto code = [&](bf16 w) { return (std::uint32_t)(w >> 15 << 3 | (exponent_of(w) - window) >> 1); };
  std::uint32_t halves[2][COMPACT_WORDS];
  for (int half = 0; half < 2; half++) {
    const bf16 last = weights[6 + half];
    const std::uint32_t thirds[] = {code(last), last & 15u, last >> 4 & 15u};
    for (int i = 0; i < COMPACT_WORDS; i++) {
      const bf16 w = weights[2 * i + half];
      halves[half][i] = (w & 255) | code(w) << 8 | thirds[i] << 12;
    }
  }
  for (int i = 0; i < COMPACT_WORDS; i++) words[i * stride] = halves[0][i] | halves[1][i] << 16;
}

}  // namespace

Window choose_window(const PlainWeight& w, int block_outs) {
  struct Counts {
    std::int64_t of[EXPONENTS] = {};
  };
  const std::int64_t blocks = (w.outs + block_outs - 1) / block_outs;
  std::vector<Counts> counts(blocks);
#pragma omp parallel for if (forks(true))
  for (std::int64_t b = 0; b < blocks; b++)
    for (std::int64_t o = b * block_outs; o < (b + 1) * block_outs && o < w.outs; o++)
      for (std::int64_t i = 0; i < w.ins; i++) counts[b].of[exponent_of(w.weights[o * w.ins + i])]++;
  const auto outside = [](const Counts& c, int first) {
    std::int64_t count = 0;
    for (int e = 0; e < EXPONENTS; e++) count += e < first || e >= first + WINDOW ? c.of[e] : 0;
    return count;
  };
  Counts all;
  for (const Counts& c : counts)
    for (int e = 0; e < EXPONENTS; e++) all.of[e] += c.of[e];
  Window best = {0, 0};
  for (int first = 2; first + WINDOW <= EXPONENTS; first += 2)
    if (outside(all, first) < outside(all, best.first)) best.first = first;
  for (const Counts& c : counts) best.exceptions = std::max(best.exceptions, outside(c, best.first));
  return best;
}

void pack_compact(const PlainWeight& w, int window, std::int64_t room, int block_outs, std::uint32_t* words) {
  const std::int64_t blocks = (w.outs + block_outs - 1) / block_outs;
  const std::int64_t eights = (w.ins + COMPACT_WEIGHTS - 1) / COMPACT_WEIGHTS;
  const std::int64_t weight_words = eights * COMPACT_WORDS * block_outs;
#pragma omp parallel for if (forks(true))
  for (std::int64_t b = 0; b < blocks; b++) {
    std::uint32_t* block = words + b * (weight_words + CompactEnd::num_words(room));
    CompactEnd& end = *(CompactEnd*)(block + weight_words);
    end = {(std::uint32_t)window, 0};
    for (int o = 0; o < block_outs && b * block_outs + o < w.outs; o++) {
      const bf16* row = w.weights + (b * block_outs + o) * w.ins;
      for (std::int64_t i = 0; i < eights; i++) {
        bf16 eight[COMPACT_WEIGHTS];
        std::fill_n(eight, COMPACT_WEIGHTS, (bf16)(window << 7));
        for (std::int64_t k = 0; k < COMPACT_WEIGHTS && i * COMPACT_WEIGHTS + k < w.ins; k++) {
          const std::int64_t column = i * COMPACT_WEIGHTS + k;
          if (is_inside(row[column], window))
            eight[k] = row[column];
          else
            end.list()[end.exceptions++] = {(std::uint32_t)column, (std::uint16_t)o, row[column]};
        }
        put_eight(eight, window, block + i * COMPACT_WORDS * block_outs + o, block_outs);
      }
    }
  }
}

}  // namespace latentkv
