// Sums of processes of one machine through memory that they share: each has a part of every sum, and gets all of it. And
// what the first of them tells the others.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtypes.h"

namespace latentkv {

// Another process is not there any more, or was given up; or it could not do its part of this step. `culprit` says which.
struct ProcessLost : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct ProcessFailed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One of `count` processes that map the same memory. All of them make the same calls in the same order, in steps from
// `begin` to `end`: a process that calls something else fails the step. Sums are taken in the order of the processes, so
// that all get the same bits.
//
// Every process writes what it has into one of two places of its own, says so, waits until the others have said so, and
// reads theirs. Two places are enough: who has seen all others come to a place knows that they have read the one before.
class SharedSum {
 public:
  // floats: that one place holds. ended: of each process a descriptor (pidfd) that is readable once it has ended, or -1.
  SharedSum(int file, int rank, int count, std::int64_t floats, std::vector<int> ended);
  SharedSum(const SharedSum&) = delete;
  ~SharedSum();

  static std::int64_t bytes(int count, std::int64_t floats);

  // Begins the next step once all others do, however long that takes: who waits sleeps. What was left unfinished of the
  // last step counts for nothing.
  void begin();

  // Ends the step once all others do: from here on none of them can fail it.
  void end();

  // The others' bytes [n] become those of the first process.
  void broadcast(void* bytes, std::int64_t n);

  // out [n] = the sum of all processes' parts [n], and of the residual [n] where there is one, rounded once.
  void sum(const float* part, std::int64_t n, const void* residual, DType residual_dtype, void* out, DType out_dtype);

  // out [rows, all widths] = the processes' own [rows, widths[r]] side by side, where out is not null.
  void gather(const float* own, std::int64_t rows, const std::vector<std::int64_t>& widths, float* out);

  // Lets the others know that this process will do no more of this step, because of a process: itself, or another. Not
  // before the first `begin`.
  void fail(int cause);

  // The process that something was last thrown about.
  int culprit() const { return culprit_; }

  // Has all that wait, in whatever process and thread, wait no more.
  void abandon();

 private:
  enum class Call : std::uint64_t { begin, broadcast, sum, gather, end };
  struct Place;
  Place& place(int rank) const;
  float* room(std::uint64_t index, int rank) const;
  void arrive(Call call, std::int64_t n);
  void publish(std::uint64_t index);
  void wait_for(int rank);
  bool is_gone(int rank) const;

  void* memory_ = nullptr;
  std::int64_t bytes_, floats_;
  int rank_, count_, culprit_ = -1;
  std::vector<int> ended_;
  std::uint64_t step_ = 1, index_ = 1;  // memory that nobody has written to yet says 0
};

}  // namespace latentkv
