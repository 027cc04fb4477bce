// Products on tensor cores: weights times the activations of 8, 16 or 32 samples.
//
// A k-step is 32 bytes of k: 16 bfloat16 or 8 float32. An instruction sums over k in any order, as long as both
// operands have the same. So lane 4 g + t takes the t-th 8 bytes of a k-step, adjacent in memory: of rows 2 g and
// 2 g + 1 of the weights (its 16 bytes of a fragment; its sums are of the same rows) and of sample g of the
// activations, which lie [k-step][sample][32 bytes].
#pragma once

#include "hardware.cuh"
#include "launch_plan.h"

namespace vjvcr {

namespace hw = hardware;

// bfloat16 operands, float32 sums.
struct Bf16 {
  static constexpr int kElements = 4;  // numbers in 8 bytes
  static VJVCR_DEVICE uint2 pack(const float (&x)[4]) { return {hw::pack_bf16(x[0], x[1]), hw::pack_bf16(x[2], x[3])}; }
  static VJVCR_DEVICE uint4 prepare(const uint4& a) { return a; }
  static VJVCR_DEVICE uint2 prepare(const uint2& b) { return b; }
  static VJVCR_DEVICE void add_product(float (&sum)[4], const uint4& a, const uint2& b) { hw::mma_bf16(sum, a, b); }
};

// float32 operands, to about 2^-21: x = high + low with 11 bits each, and low times low is left out.
struct Tf32x3 {
  static constexpr int kElements = 2;
  template <typename V>
  struct Split {
    V high, low;
  };
  static VJVCR_DEVICE uint2 pack(const float (&x)[2]) { return {hw::as_bits(x[0]), hw::as_bits(x[1])}; }
  static VJVCR_DEVICE uint32_t high(uint32_t x) { return x & 0xffffe000u; }
  static VJVCR_DEVICE uint32_t low(uint32_t x) { return hw::as_bits(hw::as_float(x) - hw::as_float(high(x))); }
  static VJVCR_DEVICE Split<uint4> prepare(const uint4& a) {
    return {{high(a.x), high(a.y), high(a.z), high(a.w)}, {low(a.x), low(a.y), low(a.z), low(a.w)}};
  }
  static VJVCR_DEVICE Split<uint2> prepare(const uint2& b) { return {{high(b.x), high(b.y)}, {low(b.x), low(b.y)}}; }
  static VJVCR_DEVICE void add_product(float (&sum)[4], const Split<uint4>& a, const Split<uint2>& b) {
    hw::mma_tf32(sum, a.low, b.high);
    hw::mma_tf32(sum, a.high, b.low);
    hw::mma_tf32(sum, a.high, b.high);
  }
};

constexpr int kAhead = 4;  // how many k-steps ahead operands are loaded into registers

// Adds up two tiles of 16 rows by kTiles times 8 samples, over the k-steps first, first + stride, ... below `steps`.
// weights(k-step, 0 or 1) is the lane's part of a fragment, activations(k-step, tile) its part of 8 samples. Tensor
// cores truncate as they add, so they add up only kAhead k-steps at a time; these sums are then added with rounding.
//
//   registers a[i], b[i] | written by fetch(i, k)                 | read by the products of k-step k
//   safe because a lane's registers are its own, and slot i is fetched again only after its products were issued
template <typename Mode, int kTiles, typename Weights, typename Activations>
VJVCR_DEVICE void sum_products(float (&sum)[2][kTiles][4], int first, int stride, int steps, const Weights& weights,
                               const Activations& activations) {
  uint4 a[kAhead][2];
  uint2 b[kAhead][kTiles];
  const auto fetch = [&](int i, int k) {
    a[i][0] = weights(k, 0);
    a[i][1] = weights(k, 1);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) b[i][j] = activations(k, j);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (first + i * stride < steps) fetch(i, first + i * stride);
  }
  for (int block = first; block < steps; block += kAhead * stride) {
    float part[2][kTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int k = block + i * stride;
      if (k >= steps) break;
      const auto a0 = Mode::prepare(a[i][0]), a1 = Mode::prepare(a[i][1]);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const auto of_samples = Mode::prepare(b[i][j]);
        Mode::add_product(part[0][j], a0, of_samples);
        Mode::add_product(part[1][j], a1, of_samples);
      }
      if (k + kAhead * stride < steps) fetch(i, k + kAhead * stride);
    }
#pragma unroll
    for (int i = 0; i < kTiles * 8; ++i) (&sum[0][0][0])[i] += (&part[0][0][0])[i];
  }
}

}  // namespace vjvcr
