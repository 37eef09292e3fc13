// The `count` best of a row's scores, ties by position, in time proportional to their number.
//
// Scores become integers of the same order. A histogram of their upper bits says in which bucket the last chosen one
// lies, two more of that bucket's own find it; then tokens are taken in order of position. A row may lie in parts, so
// that several threads can look through it: what is chosen does not depend on where they are cut.
#pragma once

#include "simd.h"

namespace latentkv::LATENTKV_ISA {

constexpr int BUCKETS = 2048;  // 11 bits

struct Part {
  int first, tokens;          // of the sequence's
  std::uint32_t* ranks;       // [tokens]
  std::uint32_t* candidates;  // [tokens]
  std::int32_t* histogram;    // [BUCKETS]
  int num_candidates, above;  // ranks in the last bucket that is chosen from; in those above it
  int place, ties;            // where its first token goes among the chosen; how many of the lowest rank it gives
};

// NaN and infinity are the highest; -0 is 0.
LATENTKV_INLINE std::uint32_t rank_of(float score) {
  const float plain = score != score ? __builtin_inff() : score == 0.0f ? 0.0f : score;
  std::uint32_t bits;
  std::memcpy(&bits, &plain, 4);
  return bits ^ ((std::uint32_t)((std::int32_t)bits >> 31) | 0x80000000u);
}

// Turns the scores that lie where the ranks belong into ranks, and counts them.
LATENTKV_INLINE void rank(Part& part) {
  std::memset(part.histogram, 0, sizeof(std::int32_t) * BUCKETS);
  for (int i = 0; i < part.tokens; i++) {
    float score;
    std::memcpy(&score, part.ranks + i, 4);
    part.ranks[i] = rank_of(score);
  }
  for (int i = 0; i < part.tokens; i++) part.histogram[part.ranks[i] >> 21]++;
}

// From the highest bucket down, the one that the count-th lies in; `count` is then how many to choose from it.
LATENTKV_INLINE std::uint32_t last_bucket(const std::int32_t* histogram, int buckets, int& count) {
  int bucket = buckets - 1;
  for (; bucket > 0 && histogram[bucket] < count; bucket--) count -= histogram[bucket];
  return (std::uint32_t)bucket;
}

LATENTKV_INLINE std::uint32_t last_bucket_of(const Part* parts, int num_parts, int& count) {
  std::int32_t all[BUCKETS] = {};
  for (int p = 0; p < num_parts; p++)
    for (int i = 0; i < BUCKETS; i++) all[i] += parts[p].histogram[i];
  return last_bucket(all, BUCKETS, count);
}

LATENTKV_INLINE void collect(Part& part, std::uint32_t bucket) {
  int above = 0, n = 0;
  for (int i = 0; i < part.tokens; i++) {
    const std::uint32_t rank = part.ranks[i], own = rank >> 21;
    above += own > bucket;
    part.candidates[n] = rank;
    n += own == bucket;
  }
  part.above = above;
  part.num_candidates = n;
}

// The lowest rank that is chosen, `count` of the bucket's being so; says where each part's tokens go.
LATENTKV_INLINE std::uint32_t lowest_rank(Part* parts, int num_parts, std::uint32_t bucket, int count) {
  std::uint32_t lowest = bucket;
  for (int shift = 10; shift >= 0; shift -= 10) {  // 11 bits more, then the last 10
    const int buckets = shift ? BUCKETS : BUCKETS / 2, known = shift ? 21 : 10;
    std::int32_t histogram[BUCKETS] = {};
    for (int p = 0; p < num_parts; p++)
      for (int i = 0; i < parts[p].num_candidates; i++) {
        const std::uint32_t rank = parts[p].candidates[i];
        if (rank >> known == lowest) histogram[rank >> shift & (buckets - 1)]++;
      }
    lowest = lowest << (shift ? 11 : 10) | last_bucket(histogram, buckets, count);
  }
  for (int p = 0, place = 0; p < num_parts; p++) {
    Part& part = parts[p];
    int higher = part.above, equal = 0;
    for (int i = 0; i < part.num_candidates; i++) {
      higher += part.candidates[i] > lowest;
      equal += part.candidates[i] == lowest;
    }
    part.place = place;
    part.ties = equal < count ? equal : count;
    count -= part.ties;
    place += higher + part.ties;
  }
  return lowest;
}

// Calls f(place, token) for the part's chosen tokens in order.
template <class F>
LATENTKV_INLINE void take(const Part& part, std::uint32_t lowest, F f) {
  int place = part.place, ties = part.ties;
  for (int i = 0; i < part.tokens; i++) {
    const std::uint32_t rank = part.ranks[i];
    if (rank > lowest || (rank == lowest && ties-- > 0)) f(place++, part.first + i);
  }
}

}  // namespace latentkv::LATENTKV_ISA
