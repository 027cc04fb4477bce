// The operators' schemas, as `torch.ops.vjvcr` shows them, and what one can ask about the build. vjvcr_fast/native.py
// says what the arguments mean.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <tuple>
#include <vector>

#include "launch_plan.h"

namespace vjvcr {
namespace {

std::string architectures() { return VJVCR_ARCHITECTURES; }

std::tuple<std::vector<int64_t>, std::string> fista_plan(int64_t n, int64_t hidden, int64_t latent, bool bf16,
                                                         int64_t device) {
  STD_TORCH_CHECK(n >= 1 && hidden >= 1 && latent >= 1, "fista_plan: n=", n, ", hidden=", hidden, ", latent=", latent,
                  ": positive numbers are needed");
  const int sizes[] = {static_cast<int>(n), static_cast<int>(hidden), static_cast<int>(latent)};
#ifdef USE_CUDA
  const Plan plan = device >= 0 ? plan_on(static_cast<int>(device), sizes[0], sizes[1], sizes[2], bf16)
                                : launch_plan(sizes[0], sizes[1], sizes[2], bf16, h100());
#else
  STD_TORCH_CHECK(device < 0, "fista_plan: the operators were built without CUDA kernels");
  const Plan plan = launch_plan(sizes[0], sizes[1], sizes[2], bf16, h100());
#endif
  std::vector<int64_t> found;
  if (plan.cluster > 0) {
    found = {plan.cluster,  plan.clusters,    plan.at_once,     plan.samples,
             plan.resident, plan.fragments(), plan.shared_bytes};
  }
  return {found, plan.cluster > 0 ? "" : refusal_of(plan)};
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_FRAGMENT(vjvcr, m) {
  m.def("instruction_set() -> str");
  m.def(
      "vcr_cpu(Tensor[] hs, float alpha, float beta, float threshold, float eps, bool gram, bool variance, "
      "bool covariance, int[] made) -> (Tensor loss, Tensor variance, Tensor covariance, Tensor[] gradients)");
  m.def(
      "vcr_cpu_backward(Tensor[] hs, Tensor? g_loss, Tensor? g_variance, Tensor? g_covariance, float alpha, float beta, "
      "float threshold, float eps, bool gram, bool variance, bool covariance, int[] made) -> Tensor[]");
  m.def(
      "sigreg_cpu(Tensor h, Tensor directions, Tensor grid, bool half, float scale) -> (Tensor loss, Tensor gradient)");
  m.def("sigreg_sums_cpu(Tensor h, Tensor directions, Tensor grid, bool half) -> Tensor");
  m.def("sigreg_gradient_cpu(Tensor h, Tensor directions, Tensor grid, bool half, Tensor factors) -> Tensor");
  m.def("sigreg_directions_cpu(Tensor key, int d, int count) -> Tensor");
  m.def(
      "proximal_step(Tensor(a!) z, Tensor(b!) v, Tensor gradient, Tensor step, Tensor momentum, float weight, "
      "float lower, float upper) -> ()");
  m.def(
      "fista_mlp(Tensor z0, Tensor p, Tensor w1z, Tensor w2, Tensor b2, Tensor gram, Tensor u0, Tensor r, Tensor start, "
      "float scale, float weight, float lower, float upper, float momentum, bool backtracking, float lr, "
      "float tolerance, int steps, bool bf16) -> (Tensor z, Tensor energy, Tensor step, Tensor steps, Tensor lost)");
  m.def(
      "newton_mlp(Tensor z0, Tensor p, Tensor w1z, Tensor w2, Tensor b2, Tensor gram, Tensor u0, Tensor r, Tensor start, "
      "Tensor B, float scale, float weight, float low, float tolerance, int steps, int sweeps, float settled, "
      "float damped, float least, float most) -> (Tensor z, Tensor energy, Tensor step, Tensor steps, Tensor lost)");
  m.def("architectures() -> str");
  m.def("fista_plan(int n, int hidden, int latent, bool bf16, int device) -> (int[] plan, str refusal)");
}

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CompositeExplicitAutograd, m) {
  m.impl("architectures", TORCH_BOX(&vjvcr::architectures));
  m.impl("fista_plan", TORCH_BOX(&vjvcr::fista_plan));
}
