// The proximal quasi-Newton method on the CPU: newton_trial, the trial of every sample, by coordinate descent on its model;
// newton_update, what the trial changes; newton_mlp, all steps for an MLP predictor. What they are stands in
// vjvcr_fast/reference.py.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "latent_math.h"
#include "mlp_energy_cpu.h"

namespace vjvcr {
namespace {

constexpr int64_t kGrain = 4;  // samples a thread takes at least

// Of one sample: v, gradient, slope (m,); B (m, m), symmetric. v is z, and becomes the trial; slope is overwritten.
template <typename T>
void descend(T* __restrict__ v, const T* __restrict__ gradient, const T* __restrict__ B, T* __restrict__ slope,
             int64_t m, T damping, T weight, T low, int64_t sweeps, T settled) {
  std::copy_n(gradient, m, slope);
  for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
    T moved = T(0), largest = T(0);
    for (int64_t k = 0; k < m; ++k) {
      const T* row = B + k * m;
      const T diagonal = damping * row[k];
      const T threshold = soft_threshold(v[k] - slope[k] / diagonal, weight / diagonal);
      const T next = threshold < low ? low : threshold;
      const T change = next - v[k];
      v[k] = next;
      if (change != T(0)) {
        const T scaled = damping * change;
        for (int64_t j = 0; j < m; ++j) slope[j] += scaled * row[j];
      }
      moved = std::max(moved, std::abs(change));
      largest = std::max(largest, std::abs(next));
    }
    if (moved <= settled * largest) break;
  }
}

struct Constants {
  double weight, low, tolerance;
  int64_t sweeps;
  double settled, damped, least, most;
};

// Of one sample, as `update` of vjvcr_fast/latents/newton.py. room: (3 m,), overwritten.
template <typename T>
void learn(T* z, T* energy, T* gradient, T* B, T* damping, bool* active, bool* lost, int64_t* steps, const T* v,
           T value, const T* gradient_v, int64_t m, const Constants& at, T* room) {
  T *s = room, *y = room + m, *Bs = room + 2 * m;
  for (int64_t k = 0; k < m; ++k) s[k] = v[k] - z[k], y[k] = gradient_v[k] - gradient[k];
  for (int64_t k = 0; k < m; ++k) Bs[k] = sum<T>(m, [&](int64_t j) { return B[k * m + j] * s[j]; });
  const auto inner = [m](const T* a, const T* b) { return sum<T>(m, [&](int64_t k) { return a[k] * b[k]; }); };
  const T bent = inner(s, y);
  T expected = inner(s, Bs);
  const bool finite = is_finite(value) && is_finite(bent);
  const bool accepted = finite && value <= *energy;
  const T linear = sum<T>(
      m, [&](int64_t k) { return gradient[k] * s[k] + T(at.weight) * (std::abs(v[k]) - std::abs(z[k])); });
  const bool calibrated = *steps > 0 || std::equal(v, v + m, z);  // before it the model's promise means little
  const bool done = calibrated && -linear - *damping * expected / T(2) <= T(at.tolerance) * std::abs(*energy);

  T scale = T(1);
  if (*steps == 0 && bent > T(0) && expected > T(0)) {
    scale = std::min(std::max(bent / expected, T(at.least)), T(at.most));
    expected *= scale;
    for (int64_t k = 0; k < m; ++k) Bs[k] *= scale;
  }
  if (finite && expected > T(0)) {
    const T share =
        bent >= T(at.damped) * expected ? T(1) : (T(1) - T(at.damped)) * expected / (expected - bent);
    for (int64_t k = 0; k < m; ++k) y[k] = share * y[k] + (T(1) - share) * Bs[k];
    const T met = inner(s, y);
    const T largest_y = std::abs(*std::max_element(y, y + m, [](T a, T b) { return std::abs(a) < std::abs(b); }));
    const T largest_B = std::abs(*std::max_element(Bs, Bs + m, [](T a, T b) { return std::abs(a) < std::abs(b); }));
    if (met > T(0) && is_finite(largest_y * (largest_y / met)) && is_finite(largest_B * (largest_B / expected))) {
      for (int64_t k = 0; k < m; ++k) {
        const T of_B = Bs[k] / expected, of_y = y[k] / met;
        T* row = B + k * m;
        for (int64_t j = 0; j < m; ++j) row[j] = scale * row[j] - of_B * Bs[j] + of_y * y[j];
      }
    }
  }
  *damping = accepted ? std::max(*damping / T(2), T(1)) : T(2) * *damping;
  if (accepted) {
    std::copy_n(v, m, z);
    std::copy_n(gradient_v, m, gradient);
    *energy = value;
  }
  *lost = !finite;
  *steps += 1;
  *active = !done;
}

// z, gradient, v and the like (N, m); B (N, m, m); the others (N, 1).
void check_newton(const char* name, const Tensor& z, std::initializer_list<const Tensor*> alike, const Tensor& B,
                  std::initializer_list<const Tensor*> of_sample, std::initializer_list<const Tensor*> flags) {
  STD_TORCH_CHECK(z.dim() == 2 && z.size(1) >= 1, name, ": z must be (N, m), m at least 1");
  const int64_t n = z.size(0), m = z.size(1);
  STD_TORCH_CHECK(is_shaped(B, {n, m, m}), name, ": B must be (N, m, m) = (", n, ", ", m, ", ", m, ")");
  check_alike(name, {&z, &B});
  for (const Tensor* tensor : alike) {
    STD_TORCH_CHECK(same_shape(*tensor, z), name, ": gradients and trials must have z's shape");
    check_alike(name, {&z, tensor});
  }
  for (const Tensor* tensor : of_sample) {
    STD_TORCH_CHECK(is_shaped(*tensor, {n, 1}), name, ": energies and damping must be (N, 1), N = ", n);
    check_alike(name, {&z, tensor});
  }
  for (const Tensor* tensor : flags) {
    STD_TORCH_CHECK(is_shaped(*tensor, {n, 1}) && tensor->scalar_type() == ScalarType::Bool && tensor->is_contiguous(),
                    name, ": active and lost must be (N, 1), bool, contiguous");
  }
}

template <typename Body>
void by_type(const Tensor& z, const Body& body) {
  if (z.scalar_type() == ScalarType::Float) {
    body(float());
  } else {
    body(double());
  }
}

void newton_trial(Tensor v, Tensor gradient, Tensor B, Tensor damping, Tensor active, double weight, double low,
                  int64_t sweeps, double settled) {
  check_newton("newton_trial", v, {&gradient}, B, {&damping}, {&active});
  const int64_t n = v.size(0), m = v.size(1);
  by_type(v, [&](auto zero) {
    using T = decltype(zero);
    T* trials = mutable_data<T>(v);
    torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      std::vector<T> slope(m);
      for (int64_t i = begin; i < end; ++i) {
        if (!data<bool>(active)[i]) continue;
        descend(trials + i * m, data<T>(gradient) + i * m, data<T>(B) + i * m * m, slope.data(), m,
                data<T>(damping)[i], T(weight), T(low), sweeps, T(settled));
      }
    });
  });
}

void newton_update(Tensor z, Tensor energy, Tensor gradient, Tensor B, Tensor damping, Tensor active, Tensor lost,
                   Tensor steps, Tensor v, Tensor value, Tensor gradient_v, double weight, double tolerance,
                   double damped, double least, double most) {
  check_newton("newton_update", z, {&gradient, &v, &gradient_v}, B, {&energy, &damping, &value}, {&active, &lost});
  const int64_t n = z.size(0), m = z.size(1);
  STD_TORCH_CHECK(is_shaped(steps, {n, 1}) && steps.scalar_type() == ScalarType::Long && steps.is_contiguous(),
                  "newton_update: steps must be (N, 1), int64, contiguous");
  const Constants at{weight, 0.0, tolerance, 0, 0.0, damped, least, most};
  by_type(z, [&](auto zero) {
    using T = decltype(zero);
    T *z_data = mutable_data<T>(z), *of_gradient = mutable_data<T>(gradient), *of_B = mutable_data<T>(B);
    T *energies = mutable_data<T>(energy), *damped_by = mutable_data<T>(damping);
    bool *on = mutable_data<bool>(active), *gone = mutable_data<bool>(lost);
    int64_t* taken = mutable_data<int64_t>(steps);
    torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      std::vector<T> room(3 * m);
      for (int64_t i = begin; i < end; ++i) {
        if (!on[i]) continue;
        learn(z_data + i * m, energies + i, of_gradient + i * m, of_B + i * m * m, damped_by + i, on + i, gone + i,
              taken + i, data<T>(v) + i * m, data<T>(value)[i], data<T>(gradient_v) + i * m, m, at, room.data());
      }
    });
  });
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// What changes of a sample from step to step besides z, its gradient and B. `at`: which it is.
template <typename T>
struct Searching {
  T energy, damping;
  bool active, lost;
  int64_t steps, at;
};

template <typename T>
void search(MlpEnergy<T>& energy, const Tensor& z0, const Tensor& B0, const Constants& at, int64_t steps,
            Result& result) {
  const int64_t m = z0.size(1), n = z0.size(0);
  Tensor z = torch::stable::clone(z0), v = torch::stable::clone(z0), gradient = energy.gradient(z0);
  std::vector<T> B(n * m * m);
  std::vector<Searching<T>> samples(n);
  for (int64_t i = 0; i < n; ++i) {
    std::copy_n(data<T>(B0), m * m, B.data() + i * m * m);
    samples[i] = {energy.value(i), T(1), true, false, 0, i};
  }
  const auto write = [&](int64_t i) {
    auto& [found, least, damping, taken, lost] = result;
    const Searching<T>& sample = samples[i];
    std::copy_n(data<T>(z) + i * m, m, mutable_data<T>(found) + sample.at * m);
    mutable_data<T>(least)[sample.at] = sample.energy;
    mutable_data<T>(damping)[sample.at] = sample.damping;
    mutable_data<int64_t>(taken)[sample.at] = sample.steps;
    mutable_data<bool>(lost)[sample.at] = sample.lost;
  };
  for (int64_t k = 0; k < steps && energy.size() > 0; ++k) {
    T *of_z = mutable_data<T>(z), *of_v = mutable_data<T>(v), *of_gradient = mutable_data<T>(gradient);
    const auto each = [&](const auto& body) {
      torch::stable::parallel_for(0, energy.size(), kGrain, [&](int64_t begin, int64_t end) {
        std::vector<T> room(3 * m);
        for (int64_t i = begin; i < end; ++i) {
          if (samples[i].active) body(i, room.data());
        }
      });
    };
    each([&](int64_t i, T* room) {
      std::copy_n(of_z + i * m, m, of_v + i * m);
      descend(of_v + i * m, of_gradient + i * m, B.data() + i * m * m, room, m, samples[i].damping, T(at.weight),
              T(at.low), at.sweeps, T(at.settled));
    });
    Tensor gradient_v = energy.gradient(v);
    each([&](int64_t i, T* room) {
      Searching<T>& sample = samples[i];
      learn(of_z + i * m, &sample.energy, of_gradient + i * m, B.data() + i * m * m, &sample.damping, &sample.active,
            &sample.lost, &sample.steps, of_v + i * m, energy.value(i), data<T>(gradient_v) + i * m, m, at, room);
    });
    const int64_t now = energy.size();
    const int64_t leaving =
        std::count_if(samples.begin(), samples.begin() + now, [](const Searching<T>& s) { return !s.active; });
    if (leaving == 0 || (leaving < now && leaving * kWorthIt < now)) continue;
    int64_t kept = 0;
    for (int64_t i = 0; i < now; ++i) {
      if (!samples[i].active) {
        write(i);
        continue;
      }
      energy.move(i, kept);
      for (Tensor* rows : {&z, &gradient}) move_row<T>(*rows, m, i, kept);
      if (i != kept) std::copy_n(B.data() + i * m * m, m * m, B.data() + kept * m * m);
      samples[kept++] = samples[i];
    }
    energy.narrow(kept);
    for (Tensor* rows : {&z, &v, &gradient}) *rows = torch::stable::narrow(*rows, 0, 0, kept);
  }
  for (int64_t i = 0; i < energy.size(); ++i) write(i);
}

Result newton_mlp(Tensor z0, Tensor p, Tensor w1z, Tensor w2, Tensor b2, Tensor gram, Tensor u0, Tensor r, Tensor start,
                  Tensor B, double scale, double weight, double low, double tolerance, int64_t steps, int64_t sweeps,
                  double settled, double damped, double least, double most) {
  check_mlp("newton_mlp", z0, p, w1z, w2, b2, gram, u0, r, start);
  const int64_t n = z0.size(0), m = z0.size(1);
  STD_TORCH_CHECK(is_shaped(B, {m, m}), "newton_mlp: B must be (m, m), m = ", m);
  check_alike("newton_mlp", {&z0, &B});
  Result result{torch::stable::empty_like(z0), torch::stable::empty_like(start), torch::stable::empty_like(start),
                torch::stable::new_empty(start, {n}, ScalarType::Long),
                torch::stable::new_empty(start, {n}, ScalarType::Bool)};
  if (n == 0) return result;
  const Constants at{weight, low, tolerance, sweeps, settled, damped, least, most};
  by_type(z0, [&](auto zero) {
    using T = decltype(zero);
    MlpEnergy<T> energy(p, w1z, w2, b2, gram, u0, r, start, T(scale), T(weight));
    search(energy, z0, B, at, steps, result);
  });
  return result;
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CPU, m) {
  m.impl("newton_trial", TORCH_BOX(&vjvcr::newton_trial));
  m.impl("newton_update", TORCH_BOX(&vjvcr::newton_update));
  m.impl("newton_mlp", TORCH_BOX(&vjvcr::newton_mlp));
}
