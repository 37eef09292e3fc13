#include "shared_sum.h"

#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <ctime>

#include "team.h"

namespace latentkv {
namespace {

constexpr int INDEX_BITS = 24;                                    // of how far a process has come in a step
constexpr std::uint64_t NEVER_AGAIN = (1 << INDEX_BITS) - 1;      // an index that no step reaches
constexpr int CALL_BITS = 56;                                     // of a call's size, below which call it is
constexpr std::int64_t PART = 4096;                               // numbers that are added up at a time
constexpr int SPINS = 4096, YIELDS_A_LOOK = 64;
constexpr std::chrono::milliseconds AWAKE{5};  // a step follows the last one in less
constexpr long NAP_NANOSECONDS = 100'000'000;   // who sleeps looks so often whether the others live
constexpr std::int64_t WORTH_A_TEAM = 1 << 15;  // numbers

static_assert(std::atomic<std::uint64_t>::is_always_lock_free, "processes share it");

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Sleeps until `wake` or a little while, unless the bell has rung since it was `heard`.
void sleep_until(const std::atomic<std::uint32_t>& bell, std::uint32_t heard) {
  timespec nap = {0, NAP_NANOSECONDS};
#if defined(__linux__)
  syscall(SYS_futex, &bell, FUTEX_WAIT, heard, &nap, nullptr, 0);
#else  // where no memory is shared either (memfd); only the tests of another system come here
  (void)bell, (void)heard;
  nap.tv_nsec /= 100;
  nanosleep(&nap, nullptr);
#endif
}

void wake(std::atomic<std::uint32_t>& bell) {
#if defined(__linux__)
  syscall(SYS_futex, &bell, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
#else
  (void)bell;
#endif
}

float as_float(const void* numbers, DType dtype, std::int64_t i) {
  if (dtype == DType::f32) return ((const float*)numbers)[i];
  const std::uint32_t bits = (std::uint32_t)((const bf16*)numbers)[i] << 16;
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}

// Round to nearest, ties to even; NaN stays NaN.
bf16 rounded(float number) {
  std::uint32_t bits;
  std::memcpy(&bits, &number, 4);
  if (number != number) return (bf16)((bits >> 16) | 0x40);
  return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// f(begin, end) of parts of [0, n), in a team of threads where that pays.
template <class F>
void in_parts(std::int64_t n, F f) {
#pragma omp parallel for schedule(static) if (forks(n >= WORTH_A_TEAM))
  for (std::int64_t begin = 0; begin < n; begin += PART) f(begin, std::min(begin + PART, n));
}

}  // namespace

// What a process says of itself: alone in its cache line, and in the one that is fetched with it.
struct alignas(128) SharedSum::Place {
  std::atomic<std::uint64_t> arrived;  // the step it is at, above the bits of how far it has come in it
  std::atomic<std::uint64_t> calls[2]; // what it does there, and did before
  std::atomic<std::uint64_t> failed;   // the last step that it could not do
  std::atomic<std::uint64_t> cause;    // the process because of which
  std::atomic<std::uint64_t> abandoned;
  std::atomic<std::uint32_t> bell;      // rings with each arrival
  std::atomic<std::uint32_t> sleepers;  // who wait for it
};

SharedSum::SharedSum(int file, int rank, int count, std::int64_t floats, std::vector<int> ended)
    : bytes_(bytes(count, floats)), floats_(floats), rank_(rank), count_(count), ended_(std::move(ended)) {
  memory_ = mmap(nullptr, (std::size_t)bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory_ == MAP_FAILED) throw std::runtime_error(std::string("memory cannot be shared: ") + std::strerror(errno));
}

SharedSum::~SharedSum() { munmap(memory_, (std::size_t)bytes_); }

std::int64_t SharedSum::bytes(int count, std::int64_t floats) {
  return count * (std::int64_t)(sizeof(Place) + 2 * sizeof(float) * floats);
}

SharedSum::Place& SharedSum::place(int rank) const { return ((Place*)memory_)[rank]; }

float* SharedSum::room(std::uint64_t index, int rank) const {
  return (float*)((Place*)memory_ + count_) + ((std::int64_t)(index & 1) * count_ + rank) * floats_;
}

void SharedSum::begin() {
  step_++;
  index_ = 0;
  arrive(Call::begin, 0);
}

void SharedSum::end() { arrive(Call::end, 0); }

void SharedSum::publish(std::uint64_t index) {
  Place& own = place(rank_);
  own.arrived.store(step_ << INDEX_BITS | index, std::memory_order_release);
  // After this store and before that look no sleeper is missed: it counts itself before it looks at the bell.
  own.bell.fetch_add(1, std::memory_order_seq_cst);
  if (own.sleepers.load(std::memory_order_seq_cst)) wake(own.bell);
}

void SharedSum::arrive(Call call, std::int64_t n) {
  place(rank_).calls[index_ & 1].store((std::uint64_t)call << CALL_BITS | (std::uint64_t)n, std::memory_order_relaxed);
  publish(index_);
  for (int rank = 0; rank < count_; rank++)
    if (rank != rank_) wait_for(rank);
  index_++;
}

void SharedSum::wait_for(int rank) {
  Place& other = place(rank);
  const std::uint64_t here = step_ << INDEX_BITS | index_;
  std::chrono::steady_clock::time_point began;
  for (std::int64_t waited = 0; other.arrived.load(std::memory_order_acquire) < here; waited++) {
    if (waited < SPINS) {
      pause_briefly();
      continue;
    }
    if (waited == SPINS) began = std::chrono::steady_clock::now();
    sched_yield();
    if (waited % YIELDS_A_LOOK) continue;
    if (std::chrono::steady_clock::now() - began > AWAKE) {
      other.sleepers.fetch_add(1, std::memory_order_seq_cst);
      const std::uint32_t heard = other.bell.load(std::memory_order_seq_cst);
      if (other.arrived.load(std::memory_order_acquire) < here) sleep_until(other.bell, heard);
      other.sleepers.fetch_sub(1, std::memory_order_seq_cst);
      waited = SPINS + YIELDS_A_LOOK - 1;  // and look again at once
    }
    if (place(rank_).abandoned.load(std::memory_order_relaxed)) {
      culprit_ = rank;
      throw ProcessLost("another process was given up");
    }
    // One that others wait for is gone for all. What it had written before it ended still counts.
    for (int each = 0; each < count_; each++)
      if (is_gone(each) && place(each).arrived.load(std::memory_order_acquire) < here) {
        culprit_ = each;
        throw ProcessLost("another process is gone");
      }
  }
  const auto kind = [](std::uint64_t call) { return (Call)(call >> CALL_BITS); };
  const std::uint64_t own = place(rank_).calls[index_ & 1].load(std::memory_order_relaxed);
  const std::uint64_t theirs = other.calls[index_ & 1].load(std::memory_order_relaxed);
  // From the end of a step, where it has seen this process, the other one may have gone on to the next.
  const bool ends = kind(own) == Call::end && (kind(theirs) == Call::end || kind(theirs) == Call::begin);
  const bool went_on = other.arrived.load(std::memory_order_acquire) >> INDEX_BITS > step_;
  if (other.failed.load(std::memory_order_acquire) == step_ || (went_on && !ends)) {
    culprit_ = (int)other.cause.load(std::memory_order_relaxed);
    throw ProcessFailed("another process could not do its part");
  }
  if (theirs != own && !ends) {
    culprit_ = rank;
    throw ProcessFailed("another process does something else");
  }
}

bool SharedSum::is_gone(int rank) const {
  pollfd end = {ended_[(std::size_t)rank], POLLIN, 0};
  return end.fd >= 0 && poll(&end, 1, 0) > 0;
}

void SharedSum::broadcast(void* bytes, std::int64_t n) {
  const std::int64_t most = floats_ * (std::int64_t)sizeof(float);
  for (std::int64_t first = 0; first < n; first += most) {
    const std::size_t size = (std::size_t)std::min(most, n - first);
    float* given = room(index_, 0);
    if (rank_ == 0) std::memcpy(given, (char*)bytes + first, size);
    arrive(Call::broadcast, n);
    if (rank_ != 0) std::memcpy((char*)bytes + first, given, size);
  }
}

void SharedSum::sum(const float* part, std::int64_t n, const void* residual, DType residual_dtype, void* out,
                    DType out_dtype) {
  for (std::int64_t first = 0; first < n; first += floats_) {
    const std::int64_t size = std::min(floats_, n - first);
    const std::uint64_t index = index_;
    float* own = room(index, rank_);
    in_parts(size, [&](std::int64_t begin, std::int64_t end) {
      std::memcpy(own + begin, part + first + begin, (std::size_t)(end - begin) * sizeof(float));
    });
    arrive(Call::sum, n);
    in_parts(size, [&](std::int64_t begin, std::int64_t end) {
      float sums[PART];
      std::memcpy(sums, room(index, 0) + begin, (std::size_t)(end - begin) * sizeof(float));
      for (int rank = 1; rank < count_; rank++) {
        const float* theirs = room(index, rank) + begin;
        for (std::int64_t i = 0; i < end - begin; i++) sums[i] += theirs[i];
      }
      if (residual)
        for (std::int64_t i = 0; i < end - begin; i++) sums[i] += as_float(residual, residual_dtype, first + begin + i);
      if (out_dtype == DType::f32)
        std::memcpy((float*)out + first + begin, sums, (std::size_t)(end - begin) * sizeof(float));
      else
        for (std::int64_t i = 0; i < end - begin; i++) ((bf16*)out)[first + begin + i] = rounded(sums[i]);
    });
  }
}

void SharedSum::gather(const float* own, std::int64_t rows, const std::vector<std::int64_t>& widths, float* out) {
  const std::int64_t widest = rows * *std::max_element(widths.begin(), widths.end());
  std::int64_t all = 0;
  for (const std::int64_t width : widths) all += width;
  for (std::int64_t first = 0; first < widest; first += floats_) {
    const std::uint64_t index = index_;
    const std::int64_t size = std::min(floats_, rows * widths[(std::size_t)rank_] - first);
    if (size > 0) std::memcpy(room(index, rank_), own + first, (std::size_t)size * sizeof(float));
    arrive(Call::gather, rows);
    if (!out) continue;
    std::int64_t column = 0;
    for (int rank = 0; rank < count_; rank++) {
      const std::int64_t width = widths[(std::size_t)rank], end = std::min(first + floats_, rows * width);
      for (std::int64_t i = first; i < end;) {
        const std::int64_t row = i / width, stop = std::min((row + 1) * width, end);
        std::memcpy(out + row * all + column + i % width, room(index, rank) + (i - first),
                    (std::size_t)(stop - i) * sizeof(float));
        i = stop;
      }
      column += width;
    }
  }
}

void SharedSum::fail(int cause) {
  place(rank_).cause.store((std::uint64_t)cause, std::memory_order_relaxed);
  place(rank_).failed.store(step_, std::memory_order_release);
  publish(NEVER_AGAIN);
}

void SharedSum::abandon() {
  for (int rank = 0; rank < count_; rank++) place(rank).abandoned.store(1, std::memory_order_relaxed);
}

}  // namespace latentkv
