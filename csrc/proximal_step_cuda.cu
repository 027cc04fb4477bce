// proximal_step_cpu.cpp on a CUDA GPU. Bytes: z, v and the gradient once, z and v written once; frozen samples none.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "latent_math.h"
#include "tensors.h"

// Of CUDA torch alone: a CPU torch loads this library too, and never calls it.
#pragma weak aoti_torch_get_current_cuda_stream

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

template <typename T>
void run(Tensor& z, Tensor& v, const Tensor& gradient, const Tensor& step, const Tensor& momentum, T weight, T lower,
         T upper, cudaStream_t stream) {
  if (z.numel() == 0) return;
  const int64_t blocks = std::min((z.numel() + kThreads - 1) / kThreads, kMostBlocks);
  proximal_step_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      static_cast<T*>(z.mutable_data_ptr()), static_cast<T*>(v.mutable_data_ptr()),
      static_cast<const T*>(gradient.const_data_ptr()), static_cast<const T*>(step.const_data_ptr()),
      static_cast<const T*>(momentum.const_data_ptr()), z.size(0), z.numel() / z.size(0), weight, lower, upper);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "proximal_step: ", cudaGetErrorString(error));
}

void proximal_step(Tensor z, Tensor v, Tensor gradient, Tensor step, Tensor momentum, double weight, double lower,
                   double upper) {
  check_proximal_step(z, v, gradient, step, momentum);
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(z.get_device_index(), &stream));
  if (z.scalar_type() == ScalarType::Float) {
    run<float>(z, v, gradient, step, momentum, weight, lower, upper, static_cast<cudaStream_t>(stream));
  } else {
    run<double>(z, v, gradient, step, momentum, weight, lower, upper, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CUDA, m) { m.impl("proximal_step", TORCH_BOX(&vjvcr::proximal_step)); }
