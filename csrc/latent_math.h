// The math of a step of monotone FISTA, shared by CPU and GPU. vjvcr_fast/latents/descent.py describes the step.
// Without torch headers. Both compilers are told not to fuse multiplies and adds, so that both round alike.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define VJVCR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VJVCR_HOST_DEVICE inline __attribute__((always_inline))  // so that a loop around it can be vectorised
#endif

namespace vjvcr {

// -- One element ----------------------------------------------------------------------------------------------------

// argmin_x (x - v)^2 / 2 + threshold |x|, threshold >= 0: v moved towards zero by `threshold`, and exactly zero if |v|
// is not above it. NaN stays NaN.
template <typename T>
VJVCR_HOST_DEVICE T soft_threshold(T v, T threshold) {
  T magnitude = (v < T(0) ? -v : v) - threshold;
  return magnitude <= T(0) ? T(0) : (v < T(0) ? -magnitude : magnitude);
}

// The nearest number in [lower, upper]. NaN stays NaN.
template <typename T>
VJVCR_HOST_DEVICE T clamp(T x, T lower, T upper) {
  return x < lower ? lower : (x > upper ? upper : x);
}

// A gradient step from z, then the proximal map of step * weight |x| on [lower, upper].
template <typename T>
VJVCR_HOST_DEVICE T proximal(T z, T gradient, T step, T weight, T lower, T upper) {
  return clamp(soft_threshold(z - step * gradient, step * weight), lower, upper);
}

// x + momentum (x - previous), in [lower, upper]. If x is penalised, the result is zero unless it has the sign of x.
template <typename T>
VJVCR_HOST_DEVICE T extrapolate_in_sign(T x, T previous, T momentum, T weight, T lower, T upper) {
  const T v = x + momentum * (x - previous);
  return clamp(weight > T(0) && !(v * x > T(0)) ? T(0) : v, lower, upper);
}

template <typename T>
VJVCR_HOST_DEVICE bool is_finite(T x) {
  return x - x == T(0);
}

// -- One sample -----------------------------------------------------------------------------------------------------

// By which factors the step size changes. The same as in vjvcr_fast/reference.py.
constexpr double kGrowthAtFirst = 4.0, kGrowth = 1.01, kShrinkage = 0.5;

// The settings that all samples share. momentum: negative for FISTA's, which grows. lr: the first, or fixed, step size.
template <typename T>
struct Rule {
  T weight, lower, upper, momentum;
  bool backtracking;
  T lr, tolerance;
};

// What changes from step to step besides z. t: FISTA's sequence, 1 after a restart. active: not frozen. lost: the last
// trial was not finite.
template <typename T>
struct Sample {
  T energy, t, step, growth;
  int steps;
  bool active, lost;
};

// The state at the start, where the energy, penalty included, is `energy`.
template <typename T>
VJVCR_HOST_DEVICE Sample<T> begin(const Rule<T>& rule, T energy) {
  return {energy, T(1), rule.lr, T(kGrowthAtFirst), 0, true, false};
}

template <typename T>
VJVCR_HOST_DEVICE T following(T t) {
  return (T(1) + std::sqrt(T(1) + T(4) * t * t)) / T(2);
}

// The momentum of the next step.
template <typename T>
VJVCR_HOST_DEVICE T momentum_of(const Rule<T>& rule, const Sample<T>& sample) {
  if (rule.momentum >= T(0)) return sample.t > T(1) ? rule.momentum : T(0);
  return (sample.t - T(1)) / following(sample.t);
}

// Updates the sample's state after a trial at v, which is the proximal point x moved on by `momentum`. Returns whether
// v becomes z. value: the energy at v, penalty included. The others are sums over the sample's elements: bent is
// <gradient at v - gradient at z, v - z>; changed2 |v - z|^2; moved2 |x - z|^2; x2 |x|^2; z2 |z|^2.
template <typename T>
VJVCR_HOST_DEVICE bool advance(const Rule<T>& rule, Sample<T>& sample, T momentum, T value, T bent, T changed2,
                               T moved2, T x2, T z2) {
  if (!sample.active) return false;
  const bool finite = is_finite(value) && is_finite(bent);
  const bool accepted = finite && value <= sample.energy;
  const bool small = std::sqrt(moved2) <= rule.tolerance * std::sqrt(x2 > z2 ? x2 : z2);
  bool done;
  if (!rule.backtracking) {
    done = small || !(accepted || momentum > T(0));  // the same trial would fail again
  } else {
    done = (small && sample.growth < T(kGrowthAtFirst)) || moved2 == T(0);  // with a small lr the first step is small
    // How many times larger a step the curvature allows: any number if there is no curvature.
    const T room = bent > T(0) ? changed2 / (bent * sample.step) : T(INFINITY);
    if (!(accepted && room >= T(kGrowthAtFirst))) sample.growth = T(kGrowth);
    const T factor = accepted ? sample.growth : momentum > T(0) ? T(1) : T(kShrinkage);
    const T largest = sizeof(T) == 4 ? T(1.8446743e19) : T(1.3407807929942596e154);  // root of the largest T
    const T least = room > T(kShrinkage) ? room : T(kShrinkage);
    const T step = sample.step * (least < factor ? least : factor);
    sample.step = step < largest ? step : largest;
  }
  if (accepted) sample.energy = value;
  sample.t = !accepted ? T(1) : rule.momentum >= T(0) ? T(2) : following(sample.t);
  sample.active = !done;
  sample.lost = !finite;
  sample.steps += 1;
  return accepted;
}

}  // namespace vjvcr
