// fista_mlp on a CUDA GPU of compute capability 9.0: two launches prepare, and one makes all K steps. The first call
// with new sizes also loads kernels and asks CUDA how many clusters of each plan run at once.
#include "fista_mlp.cuh"

#include <tuple>

#include "launch.cuh"

namespace vjvcr {
namespace {

constexpr const char* kName = "fista_mlp";

// All kernels have these arguments.
using Kernel = void (*)(FistaInput, FistaPrepared, FistaOutput);

template <typename Mode>
Kernel kernel_of(int samples) {
  return samples == 8    ? fista_mlp_kernel<Mode, 1>
         : samples == 16 ? fista_mlp_kernel<Mode, 2>
                         : fista_mlp_kernel<Mode, 4>;
}
Kernel kernel_of(const Plan& plan) {
  return plan.bf16 ? kernel_of<Bf16>(plan.samples) : kernel_of<Tf32x3>(plan.samples);
}

// A launch of blocks in clusters. It stays where it is, since `config` points to `attribute`.
struct Launch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  Launch(int blocks, int cluster, int shared_bytes, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(blocks), config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared_bytes, config.stream = stream;
    config.attrs = &attribute, config.numAttrs = 1;
  }
  Launch(const Launch&) = delete;
};

// How many of a plan's clusters run at the same time on the current device; 0 if this cluster size is none of its. CUDA
// is asked once.
int clusters_at_once(const Plan& plan, int device, int shared_limit) {
  static std::mutex mutex;
  static std::map<std::tuple<int, bool, int, int, int>, int> known;
  const std::lock_guard lock(mutex);
  const auto key = std::make_tuple(device, plan.bf16, plan.samples, plan.cluster, plan.shared_bytes);
  if (const auto found = known.find(key); found != known.end()) return found->second;

  refuse_capture(device, kName);
  const Kernel kernel = kernel_of(plan);
  const int compiled_for = load(reinterpret_cast<const void*>(kernel), device, kName);
  STD_TORCH_CHECK(compiled_for >= 90, "fista_mlp: it was not compiled for this GPU, compute capability 9.0");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit), kName);
  const Launch one(plan.cluster, plan.cluster, plan.shared_bytes, nullptr);
  int found = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&found, kernel, &one.config);
  if (error == cudaErrorInvalidClusterSize) {
    found = 0, forget_error();
  } else {
    check(error, kName);
  }
  return known[key] = found;
}

template <typename Mode>
void run(const FistaInput& in, FistaPrepared made, Tensor& a0, const Tensor& w2, const FistaOutput& out,
         cudaStream_t stream) {
  const Plan& plan = in.plan;
  const int64_t work = std::max(int64_t(plan.cluster) * plan.fragments() * 32, int64_t(in.n) * plan.hidden);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((work + kThreads - 1) / kThreads, 4096));
  fista_prepare_kernel<Mode><<<blocks, kThreads, 0, stream>>>(in, made);
  check(cudaGetLastError(), kName);
  const Tensor c = torch::stable::matmul(a0, torch::stable::transpose(w2, 0, 1));
  made.c = data<float>(c);
  const Launch all(plan.blocks(), plan.cluster, plan.shared_bytes, stream);
  check(cudaLaunchKernelEx(&all.config, kernel_of(plan), in, made, out), kName);
}

Result fista_mlp(Tensor z0, Tensor p, Tensor w1z, Tensor w2, Tensor b2, Tensor gram, Tensor u0, Tensor r, Tensor start,
                 double scale, double weight, double lower, double upper, double momentum, bool backtracking, double lr,
                 double tolerance, int64_t steps, bool bf16) {
  check_mlp("fista_mlp", z0, p, w1z, w2, b2, gram, u0, r, start);
  STD_TORCH_CHECK(z0.scalar_type() == ScalarType::Float, "fista_mlp: float32 is needed on a GPU");
  const int device = z0.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Result result = empty_result(z0, start);
  if (z0.size(0) == 0) return result;

  const Plan plan = plan_on(device, static_cast<int>(z0.size(0)), static_cast<int>(p.size(1)),
                            static_cast<int>(z0.size(1)), bf16);
  STD_TORCH_CHECK(plan.cluster > 0, "fista_mlp: ", p.size(1), " hidden units and ", z0.size(1),
                  " latents are not served: ", refusal_of(plan));
  const auto prepare = bf16 ? fista_prepare_kernel<Bf16> : fista_prepare_kernel<Tf32x3>;
  load(reinterpret_cast<const void*>(prepare), device, kName);
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
  (bf16 ? run<Bf16> : run<Tf32x3>)(in, made, a0, w2, out, current_stream(device));
  return result;
}

}  // namespace

Plan plan_on(int device, int n, int hidden, int latent, bool bf16) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), kName);
    return value;
  };
  const int major = ask(cudaDevAttrComputeCapabilityMajor);
  STD_TORCH_CHECK(major == 9, "fista_mlp: this GPU has compute capability ", major, ".x; 9.0 is needed");
  const int shared_limit = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return launch_plan(n, hidden, latent, bf16,
                     {ask(cudaDevAttrMultiProcessorCount), shared_limit,
                      [&](const Plan& plan) { return clusters_at_once(plan, device, shared_limit); }});
}

}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CUDA, m) { m.impl("fista_mlp", TORCH_BOX(&vjvcr::fista_mlp)); }
