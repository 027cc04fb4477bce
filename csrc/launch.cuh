// What the CUDA operators need of torch and of the CUDA runtime.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>
#include <utility>

#include "tensors.h"

// In libtorch_cuda.so, which only CUDA builds of torch have. A CPU build loads this library too, but never calls it.
#pragma weak aoti_torch_get_current_cuda_stream

namespace vjvcr {

inline cudaStream_t current_stream(int device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "vjvcr_fast: the operators do not see libtorch_cuda.so; install again with pip's --no-build-isolation");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// CUDA keeps the last error until it is asked for it. The check after the next launch would report it once more.
inline void forget_error() { cudaGetLastError(); }

inline void check(cudaError_t error, const char* name) {
  if (error == cudaSuccess) return;
  forget_error();
  STD_TORCH_CHECK(false, name, ": ", cudaGetErrorString(error));
}

// Raises an error if the current stream is being captured in a CUDA graph. What must happen once and cannot happen
// there asks this first: CUDA loads a kernel when it is first used, and a capture allows neither that nor questions
// about a kernel.
inline void refuse_capture(int device, const char* name) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(current_stream(device), &status), name);
  STD_TORCH_CHECK(status == cudaStreamCaptureStatusNone, name,
                  ": this is its first call with these sizes on this GPU, inside the capture of a CUDA graph, where no "
                  "kernel can be loaded; call it once with the same sizes before the capture");
}

// Loads a kernel on the current device, unless that was done before. It may then be launched in a capture. Returns for
// which compute capability it was compiled: 80 is 8.0.
inline int load(const void* kernel, int device, const char* name) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> loaded;
  const std::lock_guard lock(mutex);
  if (const auto found = loaded.find({kernel, device}); found != loaded.end()) return found->second;
  refuse_capture(device, name);
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), name);
  return loaded[{kernel, device}] = attributes.ptxVersion;
}

}  // namespace vjvcr
