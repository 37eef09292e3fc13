// bfloat16 weights in 12 bits each, without loss: see `weights/compact.py` for the layout.
//
// The exponents of a trained matrix lie close together: of a window of 16, 3 bits say which pair of exponents, and a
// weight's lower byte has the last bit. Weights with other exponents are exceptions: the window's first power of two
// stands for them among the words, and they are listed at the end of their block.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace latentkv {

constexpr int COMPACT_WEIGHTS = 8;  // of an output that lie in ..
constexpr int COMPACT_WORDS = 3;    // .. so many words
constexpr int WINDOW = 16;          // exponents, from an even one on

struct CompactException {
  std::uint32_t column;
  std::uint16_t out;  // in its block
  bf16 weight;
};

// What ends a block, before its exceptions.
struct CompactEnd {
  std::uint32_t window;  // its first exponent, the same in all blocks of a matrix
  std::uint32_t exceptions;

  static std::int64_t num_words(std::int64_t room) { return (2 + 2 * room + 15) / 16 * 16; }  // whole cache lines
  CompactException* list() { return (CompactException*)(this + 1); }
  const CompactException* list() const { return (const CompactException*)(this + 1); }
};

// A matrix [outs, ins] as it was trained.
struct PlainWeight {
  const bf16* weights;
  std::int64_t outs, ins;
};

struct Window {
  int first;                // exponent
  std::int64_t exceptions;  // weights outside, in the block that has most
};

// The window that holds the most weights.
Window choose_window(const PlainWeight& w, int block_outs);

// Fills blocks of `block_outs` outputs at `words`, each with room for so many exceptions.
void pack_compact(const PlainWeight& w, int window, std::int64_t room, int block_outs, std::uint32_t* words);

}  // namespace latentkv
