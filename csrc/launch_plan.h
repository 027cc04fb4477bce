// How fista_mlp is laid out on a GPU: how many blocks form a cluster, how many samples a cluster serves, and what lies
// where in a block's shared memory. Plain C++ without torch or CUDA, so that `vjvcr-fast info` and the tests can ask.
//
// Matrices are cut into fragments. A fragment is the operand of one tensor-core instruction: 16 rows by a k-step of 32
// bytes (16 bfloat16 or 8 float32). That makes 512 bytes, of which each lane holds 16. A block works on `rows` rows of
// W2, G and W2'.
#pragma once

#include <algorithm>
#include <functional>
#include <string>

#include "latent_math.h"

namespace vjvcr {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kFragment = 512;     // bytes
constexpr int kScratchTile = 80;   // float2 in a 16 x 8 tile of sums: 8 samples, each 8 pairs of rows and 2 of padding
constexpr int kArrays = 5;         // p, a, c, u, r, for a block's rows and samples
constexpr int kMailboxes = 4;      // for a, D, q and the parts
constexpr int kStates = 7;         // z, gradient, previous, x, v, gradient at v, z0
constexpr int kScalarBytes = 64;   // for the scalars of a sample, at most
constexpr int kTeam = 16;          // lanes that update a sample together
constexpr int kMostLatents = 128;  // that are served

struct Plan {
  bool bf16 = false;
  int hidden = 0, latent = 0;    // as asked for
  int cluster = 0;               // blocks in a cluster, which share `samples` samples; 0 if these sizes are not served
  int samples = 0;               // 8, 16 or 32
  int clusters = 0;              // in the launch
  int rows = 0;                  // in a block, a multiple of 16; cluster * rows >= hidden
  int steps = 0;                 // k-steps in each of the three large products
  int resident = 0;              // how many of a block's fragments stay in shared memory; the others stream from L2
  int latent_tiles = 0;          // tiles of 16 rows of W1z', an even number
  int latent_steps = 0;          // k-steps in the product with W1z
  int shared_bytes = 0;
  int at_once = 0;               // clusters that run at the same time; the others wait for them
  // Offsets in shared memory. The resident fragments are at 0; Y follows X.
  int mailboxes = 0, x = 0, v = 0, scratch = 0, parts = 0, energy = 0, arrays = 0, states = 0, scalars = 0;

  VJVCR_HOST_DEVICE int element() const { return bf16 ? 2 : 4; }
  VJVCR_HOST_DEVICE int tiles() const { return (rows + 31) / 32 * 2; }  // of 16 rows, in pairs; one may be unused
  // How many fragments W1z and W1z' have together.
  VJVCR_HOST_DEVICE int outer_fragments() const { return tiles() * latent_steps + latent_tiles * (rows / 8); }
  VJVCR_HOST_DEVICE int fragments() const { return outer_fragments() + 3 * steps * tiles(); }
  VJVCR_HOST_DEVICE int operand_bytes() const { return samples * steps * 32; }  // of X or Y
  // A block's parts for a sample: its gradient, made even, and its energy. A row of them is a multiple of 32 bytes.
  VJVCR_HOST_DEVICE int even_latent() const { return (latent + 1) / 2 * 2; }
  VJVCR_HOST_DEVICE int part_row() const { return (even_latent() + 9) / 8 * 8; }
  VJVCR_HOST_DEVICE int blocks() const { return cluster * clusters; }
};

// Each warp takes a pair of tiles. If there are more warps than pairs, this many groups of warps share the k-steps, and
// their sums are added up.
VJVCR_HOST_DEVICE int groups_of(int tiles, int steps) {
  const int pairs = tiles / 2, wanted = pairs < kWarps ? kWarps / pairs : 1;
  return wanted < steps ? wanted : steps;
}

// The plan for a given cluster size and number of samples. `cluster` is 0 if it does not fit into `shared_limit` bytes.
// `at_once` is left to launch_plan.
inline Plan plan_of(int n, int hidden, int latent, bool bf16, int cluster, int samples, int shared_limit) {
  const auto round_up = [](int x, int to) { return (x + to - 1) / to * to; };
  Plan plan;
  plan.bf16 = bf16, plan.hidden = hidden, plan.latent = latent, plan.samples = samples;
  plan.rows = round_up(hidden, 16 * cluster) / cluster;
  plan.clusters = (n + samples - 1) / samples;
  plan.steps = cluster * plan.rows * plan.element() / 32;
  plan.latent_tiles = (latent + 31) / 32 * 2;
  plan.latent_steps = (latent + 7) / 8;
  const int tiles = plan.tiles(), groups = groups_of(tiles, plan.steps);
  const int sums = std::max({groups * tiles, groups_of(tiles, plan.latent_steps) * tiles,
                             groups_of(plan.latent_tiles, plan.rows / 8) * plan.latent_tiles});

  int at = 0;
  const auto place = [&](int& offset, int bytes) { offset = at, at += round_up(bytes, 32); };
  place(plan.mailboxes, kMailboxes * 8);
  place(plan.x, 2 * plan.operand_bytes());
  place(plan.v, samples * plan.latent_steps * 32);
  place(plan.scratch, sums * (samples / 8) * kScratchTile * 8);
  place(plan.parts, cluster * samples * plan.part_row() * 4);
  place(plan.energy, plan.rows * plan.element() / 32 * samples * 4);
  place(plan.arrays, kArrays * samples * plan.rows * 4);
  place(plan.states, kStates * samples * latent * 4);
  place(plan.scalars, samples * kScalarBytes);
  if (at > shared_limit) return plan;
  plan.cluster = cluster;
  plan.resident = std::min(plan.fragments(), (shared_limit - at) / kFragment);
  const int large = plan.resident - plan.outer_fragments();
  if (large > 0) plan.resident -= large % (3 * tiles);  // whole k-steps
  const int weights = plan.resident * kFragment;
  for (int* offset : {&plan.mailboxes, &plan.x, &plan.v, &plan.scratch, &plan.parts, &plan.energy, &plan.arrays,
                      &plan.states, &plan.scalars}) {
    *offset += weights;
  }
  plan.shared_bytes = at + weights;
  return plan;
}

// How many cycles a step of the whole batch takes if `at_once` clusters run at the same time. Rough figures, to choose
// by: shared memory delivers 128 bytes a cycle, L2 64 to a block and 3200 to all; an m16n8 product takes about 1.6
// cycles, and waiting for the cluster a few hundred.
inline double cycles_of(const Plan& plan) {
  const int tiles = plan.tiles(), groups = groups_of(tiles, plan.steps);
  const double n_tiles = plan.samples / 8.0, pairs = (tiles + 1) / 2, k_steps = 3.0 * plan.steps;
  const double weights = double(plan.resident) * kFragment;
  const double moved = weights + k_steps * pairs * n_tiles * 256 + 6.0 * groups * tiles * n_tiles * kScratchTile * 8;
  const double products = k_steps * 2 * pairs * n_tiles * (plan.bf16 ? 1 : 3) * 1.6;
  const double streamed = double(plan.fragments() - plan.resident) * kFragment;
  const double waiting = 2500 + (plan.cluster == 1 ? 0 : 4.0 * (300 + 20 * plan.cluster));
  const auto wave = [&](int clusters) {
    const double from_l2 = std::min(64.0, 3200.0 / (plan.cluster * clusters));
    return std::max({moved / 128, products, streamed / from_l2}) + waiting;
  };
  const int full = plan.clusters / plan.at_once, last = plan.clusters % plan.at_once;
  return full * wave(plan.at_once) + (last > 0 ? wave(last) : 0);
}

// What a plan needs to know of a GPU. capacity: how many clusters of a plan run at the same time, which depends on its
// kernel, its cluster size and its shared memory; 0 if none can.
struct Gpu {
  int multiprocessors, shared_limit;
  std::function<int(const Plan&)> capacity;
};

// Is assumed where there is no GPU. Not every multiprocessor can be in a cluster of 8: 15 clusters were seen at once.
inline Gpu h100() {
  return {132, 227 << 10, [](const Plan& plan) { return plan.cluster == 8 ? 15 : 132 / plan.cluster; }};
}

// The plan with the least estimated time. If no plan serves, its cluster is 0 and refusal_of says why.
inline Plan launch_plan(int n, int hidden, int latent, bool bf16, const Gpu& gpu) {
  Plan best, refused;
  if (latent > kMostLatents) return best;
  for (int cluster : {1, 2, 4, 8}) {
    for (int samples : {8, 16, 32}) {
      Plan plan = plan_of(n, hidden, latent, bf16, cluster, samples, gpu.shared_limit);
      if (plan.cluster == 0) continue;
      // Small blocks can share a multiprocessor. They then share its time, so they count as if they waited.
      plan.at_once = std::min(gpu.capacity(plan), gpu.multiprocessors / cluster);
      if (plan.at_once == 0) {
        refused.shared_bytes = plan.shared_bytes;
      } else if (best.cluster == 0 || cycles_of(plan) < cycles_of(best)) {
        best = plan;
      }
    }
  }
  return best.cluster == 0 ? refused : best;
}

// On a GPU. In csrc/fista_mlp_cuda.cu, if the build has CUDA kernels.
Plan plan_on(int device, int n, int hidden, int latent, bool bf16);

// Why launch_plan found no plan.
inline std::string refusal_of(const Plan& plan) {
  return plan.shared_bytes == 0
             ? "at most " + std::to_string(kMostLatents) + " latents, and no more of both than fits into shared memory"
             : "CUDA says that no cluster of thread blocks with " + std::to_string(plan.shared_bytes) +
                   " bytes of shared memory each can run on this GPU";
}

}  // namespace vjvcr
