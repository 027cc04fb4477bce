// newton_mlp on the CPU: all steps of the proximal quasi-Newton method for an MLP predictor. The method is
// `proximal_newton` in vjvcr_fast/reference.py; the names here are those there.
#include "latent_math.h"
#include "mlp_energy_cpu.h"

namespace vjvcr {
namespace {

// The options that all samples share, by the names in reference.py.
template <typename T>
struct Options {
  T weight, low, tolerance;
  int64_t sweeps;
  T settled, damped, least, most;
};

// What changes of one sample from step to step besides z, its gradient and B. step: 1 / b, always a power of two.
template <typename T>
struct Search {
  T energy, step;
  int64_t steps;
  bool active, lost;
};

// Coordinate descent on one sample's model. v (m,) is z at first and becomes the trial. gradient: (m,); B: (m, m),
// symmetric. slope: (m,), scratch.
template <typename T>
void minimise_model(T* __restrict__ v, const T* __restrict__ gradient, const T* __restrict__ B, T* __restrict__ slope,
                    int64_t m, T damping, const Options<T>& options) {
  std::copy_n(gradient, m, slope);
  for (int64_t sweep = 0; sweep < options.sweeps; ++sweep) {
    T moved = T(0), largest = T(0);
    for (int64_t k = 0; k < m; ++k) {
      const T* row = B + k * m;
      const T diagonal = damping * row[k];
      const T shrunk = soft_threshold(v[k] - slope[k] / diagonal, options.weight / diagonal);
      const T next = shrunk < options.low ? options.low : shrunk;
      const T change = next - v[k];
      v[k] = next;
      if (change != T(0)) {
        const T scaled = damping * change;
        for (int64_t j = 0; j < m; ++j) slope[j] += scaled * row[j];
      }
      moved = std::max(moved, std::abs(change));
      largest = std::max(largest, std::abs(next));
    }
    if (moved <= options.settled * largest) break;
  }
}

// The largest magnitude of m numbers.
template <typename T>
T largest_of(const T* x, int64_t m) {
  return std::abs(*std::max_element(x, x + m, [](T a, T b) { return std::abs(a) < std::abs(b); }));
}

// What one sample learns from its trial v with energy `value`: updates B, and takes v if the energy has not risen.
// scratch: (3 m,).
template <typename T>
void learn(Search<T>& sample, T* z, T* gradient, T* B, const T* v, T value, const T* gradient_v, int64_t m,
           const Options<T>& options, T* scratch) {
  T *s = scratch, *y = scratch + m, *Bs = scratch + 2 * m;
  for (int64_t k = 0; k < m; ++k) s[k] = v[k] - z[k], y[k] = gradient_v[k] - gradient[k];
  for (int64_t k = 0; k < m; ++k) Bs[k] = sum<T>(m, [&](int64_t j) { return B[k * m + j] * s[j]; });
  const auto inner = [m](const T* a, const T* b) { return sum<T>(m, [&](int64_t k) { return a[k] * b[k]; }); };
  const T bent = inner(s, y);
  T expected = inner(s, Bs);
  const bool finite = is_finite(value) && is_finite(bent), accepted = finite && value <= sample.energy;
  const T linear = sum<T>(
      m, [&](int64_t k) { return gradient[k] * s[k] + options.weight * (std::abs(v[k]) - std::abs(z[k])); });
  const T promised = -linear - expected / sample.step / T(2);
  // Before the first trial has scaled B, the model's promise means little.
  const bool calibrated = sample.steps > 0 || std::equal(v, v + m, z);
  const bool done = calibrated && promised <= options.tolerance * std::abs(sample.energy);

  T scale = T(1);
  if (sample.steps == 0 && bent > T(0) && expected > T(0)) {
    scale = std::min(std::max(bent / expected, options.least), options.most);
    expected *= scale;
    for (int64_t k = 0; k < m; ++k) Bs[k] *= scale;
  }
  if (finite && expected > T(0)) {
    const T share = bent >= options.damped * expected
                        ? T(1)
                        : (T(1) - options.damped) * expected / (expected - bent);
    for (int64_t k = 0; k < m; ++k) y[k] = share * y[k] + (T(1) - share) * Bs[k];
    const T met = inner(s, y), most_y = largest_of(y, m), most_Bs = largest_of(Bs, m);
    // B stays as it is if the update would overflow.
    if (met > T(0) && is_finite(most_y * (most_y / met)) && is_finite(most_Bs * (most_Bs / expected))) {
      for (int64_t k = 0; k < m; ++k) {
        const T of_B = Bs[k] / expected, of_y = y[k] / met;
        T* row = B + k * m;
        for (int64_t j = 0; j < m; ++j) row[j] = scale * row[j] - of_B * Bs[j] + of_y * y[j];
      }
    }
  }
  sample.step = accepted ? std::min(T(2) * sample.step, T(1)) : sample.step / T(2);
  if (accepted) {
    std::copy_n(v, m, z);
    std::copy_n(gradient_v, m, gradient);
    sample.energy = value;
  }
  sample.lost = !finite;
  sample.steps += 1;
  sample.active = !done;
}

template <typename T>
void search(MlpEnergy<T>& energy, const Tensor& z0, const Tensor& B0, const Options<T>& options, int64_t steps,
            Result& result) {
  const int64_t n = z0.size(0), m = z0.size(1);
  Tensor z = torch::stable::clone(z0), v = torch::stable::clone(z0), gradient = energy.gradient(z0);
  Tensor B = torch::stable::new_empty(z0, {n, m * m});
  const std::vector<Tensor*> rows{&z, &v, &gradient, &B};
  std::vector<Search<T>> samples(n);
  for (int64_t i = 0; i < n; ++i) {
    std::copy_n(data<T>(B0), m * m, mutable_data<T>(B) + i * m * m);
    samples[i] = {energy.value(i), T(1), 0, true, false};
  }
  const int64_t width = 4 * m * m;  // a few passes over B
  for (int64_t k = 0; k < steps && energy.size() > 0; ++k) {
    energy.for_each(width, [&](int64_t i) {
      if (!samples[i].active) return;
      std::vector<T> slope(m);
      T* trial = mutable_data<T>(v) + i * m;
      std::copy_n(data<T>(z) + i * m, m, trial);
      minimise_model(trial, data<T>(gradient) + i * m, data<T>(B) + i * m * m, slope.data(), m,
                     T(1) / samples[i].step, options);
    });
    const Tensor gradient_v = energy.gradient(v);
    energy.for_each(width, [&](int64_t i) {
      if (!samples[i].active) return;
      std::vector<T> scratch(3 * m);
      learn(samples[i], mutable_data<T>(z) + i * m, mutable_data<T>(gradient) + i * m,
            mutable_data<T>(B) + i * m * m, data<T>(v) + i * m, energy.value(i), data<T>(gradient_v) + i * m, m,
            options, scratch.data());
    });
    retire(energy, samples, rows, false, result);
  }
  retire(energy, samples, rows, true, result);
}

Result newton_mlp(Tensor z0, Tensor p, Tensor w1z, Tensor w2, Tensor b2, Tensor gram, Tensor u0, Tensor r, Tensor start,
                  Tensor B, double scale, double weight, double low, double tolerance, int64_t steps, int64_t sweeps,
                  double settled, double damped, double least, double most) {
  check_mlp("newton_mlp", z0, p, w1z, w2, b2, gram, u0, r, start);
  STD_TORCH_CHECK(is_shaped(B, {z0.size(1), z0.size(1)}), "newton_mlp: B must be (m, m), m = ", z0.size(1));
  check_alike("newton_mlp", {&z0, &B});
  Result result = empty_result(z0, start);
  by_type(z0, [&](auto zero) {
    using T = decltype(zero);
    const Options<T> options{T(weight),  T(low),    T(tolerance), sweeps,
                             T(settled), T(damped), T(least),     T(most)};
    MlpEnergy<T> energy(p, w1z, w2, b2, gram, u0, r, start, T(scale), T(weight));
    search(energy, z0, B, options, steps, result);
  });
  return result;
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CPU, m) { m.impl("newton_mlp", TORCH_BOX(&vjvcr::newton_mlp)); }
