// What fista_mlp and newton_mlp share on the CPU: the energy of an MLP predictor about a start, for a whole batch, and
// how samples leave the batch. The matrix products are torch's; between two of them lies one pass over each row.
//
// A sample that is frozen needs no more steps, but it still costs its rows of every product. So once an eighth of the
// batch is frozen, `retire` writes those samples out and moves the others up, into the gaps.
//
//   buffer               | written by             | read by           | safe because
//   u_, value_           | gradient, row i in a   | the next pass,    | passes do not overlap; each call of gradient
//                        | pass over sample i     | value(i)          | writes them anew, so retire need not move them
//   all other rows,      | retire, which copies   | the next step     | one thread copies them, in ascending order of
//   samples              | row i to row j <= i    |                   | i; row j has been copied or written out before
//   a sample's scratch   | the pass over the      | the same pass     | every pass over a sample has its own
//                        | sample                 |                   |
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "tensors.h"

namespace vjvcr {
namespace {

constexpr int64_t kGrain = 8192;  // numbers that a thread works on at least
constexpr int64_t kWorthIt = 8;   // samples leave once one in so many is frozen
constexpr int kLanes = 16;        // partial sums that `sum` keeps side by side

// The sum of term(k), k < count, in a fixed order that the compiler can keep in vector registers.
template <typename T, typename Term>
T sum(int64_t count, const Term& term) {
  T lanes[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    for (int i = 0; i < kLanes; ++i) lanes[i] += term(k + i);
  }
  for (; k < count; ++k) lanes[k % kLanes] += term(k);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

template <typename T>
T relu(T x) {
  return x < T(0) ? T(0) : x;  // NaN stays NaN
}

// Copies row `from` to row `to`.
template <typename T>
void move_row(Tensor& rows, int64_t from, int64_t to) {
  const int64_t width = rows.size(1);
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
        start_(data<T>(start), data<T>(start) + n_), u_(torch::stable::empty_like(p)), value_(n_), at_(n_) {
    std::iota(at_.begin(), at_.end(), 0);
  }

  int64_t size() const { return n_; }

  // The energy of sample i, with its penalty, at the point of the last call of `gradient`.
  T value(int64_t i) const { return value_[i]; }

  // The row of sample i in the operator's arguments.
  int64_t at(int64_t i) const { return at_[i]; }

  // Runs body(i) for every sample, in parallel. width: how many numbers one sample reads or writes.
  template <typename Body>
  void for_each(int64_t width, const Body& body) const {
    torch::stable::parallel_for(0, n_, kGrain / width + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }

  // The gradients at v, (N, m) both, without the penalty. Also sets `value`.
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

  // Puts sample `from` in the place of sample `to`.
  void move(int64_t from, int64_t to) {
    for (Tensor* rows : {&p_, &u0_, &r_}) move_row<T>(*rows, from, to);
    start_[to] = start_[from], at_[to] = at_[from];
  }

  // Keeps the first n samples.
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
  std::vector<int64_t> at_;
};

// Writes frozen samples to `result` and takes them out of the batch, once they are enough; with `all`, every sample.
// samples: their state, of which energy, step, steps, active and lost are read. rows: the batch's other tensors, z
// first.
template <typename T, typename State>
void retire(MlpEnergy<T>& energy, std::vector<State>& samples, const std::vector<Tensor*>& rows, bool all,
            Result& result) {
  const int64_t n = energy.size(), m = rows[0]->size(1);
  const auto leaves = [&](const State& sample) { return all || !sample.active; };
  const int64_t leaving = std::count_if(samples.begin(), samples.begin() + n, leaves);
  if (leaving == 0 || (leaving < n && leaving * kWorthIt < n)) return;
  auto& [z, value, step, steps, lost] = result;
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const State& sample = samples[i];
    if (leaves(sample)) {
      const int64_t to = energy.at(i);
      std::copy_n(data<T>(*rows[0]) + i * m, m, mutable_data<T>(z) + to * m);
      mutable_data<T>(value)[to] = sample.energy;
      mutable_data<T>(step)[to] = sample.step;
      mutable_data<int64_t>(steps)[to] = sample.steps;
      mutable_data<bool>(lost)[to] = sample.lost;
      continue;
    }
    energy.move(i, kept);
    for (Tensor* tensor : rows) move_row<T>(*tensor, i, kept);
    samples[kept++] = sample;
  }
  energy.narrow(kept);
  for (Tensor* tensor : rows) *tensor = torch::stable::narrow(*tensor, 0, 0, kept);
}

}  // namespace
}  // namespace vjvcr
