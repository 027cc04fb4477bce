// fista_mlp on the CPU: all K steps. Samples that are frozen leave the batch when there are enough of them.
#include <algorithm>
#include <tuple>
#include <vector>

#include "latent_math.h"
#include "mlp_energy_cpu.h"

namespace vjvcr {
namespace {

// Of the samples that are not frozen, side by side: `at` says which they are.
template <typename T>
class Batch {
 public:
  Batch(const Tensor& z0, const Tensor& p, const Tensor& w1z, const Tensor& w2, const Tensor& b2, const Tensor& gram,
        const Tensor& u0, const Tensor& r, const Tensor& start, T scale, const Rule<T>& rule)
      : m_(z0.size(1)), rule_(rule), energy_(p, w1z, w2, b2, gram, u0, r, start, scale, rule.weight),
        z_(torch::stable::clone(z0)), v_(torch::stable::clone(z0)), x_(torch::stable::clone(z0)),
        previous_(torch::stable::clone(z0)), gradient_(torch::stable::empty_like(z0)), samples_(size()), at_(size()) {
    for (int64_t i = 0; i < size(); ++i) at_[i] = i;
  }

  int64_t size() const { return energy_.size(); }

  // Energy and gradient at z0.
  void begin() {
    Tensor gradient = energy_.gradient(v_);
    energy_.for_each(m_, [&](int64_t i) {
      samples_[i] = vjvcr::begin(rule_, energy_.value(i));
      std::copy_n(data<T>(gradient) + i * m_, m_, mutable_data<T>(gradient_) + i * m_);
    });
  }

  // One step of all samples.
  void step() {
    energy_.for_each(m_, [&](int64_t i) { propose(i); });
    Tensor gradient = energy_.gradient(v_);
    energy_.for_each(m_, [&](int64_t i) { decide(i, data<T>(gradient) + i * m_); });
  }

  // Writes samples out and drops those that are frozen, if there are enough of them or `all` is wanted.
  template <typename Write>
  void retire(bool all, const Write& write) {
    const auto frozen = [](const Sample<T>& sample) { return !sample.active; };
    const int64_t n = size(), leaving = all ? n : std::count_if(samples_.begin(), samples_.begin() + n, frozen);
    if (leaving == 0 || (leaving < n && leaving * kWorthIt < n)) return;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (all || !samples_[i].active) {
        write(at_[i], data<T>(z_) + i * m_, samples_[i]);
        continue;
      }
      energy_.move(i, kept);
      for (Tensor* rows : {&z_, &x_, &previous_, &gradient_}) move_row<T>(*rows, m_, i, kept);
      samples_[kept] = samples_[i], at_[kept] = at_[i];
      ++kept;
    }
    energy_.narrow(kept);
    for (Tensor* rows : {&z_, &v_, &x_, &previous_, &gradient_}) *rows = torch::stable::narrow(*rows, 0, 0, kept);
  }

 private:
  // The proximal point x and the trial v of the step to come.
  void propose(int64_t i) {
    const Sample<T>& sample = samples_[i];
    const T momentum = momentum_of(rule_, sample);
    const T *z = data<T>(z_) + i * m_, *gradient = data<T>(gradient_) + i * m_, *previous = data<T>(previous_) + i * m_;
    T *x = mutable_data<T>(x_) + i * m_, *v = mutable_data<T>(v_) + i * m_;
    for (int64_t k = 0; k < m_; ++k) {
      x[k] = proximal(z[k], gradient[k], sample.step, rule_.weight, rule_.lower, rule_.upper);
      v[k] = extrapolate_in_sign(x[k], previous[k], momentum, rule_.weight, rule_.lower, rule_.upper);
    }
  }

  void decide(int64_t i, const T* gradient_v) {
    T *z = mutable_data<T>(z_) + i * m_, *gradient = mutable_data<T>(gradient_) + i * m_;
    T* previous = mutable_data<T>(previous_) + i * m_;
    const T *x = data<T>(x_) + i * m_, *v = data<T>(v_) + i * m_;
    const T bent = sum<T>(m_, [&](int64_t k) { return (gradient_v[k] - gradient[k]) * (v[k] - z[k]); });
    const T changed2 = sum<T>(m_, [&](int64_t k) { return (v[k] - z[k]) * (v[k] - z[k]); });
    const T moved2 = sum<T>(m_, [&](int64_t k) { return (x[k] - z[k]) * (x[k] - z[k]); });
    const T x2 = sum<T>(m_, [&](int64_t k) { return x[k] * x[k]; });
    const T z2 = sum<T>(m_, [&](int64_t k) { return z[k] * z[k]; });
    Sample<T>& sample = samples_[i];
    if (advance(rule_, sample, momentum_of(rule_, sample), energy_.value(i), bent, changed2, moved2, x2, z2)) {
      std::copy_n(v, m_, z);
      std::copy_n(x, m_, previous);
      std::copy_n(gradient_v, m_, gradient);
    }
  }

  int64_t m_;
  Rule<T> rule_;
  MlpEnergy<T> energy_;
  Tensor z_, v_, x_, previous_, gradient_;
  std::vector<Sample<T>> samples_;
  std::vector<int64_t> at_;
};

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
void run(Batch<T>& batch, int64_t steps, Result& result) {
  auto& [z, energy, step, taken, lost] = result;
  const int64_t m = z.size(1);
  const auto write = [&](int64_t at, const T* from, const Sample<T>& sample) {
    std::copy_n(from, m, mutable_data<T>(z) + at * m);
    mutable_data<T>(energy)[at] = sample.energy;
    mutable_data<T>(step)[at] = sample.step;
    mutable_data<int64_t>(taken)[at] = sample.steps;
    mutable_data<bool>(lost)[at] = sample.lost;
  };
  batch.begin();
  for (int64_t k = 0; k < steps && batch.size() > 0; ++k) {
    batch.step();
    batch.retire(false, write);
  }
  if (batch.size() > 0) batch.retire(true, write);
}

Result fista_mlp(Tensor z0, Tensor p, Tensor w1z, Tensor w2, Tensor b2, Tensor gram, Tensor u0, Tensor r, Tensor start,
                 double scale, double weight, double lower, double upper, double momentum, bool backtracking, double lr,
                 double tolerance, int64_t steps, bool bf16) {
  check_mlp("fista_mlp", z0, p, w1z, w2, b2, gram, u0, r, start);
  STD_TORCH_CHECK(!bf16, "fista_mlp: bf16=True needs a CUDA GPU");
  const int64_t n = z0.size(0);
  Result result{torch::stable::empty_like(z0), torch::stable::empty_like(start), torch::stable::empty_like(start),
                torch::stable::new_empty(start, {n}, ScalarType::Long),
                torch::stable::new_empty(start, {n}, ScalarType::Bool)};
  if (n == 0) return result;
  const auto go = [&](auto zero) {
    using T = decltype(zero);
    const Rule<T> rule{T(weight), T(lower), T(upper), T(momentum), backtracking, T(lr), T(tolerance)};
    Batch<T> batch(z0, p, w1z, w2, b2, gram, u0, r, start, T(scale), rule);
    run(batch, steps, result);
  };
  if (z0.scalar_type() == ScalarType::Float) {
    go(float());
  } else {
    go(double());
  }
  return result;
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CPU, m) { m.impl("fista_mlp", TORCH_BOX(&vjvcr::fista_mlp)); }
