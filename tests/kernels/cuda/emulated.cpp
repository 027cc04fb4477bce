// The kernels on a CPU, to be called through ctypes; see emulator.h. All arrays are copied to memory where an access
// beyond their end is a fault.
#include "emulator.h"

#include <bit>

#include "../../../csrc/fista_mlp.cuh"

namespace vjvcr {
namespace {

constexpr int kBarriers = 11;  // in a step; the cluster barrier before the first step is one more

struct Input : hw::Array<float> {
  Input(const float* from, size_t n) : hw::Array<float>(n) { std::copy(from, from + n, data()); }
};

template <typename T>
struct Output : hw::Array<T> {
  T* to;
  size_t n;
  Output(T* to, size_t n) : hw::Array<T>(n), to(to), n(n) {}
  ~Output() { std::copy(this->data(), this->data() + n, to); }
};

template <typename Mode, int kTiles>
const char* run(const FistaInput& in, FistaPrepared made, float* c, const FistaOutput& out, unsigned seed, int skip) {
  hw::launch([&] { fista_prepare_kernel<Mode>(in, made); }, 2, kThreads, 1, 0, seed);
  const int h = in.plan.hidden;
  for (int i = 0; i < in.n * h; ++i) {  // torch's matmul
    double sum = 0;
    for (int k = 0; k < h; ++k) sum += double(in.w2[i % h * h + k]) * made.a0[i / h * h + k];
    c[i] = float(sum);
  }
  made.c = c;
  return hw::launch([&] { fista_mlp_kernel<Mode, kTiles>(in, made, out); }, in.plan.blocks(), kThreads, in.plan.cluster,
                    in.plan.shared_bytes, seed, [&](int i) { return i > 0 && (i - 1) % kBarriers == skip; });
}

}  // namespace
}  // namespace vjvcr

// skip: the barrier of every step that is left out, or -1. fragments: how many are in shared memory, and how many there
// are. Returns what went wrong, or null.
extern "C" const char* fista_mlp(const float* z0, const float* p, const float* w1z, const float* w2, const float* b2,
                         const float* gram, const float* r, const float* start, int n, int hidden, int latent,
                         float scale, float weight, float lower, float upper, float momentum, bool backtracking,
                         float lr, float tolerance, int steps, bool bf16, int cluster, int samples, int shared_limit,
                         unsigned seed, int skip, float* z, float* energy, float* step, int64_t* taken, bool* lost,
                         int* fragments) {
  using namespace vjvcr;
  const Plan plan = plan_of(n, hidden, latent, bf16, cluster, samples, shared_limit);
  if (plan.cluster == 0) return "this does not fit";
  fragments[0] = plan.resident, fragments[1] = plan.fragments();
  const size_t nh = size_t(n) * hidden, nm = size_t(n) * latent, hh = size_t(hidden) * hidden;
  const Input in_z0(z0, nm), in_p(p, nh), in_w1z(w1z, size_t(hidden) * latent), in_w2(w2, hh), in_b2(b2, hidden);
  const Input in_gram(gram, hh), in_r(r, nh), in_start(start, n);
  const hw::Array<uint4> packed(size_t(plan.cluster) * plan.fragments() * 32);
  const hw::Array<float> p0(nh), a0(nh), c(nh);
  const Output<float> out_z(z, nm), out_energy(energy, n), out_step(step, n);
  const Output<int64_t> out_taken(taken, n);
  const Output<bool> out_lost(lost, n);
  Rule<float> rule{};
  rule.weight = weight, rule.lower = lower, rule.upper = upper, rule.momentum = momentum;
  rule.backtracking = backtracking, rule.lr = lr, rule.tolerance = tolerance;
  const FistaInput in{plan,         n,           steps,          in_p.data(), in_w1z.data(),   in_w2.data(),
                      in_b2.data(), in_gram.data(), in_r.data(), in_start.data(), in_z0.data(), scale, rule};
  const FistaOutput out{out_z.data(), out_energy.data(), out_step.data(), out_taken.data(), out_lost.data()};
  const auto go = samples == 8    ? (bf16 ? run<Bf16, 1> : run<Tf32x3, 1>)
                  : samples == 16 ? (bf16 ? run<Bf16, 2> : run<Tf32x3, 2>)
                                  : (bf16 ? run<Bf16, 4> : run<Tf32x3, 4>);
  return go(in, {packed.data(), p0.data(), a0.data(), nullptr}, c.data(), out, seed, skip);
}

// The bytes of shared memory into which everything fits but the weights.
extern "C" int least_shared(int n, int hidden, int latent, bool bf16, int cluster, int samples) {
  const vjvcr::Plan plan = vjvcr::plan_of(n, hidden, latent, bf16, cluster, samples, 1 << 30);
  return plan.shared_bytes - plan.resident * vjvcr::kFragment;
}

// The plan for a GPU on which capacity[i] clusters of 2^i blocks run at once. cycles: 12 numbers, the estimate of each
// cluster size and number of samples, or 0 if such a plan is not served. Writes 0 to found[0] if no plan is.
extern "C" void launch_plan(int n, int hidden, int latent, bool bf16, int multiprocessors, int shared_limit,
                            const int* capacity, int* found, double* cycles) {
  using namespace vjvcr;
  const auto at_once = [&](const Plan& plan) { return capacity[std::countr_zero(unsigned(plan.cluster))]; };
  const Plan plan = vjvcr::launch_plan(n, hidden, latent, bf16, {multiprocessors, shared_limit, at_once});
  const int of[] = {plan.cluster,  plan.samples,     plan.blocks(),     plan.rows,
                    plan.resident, plan.fragments(), plan.shared_bytes, plan.at_once};
  std::copy(std::begin(of), std::end(of), found);
  for (int cluster : {1, 2, 4, 8}) {
    for (int samples : {8, 16, 32}) {
      Plan other = plan_of(n, hidden, latent, bf16, cluster, samples, shared_limit);
      other.at_once = std::min(capacity[std::countr_zero(unsigned(cluster))], multiprocessors / cluster);
      *cycles++ = other.cluster > 0 && other.at_once > 0 ? cycles_of(other) : 0;
    }
  }
}
