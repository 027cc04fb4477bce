// The math of a latent step, an element at a time, once for the host and the device. No torch headers. Compiled without
// contraction into fused multiply-adds on either side, so that both round alike. What a step is stands in
// vjvcr_fast/latents/descent.py.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define VJVCR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VJVCR_HOST_DEVICE inline
#endif

namespace vjvcr {

// -- Of an element --------------------------------------------------------------------------------------------------

// argmin_x (x - v)^2 / 2 + threshold |x|: v moved towards zero by threshold >= 0, exactly zero within it. NaN stays NaN.
template <typename T>
VJVCR_HOST_DEVICE T soft_threshold(T v, T threshold) {
  T magnitude = (v < T(0) ? -v : v) - threshold;
  return magnitude <= T(0) ? T(0) : (v < T(0) ? -magnitude : magnitude);
}

// The nearest number within [lower, upper]. NaN stays NaN.
template <typename T>
VJVCR_HOST_DEVICE T clamp(T x, T lower, T upper) {
  return x < lower ? lower : (x > upper ? upper : x);
}

// A gradient step from z, then the proximal map of weight |x| on [lower, upper].
template <typename T>
VJVCR_HOST_DEVICE T proximal(T z, T gradient, T step, T weight, T lower, T upper) {
  return clamp(soft_threshold(z - step * gradient, step * weight), lower, upper);
}

// x moved on by momentum times what it is ahead of `previous`; where x is penalised it keeps its sign and its zeros.
template <typename T>
VJVCR_HOST_DEVICE T extrapolate_in_sign(T x, T previous, T momentum, T weight, T lower, T upper) {
  const T v = x + momentum * (x - previous);
  return clamp(weight > T(0) && !(v * x > T(0)) ? T(0) : v, lower, upper);
}

template <typename T>
VJVCR_HOST_DEVICE bool is_finite(T x) {
  return x - x == T(0);
}

// -- Of a sample ----------------------------------------------------------------------------------------------------

// How the step size changes from step to step.
constexpr double kGrowthAtFirst = 4.0, kGrowth = 1.01, kShrinkage = 0.5;

// What all samples share. momentum: negative for FISTA's growing one. lr: the first step size, or the fixed one.
template <typename T>
struct Rule {
  T weight, lower, upper, momentum;
  bool backtracking;
  T lr, tolerance;
};

// What changes from step to step besides z. t: of FISTA's sequence, 1 after a restart. active: not frozen yet. lost: the
// last trial was not finite.
template <typename T>
struct Sample {
  T energy, t, step, growth;
  int steps;
  bool active, lost;
};

// energy: at the start, with the penalty.
template <typename T>
VJVCR_HOST_DEVICE Sample<T> begin(const Rule<T>& rule, T energy) {
  return {energy, T(1), rule.lr, T(kGrowthAtFirst), 0, true, false};
}

template <typename T>
VJVCR_HOST_DEVICE T following(T t) {
  return (T(1) + std::sqrt(T(1) + T(4) * t * t)) / T(2);
}

// Of the step to come.
template <typename T>
VJVCR_HOST_DEVICE T momentum_of(const Rule<T>& rule, const Sample<T>& sample) {
  if (rule.momentum >= T(0)) return sample.t > T(1) ? rule.momentum : T(0);
  return (sample.t - T(1)) / following(sample.t);
}

// After a trial at v, the proximal point x moved on by `momentum`: whether v becomes z, and the sample's next step size,
// momentum and freezing. value: energy at v, with the penalty. Sums over the sample's elements: bent, <gradient at v -
// gradient at z, v - z>; changed2, |v - z|^2; moved2, |x - z|^2; x2, |x|^2; z2, |z|^2.
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
    done = (small && sample.growth < T(kGrowthAtFirst)) || moved2 == T(0);  // a first step is small where lr is
    // How many times this step the curvature allows; any number where there is none.
    const T room = bent > T(0) ? changed2 / (bent * sample.step) : T(INFINITY);
    if (!(accepted && room >= T(kGrowthAtFirst))) sample.growth = T(kGrowth);
    const T factor = accepted ? sample.growth : momentum > T(0) ? T(1) : T(kShrinkage);
    const T largest = sizeof(T) == 4 ? T(1.8446743e19) : T(1.3407807929942596e154);  // root of the largest number
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
