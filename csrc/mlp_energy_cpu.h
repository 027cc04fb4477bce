// The energy of an MLP predictor about a start, of many samples at once, on the CPU. The products are torch's own; what
// lies between two of them is one pass over a sample's row. Samples can leave: those that stay move up.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "sums.h"
#include "tensors.h"

namespace vjvcr {
namespace {

constexpr int64_t kElements = 8192;  // a thread takes at least
constexpr int64_t kWorthIt = 8;      // samples leave once every eighth is frozen

template <typename T>
T relu(T x) {
  return x < T(0) ? T(0) : x;  // NaN stays NaN
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Row `from` of `rows` goes to row `to`.
template <typename T>
void move_row(Tensor& rows, int64_t width, int64_t from, int64_t to) {
  T* memory = mutable_data<T>(rows);
  if (from != to) std::copy_n(memory + from * width, width, memory + to * width);
}

template <typename T>
class MlpEnergy {
 public:
  MlpEnergy(const Tensor& p, const Tensor& w1z, const Tensor& w2, const Tensor& b2, const Tensor& gram,
            const Tensor& u0, const Tensor& r, const Tensor& start, T scale, T weight)
      : n_(p.size(0)), m_(w1z.size(1)), hidden_(p.size(1)), scale_(scale), weight_(weight), w1z_(w1z), w2_(w2),
        gram_(gram), b2_(b2), w1z_t_(torch::stable::transpose(w1z, 0, 1)), w2_t_(torch::stable::transpose(w2, 0, 1)),
        p_(torch::stable::clone(p)), u0_(torch::stable::clone(u0)), r_(torch::stable::clone(r)),
        start_(data<T>(start), data<T>(start) + n_), u_(torch::stable::empty_like(p)), value_(n_) {}

  int64_t size() const { return n_; }

  // Of the last `gradient`: a sample's energy with its penalty.
  T value(int64_t i) const { return value_[i]; }

  // Runs body(i) for every sample, of `width` numbers each.
  template <typename Body>
  void for_each(int64_t width, const Body& body) const {
    torch::stable::parallel_for(0, n_, kElements / width + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }

  // The gradients without penalty at v (N, m); `value` has the energies with it.
  Tensor gradient(const Tensor& v) {
    Tensor a = torch::stable::matmul(v, w1z_t_);
    for_each(hidden_, [&](int64_t i) {
      const T* p = data<T>(p_) + i * hidden_;
      T* row = mutable_data<T>(a) + i * hidden_;
      for (int64_t k = 0; k < hidden_; ++k) row[k] = relu(row[k] + p[k]);
    });
    Tensor change = torch::stable::matmul(a, w2_t_);
    for_each(hidden_, [&](int64_t i) {
      const T *b2 = data<T>(b2_), *u0 = data<T>(u0_) + i * hidden_;
      T *row = mutable_data<T>(change) + i * hidden_, *u = mutable_data<T>(u_) + i * hidden_;
      for (int64_t k = 0; k < hidden_; ++k) {
        u[k] = relu(row[k] + b2[k]);
        row[k] = u[k] - u0[k];
      }
    });
    Tensor g = torch::stable::matmul(change, gram_);
    for_each(hidden_, [&](int64_t i) {
      const T *r = data<T>(r_) + i * hidden_, *u = data<T>(u_) + i * hidden_, *d = data<T>(change) + i * hidden_;
      const T* z = data<T>(v) + i * m_;
      T* row = mutable_data<T>(g) + i * hidden_;
      const T energy = sum<T>(hidden_, [&](int64_t k) { return (row[k] - T(2) * r[k]) * d[k]; });
      const T norm = sum<T>(m_, [&](int64_t k) { return std::abs(z[k]); });
      value_[i] = start_[i] + scale_ * energy + weight_ * norm;
      for (int64_t k = 0; k < hidden_; ++k) row[k] = u[k] > T(0) ? row[k] - r[k] : T(0);
    });
    Tensor back = torch::stable::matmul(g, w2_);
    for_each(hidden_, [&](int64_t i) {
      const T* row_a = data<T>(a) + i * hidden_;
      T* row = mutable_data<T>(back) + i * hidden_;
      for (int64_t k = 0; k < hidden_; ++k) row[k] = row_a[k] > T(0) ? row[k] : T(0);
    });
    Tensor gradient = torch::stable::matmul(back, w1z_);
    T* all = mutable_data<T>(gradient);
    for (int64_t k = 0; k < n_ * m_; ++k) all[k] *= T(2) * scale_;
    return gradient;
  }

  // Sample `from` takes the place of `to`.
  void move(int64_t from, int64_t to) {
    for (Tensor* rows : {&p_, &u0_, &r_}) move_row<T>(*rows, hidden_, from, to);
    start_[to] = start_[from];
  }

  // The first n stay.
  void narrow(int64_t n) {
    n_ = n;
    for (Tensor* rows : {&p_, &u0_, &r_, &u_}) *rows = torch::stable::narrow(*rows, 0, 0, n);
  }

 private:
  int64_t n_, m_, hidden_;
  T scale_, weight_;
  Tensor w1z_, w2_, gram_, b2_, w1z_t_, w2_t_, p_, u0_, r_;
  std::vector<T> start_;
  Tensor u_;
  std::vector<T> value_;
};

}  // namespace
}  // namespace vjvcr
