#include "router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace latentkv {
namespace {

constexpr float NONE = -std::numeric_limits<float>::infinity();

// The index of the largest of n that is not taken yet; ties: the first. NaN is the smallest.
std::int64_t largest(const float* x, const std::vector<char>& taken, std::int64_t n) {
  std::int64_t best = -1;
  for (std::int64_t i = 0; i < n; i++)
    if (!taken[i] && (best < 0 || x[i] > x[best] || (std::isnan(x[best]) && !std::isnan(x[i])))) best = i;
  return best;
}

void score(const Routes& r, const float* logits, float* scores) {
  if (!r.softmax) {
    for (std::int64_t e = 0; e < r.experts; e++) scores[e] = 1 / (1 + std::exp(-logits[e]));
    return;
  }
  const float peak = *std::max_element(logits, logits + r.experts);
  float total = 0;
  for (std::int64_t e = 0; e < r.experts; e++) total += scores[e] = std::exp(logits[e] - peak);
  for (std::int64_t e = 0; e < r.experts; e++) scores[e] /= total;
}

// Leaves only the best groups' experts to be chosen.
void keep_groups(const Routes& r, float* choice) {
  const std::int64_t size = r.experts / r.groups;
  std::vector<float> worth(r.groups);
  for (std::int64_t g = 0; g < r.groups; g++) {
    float first = NONE, second = NONE;
    for (std::int64_t e = g * size; e < (g + 1) * size; e++) {
      if (choice[e] > first) {
        second = first;
        first = choice[e];
      } else if (choice[e] > second) {
        second = choice[e];
      }
    }
    worth[g] = r.group_max ? first : first + second;
  }
  std::vector<char> kept(r.groups, 0);
  for (std::int64_t i = 0; i < r.kept_groups; i++) kept[largest(worth.data(), kept, r.groups)] = 1;
  for (std::int64_t e = 0; e < r.experts; e++)
    if (!kept[e / size]) choice[e] = r.excluded;
}

}  // namespace

void select_experts(const Routes& r) {
  std::vector<float> scores(r.experts), choice(r.experts);
  std::vector<char> taken(r.experts);
  for (std::int64_t t = 0; t < r.tokens; t++) {
    score(r, r.logits + t * r.experts, scores.data());
    for (std::int64_t e = 0; e < r.experts; e++) choice[e] = scores[e] + (r.bias ? r.bias[e] : 0);
    if (r.groups) keep_groups(r, choice.data());
    std::fill(taken.begin(), taken.end(), 0);
    std::int64_t* ids = r.ids + t * r.chosen;
    float *weights = r.weights + t * r.chosen, total = 0;
    for (std::int64_t k = 0; k < r.chosen; k++) {
      ids[k] = largest(choice.data(), taken, r.experts);
      taken[ids[k]] = 1;
      total += weights[k] = scores[ids[k]];
    }
    for (std::int64_t k = 0; k < r.chosen; k++)
      weights[k] = (r.normalize ? weights[k] / (total + 1e-20f) : weights[k]) * r.scaling;
  }
}

}  // namespace latentkv
