// fista_mlp on the CPU: all K steps of monotone FISTA for an MLP predictor.
#include "latent_math.h"
#include "mlp_energy_cpu.h"

namespace vjvcr {
namespace {

template <typename T>
void search(MlpEnergy<T>& energy, const Tensor& z0, const Rule<T>& rule, int64_t steps, Result& result) {
  const int64_t m = z0.size(1);
  Tensor z = torch::stable::clone(z0), v = torch::stable::clone(z0), x = torch::stable::clone(z0);
  Tensor previous = torch::stable::clone(z0), gradient = energy.gradient(z0);
  const std::vector<Tensor*> rows{&z, &v, &x, &previous, &gradient};
  std::vector<Sample<T>> samples(z0.size(0));
  for (int64_t i = 0; i < energy.size(); ++i) samples[i] = begin(rule, energy.value(i));

  for (int64_t k = 0; k < steps && energy.size() > 0; ++k) {
    energy.for_each(m, [&](int64_t i) {  // the proximal point x and the trial v
      const T momentum = momentum_of(rule, samples[i]), step = samples[i].step;
      const T *at_z = data<T>(z) + i * m, *slope = data<T>(gradient) + i * m, *before = data<T>(previous) + i * m;
      T *at_x = mutable_data<T>(x) + i * m, *at_v = mutable_data<T>(v) + i * m;
      for (int64_t j = 0; j < m; ++j) {
        at_x[j] = proximal(at_z[j], slope[j], step, rule.weight, rule.lower, rule.upper);
        at_v[j] = extrapolate_in_sign(at_x[j], before[j], momentum, rule.weight, rule.lower, rule.upper);
      }
    });
    const Tensor gradient_v = energy.gradient(v);
    energy.for_each(m, [&](int64_t i) {  // whether the trial is taken
      T *at_z = mutable_data<T>(z) + i * m, *slope = mutable_data<T>(gradient) + i * m;
      const T *at_v = data<T>(v) + i * m, *at_x = data<T>(x) + i * m, *slope_v = data<T>(gradient_v) + i * m;
      const T bent = sum<T>(m, [&](int64_t j) { return (slope_v[j] - slope[j]) * (at_v[j] - at_z[j]); });
      const T changed2 = sum<T>(m, [&](int64_t j) { return (at_v[j] - at_z[j]) * (at_v[j] - at_z[j]); });
      const T moved2 = sum<T>(m, [&](int64_t j) { return (at_x[j] - at_z[j]) * (at_x[j] - at_z[j]); });
      const T x2 = sum<T>(m, [&](int64_t j) { return at_x[j] * at_x[j]; });
      const T z2 = sum<T>(m, [&](int64_t j) { return at_z[j] * at_z[j]; });
      Sample<T>& sample = samples[i];
      if (advance(rule, sample, momentum_of(rule, sample), energy.value(i), bent, changed2, moved2, x2, z2)) {
        std::copy_n(at_v, m, at_z);
        std::copy_n(at_x, m, mutable_data<T>(previous) + i * m);
        std::copy_n(slope_v, m, slope);
      }
    });
    retire(energy, samples, rows, false, result);
  }
  retire(energy, samples, rows, true, result);
}

Result fista_mlp(Tensor z0, Tensor p, Tensor w1z, Tensor w2, Tensor b2, Tensor gram, Tensor u0, Tensor r, Tensor start,
                 double scale, double weight, double lower, double upper, double momentum, bool backtracking, double lr,
                 double tolerance, int64_t steps, bool bf16) {
  check_mlp("fista_mlp", z0, p, w1z, w2, b2, gram, u0, r, start);
  STD_TORCH_CHECK(!bf16, "fista_mlp: bf16=True needs a CUDA GPU");
  Result result = empty_result(z0, start);
  by_type(z0, [&](auto zero) {
    using T = decltype(zero);
    const Rule<T> rule{T(weight), T(lower), T(upper), T(momentum), backtracking, T(lr), T(tolerance)};
    MlpEnergy<T> energy(p, w1z, w2, b2, gram, u0, r, start, T(scale), T(weight));
    search(energy, z0, rule, steps, result);
  });
  return result;
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CPU, m) { m.impl("fista_mlp", TORCH_BOX(&vjvcr::fista_mlp)); }
