// One block of fista_mlp's cluster: where its arrays lie in shared memory, how it sends to the other blocks, and how
// its warps multiply. csrc/fista_mlp.cuh says who writes and reads which array, and why that is safe.
#pragma once

#include "latent_math.h"
#include "launch_plan.h"
#include "products.cuh"

namespace vjvcr {

struct Scalars {
  Sample<float> sample;
  float start;
};
static_assert(sizeof(Scalars) <= kScalarBytes);

enum { kOfA, kOfD, kOfQ, kOfParts };                                    // mailboxes
enum { kP, kA, kC, kU, kR };                                            // arrays
enum { kZ, kGradient, kPrevious, kProximal, kTrial, kSlope, kOrigin };  // states

// How a block's warps share a product of `tiles` by `steps` fragments. Each warp takes a pair of tiles; if there are
// more warps than pairs, it takes a part of the k-steps. Computed once, because it divides.
struct Work {
  int tiles, steps, pairs, groups, group, pair;
  VJVCR_DEVICE Work(int tiles, int steps, int warp)
      : tiles(tiles), steps(steps), pairs((tiles + 1) / 2), groups(groups_of(tiles, steps)), group(warp / pairs),
        pair(warp % pairs) {}
};

// A block and its shared memory. One thread's view.
template <typename Mode, int kTiles>
struct FistaBlock {
  static constexpr int kElements = Mode::kElements, kSamples = 8 * kTiles;
  struct alignas(4 * kElements) Values {  // the numbers of one unit
    float x[kElements];
  };

  const Plan& plan;
  const uint4* streamed;
  char* memory;
  int thread, lane, rank;

  // The work of one thread between two products: kElements adjacent rows of one sample. They make 8 bytes of the next
  // product's operand.
  struct Unit {
    int index, sample, row;
  };
  VJVCR_DEVICE int units() const { return plan.rows * kSamples / kElements; }
  VJVCR_DEVICE Unit unit(int i) const {
    return {i, i / 4 % kSamples, (i / (4 * kSamples) * 4 + i % 4) * kElements};
  }
  VJVCR_DEVICE Values* array(int which) const {
    return reinterpret_cast<Values*>(memory + plan.arrays) + which * units();
  }
  VJVCR_DEVICE float2* scratch() const { return reinterpret_cast<float2*>(memory + plan.scratch); }
  VJVCR_DEVICE char* x() const { return memory + plan.x; }
  VJVCR_DEVICE char* y() const { return memory + plan.x + plan.operand_bytes(); }
  VJVCR_DEVICE float* v() const { return reinterpret_cast<float*>(memory + plan.v); }
  VJVCR_DEVICE float* parts(int rank, int sample) const {
    return reinterpret_cast<float*>(memory + plan.parts) + (rank * kSamples + sample) * plan.part_row();
  }
  VJVCR_DEVICE float* energy() const { return reinterpret_cast<float*>(memory + plan.energy); }
  VJVCR_DEVICE float* state(int which, int sample) const {
    return reinterpret_cast<float*>(memory + plan.states) + (which * kSamples + sample) * plan.latent;
  }
  VJVCR_DEVICE Scalars& scalars(int sample) const {
    return *reinterpret_cast<Scalars*>(memory + plan.scalars + sample * kScalarBytes);
  }

  VJVCR_DEVICE uint4 fragment(int f) const {
    return (f < plan.resident ? reinterpret_cast<const uint4*>(memory) : streamed)[f * 32 + lane];
  }

  VJVCR_DEVICE uint64_t* mailbox(int which) const {
    return reinterpret_cast<uint64_t*>(memory + plan.mailboxes) + which;
  }

  // Sends a value to the same place in every block of the cluster, this one included.
  template <typename T>
  VJVCR_DEVICE void send(int which, T* place, T value) const {
#pragma unroll 1
    for (int i = 0; i < plan.cluster; ++i) hw::send(place, value, mailbox(which), (rank + i) & (plan.cluster - 1));
  }

  // Sends a unit of this block's rows to its place in the whole operand, which every block has.
  VJVCR_DEVICE void send(int which, char* operand, const Unit& at, const float (&x)[kElements]) const {
    send(which, reinterpret_cast<uint2*>(operand + rank * (units() * 8)) + at.index, Mode::pack(x));
  }

  // scratch [group of warps][tile][8 samples] <- weights times activations. The weights start at fragment `first`, and
  // a k-step is `stride` fragments. Ends with a barrier.
  template <typename Product>
  VJVCR_DEVICE void multiply(const Work& work, int first, int stride, const char* activations) const {
    for (int pair = work.pair; pair < work.pairs && work.group < work.groups; pair += kWarps) {
      const int tile[2] = {2 * pair, min(2 * pair + 1, work.tiles - 1)};
      float sum[2][kTiles][4] = {};
      sum_products<Product, kTiles>(
          sum, work.group, work.groups, work.steps,
          [&](int k, int i) { return fragment(first + k * stride + tile[i]); },
          [&](int k, int j) { return reinterpret_cast<const uint2*>(activations)[(k * kTiles + j) * 32 + lane]; });
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const float(&of)[4] = sum[i / kTiles][i % kTiles];
        const int at = (work.group * work.tiles + tile[i / kTiles]) * kTiles + i % kTiles;
        float2* to = scratch() + at * kScratchTile + lane / 4;
        to[lane % 4 * 20] = {of[0], of[2]};
        to[lane % 4 * 20 + 10] = {of[1], of[3]};
      }
    }
    hw::barrier();
  }

  // Reads kRows adjacent rows of a sample from multiply's result, summed over the groups of warps.
  template <int kRows>
  VJVCR_DEVICE void result(float (&x)[kRows], const Work& work, int sample, int row) const {
    const float2* from = scratch() + (row / 16 * kTiles + sample / 8) * kScratchTile + sample % 8 * 10 + row % 16 / 2;
#pragma unroll
    for (int i = 0; i < kRows; ++i) x[i] = 0;
    for (int group = 0; group < work.groups; ++group, from += work.tiles * kTiles * kScratchTile) {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) x[2 * i] += from[i].x, x[2 * i + 1] += from[i].y;
    }
  }
};

}  // namespace vjvcr
