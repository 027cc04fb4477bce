// fista_mlp on a CUDA GPU of compute capability 9.0: three launches prepare, and one makes all K steps.
#include "fista_mlp.cuh"

#include "launch.cuh"

namespace vjvcr {
namespace {

constexpr const char* kName = "fista_mlp";

Plan plan_here(const Tensor& z0, const Tensor& p, bool bf16) {
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, z0.get_device_index()), kName);
    return value;
  };
  const int major = ask(cudaDevAttrComputeCapabilityMajor);
  STD_TORCH_CHECK(major == 9, "fista_mlp: this GPU has compute capability ", major, ".x; 9.0 is needed");
  const Plan plan = launch_plan(static_cast<int>(z0.size(0)), static_cast<int>(p.size(1)),
                                static_cast<int>(z0.size(1)), bf16, ask(cudaDevAttrMultiProcessorCount),
                                ask(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  STD_TORCH_CHECK(plan.cluster > 0, "fista_mlp: ", p.size(1), " hidden units and ", z0.size(1),
                  " latents are not served: at most ", kMostLatents,
                  " latents, and no more of both than fits into shared memory");
  return plan;
}

// Launches kernel(arguments...) in clusters of blocks, each with `shared_bytes` of dynamic shared memory.
template <typename... Arguments>
void launch(void (*kernel)(Arguments...), int blocks, int cluster, int shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), kName);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), kName);
}

template <typename Mode, int kTiles>
void run(const FistaInput& in, FistaPrepared made, Tensor& a0, const Tensor& w2, const FistaOutput& out,
         cudaStream_t stream) {
  const Plan& plan = in.plan;
  const int work = std::max(plan.cluster * plan.fragments() * 32, in.n * plan.hidden);
  const int blocks = std::min((work + kThreads - 1) / kThreads, 4096);
  launch(fista_prepare_kernel<Mode>, blocks, 1, 0, stream, in, made);
  const Tensor c = torch::stable::matmul(a0, torch::stable::transpose(w2, 0, 1));
  made.c = data<float>(c);
  launch(fista_mlp_kernel<Mode, kTiles>, plan.blocks(), plan.cluster, plan.shared_bytes, stream, in, made, out);
}

Result fista_mlp(Tensor z0, Tensor p, Tensor w1z, Tensor w2, Tensor b2, Tensor gram, Tensor u0, Tensor r, Tensor start,
                 double scale, double weight, double lower, double upper, double momentum, bool backtracking, double lr,
                 double tolerance, int64_t steps, bool bf16) {
  check_mlp("fista_mlp", z0, p, w1z, w2, b2, gram, u0, r, start);
  STD_TORCH_CHECK(z0.scalar_type() == ScalarType::Float, "fista_mlp: float32 is needed on a GPU");
  const torch::stable::accelerator::DeviceGuard guard(z0.get_device_index());
  Result result = empty_result(z0, start);
  if (z0.size(0) == 0) return result;

  const Plan plan = plan_here(z0, p, bf16);
  Tensor fragments = torch::stable::new_empty(p, {int64_t(plan.cluster) * plan.fragments() * (kFragment / 4)});
  Tensor p0 = torch::stable::empty_like(p), a0 = torch::stable::empty_like(p);
  const Rule<float> rule{float(weight), float(lower), float(upper),    float(momentum),
                         backtracking,  float(lr),    float(tolerance)};
  FistaInput in{};
  in.plan = plan, in.n = static_cast<int>(z0.size(0)), in.iterations = static_cast<int>(steps);
  in.p = data<float>(p), in.w1z = data<float>(w1z), in.w2 = data<float>(w2), in.b2 = data<float>(b2);
  in.gram = data<float>(gram), in.r = data<float>(r), in.start = data<float>(start), in.z0 = data<float>(z0);
  in.scale = float(scale), in.rule = rule;
  const FistaPrepared made{reinterpret_cast<uint4*>(mutable_data<float>(fragments)), mutable_data<float>(p0),
                           mutable_data<float>(a0), nullptr};
  auto& [z, energy, step, taken, lost] = result;
  const FistaOutput out{mutable_data<float>(z), mutable_data<float>(energy), mutable_data<float>(step),
                        mutable_data<int64_t>(taken), mutable_data<bool>(lost)};
  const auto go = plan.samples == 8    ? (bf16 ? run<Bf16, 1> : run<Tf32x3, 1>)
                  : plan.samples == 16 ? (bf16 ? run<Bf16, 2> : run<Tf32x3, 2>)
                                       : (bf16 ? run<Bf16, 4> : run<Tf32x3, 4>);
  go(in, made, a0, w2, out, current_stream(z0));
  return result;
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CUDA, m) { m.impl("fista_mlp", TORCH_BOX(&vjvcr::fista_mlp)); }
