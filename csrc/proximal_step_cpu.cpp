// z <- prox(v - step gradient), v <- z + momentum (z - its old value), where z is penalised in its sign, on the CPU, in one
// pass.
#include "latent_math.h"
#include "tensors.h"

namespace vjvcr {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread takes at least

template <typename T>
void sample(T* __restrict__ z, T* __restrict__ v, const T* __restrict__ gradient, int64_t width, T step, T momentum,
            T weight, T lower, T upper) {
  for (int64_t k = 0; k < width; ++k) {
    const T before = z[k];
    const T after = proximal(v[k], gradient[k], step, weight, lower, upper);
    z[k] = after;
    v[k] = extrapolate_in_sign(after, before, momentum, weight, lower, upper);
  }
}

template <typename T>
void run(Tensor& z, Tensor& v, const Tensor& gradient, const Tensor& step, const Tensor& momentum, T weight, T lower,
         T upper) {
  const int64_t n = z.size(0);
  if (z.numel() == 0) return;
  const int64_t width = z.numel() / n;
  T* z_data = static_cast<T*>(z.mutable_data_ptr());
  T* v_data = static_cast<T*>(v.mutable_data_ptr());
  const T* g_data = static_cast<const T*>(gradient.const_data_ptr());
  const T* steps = static_cast<const T*>(step.const_data_ptr());
  const T* momenta = static_cast<const T*>(momentum.const_data_ptr());
  torch::stable::parallel_for(0, n, kGrain / width + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (steps[i] == T(0)) continue;  // frozen
      const int64_t at = i * width;
      sample(z_data + at, v_data + at, g_data + at, width, steps[i], momenta[i], weight, lower, upper);
    }
  });
}

void proximal_step(Tensor z, Tensor v, Tensor gradient, Tensor step, Tensor momentum, double weight, double lower,
                   double upper) {
  check_proximal_step(z, v, gradient, step, momentum);
  if (z.scalar_type() == ScalarType::Float) {
    run<float>(z, v, gradient, step, momentum, weight, lower, upper);
  } else {
    run<double>(z, v, gradient, step, momentum, weight, lower, upper);
  }
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CPU, m) { m.impl("proximal_step", TORCH_BOX(&vjvcr::proximal_step)); }
