// What the CUDA operators need of torch and of the CUDA runtime.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "tensors.h"

// In libtorch_cuda.so, which only CUDA builds of torch have. A CPU build loads this library too, but never calls it.
#pragma weak aoti_torch_get_current_cuda_stream

namespace vjvcr {

inline cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "vjvcr_fast: the operators do not see libtorch_cuda.so; install again with pip's --no-build-isolation");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check(cudaError_t error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

}  // namespace vjvcr
