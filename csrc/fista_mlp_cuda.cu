// fista_mlp on a CUDA GPU: three launches that prepare, one for all K steps.
#include "fista_mlp.cuh"

#include <tuple>

#include "launch.cuh"

namespace vjvcr {
namespace {

Plan plan_here(const Tensor& z0, const Tensor& p, bool bf16) {
  const int device = z0.get_device_index();
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "fista_mlp");
    return value;
  };
  const int major = ask(cudaDevAttrComputeCapabilityMajor);
  const Plan plan = launch_plan(static_cast<int>(z0.size(0)), static_cast<int>(p.size(1)),
                                static_cast<int>(z0.size(1)), bf16, major == 8 ? 80 : major == 9 ? 90 : 0,
                                ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  STD_TORCH_CHECK(plan.cluster > 0, "fista_mlp: ", p.size(1), " hidden units and ", z0.size(1),
                  " latents are not served on this GPU: at most ", kMostLatents,
                  " latents, compute capability 8.x or 9.0, and as much shared memory as it takes");
  return plan;
}

const float* data(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
float* mutable_data(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

template <typename Mode, int kTiles>
void run(const FistaInput& in, FistaPrepared made, Tensor& a0, const Tensor& w2, const FistaOutput& out,
         cudaStream_t stream) {
  const Plan& plan = in.plan;
  const int work = std::max(plan.cluster * plan.fragments() * 32, in.n * plan.hidden);
  const int blocks = std::min((work + kThreads - 1) / kThreads, 4096);
  launch("fista_mlp", fista_prepare_kernel<Mode>, blocks, kThreads, 1, 0, stream, in, made);
  const Tensor c = torch::stable::matmul(a0, torch::stable::transpose(w2, 0, 1));
  made.c = data(c);
  launch("fista_mlp", fista_mlp_kernel<Mode, kTiles>, plan.blocks(), kThreads, plan.cluster, plan.shared_bytes, stream,
         in, made, out);
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Result fista_mlp(Tensor z0, Tensor p, Tensor w1z, Tensor w2, Tensor b2, Tensor gram, Tensor u0, Tensor r, Tensor start,
                 double scale, double weight, double lower, double upper, double momentum, bool backtracking, double lr,
                 double tolerance, int64_t steps, bool bf16) {
  check_mlp("fista_mlp", z0, p, w1z, w2, b2, gram, u0, r, start);
  STD_TORCH_CHECK(z0.scalar_type() == ScalarType::Float, "fista_mlp: float32 is needed on a GPU");
  const torch::stable::accelerator::DeviceGuard guard(z0.get_device_index());
  const int64_t n = z0.size(0), hidden = p.size(1);
  Tensor z = torch::stable::empty_like(z0), energy = torch::stable::empty_like(start);
  Tensor step = torch::stable::empty_like(start), taken = torch::stable::new_empty(start, {n}, ScalarType::Long);
  Tensor lost = torch::stable::new_empty(start, {n}, ScalarType::Bool);
  if (n == 0) return {z, energy, step, taken, lost};

  const Plan plan = plan_here(z0, p, bf16);
  Tensor fragments = torch::stable::new_empty(p, {int64_t(plan.cluster) * plan.fragments() * (kFragment / 4)});
  Tensor p0 = torch::stable::empty_like(p), a0 = torch::stable::empty_like(p);
  const auto number = [](double x) { return static_cast<float>(x); };
  Rule<float> rule{};
  rule.weight = number(weight), rule.lower = number(lower), rule.upper = number(upper);
  rule.momentum = number(momentum), rule.backtracking = backtracking;
  rule.lr = number(lr), rule.tolerance = number(tolerance);
  FistaInput in{};
  in.plan = plan, in.n = static_cast<int>(n), in.iterations = static_cast<int>(steps);
  in.p = data(p), in.w1z = data(w1z), in.w2 = data(w2), in.b2 = data(b2), in.gram = data(gram), in.r = data(r);
  in.start = data(start), in.z0 = data(z0), in.scale = number(scale), in.rule = rule;
  FistaPrepared made{};
  made.fragments = static_cast<uint4*>(fragments.mutable_data_ptr());
  made.p0 = mutable_data(p0), made.a0 = mutable_data(a0);
  const FistaOutput out{mutable_data(z), mutable_data(energy), mutable_data(step),
                        static_cast<int64_t*>(taken.mutable_data_ptr()), static_cast<bool*>(lost.mutable_data_ptr())};
  const auto go = plan.samples == 8    ? (bf16 ? run<Bf16, 1> : run<Tf32x3, 1>)
                  : plan.samples == 16 ? (bf16 ? run<Bf16, 2> : run<Tf32x3, 2>)
                                       : (bf16 ? run<Bf16, 4> : run<Tf32x3, 4>);
  go(in, made, a0, w2, out, current_stream(z0));
  return {z, energy, step, taken, lost};
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CUDA, m) { m.impl("fista_mlp", TORCH_BOX(&vjvcr::fista_mlp)); }
