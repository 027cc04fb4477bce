// Energies of k heads, mean over M of (W3_k u + b3_k - target)^2, and the least. No prediction is ever stored: a block
// makes 256 rows of one head's for 32 samples, in registers, and leaves the sum of their squared errors; a second,
// small kernel adds these up, always in the same order.
//
// Products in three TF32 parts. Bytes: W3 once for each 32 samples, from L2 where these follow each other, as they do;
// u once for each 256 rows.
#pragma once

#include <cmath>
#include <cstdint>

#include "products.cuh"

namespace vjvcr {

constexpr int kHeadTiles = 4, kHeadSamples = 8 * kHeadTiles;
constexpr int kHeadRows = 32 * kWarps;
constexpr int kHeadSteps = 32;  // k-steps of u in shared memory at a time
constexpr int kHeadBytes = kHeadSamples * (kHeadSteps * 32 + kWarps * 4);

struct HeadsInput {
  int n, hidden, heads, outputs;
  const float *u, *w3, *b3, *target;

  VJVCR_HOST_DEVICE int row_blocks() const { return (outputs + kHeadRows - 1) / kHeadRows; }
  VJVCR_HOST_DEVICE int sample_blocks() const { return (n + kHeadSamples - 1) / kHeadSamples; }
  VJVCR_HOST_DEVICE int blocks() const { return heads * row_blocks() * sample_blocks(); }
};

// Columns k and k + 1 of a row, zero beyond its end. kWhole: k-steps end where rows do.
template <bool kWhole>
VJVCR_DEVICE uint2 two(const float* row, int k, int columns) {
  if (kWhole) return *reinterpret_cast<const uint2*>(row + k);
  return {k < columns ? hw::as_bits(row[k]) : 0, k + 1 < columns ? hw::as_bits(row[k + 1]) : 0};
}

// partial: [head][block of rows][sample].
template <bool kWhole>
VJVCR_KERNEL(kThreads) head_energies_kernel(VJVCR_CONSTANT HeadsInput in, float* partial) {
  const int thread = hw::thread(), warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int h = in.hidden, first_sample = hw::block() % in.sample_blocks() * kHeadSamples;
  const int part = hw::block() / in.sample_blocks(), head = part / in.row_blocks();
  const int first_row = part % in.row_blocks() * kHeadRows + warp * 32;
  const float* weights = in.w3 + int64_t(head) * in.outputs * h;
  uint2* u = reinterpret_cast<uint2*>(hw::shared_memory());  // [k-step][sample][4]

  float sum[2][kHeadTiles][4] = {};
  for (int first = 0; first < h; first += kHeadSteps * 8) {
    const int steps = min((h - first + 7) / 8, kHeadSteps);
    hw::barrier();
    for (int i = thread; i < steps * kHeadSamples * 4; i += kThreads) {
      const int n = first_sample + i / 4 % kHeadSamples, k = first + i / (4 * kHeadSamples) * 8 + i % 4 * 2;
      u[i] = n < in.n ? two<kWhole>(in.u + int64_t(n) * h, k, h) : uint2{0, 0};
    }
    hw::barrier();
    sum_products<Tf32x3, kHeadTiles>(
        sum, 0, 1, steps,
        [&](int k, int i) -> uint4 {
          const int row = min(first_row + i * 16 + 2 * g, in.outputs - 1), next = min(row + 1, in.outputs - 1);
          const uint2 a = two<kWhole>(weights + int64_t(row) * h, first + k * 8 + 2 * t, h);
          const uint2 b = two<kWhole>(weights + int64_t(next) * h, first + k * 8 + 2 * t, h);
          return {a.x, a.y, b.x, b.y};
        },
        [&](int k, int j) { return u[(k * kHeadTiles + j) * 32 + lane]; });
  }

  float* of_warps = reinterpret_cast<float*>(hw::shared_memory() + kHeadSamples * kHeadSteps * 32);
#pragma unroll
  for (int j = 0; j < 2 * kHeadTiles; ++j) {
    const int sample = j / 2 * 8 + 2 * t + j % 2, n = min(first_sample + sample, in.n - 1);
    float energy = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + i / 2 * 16 + 2 * g + i % 2;
      if (row >= in.outputs) continue;
      const float error = sum[i / 2][j / 2][i % 2 * 2 + j % 2] + in.b3[int64_t(head) * in.outputs + row] -
                          in.target[int64_t(n) * in.outputs + row];
      energy += error * error;
    }
    for (int mask = 4; mask < 32; mask *= 2) energy += hw::shuffle_xor(energy, mask);
    if (g == 0) of_warps[warp * kHeadSamples + sample] = energy;
  }
  hw::barrier();
  if (thread >= kHeadSamples || first_sample + thread >= in.n) return;
  float energy = 0;
  for (int i = 0; i < kWarps; ++i) energy += of_warps[i * kHeadSamples + thread];
  partial[int64_t(part) * in.n + first_sample + thread] = energy;
}

// energies: (N, heads). index: (N,), the first of the least finite ones, 0 where none is.
VJVCR_KERNEL(kThreads)
least_head_kernel(VJVCR_CONSTANT HeadsInput in, const float* partial, float* energies, int64_t* index) {
  const int n = hw::block() * kThreads + hw::thread(), rows = in.row_blocks();
  if (n >= in.n) return;
  float least = INFINITY;
  int64_t best = 0;
  for (int head = 0; head < in.heads; ++head) {
    float energy = 0;
    for (int i = 0; i < rows; ++i) energy += partial[int64_t(head * rows + i) * in.n + n];
    energy /= static_cast<float>(in.outputs);
    energies[int64_t(n) * in.heads + head] = energy;
    if (energy < least) least = energy, best = head;
  }
  index[n] = best;
}

}  // namespace vjvcr
