// The math of a latent step, an element at a time, once for the host and the device. No torch headers. Compiled without
// contraction into fused multiply-adds on either side, so that both round alike.
#pragma once

#ifdef __CUDACC__
#define VJVCR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VJVCR_HOST_DEVICE inline
#endif

namespace vjvcr {

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

// A gradient step from v, then the proximal map of weight |x| on [lower, upper].
template <typename T>
VJVCR_HOST_DEVICE T proximal(T v, T gradient, T step, T weight, T lower, T upper) {
  return clamp(soft_threshold(v - step * gradient, step * weight), lower, upper);
}

// Where the next gradient is taken: x moved on by momentum times its last step.
template <typename T>
VJVCR_HOST_DEVICE T extrapolate(T x, T before, T momentum) {
  return x + momentum * (x - before);
}

}  // namespace vjvcr
