#include "scratch.h"

#include <cstdlib>
#include <new>

namespace latentkv {
namespace {

struct Buffer {
  char* data = nullptr;
  std::size_t size = 0;

  ~Buffer() { std::free(data); }
  char* at_least(std::size_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = 0;
      bytes = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      data = static_cast<char*>(std::aligned_alloc(4096, bytes));
      if (!data) throw std::bad_alloc();
      size = bytes;
    }
    return data;
  }
};

}  // namespace

char* thread_scratch(Scratch use, std::size_t bytes) {
  static thread_local Buffer buffers[SCRATCH_USES];
  return buffers[static_cast<int>(use)].at_least(bytes);
}

}  // namespace latentkv
