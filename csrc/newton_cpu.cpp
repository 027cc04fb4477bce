// A step of the proximal quasi-Newton method, in two parts, on the CPU: the trial of every sample, by coordinate descent
// on its model, and what the trial changes. What both are stands in vjvcr_fast/reference.py.
#include <algorithm>
#include <cmath>
#include <vector>

#include "latent_math.h"
#include "sums.h"
#include "tensors.h"

namespace vjvcr {
namespace {

constexpr int64_t kGrain = 4;  // samples a thread takes at least

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}

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
  double weight, tolerance, damped, least, most;
};

// Of one sample, as `update` of vjvcr_fast/newton.py.
template <typename T>
void learn(T* z, T* energy, T* gradient, T* B, T* damping, bool* active, bool* lost, int64_t* steps, const T* v,
           T value, const T* gradient_v, int64_t m, const Constants& at, T* s, T* y, T* Bs) {
  for (int64_t k = 0; k < m; ++k) s[k] = v[k] - z[k], y[k] = gradient_v[k] - gradient[k];
  for (int64_t k = 0; k < m; ++k) Bs[k] = sum<T>(m, [&](int64_t j) { return B[k * m + j] * s[j]; });
  const auto inner = [m](const T* a, const T* b) { return sum<T>(m, [&](int64_t k) { return a[k] * b[k]; }); };
  const T bent = inner(s, y);
  T expected = inner(s, Bs);
  const bool finite = is_finite(value) && is_finite(bent);
  const bool accepted = finite && value <= *energy;
  const T linear = sum<T>(
      m, [&](int64_t k) { return gradient[k] * s[k] + T(at.weight) * (std::abs(v[k]) - std::abs(z[k])); });
  const bool done = -linear - *damping * expected / T(2) <= T(at.tolerance) * std::abs(*energy);

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
    torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      std::vector<T> slope(m);
      for (int64_t i = begin; i < end; ++i) {
        if (!data<bool>(active)[i]) continue;
        descend(data<T>(v) + i * m, data<T>(gradient) + i * m, data<T>(B) + i * m * m, slope.data(), m,
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
  const Constants at{weight, tolerance, damped, least, most};
  by_type(z, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      std::vector<T> room(3 * m);
      for (int64_t i = begin; i < end; ++i) {
        if (!data<bool>(active)[i]) continue;
        learn(data<T>(z) + i * m, data<T>(energy) + i, data<T>(gradient) + i * m, data<T>(B) + i * m * m,
              data<T>(damping) + i, data<bool>(active) + i, data<bool>(lost) + i, data<int64_t>(steps) + i,
              data<T>(v) + i * m, data<T>(value)[i], data<T>(gradient_v) + i * m, m, at, room.data(), room.data() + m,
              room.data() + 2 * m);
      }
    });
  });
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CPU, m) {
  m.impl("newton_trial", TORCH_BOX(&vjvcr::newton_trial));
  m.impl("newton_update", TORCH_BOX(&vjvcr::newton_update));
}
