#include "choice.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "scratch.h"
#include "team.h"

namespace latentkv {
namespace {

constexpr double LEAST = std::numeric_limits<double>::min();
// Candidates at most whose noise is computed one by one: beyond that, most are ruled out without a logarithm.
constexpr std::size_t FEW = 4096;
constexpr int LANES = 16;  // sums of many numbers, so that their order does not depend on the processor

// Philox4x64-10 (Salmon et al., SC 2011), as numpy's generator of that name runs it: the block of four numbers
// 4 b ... 4 b + 3 has the counter b + 1.
struct Philox {
  std::uint64_t seed, position;

  void block(std::uint64_t number, std::uint64_t* out) const {
    std::uint64_t a = number + 1, b = 0, c = 0, d = 0, k0 = seed, k1 = position;
    for (int round = 0; round < 10; round++) {
      const unsigned __int128 x = (unsigned __int128)0xD2E7470EE14C6C93u * a;
      const unsigned __int128 y = (unsigned __int128)0xCA5A826395121157u * c;
      a = (std::uint64_t)(y >> 64) ^ b ^ k0;
      b = (std::uint64_t)y;
      c = (std::uint64_t)(x >> 64) ^ d ^ k1;
      d = (std::uint64_t)x;
      k0 += 0x9E3779B97F4A7C15u;
      k1 += 0xBB67AE8584CAA73Bu;
    }
    out[0] = a, out[1] = b, out[2] = c, out[3] = d;
  }
};

double gumbel(std::uint64_t bits) { return -std::log(-std::log(std::max((double)(bits >> 11) * 0x1p-53, LEAST))); }

// exp(x) to an ulp or two for -708 <= x <= 0, 0 below; written so that the compiler takes several at a time.
// x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts (Cody and Waite); exp(r) by its series.
inline double exp_of_negative(double x) {
  const double bounded = x > -708 ? x : -708;
  const double shifted = bounded * 1.4426950408889634 + 0x1.8p52;
  const double n = shifted - 0x1.8p52;
  const double r = (bounded - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  double p = 1.0 / 6227020800;
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  std::uint64_t bits, exponent;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&exponent, &shifted, sizeof exponent);
  bits += exponent << 52;
  std::memcpy(&p, &bits, sizeof p);
  return x > -708 ? p : 0;
}

struct Candidate {
  double weight;  // probability, or the scaled logit
  std::int64_t token;
};

struct Row {
  const float* logits;
  std::int64_t vocabulary;
  const ChoiceRule& rule;
  float peak;  // the largest logit

  // As the definition scales them: 0 for the largest.
  double scaled(std::int64_t token) const { return ((double)logits[token] - (double)peak) / rule.temperature; }
};

// The first of the largest of n; 0 where all are NaN.
std::int64_t largest(const float* x, std::int64_t n) {
  float lanes[LANES];
  std::fill(lanes, lanes + LANES, -std::numeric_limits<float>::infinity());
  std::int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
  float peak = *std::max_element(lanes, lanes + LANES);
  for (; i < n; i++) peak = std::max(peak, x[i]);
  const float* found = std::find(x, x + n, peak);
  return found == x + n ? 0 : found - x;
}

// The k-th largest of a row, 1 <= k <= n.
float kth_largest(const float* x, std::int64_t n, std::int64_t k) {
  std::vector<float> heap(x, x + k);  // its first is its least
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  for (std::int64_t i = k; i < n; i++)
    if (x[i] > heap.front()) {
      std::pop_heap(heap.begin(), heap.end(), std::greater<>());
      heap.back() = x[i];
      std::push_heap(heap.begin(), heap.end(), std::greater<>());
    }
  return heap.front();
}

// exp(scaled logit) of every token that is at least `least`, 0 of the others.
void weigh(const Row& row, double least, double* weights) {
  const double peak = row.peak, temperature = row.rule.temperature;
  for (std::int64_t i = 0; i < row.vocabulary; i++) {
    const double x = ((double)row.logits[i] - peak) / temperature;
    weights[i] = x >= least ? exp_of_negative(x) : 0;
  }
}

double sum(const double* x, std::int64_t n) {
  double lanes[LANES] = {}, total = 0;
  std::int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int lane = 0; lane < LANES; lane++) lanes[lane] += x[i + lane];
  for (; i < n; i++) lanes[0] += x[i];
  for (const double lane : lanes) total += lane;
  return total;
}

// The fewest likeliest tokens whose probability reaches top_p, in the order of their tokens.
void nucleus(const Row& row, const double* weights, std::vector<Candidate>& kept) {
  const double total = sum(weights, row.vocabulary), p = row.rule.top_p;
  // Tokens below (1 - p) / V together weigh less than 1 - p: the nucleus is full before them, so few need sorting.
  const double floor = std::min((1 - p) / (double)row.vocabulary, 1 / total);
  const double nearly = floor * total * (1 - 1e-9);
  for (std::int64_t i = 0; i < row.vocabulary; i++)
    if (weights[i] >= nearly && weights[i] / total >= floor) kept.push_back({weights[i] / total, i});
  std::stable_sort(kept.begin(), kept.end(), [](const Candidate& a, const Candidate& b) { return a.weight > b.weight; });
  double reached = 0;
  std::size_t count = 0;
  for (; count < kept.size(); count++) {
    reached += kept[count].weight;
    if (!(reached - kept[count].weight < p)) break;
  }
  kept.resize(count);
  std::sort(kept.begin(), kept.end(), [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
}

// The largest sum of logit and noise among candidates in the order of their tokens; none are left only beside NaN.
std::int64_t best_of(const Row& row, const std::vector<Candidate>& candidates, std::int64_t likeliest) {
  const Philox philox{row.rule.seed, row.rule.position};
  double best = -std::numeric_limits<double>::infinity();
  std::int64_t token = candidates.empty() ? likeliest : candidates.front().token;
  for (const Candidate& candidate : candidates) {
    std::uint64_t bits[4];
    philox.block((std::uint64_t)candidate.token / 4, bits);
    const double sum = row.scaled(candidate.token) + gumbel(bits[candidate.token % 4]);
    if (sum > best) best = sum, token = candidate.token;
  }
  return token;
}

// The same among all tokens of a weight. A token of uniform number u is better than `best` only if
// -log(u) < exp(scaled - best), and -log(u) is at least 1 - u: few need logarithms.
std::int64_t best_of_all(const Row& row, const double* weights, std::int64_t likeliest) {
  const Philox philox{row.rule.seed, row.rule.position};
  std::uint64_t bits[4];
  philox.block((std::uint64_t)likeliest / 4, bits);
  std::int64_t token = likeliest;
  double best = gumbel(bits[likeliest % 4]);  // at least -6.6, so that weights above exp(-40) alone can win
  double factor = std::exp(-best) * 1.000001;
  for (std::int64_t first = 0; first < row.vocabulary; first += 4) {
    const int count = (int)std::min<std::int64_t>(4, row.vocabulary - first);
    philox.block((std::uint64_t)first / 4, bits);
    for (int i = 0; i < count; i++) {
      const double above = (double)((std::int64_t)(1ll << 53) - (std::int64_t)(bits[i] >> 11)) * 0x1p-53;
      if (above >= weights[first + i] * factor || weights[first + i] == 0) continue;
      const double sum = row.scaled(first + i) + gumbel(bits[i]);
      if (sum > best || (sum == best && first + i < token)) {
        best = sum, token = first + i;
        factor = std::exp(-best) * 1.000001;
      }
    }
  }
  return token;
}

std::int64_t choose(const Row& row, std::int64_t likeliest) {
  const ChoiceRule& rule = row.rule;
  double least = rule.min_p > 0 ? std::log(rule.min_p) : -std::numeric_limits<double>::infinity();
  double of_k = -std::numeric_limits<double>::infinity();
  const bool few = rule.top_k > 0 && rule.top_k < row.vocabulary;
  if (few)
    of_k = ((double)kth_largest(row.logits, row.vocabulary, rule.top_k) - (double)row.peak) / rule.temperature;
  std::vector<Candidate> candidates;
  if (few && rule.top_p >= 1 && (std::size_t)rule.top_k <= FEW) {
    for (std::int64_t i = 0; i < row.vocabulary; i++)
      if (const double x = row.scaled(i); x >= of_k && x >= least) candidates.push_back({x, i});
    return best_of(row, candidates, likeliest);
  }
  auto* weights = (double*)thread_scratch(Scratch::own, sizeof(double) * (std::size_t)row.vocabulary);
  if (rule.top_p >= 1) {
    weigh(row, std::max(of_k, least), weights);
    return best_of_all(row, weights, likeliest);
  }
  weigh(row, of_k, weights);
  nucleus(row, weights, candidates);
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(),
                                  [&](const Candidate& each) { return row.scaled(each.token) < least; }),
                   candidates.end());
  return best_of(row, candidates, likeliest);
}

}  // namespace

void choose_tokens(const Choices& c) {
#pragma omp parallel for schedule(dynamic) if (forks(c.rows > 1))
  for (std::int64_t r = 0; r < c.rows; r++) {
    const float* logits = c.logits + r * c.vocabulary;
    const std::int64_t likeliest = largest(logits, c.vocabulary);
    const Row row{logits, c.vocabulary, c.rules[r], logits[likeliest]};
    const bool by_chance = row.rule.temperature > 0 && std::isfinite(row.peak);
    c.tokens[r] = by_chance ? choose(row, likeliest) : likeliest;
  }
}

}  // namespace latentkv
