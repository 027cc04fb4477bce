// fista_mlp on a GPU: all K steps of monotone FISTA for the MLP predictor in one launch. The method is `_step` in
// vjvcr_fast/latents/descent.py with the energy of `ExpandedMLPEnergy`. With p0 = P + W1z z0 and c = W2 relu(p0) + b2,
// at the trial point v,
//
//     a = relu(p0 + W1z (v - z0)),   u = relu(c + W2 (a - relu(p0))),   D = u - relu(c),   q = G D - r,
//     E = start + scale sum((q - r) D),   dE/dz = 2 scale W1z' [a > 0] W2' [u > 0] q.
//
// These are five products. Each is of a change since z0, so that the rounding of bfloat16 is small against the change.
// The two products with W1z have float32 accuracy in both modes.
//
// A cluster of C blocks works on S samples for all steps. Each block has H / C rows of W2, G and W2'. As many k-steps
// of these as fit stay in its shared memory; the others come from L2 in every step. After a product each block sends
// its rows of the result to all blocks. The latents are updated by every block alike, so no block waits for another's
// decision, and no sum depends on the order of arrival. A step waits for 4 mailboxes and 7 barriers within the block.
//
// The arrays in shared memory, in step i. "All blocks" are those of the cluster.
//
//   array                | written by           | read by             | safe because
//   fragments, p, c, r   | load, once           | this block          | a cluster barrier follows load
//   X: change of a       | all blocks, mailbox  | W2 X                | a block sends a(i) after it has the parts(i-1)
//                        | a                    |                     | of all; these follow the last use of X in step
//                        |                      |                     | i-1
//   Y: D                 | all blocks, mailbox  | G Y                 | a block sends D(i) after it has the a(i) of
//                        | D                    |                     | all; these follow the last use of Y in step i-1
//   X: q                 | all blocks, mailbox  | W2' X               | a block sends q(i) after it has the D(i) of
//                        | q                    |                     | all; these follow the barrier that ends W2 X
//   X: [a > 0] W2' q in  | this block           | W1z' X              | it follows the barrier that ends W2' X; the
//   float32, may reach   |                      |                     | others send a(i+1) and D(i+1) after they have
//   into Y               |                      |                     | this block's parts(i), which follow W1z' X
//   a, u                 | one thread for each  | the same thread     | a unit stays with its thread
//                        | unit                 |                     |
//   energy               | threads, after G Y   | threads, for parts  | there are barriers in between; the next writing
//                        |                      |                     | follows the parts(i) of all
//   parts                | all blocks, mailbox  | update              | parts(i+1) follow the a(i+1) of all; these
//                        | parts                |                     | follow the barrier that ends update(i)
//   scratch              | multiply             | threads, after its  | before the next multiply there is a barrier, or
//                        |                      | barrier             | a receive that needs what every thread of the
//                        |                      |                     | block sends after reading
//   v: change of z       | update               | W1z v               | a barrier ends update; update(i) follows the
//                        |                      |                     | parts(i) of all, which follow W1z v
//   states, scalars      | a team of lanes      | the same team       | a sample stays with its team; its lanes wait
//                        |                      |                     | for each other between reading and writing the
//                        |                      |                     | scalars
//   mailboxes            | senders; thread 0,   | all threads, by the | round i+1 can only end after every thread of
//                        | which announces the  | parity of the round | the block has passed the barrier of the next
//                        | bytes                |                     | product
//
// What a step moves, per block, with e bytes a number: 3 e H^2 / C of weights; 3 e S H H / (32 C) of activations out of
// shared memory and 3 e S H into it, from the cluster; partial sums, 6 * 640 bytes for every tile of 16 rows, 8 samples
// and group of warps. For N = 256, H = 512, bfloat16, C = 8, S = 16 (128 blocks): 192 KB of weights, of which 78 KB
// from L2, 96 KB of activations, 120 KB of sums, 59 KB from the cluster, 768 instructions m16n8k16. With each of these
// nvcc 13 issues 1.9 others where the weights are in shared memory and 2.9 where they are streamed
// (tests/kernels/test_aot.py): some 650 cycles, beside about 3000 for what is moved. What a block streams first is on
// its way while it waits for a mailbox. We estimate from this, and have not measured, 4 to 6 us a step, and 3 to 4 us
// at H = 256.
#pragma once

#include "fista_block.cuh"

namespace vjvcr {

// NaN stays NaN.
VJVCR_DEVICE float relu(float x) { return x < 0 ? 0 : x; }

struct FistaInput {
  Plan plan;
  int n, iterations;
  const float *p, *w1z, *w2, *b2, *gram, *r, *start, *z0;
  float scale;
  Rule<float> rule;
};

struct FistaOutput {
  float *z, *energy, *step;
  int64_t* steps;
  bool* lost;
};

// What fista_prepare_kernel makes: p0, a0 = relu(p0), and the fragments of each block of a cluster: W1z [k-step][tile],
// W1z' [k-step][tile], then [k-step][W2, G, W2'][tile]. The first fragments stay in shared memory; in this order they
// are equal parts of W2, G and W2'. c = W2 relu(p0) is computed between the two kernels.
struct FistaPrepared {
  uint4* fragments;
  float *p0, *a0;
  const float* c;
};

// A lane's part of a fragment: 8 bytes of each of two rows. Element (i, k) of the matrix (rows x columns) lies at
// i * by_row + k * by_column; beyond the matrix all is zero.
template <typename Mode>
VJVCR_DEVICE uint4 packed(const float* matrix, int row, int k, int rows, int columns, int by_row, int by_column) {
  uint2 both[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float x[Mode::kElements];
#pragma unroll
    for (int j = 0; j < Mode::kElements; ++j) {
      const bool inside = row + i < rows && k + j < columns;
      x[j] = inside ? matrix[int64_t(row + i) * by_row + int64_t(k + j) * by_column] : 0;
    }
    both[i] = Mode::pack(x);
  }
  return {both[0].x, both[1].x, both[0].y, both[1].y};
}

template <typename Mode>
VJVCR_KERNEL(kThreads)
fista_prepare_kernel(VJVCR_CONSTANT FistaInput in, VJVCR_CONSTANT FistaPrepared out) {
  const Plan& plan = in.plan;
  const int h = plan.hidden, m = plan.latent, tiles = plan.tiles(), stride = hw::blocks() * kThreads;
  const int into = tiles * plan.latent_steps, outer = plan.outer_fragments();
  for (int i = hw::block() * kThreads + hw::thread(); i < plan.cluster * plan.fragments() * 32; i += stride) {
    const int lane = i % 32, f = i / 32 % plan.fragments(), first = i / 32 / plan.fragments() * plan.rows;
    const int g = lane / 4, t = lane % 4;
    if (f < into) {
      out.fragments[i] =
          packed<Tf32x3>(in.w1z, first + f % tiles * 16 + 2 * g, f / tiles * 8 + 2 * t, h, m, m, 1);
    } else if (f < outer) {
      const int tile = (f - into) % plan.latent_tiles, k = (f - into) / plan.latent_tiles;
      out.fragments[i] = packed<Tf32x3>(in.w1z, tile * 16 + 2 * g, first + k * 8 + 2 * t, m, h, 1, m);
    } else {
      const int tile = (f - outer) % tiles, product = (f - outer) / tiles % 3, k = (f - outer) / tiles / 3;
      out.fragments[i] =
          packed<Mode>(product == 1 ? in.gram : in.w2, first + tile * 16 + 2 * g, (4 * k + t) * Mode::kElements, h, h,
                       product == 2 ? 1 : h, product == 2 ? h : 1);
    }
  }
  for (int64_t i = hw::block() * kThreads + hw::thread(); i < int64_t(in.n) * h; i += stride) {
    float sum = in.p[i];
    for (int k = 0; k < m; ++k) sum += in.w1z[i % h * m + k] * in.z0[i / h * m + k];
    out.p0[i] = sum;
    out.a0[i] = relu(sum);
  }
}

// Fills shared memory: weights, this block's rows of p0, c and r, and the samples at z0. Zero beyond n and hidden.
template <typename Mode, int kTiles>
VJVCR_DEVICE void load(const FistaBlock<Mode, kTiles>& at, const FistaInput& in, const FistaPrepared& made, int first) {
  const Plan& plan = at.plan;
#pragma unroll 4
  for (int i = at.thread; i < plan.resident * 32; i += kThreads) {
    reinterpret_cast<uint4*>(at.memory)[i] = at.streamed[i];
  }
#pragma unroll 1
  for (int i = at.thread; i < at.units(); i += kThreads) {
    const auto unit = at.unit(i);
    const int n = first + unit.sample;
#pragma unroll
    for (int e = 0; e < Mode::kElements; ++e) {
      const int row = at.rank * plan.rows + unit.row + e;
      const bool inside = n < in.n && row < plan.hidden;
      const int64_t from = int64_t(n) * plan.hidden + row;
      at.array(kP)[i].x[e] = inside ? made.p0[from] : 0;
      at.array(kC)[i].x[e] = inside ? made.c[from] + in.b2[row] : 0;
      at.array(kR)[i].x[e] = inside ? in.r[from] : 0;
    }
  }
  for (int i = at.thread; i < plan.latent_steps * 8 * 8 * kTiles; i += kThreads) at.v()[i] = 0;
#pragma unroll 1
  for (int i = at.thread; i < 8 * kTiles * plan.latent; i += kThreads) {
    const int sample = i / plan.latent, k = i % plan.latent, n = first + sample;
    const float z = n < in.n ? in.z0[int64_t(n) * plan.latent + k] : 0;
    for (int which : {kZ, kPrevious, kProximal, kTrial, kOrigin}) at.state(which, sample)[k] = z;
  }
  for (int i = at.thread; i < 8 * kTiles; i += kThreads) {
    at.scalars(i).start = first + i < in.n ? in.start[first + i] : 0;
  }
}

// The sum over a team's lanes, in each of them.
VJVCR_DEVICE float team_sum(float x) {
#pragma unroll
  for (int mask = kTeam / 2; mask > 0; mask /= 2) x += hw::shuffle_xor(x, mask);
  return x;
}

// One step of one sample, by a team of lanes. Takes the trial point or not, from its energy and gradient in `parts`,
// and makes the next one. i: the sample's number in the cluster; n: in the batch. In the first call (begins) energy and
// gradient are those of z0. Returns whether the sample is still active.
template <typename Mode, int kTiles>
VJVCR_DEVICE bool update(const FistaBlock<Mode, kTiles>& at, const FistaInput& in, int i, int n, bool begins) {
  const int m = at.plan.latent, first = at.thread % kTeam;
  const Rule<float>& rule = in.rule;
  float *z = at.state(kZ, i), *gradient = at.state(kGradient, i), *previous = at.state(kPrevious, i);
  float *x = at.state(kProximal, i), *trial = at.state(kTrial, i), *slope = at.state(kSlope, i);
  const float* origin = at.state(kOrigin, i);
  const auto part = [&](int k) {
    float sum = 0;
    for (int rank = 0; rank < at.plan.cluster; ++rank) sum += at.parts(rank, i)[k];
    return sum;
  };

  float penalty = 0, bent = 0, changed2 = 0, moved2 = 0, x2 = 0, z2 = 0;
#pragma unroll 1
  for (int k = first; k < m; k += kTeam) {
    slope[k] = 2 * in.scale * part(k);
    const float change = trial[k] - z[k], move = x[k] - z[k];
    penalty += fabsf(trial[k]);
    bent += (slope[k] - gradient[k]) * change;
    changed2 += change * change;
    moved2 += move * move;
    x2 += x[k] * x[k];
    z2 += z[k] * z[k];
  }
  for (float* sum : {&penalty, &bent, &changed2, &moved2, &x2, &z2}) *sum = team_sum(*sum);
  const float value = at.scalars(i).start + in.scale * part(at.plan.even_latent()) + rule.weight * penalty;

  Sample<float> sample = at.scalars(i).sample;
  hw::warp_barrier();  // all lanes have read the scalars, which one lane writes below
  bool taken = begins;
  if (begins) {
    sample = begin(rule, value);
    sample.active = n < in.n;
  } else {
    taken = advance(rule, sample, momentum_of(rule, sample), value, bent, changed2, moved2, x2, z2);
  }
  const float momentum = momentum_of(rule, sample);
#pragma unroll 1
  for (int k = first; k < m; k += kTeam) {
    if (taken) z[k] = trial[k], gradient[k] = slope[k], previous[k] = x[k];
    x[k] = proximal(z[k], gradient[k], sample.step, rule.weight, rule.lower, rule.upper);
    trial[k] = extrapolate_in_sign(x[k], previous[k], momentum, rule.weight, rule.lower, rule.upper);
    at.v()[(k / 8 * 8 * kTiles + i) * 8 + k % 8] = trial[k] - origin[k];
  }
  if (first == 0) at.scalars(i).sample = sample;
  return sample.active;
}

template <typename Mode, int kTiles>
VJVCR_KERNEL(kThreads)
fista_mlp_kernel(VJVCR_CONSTANT FistaInput in, VJVCR_CONSTANT FistaPrepared made, VJVCR_CONSTANT FistaOutput out) {
#ifdef VJVCR_CLUSTERS
  constexpr int kElements = Mode::kElements, kSamples = 8 * kTiles;
  const Plan& plan = in.plan;
  const int rank = hw::block() % plan.cluster, first = hw::block() / plan.cluster * kSamples;
  const FistaBlock<Mode, kTiles> at{plan, made.fragments + int64_t(rank) * plan.fragments() * 32, hw::shared_memory(),
                                    hw::thread(), hw::thread() % 32, rank};
  const int tiles = plan.tiles(), m = plan.latent, warp = at.thread / 32;
  const Work into(plan, tiles, plan.latent_steps, 0, tiles, warp);
  const Work back(plan, plan.latent_tiles, plan.rows / 8, tiles * plan.latent_steps, plan.latent_tiles, warp);
  const Work large(plan, tiles, plan.steps, plan.outer_fragments(), 3 * tiles, warp);
  Stream<kAhead> stream;
  if (at.thread < kMailboxes) hw::open_mailbox(at.mailbox(at.thread));
  load(at, in, made, first);
  hw::cluster_barrier();  // all mailboxes are open

  for (int iteration = 0;; ++iteration) {
    // W1z (v - z0): a. Its change since z0 is sent as X.
    at.multiply_outer(into, at.v());
#pragma unroll 1
    for (int i = at.thread; i < at.units(); i += kThreads) {
      const auto unit = at.unit(i);
      const auto p = at.array(kP)[i];
      auto& a = at.array(kA)[i];
      float change[kElements];
      at.result(change, into, unit.sample, unit.row);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        a.x[e] = relu(p.x[e] + change[e]);
        change[e] = a.x[e] - relu(p.x[e]);
      }
      at.send(kOfA, at.x(), unit, change);
    }
    at.prefetch(stream, large, large.pair, 0);  // which no mailbox changes
    hw::receive(at.mailbox(kOfA), plan.operand_bytes(), iteration);

    // The three large products share their code, which spares the instruction cache.
    //   stage 0, W2 (change of a): u. Its change D is sent as Y.
    //   stage 1, G D: q, zero unless u > 0, is sent as X; sums over this block's rows go to energy [k-step][sample].
    //   stage 2, W2' q: zero unless a > 0, in float32, stays in this block's X.
#pragma unroll 1
    for (int stage = 0; stage < 3; ++stage) {
      at.template multiply<Mode>(stream, large, stage * tiles, stage == 1 ? at.y() : at.x());
#pragma unroll 1
      for (int i = at.thread; i < at.units(); i += kThreads) {
        const auto unit = at.unit(i);
        float x[kElements];
        at.result(x, large, unit.sample, unit.row);
        if (stage == 0) {
          const auto c = at.array(kC)[i];
          auto& u = at.array(kU)[i];
#pragma unroll
          for (int e = 0; e < kElements; ++e) {
            u.x[e] = relu(c.x[e] + x[e]);
            x[e] = u.x[e] - relu(c.x[e]);
          }
          at.send(kOfD, at.y(), unit, x);
        } else if (stage == 1) {
          const auto c = at.array(kC)[i], u = at.array(kU)[i], r = at.array(kR)[i];
          float energy = 0;
#pragma unroll
          for (int e = 0; e < kElements; ++e) {
            x[e] -= r.x[e];
            energy += (x[e] - r.x[e]) * (u.x[e] - relu(c.x[e]));
            x[e] = u.x[e] > 0 ? x[e] : 0;
          }
          energy += hw::shuffle_xor(energy, 1);
          energy += hw::shuffle_xor(energy, 2);
          if (at.lane % 4 == 0) at.energy()[i / 4] = energy;
          at.send(kOfQ, at.x(), unit, x);
        } else {
          const auto a = at.array(kA)[i];
          float* to = reinterpret_cast<float*>(at.x()) + (unit.row / 8 * kSamples + unit.sample) * 8 + unit.row % 8;
#pragma unroll
          for (int e = 0; e < kElements; ++e) to[e] = a.x[e] > 0 ? x[e] : 0;
        }
      }
      if (stage < 2) {
        at.prefetch(stream, large, large.pair, (stage + 1) * tiles);
        hw::receive(at.mailbox(stage == 0 ? kOfD : kOfQ), plan.operand_bytes(), iteration);
      } else {
        hw::barrier();
      }
    }

    // W1z' X: this block's parts of gradient and energy are sent to all, two numbers at a time.
    at.multiply_outer(back, at.x());
#pragma unroll 1
    for (int i = at.thread / kTeam; i < kSamples; i += kThreads / kTeam) {
#pragma unroll 1
      for (int k = at.thread % kTeam * 2; k <= plan.even_latent(); k += 2 * kTeam) {
        float part[2] = {0, 0};
        if (k < plan.even_latent()) {
          at.result(part, back, i, k);
        } else {
          for (int j = i; j < at.units() / 4; j += kSamples) part[0] += at.energy()[j];
        }
        at.send(kOfParts, reinterpret_cast<float2*>(at.parts(rank, i) + k), float2{part[0], part[1]});
      }
    }
    hw::receive(at.mailbox(kOfParts), plan.cluster * kSamples * (plan.even_latent() + 2) * 4, iteration);

    bool active = false;
#pragma unroll 1
    for (int i = at.thread / kTeam; i < kSamples; i += kThreads / kTeam) {
      active = update(at, in, i, first + i, iteration == 0) || active;
    }
    if (!hw::barrier_any(active && iteration < in.iterations)) break;  // alike in all blocks of the cluster
  }

  hw::cluster_barrier();  // no block may end while others still send to it
  if (rank > 0) return;
  const int here = min(kSamples, in.n - first);
#pragma unroll 1
  for (int i = at.thread; i < here * m; i += kThreads) out.z[int64_t(first) * m + i] = at.state(kZ, 0)[i];
#pragma unroll 1
  for (int i = at.thread; i < here; i += kThreads) {
    const Sample<float> sample = at.scalars(i).sample;
    out.energy[first + i] = sample.energy;
    out.step[first + i] = sample.step;
    out.steps[first + i] = sample.steps;
    out.lost[first + i] = sample.lost;
  }
#endif
}

}  // namespace vjvcr
