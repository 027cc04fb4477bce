// fista_mlp on the CPU: all K steps. The products are torch's own; what lies between two of them is one pass over a
// sample's row. Samples that are frozen leave the batch of the products when there are enough of them.
#include <algorithm>
#include <tuple>
#include <vector>

#include "latent_math.h"
#include "sums.h"
#include "tensors.h"

namespace vjvcr {
namespace {

constexpr int64_t kGrain = 8192;  // elements a thread takes at least
constexpr int64_t kWorthIt = 8;   // samples leave once every eighth is frozen

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

// Of the samples that are not frozen, side by side: `at` says which they are.
template <typename T>
class Batch {
 public:
  Batch(const Tensor& z0, const Tensor& p, const Tensor& w1z, const Tensor& w2, const Tensor& b2, const Tensor& gram,
        const Tensor& u0, const Tensor& r, const Tensor& start, T scale, const Rule<T>& rule)
      : n_(z0.size(0)), m_(z0.size(1)), hidden_(p.size(1)), scale_(scale), rule_(rule), w1z_(w1z), w2_(w2), gram_(gram),
        b2_(b2), w1z_t_(torch::stable::transpose(w1z, 0, 1)), w2_t_(torch::stable::transpose(w2, 0, 1)),
        p_(torch::stable::clone(p)), u0_(torch::stable::clone(u0)), r_(torch::stable::clone(r)),
        z_(torch::stable::clone(z0)), v_(torch::stable::clone(z0)), x_(torch::stable::clone(z0)),
        previous_(torch::stable::clone(z0)), gradient_(torch::stable::empty_like(z0)), samples_(n_), at_(n_),
        start_(data<T>(start), data<T>(start) + n_), u_(torch::stable::empty_like(p)), value_(n_) {
    for (int64_t i = 0; i < n_; ++i) at_[i] = i;
  }

  int64_t size() const { return n_; }

  // Energy and gradient at z0.
  void begin() {
    Tensor gradient = evaluate();
    for_each(m_, [&](int64_t i) {
      samples_[i] = vjvcr::begin(rule_, value_[i]);
      std::copy_n(data<T>(gradient) + i * m_, m_, mutable_data<T>(gradient_) + i * m_);
    });
  }

  // One step of all samples.
  void step() {
    for_each(m_, [&](int64_t i) { propose(i); });
    Tensor gradient = evaluate();
    for_each(m_, [&](int64_t i) { decide(i, data<T>(gradient) + i * m_); });
  }

  // Writes samples out and drops those that are frozen, if there are enough of them or `all` is wanted.
  template <typename Write>
  void retire(bool all, const Write& write) {
    const auto frozen = [](const Sample<T>& sample) { return !sample.active; };
    const int64_t leaving = all ? n_ : std::count_if(samples_.begin(), samples_.begin() + n_, frozen);
    if (leaving == 0 || (leaving < n_ && leaving * kWorthIt < n_)) return;
    int64_t kept = 0;
    for (int64_t i = 0; i < n_; ++i) {
      if (all || !samples_[i].active) {
        write(at_[i], data<T>(z_) + i * m_, samples_[i]);
        continue;
      }
      for (Tensor* rows : {&p_, &u0_, &r_}) move_row(*rows, hidden_, i, kept);
      for (Tensor* rows : {&z_, &x_, &previous_, &gradient_}) move_row(*rows, m_, i, kept);
      samples_[kept] = samples_[i], at_[kept] = at_[i], start_[kept] = start_[i];
      ++kept;
    }
    n_ = kept;
    for (Tensor* rows : {&p_, &u0_, &r_, &u_, &z_, &v_, &x_, &previous_, &gradient_}) {
      *rows = torch::stable::narrow(*rows, 0, 0, n_);
    }
  }

 private:
  static void move_row(Tensor& rows, int64_t width, int64_t from, int64_t to) {
    T* memory = mutable_data<T>(rows);
    if (from != to) std::copy_n(memory + from * width, width, memory + to * width);
  }

  template <typename Body>
  void for_each(int64_t width, const Body& body) {
    torch::stable::parallel_for(0, n_, kGrain / width + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }

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

  // Energies with penalty into value_; returns the gradients without, halved and not scaled, of the trials v.
  Tensor evaluate() {
    Tensor a = torch::stable::matmul(v_, w1z_t_);
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
      const T* v = data<T>(v_) + i * m_;
      T* row = mutable_data<T>(g) + i * hidden_;
      const T energy = sum<T>(hidden_, [&](int64_t k) { return (row[k] - T(2) * r[k]) * d[k]; });
      const T norm = sum<T>(m_, [&](int64_t k) { return std::abs(v[k]); });
      value_[i] = start_[i] + scale_ * energy + rule_.weight * norm;
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
    if (advance(rule_, sample, momentum_of(rule_, sample), value_[i], bent, changed2, moved2, x2, z2)) {
      std::copy_n(v, m_, z);
      std::copy_n(x, m_, previous);
      std::copy_n(gradient_v, m_, gradient);
    }
  }

  int64_t n_, m_, hidden_;
  T scale_;
  Rule<T> rule_;
  Tensor w1z_, w2_, gram_, b2_, w1z_t_, w2_t_;
  Tensor p_, u0_, r_, z_, v_, x_, previous_, gradient_;
  std::vector<Sample<T>> samples_;
  std::vector<int64_t> at_;
  std::vector<T> start_;
  Tensor u_;
  std::vector<T> value_;
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
  check_fista_mlp(z0, p, w1z, w2, b2, gram, u0, r, start);
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
