// discrete_argmin on a CUDA GPU.
#include <tuple>

#include "discrete_argmin.cuh"
#include "launch.cuh"

namespace vjvcr {
namespace {

std::tuple<Tensor, Tensor> discrete_argmin(Tensor u, Tensor w3, Tensor b3, Tensor target) {
  check_discrete_argmin(u, w3, b3, target);
  STD_TORCH_CHECK(u.scalar_type() == ScalarType::Float, "discrete_argmin: float32 is needed on a GPU");
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  const int64_t n = u.size(0);
  Tensor energies = torch::stable::new_empty(u, {n, w3.size(0)});
  Tensor index = torch::stable::new_empty(u, {n}, ScalarType::Long);
  if (n == 0) return {energies, index};

  const auto data = [](const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); };
  const HeadsInput in{static_cast<int>(n),          static_cast<int>(u.size(1)), static_cast<int>(w3.size(0)),
                      static_cast<int>(w3.size(1)), data(u),                     data(w3),
                      data(b3),                     data(target)};
  Tensor partial = torch::stable::new_empty(u, {int64_t(in.heads) * in.row_blocks() * n});
  float* sums = static_cast<float*>(partial.mutable_data_ptr());
  const cudaStream_t stream = current_stream(u);
  const auto head_energies = in.hidden % 8 == 0 ? head_energies_kernel<true> : head_energies_kernel<false>;
  launch("discrete_argmin", head_energies, in.blocks(), kThreads, 1, kHeadBytes, stream, in, sums);
  launch("discrete_argmin", least_head_kernel, static_cast<int>((n + kThreads - 1) / kThreads), kThreads, 1, 0, stream,
         in, static_cast<const float*>(sums), static_cast<float*>(energies.mutable_data_ptr()),
         static_cast<int64_t*>(index.mutable_data_ptr()));
  return {energies, index};
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CUDA, m) { m.impl("discrete_argmin", TORCH_BOX(&vjvcr::discrete_argmin)); }
