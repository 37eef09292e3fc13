// Native calls that are recorded once and run again: a decode step makes the same ones for every token.
//
// A recorded call keeps addresses and sizes, not tensors. Who records keeps alive what lies at the addresses, and puts
// the next step's numbers there.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <vector>

namespace latentkv {

// What a call says went wrong: an index that is not negative; -1 if nothing did.
using Status = std::int64_t;

class Recording {
 public:
  Recording() = default;
  Recording(const Recording&) = delete;
  ~Recording() {
    if (current() == this) stop();
  }

  // From here on until `stop`, what this thread calls is added.
  void start() { current() = this; }
  static void stop() { current() = nullptr; }

  void add(std::function<Status()> call) { calls_.push_back(std::move(call)); }
  std::size_t size() const { return calls_.size(); }

  // Runs all calls in order, up to the first that something is wrong with. Its number, or -1.
  Status run() const {
    for (std::size_t i = 0; i < calls_.size(); i++)
      if (calls_[i]() >= 0) return (Status)i;
    return -1;
  }

  static Recording*& current() {
    static thread_local Recording* recording = nullptr;
    return recording;
  }

 private:
  std::vector<std::function<Status()>> calls_;
};

// Seconds that this thread has spent in native calls.
inline double& kernel_seconds() {
  static thread_local double seconds = 0;
  return seconds;
}

template <class F>
auto timed(F f) {
  struct Timer {
    std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
    ~Timer() { kernel_seconds() += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); }
  } timer;
  return f();
}

// f as Python is to call it: its time is counted, and where calls are recorded it is.
template <class Result, class... Args>
auto recordable(Result (*f)(Args...)) {
  return [f](Args... args) -> Result {
    const auto call = [f, args...] { return timed([&] { return f(args...); }); };
    if (Recording* recording = Recording::current()) {
      recording->add([call]() -> Status {
        if constexpr (std::is_void_v<Result>) {
          call();
          return -1;
        } else {
          return call();
        }
      });
    }
    return call();
  };
}

}  // namespace latentkv
