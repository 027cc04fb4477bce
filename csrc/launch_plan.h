// How fista_mlp is laid out on a GPU: how many blocks form a cluster, how many samples a cluster serves, and what lies
// where in a block's shared memory. Plain C++ without torch or CUDA, so that `vjvcr-fast info` and the tests can ask.
//
// Matrices are cut into fragments. A fragment is the operand of one tensor-core instruction: 16 rows by a k-step of 32
// bytes (16 bfloat16 or 8 float32). That makes 512 bytes, of which each lane holds 16. A block works on `rows` rows of
// W2, G and W2'.
#pragma once

#include <algorithm>

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
  int latent_tiles = 0;          // tiles of 16 rows of W1z'
  int latent_steps = 0;          // k-steps in the product with W1z
  int shared_bytes = 0;
  double cycles = 0;             // a step of the whole batch takes: a rough estimate, to choose by
  // Offsets in shared memory. The resident fragments are at 0; Y follows X.
  int mailboxes = 0, x = 0, v = 0, scratch = 0, parts = 0, energy = 0, arrays = 0, states = 0, scalars = 0;

  VJVCR_HOST_DEVICE int element() const { return bf16 ? 2 : 4; }
  VJVCR_HOST_DEVICE int tiles() const { return rows / 16; }
  // How many fragments W1z and W1z' have together.
  VJVCR_HOST_DEVICE int outer_fragments() const { return tiles() * latent_steps + latent_tiles * (rows / 8); }
  VJVCR_HOST_DEVICE int fragments() const { return outer_fragments() + 3 * steps * tiles(); }
  VJVCR_HOST_DEVICE int operand_bytes() const { return samples * steps * 32; }  // of X or Y
  VJVCR_HOST_DEVICE int blocks() const { return cluster * clusters; }
};

// Each warp takes a pair of tiles. If there are more warps than pairs, this many groups of warps share the k-steps, and
// their sums are added up.
VJVCR_HOST_DEVICE int groups_of(int tiles, int steps) {
  const int pairs = (tiles + 1) / 2, wanted = pairs < kWarps ? kWarps / pairs : 1;
  return wanted < steps ? wanted : steps;
}

// The plan for a given cluster size and number of samples. `cluster` is 0 if it does not fit into `shared_limit` bytes.
inline Plan plan_of(int n, int hidden, int latent, bool bf16, int cluster, int samples, int multiprocessors,
                    int shared_limit) {
  const auto round_up = [](int x, int to) { return (x + to - 1) / to * to; };
  Plan plan;
  plan.bf16 = bf16, plan.hidden = hidden, plan.latent = latent, plan.samples = samples;
  plan.rows = round_up(hidden, 16 * cluster) / cluster;
  plan.clusters = (n + samples - 1) / samples;
  plan.steps = cluster * plan.rows * plan.element() / 32;
  plan.latent_tiles = (latent + 15) / 16;
  plan.latent_steps = (latent + 7) / 8;
  const int tiles = plan.tiles(), groups = groups_of(tiles, plan.steps);
  const int sums = std::max({groups * tiles, groups_of(tiles, plan.latent_steps) * tiles,
                             groups_of(plan.latent_tiles, plan.rows / 8) * plan.latent_tiles});

  int at = 0;
  const auto place = [&](int& offset, int bytes) { offset = at, at += round_up(bytes, 16); };
  place(plan.mailboxes, kMailboxes * 8);
  place(plan.x, 2 * plan.operand_bytes());
  place(plan.v, samples * plan.latent_steps * 32);
  place(plan.scratch, sums * (samples / 8) * kScratchTile * 8);
  place(plan.parts, cluster * samples * (latent + 1) * 4);
  place(plan.energy, plan.rows * plan.element() / 32 * samples * 4);
  place(plan.arrays, kArrays * samples * plan.rows * 4);
  place(plan.states, kStates * samples * latent * 4);
  place(plan.scalars, samples * kScalarBytes);
  if (at > shared_limit) return plan;
  plan.cluster = cluster;
  plan.resident = std::min(plan.fragments(), (shared_limit - at) / kFragment);
  const int weights = plan.resident * kFragment;
  for (int* offset : {&plan.mailboxes, &plan.x, &plan.v, &plan.scratch, &plan.parts, &plan.energy, &plan.arrays,
                      &plan.states, &plan.scalars}) {
    *offset += weights;
  }
  plan.shared_bytes = at + weights;

  // Rough figures: shared memory delivers 128 bytes a cycle, L2 64 to a block and 3200 to all; an m16n8 product takes
  // about 1.6 cycles, and waiting for the cluster a few hundred.
  const int at_once = std::max(1, multiprocessors / cluster), waves = (plan.clusters + at_once - 1) / at_once;
  const double n_tiles = samples / 8.0, pairs = (tiles + 1) / 2, k_steps = 3.0 * plan.steps;
  const double moved = weights + k_steps * pairs * n_tiles * 256 + 6.0 * groups * tiles * n_tiles * kScratchTile * 8;
  const double products = k_steps * 2 * pairs * n_tiles * (bf16 ? 1 : 3) * 1.6;
  const double streamed = double(plan.fragments() - plan.resident) * kFragment;
  const double from_l2 = std::min(64.0, 3200.0 / (cluster * std::min(plan.clusters, at_once)));
  const double waiting = 2500 + (cluster == 1 ? 0 : 4.0 * (300 + 20 * cluster));
  plan.cycles = waves * (std::max({moved / 128, products, streamed / from_l2}) + waiting);
  return plan;
}

// The plan with the least estimated time. Its cluster is 0 if no plan serves these sizes.
inline Plan launch_plan(int n, int hidden, int latent, bool bf16, int multiprocessors, int shared_limit) {
  Plan best;
  if (latent > kMostLatents) return best;
  for (int cluster : {1, 2, 4, 8}) {
    for (int samples : {8, 16, 32}) {
      const Plan plan = plan_of(n, hidden, latent, bf16, cluster, samples, multiprocessors, shared_limit);
      if (plan.cluster > 0 && (best.cluster == 0 || plan.cycles < best.cycles)) best = plan;
    }
  }
  return best;
}

}  // namespace vjvcr
