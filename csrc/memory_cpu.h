// Memory and threads of the CPU operators.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace vjvcr {
namespace {

constexpr int64_t kPad = 32;      // numbers; a multiple of the columns of a tile
constexpr int64_t kBeyond = 8;    // rows that are readable beyond the last
constexpr int64_t kSkew = 16;     // rows that begin a power of two apart would meet in the same places of the cache
constexpr double kWorthIt = 1e6;  // multiplications that a thread makes at least

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
constexpr int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Calls body(worker) for 0 <= worker < workers, side by side.
template <typename Body>
void side_by_side(int64_t workers, const Body& body) {
  if (workers == 1) return body(0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(worker);
  });
}

// Runs body(i, worker) for begin <= i < end, shared among up to `threads` workers, in order on each of them.
template <typename Body>
void share(int64_t threads, int64_t begin, int64_t end, const Body& body) {
  const int64_t count = end - begin, workers = std::max<int64_t>(1, std::min(threads, count));
  side_by_side(workers, [&](int64_t worker) {
    for (int64_t i = worker * count / workers; i < (worker + 1) * count / workers; ++i) body(begin + i, worker);
  });
}

// Numbers, aligned for any vector.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) : data_(static_cast<T*>(std::aligned_alloc(64, round_up(count * sizeof(T), 64)))) {
    STD_TORCH_CHECK(data_ != nullptr, "out of memory: ", count * sizeof(T), " bytes");
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace
}  // namespace vjvcr
