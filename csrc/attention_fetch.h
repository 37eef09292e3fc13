// Rows of the next tile, fetched into the L2 cache while the products of this one are computed.
//
// A core waits for a few lines at a time: fetched all at once, or during one of the two products only, they hold up the
// others. And it fetches ahead by itself what is asked for in the order of memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace latentkv::LATENTKV_ISA {

// A walk over the lines of some rows. A row may be null: a fetch from no address does nothing.
class Walk {
 public:
  Walk(const char* const* rows, int lines) : rows_(rows), lines_(lines) {}

  void fetch() {
    if (left_ == 0) {
      line_ = (std::uintptr_t)*rows_++;
      left_ = lines_;
    }
    __builtin_prefetch((const char*)line_, 0, 2);
    line_ += 64;
    left_--;
  }

 private:
  const char* const* rows_;
  int lines_, left_ = 0;  // a row, in this row
  std::uintptr_t line_ = 0;
};

// Spreads the lines of some rows over `blocks` blocks of products.
class Fetcher {
 public:
  Fetcher(const char* const* rows, int num_rows, int bytes, int blocks)
      : walk_(rows, (bytes + 63) / 64), lines_((bytes + 63) / 64 * num_rows), blocks_(blocks) {}

  // Calls f(walk, fetches) for the next block, which fetches up to `piece` lines of the walk where `fetches` is true.
  // To be called `blocks` times: the walk ends with the rows.
  template <class F>
  void with_block(int piece, F f) {
    long owed = (long)lines_ * ++block_ / blocks_ - done_;
    for (; owed >= 2 * piece || (block_ == blocks_ && owed > 0 && owed != piece); owed--, done_++) fetch();
    if (owed >= piece) {
      done_ += piece;
      f(walk_, std::true_type{});
    } else {
      f(walk_, std::false_type{});
    }
  }

 private:
  void fetch() {
    walk_.fetch();
    asm volatile("");  // GCC drops calls of functions that do nothing but prefetch
  }

  Walk walk_;
  int lines_, blocks_, done_ = 0, block_ = 0;
};

LATENTKV_INLINE void prefetch_row(const char* row, int bytes) {
  if (!row) return;
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
  asm volatile("");
}

}  // namespace latentkv::LATENTKV_ISA
