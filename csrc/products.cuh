// Products on tensor cores: weights times the activations of 8, 16 or 32 samples.
//
// A k-step is 32 bytes of k: 16 bfloat16 or 8 float32. An instruction sums over k in any order, as long as both
// operands have the same. So lane 4 g + t takes the t-th 8 bytes of a k-step, adjacent in memory: of rows 2 g and
// 2 g + 1 of the weights (its 16 bytes of a fragment, in the instruction's order; its sums are of the same rows) and of
// sample g of the activations, which lie [k-step][sample][32 bytes].
#pragma once

#include "hardware.cuh"
#include "launch_plan.h"

namespace vjvcr {

namespace hw = hardware;

// bfloat16 operands, float32 sums.
struct Bf16 {
  static constexpr int kElements = 4;        // numbers in 8 bytes
  static constexpr bool kShortSums = false;  // 2^-23 of a sum for each k-step is little beside the operands' 2^-9
  static VJVCR_DEVICE uint2 pack(const float (&x)[4]) { return {hw::pack_bf16(x[0], x[1]), hw::pack_bf16(x[2], x[3])}; }
  static VJVCR_DEVICE uint4 prepare(const uint4& a) { return a; }
  static VJVCR_DEVICE uint2 prepare(const uint2& b) { return b; }
  static VJVCR_DEVICE void add_product(float (&sum)[4], const uint4& a, const uint2& b) { hw::mma_bf16(sum, a, b); }
};

// float32 operands: x = high + low, 11 bits each, and low times low is left out. Both halves are truncated, so a
// product of two numbers is too small, by 3e-7 in the mean and 2e-6 at most. Rounding `high` to nearest (cvt.rna.tf32)
// would make that 0 in the mean and 5e-7 at most. It takes three more instructions for every operand, which would
// double the number of instructions around the products.
struct Tf32x3 {
  static constexpr int kElements = 2;
  static constexpr bool kShortSums = true;
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

constexpr int kAhead = 4;  // k-steps of which streamed weights are loaded ahead

// The weights that a warp streams from L2 for a pair of tiles, kSteps k-steps ahead in registers. A k-step's two
// fragments are adjacent; those of the next k-step lie `stride` further.
//
//   registers a[i] | written by fetch(i) | read by the products of one k-step
//   safe because a lane's registers are its own, and a[i] is fetched again only after its products were issued
template <int kSteps>
struct Stream {
  const uint4* next;
  int stride;
  uint4 a[kSteps][2];

  VJVCR_DEVICE void fetch(int i) { a[i][0] = next[i * stride], a[i][1] = next[i * stride + 32]; }

  VJVCR_DEVICE void start(const uint4* first, int apart, int steps) {
    next = first, stride = apart;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (i < steps) fetch(i);
    }
    next += kSteps * stride;
  }
};

// A warp's sums: a pair of tiles of 16 rows by kTiles times 8 samples. `activations` is the lane's part of the first 8
// samples of a k-step; those of the next k-step lie `step` further. Tensor cores truncate as they add. Where that
// matters, they add up a few k-steps at a time; these sums are then added with rounding.
template <typename Mode, int kTiles>
struct Sums {
  float of[2][kTiles][4] = {};

  VJVCR_DEVICE void add(const uint4& a0, const uint4& a1, const uint2* activations) {
    const auto first = Mode::prepare(a0), second = Mode::prepare(a1);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const auto b = Mode::prepare(activations[j * 32]);
      Mode::add_product(of[0][j], first, b);
      Mode::add_product(of[1][j], second, b);
    }
  }

  VJVCR_DEVICE void add(const Sums& part) {
#pragma unroll
    for (int i = 0; i < kTiles * 8; ++i) (&of[0][0][0])[i] += (&part.of[0][0][0])[i];
  }

  // kSteps k-steps whose weights are in shared memory. Moves both pointers on.
  template <int kSteps>
  VJVCR_DEVICE void add_resident(const uint4*& weights, int stride, const uint2*& activations, int step) {
    Sums part;
    Sums& to = Mode::kShortSums ? part : *this;
#pragma unroll
    for (int i = 0; i < kSteps; ++i, weights += stride, activations += step) {
      to.add(weights[0], weights[32], activations);
    }
    if (Mode::kShortSums) add(part);
  }

  // All k-steps of a stream that was started with as many `steps`.
  template <int kSteps>
  VJVCR_DEVICE void add_streamed(Stream<kSteps>& weights, int steps, const uint2* activations, int step) {
#pragma unroll 1
    for (; steps > 0; steps -= kSteps, weights.next += kSteps * weights.stride) {
      Sums part;
      Sums& to = Mode::kShortSums ? part : *this;
#pragma unroll
      for (int i = 0; i < kSteps; ++i, activations += step) {
        if (i > 0 && i >= steps) break;
        to.add(weights.a[i][0], weights.a[i][1], activations);
        if (i + kSteps < steps) weights.fetch(i);
      }
      if (Mode::kShortSums) add(part);
    }
  }
};

}  // namespace vjvcr
