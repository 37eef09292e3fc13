// Memory that a thread keeps between calls, so that no call pays for fresh pages.
#pragma once

#include <cstddef>

namespace latentkv {

enum class Scratch : int {
  own,    // of one thread of a team
  team,   // taken by the thread that opens a parallel region, used by its whole team
  panel,  // of one thread: decoded weights
  sums,   // of one thread: results to which further weights add
};
constexpr int SCRATCH_USES = 4;

// At least `bytes`, aligned to a cache line; what it holds is undefined, and a later call may move it.
char* thread_scratch(Scratch use, std::size_t bytes);

}  // namespace latentkv
