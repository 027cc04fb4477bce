// What the operators ask of their tensors, on torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>

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

inline bool is_shaped(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t i = 0;
  for (const int64_t size : shape) {
    if (tensor.size(i++) != size) return false;
  }
  return true;
}

// All of one dtype, float32 or float64, contiguous, on one device.
inline void check_alike(const char* name, std::initializer_list<const Tensor*> tensors) {
  const Tensor& first = **tensors.begin();
  STD_TORCH_CHECK(first.scalar_type() == ScalarType::Float || first.scalar_type() == ScalarType::Double, name,
                  ": float32 or float64 is needed");
  for (const Tensor* tensor : tensors) {
    STD_TORCH_CHECK(same_place(first, *tensor), name, ": all tensors must share their dtype and device");
    STD_TORCH_CHECK(tensor->is_contiguous(), name, ": all tensors must be contiguous");
  }
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

// u (N, H); w3 (k, M, H); b3 (k, M); target (N, M).
inline void check_discrete_argmin(const Tensor& u, const Tensor& w3, const Tensor& b3, const Tensor& target) {
  STD_TORCH_CHECK(u.dim() == 2 && u.size(1) >= 1, "discrete_argmin: u must be (N, H)");
  STD_TORCH_CHECK(w3.dim() == 3 && w3.size(0) >= 1 && w3.size(1) >= 1 && w3.size(2) == u.size(1),
                  "discrete_argmin: w3 must be (k, M, H), H = ", u.size(1));
  STD_TORCH_CHECK(is_shaped(b3, {w3.size(0), w3.size(1)}), "discrete_argmin: b3 must be (k, M) = (", w3.size(0), ", ",
                  w3.size(1), ")");
  STD_TORCH_CHECK(is_shaped(target, {u.size(0), w3.size(1)}), "discrete_argmin: target must be (N, M) = (", u.size(0),
                  ", ", w3.size(1), ")");
  check_alike("discrete_argmin", {&u, &w3, &b3, &target});
}

}  // namespace vjvcr
