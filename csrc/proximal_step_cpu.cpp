// proximal_step on the CPU, in one pass:
//
//     z <- prox(v - step gradient),   v <- z + momentum (z - its old value)
//
// where v keeps the sign of z if z is penalised. A sample whose step is 0 is frozen and stays as it is.
#include "latent_math.h"
#include "tensors.h"

namespace vjvcr {
namespace {

constexpr int64_t kGrain = 16384;  // elements that a thread works on at least

template <typename T>
void step_of_sample(T* __restrict__ z, T* __restrict__ v, const T* __restrict__ gradient, int64_t width, T step,
                    T momentum, T weight, T lower, T upper) {
  for (int64_t k = 0; k < width; ++k) {
    const T before = z[k];
    const T after = proximal(v[k], gradient[k], step, weight, lower, upper);
    z[k] = after;
    v[k] = extrapolate_in_sign(after, before, momentum, weight, lower, upper);
  }
}

void proximal_step(Tensor z, Tensor v, Tensor gradient, Tensor step, Tensor momentum, double weight, double lower,
                   double upper) {
  check_proximal_step(z, v, gradient, step, momentum);
  if (z.numel() == 0) return;
  const int64_t n = z.size(0), width = z.numel() / n;
  by_type(z, [&](auto zero) {
    using T = decltype(zero);
    T *of_z = mutable_data<T>(z), *of_v = mutable_data<T>(v);
    const T *slope = data<T>(gradient), *steps = data<T>(step), *momenta = data<T>(momentum);
    torch::stable::parallel_for(0, n, kGrain / width + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (steps[i] == T(0)) continue;
        step_of_sample(of_z + i * width, of_v + i * width, slope + i * width, width, steps[i], momenta[i], T(weight),
                       T(lower), T(upper));
      }
    });
  });
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CPU, m) { m.impl("proximal_step", TORCH_BOX(&vjvcr::proximal_step)); }
