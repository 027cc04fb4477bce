// discrete_argmin on the CPU: a head and a block of its outputs at a time, one product of torch's and one pass over it.
#include <algorithm>
#include <limits>
#include <tuple>

#include "sums.h"
#include "tensors.h"

namespace vjvcr {
namespace {

constexpr int64_t kElements = 1 << 18;  // of a block's prediction, which then stays in the cache
constexpr int64_t kLeast = 128;         // outputs of a block at least: fewer make slow products
constexpr int64_t kGrain = 8192;        // elements a thread takes at least

template <typename T>
void run(const Tensor& u, Tensor& w3, const Tensor& b3, const Tensor& target, Tensor& energies, Tensor& index) {
  const int64_t n = u.size(0), heads = w3.size(0), width = w3.size(1);
  const int64_t most = std::max(kLeast, kElements / std::max(n, int64_t(1)));
  const T* goals = static_cast<const T*>(target.const_data_ptr());
  T* found = static_cast<T*>(energies.mutable_data_ptr());
  std::fill_n(found, n * heads, T(0));
  for (int64_t head = 0; head < heads; ++head) {
    Tensor weights = torch::stable::select(w3, 0, head);
    const T* biases = static_cast<const T*>(b3.const_data_ptr()) + head * width;
    for (int64_t first = 0; first < width; first += most) {
      const int64_t count = std::min(most, width - first);
      const Tensor block = torch::stable::transpose(torch::stable::narrow(weights, 0, first, count), 0, 1);
      const Tensor product = torch::stable::matmul(u, block);
      const T* made = static_cast<const T*>(product.const_data_ptr());
      torch::stable::parallel_for(0, n, kGrain / count + 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const T *row = made + i * count, *goal = goals + i * width + first, *bias = biases + first;
          found[i * heads + head] += sum<T>(count, [&](int64_t k) {
            const T residual = row[k] + bias[k] - goal[k];
            return residual * residual;
          });
        }
      });
    }
  }
  int64_t* least = static_cast<int64_t*>(index.mutable_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    T best = std::numeric_limits<T>::infinity();
    least[i] = 0;
    for (int64_t head = 0; head < heads; ++head) {
      const T energy = found[i * heads + head] /= T(width);
      if (energy < best) best = energy, least[i] = head;
    }
  }
}

std::tuple<Tensor, Tensor> discrete_argmin(Tensor u, Tensor w3, Tensor b3, Tensor target) {
  check_discrete_argmin(u, w3, b3, target);
  Tensor energies = torch::stable::new_empty(u, {u.size(0), w3.size(0)});
  Tensor index = torch::stable::new_empty(u, {u.size(0)}, ScalarType::Long);
  if (u.scalar_type() == ScalarType::Float) {
    run<float>(u, w3, b3, target, energies, index);
  } else {
    run<double>(u, w3, b3, target, energies, index);
  }
  return {energies, index};
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CPU, m) { m.impl("discrete_argmin", TORCH_BOX(&vjvcr::discrete_argmin)); }
