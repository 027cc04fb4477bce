// What the operators ask of their tensors, on torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace vjvcr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

inline bool same_place(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.is_cuda() == b.is_cuda() &&
         a.get_device_index() == b.get_device_index();
}

// z, v, gradient (N, ...) alike; step, momentum (N,); all contiguous, of one dtype, float32 or float64, on one device.
inline void check_proximal_step(const Tensor& z, const Tensor& v, const Tensor& gradient, const Tensor& step,
                                const Tensor& momentum) {
  STD_TORCH_CHECK(z.scalar_type() == ScalarType::Float || z.scalar_type() == ScalarType::Double,
                  "proximal_step: z must be float32 or float64");
  STD_TORCH_CHECK(z.dim() >= 1, "proximal_step: z must have a batch dimension");
  STD_TORCH_CHECK(same_shape(z, v) && same_shape(z, gradient), "proximal_step: v and gradient must have z's shape");
  for (const Tensor* of_sample : {&step, &momentum}) {
    STD_TORCH_CHECK(of_sample->dim() == 1 && of_sample->size(0) == z.size(0),
                    "proximal_step: step and momentum must have one number a sample");
  }
  for (const Tensor* other : {&v, &gradient, &step, &momentum}) {
    STD_TORCH_CHECK(same_place(z, *other), "proximal_step: all tensors must share z's dtype and device");
    STD_TORCH_CHECK(other->is_contiguous(), "proximal_step: all tensors must be contiguous");
  }
  STD_TORCH_CHECK(z.is_contiguous(), "proximal_step: all tensors must be contiguous");
}

}  // namespace vjvcr
