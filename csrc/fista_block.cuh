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

// A warp's share of a product of `tiles` by `steps` fragments, which start at fragment `start`, a k-step every `apart`.
// A warp takes a pair of tiles. If there are more warps than pairs, `groups` of warps share the k-steps in turn.
// Computed once, because it divides.
struct Work {
  int tiles, pairs, groups, group, pair;
  int first, stride;       // the fragment at which the group's first k-step starts, and how far apart its k-steps are
  int resident, streamed;  // how many of its k-steps have their weights in shared memory, and how many in L2
  VJVCR_DEVICE Work(const Plan& plan, int tiles, int steps, int start, int apart, int warp)
      : tiles(tiles), pairs(tiles / 2), groups(groups_of(tiles, steps)), group(warp / pairs), pair(warp % pairs),
        first(start + group * apart), stride(groups * apart) {
    if (group >= groups) group = 0, pair = pairs, steps = 0;  // no work
    const auto share = [&](int all) { return (all - group + groups - 1) / groups; };
    resident = share(min(steps, max(0, plan.resident - start) / apart));
    streamed = share(steps) - resident;
  }
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

  // Starts to load the weights that a product streams for a pair of tiles, `at` fragments behind its first.
  template <int kSteps>
  VJVCR_DEVICE void prefetch(Stream<kSteps>& stream, const Work& work, int pair, int at) const {
    stream.start(streamed + (work.first + work.resident * work.stride + 2 * pair + at) * 32 + lane, work.stride * 32,
                 work.streamed);
  }

  // scratch [group of warps][tile][8 samples] <- weights times activations. `stream` was started for work.pair. Ends
  // with a barrier.
  template <typename Product, int kSteps>
  VJVCR_DEVICE void multiply(Stream<kSteps>& stream, const Work& work, int at, const char* activations) const {
    const int stride = work.stride * 32, step = work.groups * kTiles * 32;
#pragma unroll 1
    for (int pair = work.pair; pair < work.pairs; pair += kWarps) {
      if (pair != work.pair) prefetch(stream, work, pair, at);
      const uint4* weights = reinterpret_cast<const uint4*>(memory) + (work.first + 2 * pair + at) * 32 + lane;
      const uint2* operand = reinterpret_cast<const uint2*>(activations) + work.group * kTiles * 32 + lane;
      Sums<Product, kTiles> sums;
      int left = work.resident;
      if constexpr (kSteps > 1) {
#pragma unroll 1
        for (; left >= kSteps; left -= kSteps) sums.template add_resident<kSteps>(weights, stride, operand, step);
      }
#pragma unroll 1
      for (; left > 0; --left) sums.template add_resident<1>(weights, stride, operand, step);
      sums.add_streamed(stream, work.streamed, operand, step);
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const float(&of)[4] = sums.of[i / kTiles][i % kTiles];
        const int tile = work.group * work.tiles + 2 * pair + i / kTiles;
        float2* to = scratch() + (tile * kTiles + i % kTiles) * kScratchTile + lane / 4;
        to[lane % 4 * 20] = {of[0], of[2]};
        to[lane % 4 * 20 + 10] = {of[1], of[3]};
      }
    }
    hw::barrier();
  }

  // A product with W1z or W1z': a warp has a k-step or two, mostly in shared memory.
  VJVCR_DEVICE void multiply_outer(const Work& work, const void* activations) const {
    Stream<1> stream;
    prefetch(stream, work, work.pair, 0);
    multiply<Tf32x3>(stream, work, 0, static_cast<const char*>(activations));
  }

  // Reads kRows adjacent rows of a sample from multiply's result, summed over the groups of warps.
  template <int kRows>
  VJVCR_DEVICE void result(float (&x)[kRows], const Work& work, int sample, int row) const {
    const float2* from = scratch() + (row / 16 * kTiles + sample / 8) * kScratchTile + sample % 8 * 10 + row % 16 / 2;
#pragma unroll
    for (int i = 0; i < kRows; ++i) x[i] = 0;
#pragma unroll 4
    for (int group = 0; group < work.groups; ++group, from += work.tiles * kTiles * kScratchTile) {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) x[2 * i] += from[i].x, x[2 * i + 1] += from[i].y;
    }
  }
};

}  // namespace vjvcr
