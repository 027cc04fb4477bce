// What the CUDA operators ask of torch and of the device.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "tensors.h"

// Of CUDA torch alone: a CPU torch loads this library too, and never calls it.
#pragma weak aoti_torch_get_current_cuda_stream

namespace vjvcr {

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check(cudaError_t error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

// kernel(arguments...) in clusters of blocks, with more shared memory than a block has unasked.
template <typename... Arguments>
void launch(const char* name, void (*kernel)(Arguments...), int blocks, int threads, int cluster, int shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = cluster > 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace vjvcr
