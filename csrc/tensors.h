// What the operators check of their tensors, and what they return. On torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <tuple>

namespace vjvcr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls body(float()) or body(double()), by the tensor's dtype.
template <typename Body>
void by_type(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == ScalarType::Float) {
    body(float());
  } else {
    body(double());
  }
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

inline bool is_shaped(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t i = 0;
  for (const int64_t size : shape) {
    if (tensor.size(i++) != size) return false;
  }
  return true;
}

// All float32 or all float64, contiguous, on one device.
inline void check_alike(const char* name, std::initializer_list<const Tensor*> tensors) {
  const Tensor& first = **tensors.begin();
  STD_TORCH_CHECK(first.scalar_type() == ScalarType::Float || first.scalar_type() == ScalarType::Double, name,
                  ": the tensors must be float32 or float64");
  for (const Tensor* tensor : tensors) {
    STD_TORCH_CHECK(tensor->scalar_type() == first.scalar_type() && tensor->is_cuda() == first.is_cuda() &&
                        tensor->get_device_index() == first.get_device_index(),
                    name, ": all tensors must have the same dtype and device");
    STD_TORCH_CHECK(tensor->is_contiguous(), name, ": all tensors must be contiguous");
  }
}

// z, v, gradient (N, ...) of one shape; step, momentum (N,).
inline void check_proximal_step(const Tensor& z, const Tensor& v, const Tensor& gradient, const Tensor& step,
                                const Tensor& momentum) {
  STD_TORCH_CHECK(z.dim() >= 1, "proximal_step: z must have a batch dimension");
  STD_TORCH_CHECK(same_shape(z, v) && same_shape(z, gradient), "proximal_step: v and gradient must have z's shape");
  STD_TORCH_CHECK(is_shaped(step, {z.size(0)}) && is_shaped(momentum, {z.size(0)}),
                  "proximal_step: step and momentum must have one number a sample");
  check_alike("proximal_step", {&z, &v, &gradient, &step, &momentum});
}

// z0 (N, m); p, u0, r (N, H); w1z (H, m); w2, gram (H, H); b2 (H,); start (N,).
inline void check_mlp(const char* name, const Tensor& z0, const Tensor& p, const Tensor& w1z, const Tensor& w2,
                      const Tensor& b2, const Tensor& gram, const Tensor& u0, const Tensor& r, const Tensor& start) {
  STD_TORCH_CHECK(z0.dim() == 2 && z0.size(1) >= 1, name, ": z0 must be (N, m), m at least 1");
  STD_TORCH_CHECK(p.dim() == 2 && p.size(0) == z0.size(0) && p.size(1) >= 1, name, ": p must be (N, H)");
  const int64_t n = z0.size(0), latent = z0.size(1), hidden = p.size(1);
  STD_TORCH_CHECK(is_shaped(u0, {n, hidden}) && is_shaped(r, {n, hidden}), name, ": u0 and r must have p's shape");
  STD_TORCH_CHECK(is_shaped(w1z, {hidden, latent}), name, ": w1z must be (H, m) = (", hidden, ", ", latent, ")");
  STD_TORCH_CHECK(is_shaped(w2, {hidden, hidden}) && is_shaped(gram, {hidden, hidden}),
                  name, ": w2 and gram must be (H, H), H = ", hidden);
  STD_TORCH_CHECK(is_shaped(b2, {hidden}), name, ": b2 must be (H,), H = ", hidden);
  STD_TORCH_CHECK(is_shaped(start, {n}), name, ": start must be (N,), N = ", n);
  check_alike(name, {&z0, &p, &w1z, &w2, &b2, &gram, &u0, &r, &start});
}

// What fista_mlp and newton_mlp return: z (N, m); energy, step, steps (int64) and lost (bool), (N,) each.
using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Result empty_result(const Tensor& z0, const Tensor& start) {
  using namespace torch::stable;
  return {empty_like(z0), empty_like(start), empty_like(start), new_empty(start, {start.size(0)}, ScalarType::Long),
          new_empty(start, {start.size(0)}, ScalarType::Bool)};
}

}  // namespace vjvcr
