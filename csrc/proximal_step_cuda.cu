// proximal_step on a CUDA GPU: one pass that reads z, v and the gradient and writes z and v. Nothing is read of frozen
// samples but their step.
#include <algorithm>

#include "latent_math.h"
#include "launch.cuh"

namespace vjvcr {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 20;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    proximal_step_kernel(T* __restrict__ z, T* __restrict__ v, const T* __restrict__ gradient,
                         const T* __restrict__ steps, const T* __restrict__ momenta, int64_t n, int64_t width, T weight,
                         T lower, T upper) {
  for (int64_t k = blockIdx.x * int64_t(kThreads) + threadIdx.x; k < n * width; k += gridDim.x * int64_t(kThreads)) {
    const int64_t i = k / width;
    const T step = steps[i];
    if (step == T(0)) continue;
    const T before = z[k];
    const T after = proximal(v[k], gradient[k], step, weight, lower, upper);
    z[k] = after;
    v[k] = extrapolate_in_sign(after, before, momenta[i], weight, lower, upper);
  }
}

void proximal_step(Tensor z, Tensor v, Tensor gradient, Tensor step, Tensor momentum, double weight, double lower,
                   double upper) {
  check_proximal_step(z, v, gradient, step, momentum);
  if (z.numel() == 0) return;
  const int device = z.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t blocks = std::min((z.numel() + kThreads - 1) / kThreads, kMostBlocks);
  by_type(z, [&](auto zero) {
    using T = decltype(zero);
    load(reinterpret_cast<const void*>(&proximal_step_kernel<T>), device, "proximal_step");
    proximal_step_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, current_stream(device)>>>(
        mutable_data<T>(z), mutable_data<T>(v), data<T>(gradient), data<T>(step), data<T>(momentum), z.size(0),
        z.numel() / z.size(0), T(weight), T(lower), T(upper));
  });
  check(cudaGetLastError(), "proximal_step");
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CUDA, m) { m.impl("proximal_step", TORCH_BOX(&vjvcr::proximal_step)); }
