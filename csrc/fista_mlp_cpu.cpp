// fista_mlp on the CPU: all K steps of monotone FISTA for an MLP predictor.
#include "latent_math.h"
#include "mlp_energy_cpu.h"

#define VJVCR_KERNELS "fista_mlp_cpu_kernels.h"
#include "instruction_sets.h"

namespace vjvcr {
namespace {

Result fista_mlp(Tensor z0, Tensor p, Tensor w1z, Tensor w2, Tensor b2, Tensor gram, Tensor u0, Tensor r, Tensor start,
                 double scale, double weight, double lower, double upper, double momentum, bool backtracking, double lr,
                 double tolerance, int64_t steps, bool bf16) {
  check_mlp("fista_mlp", z0, p, w1z, w2, b2, gram, u0, r, start);
  STD_TORCH_CHECK(!bf16, "fista_mlp: bf16=True needs a CUDA GPU");
  Result result = empty_result(z0, start);
  by_type(z0, [&](auto zero) {
    using T = decltype(zero);
    const Rule<T> rule{T(weight), T(lower), T(upper), T(momentum), backtracking, T(lr), T(tolerance)};
    solve(VJVCR_OF_THIS_CPU(kKernels<T>), rule, steps, scale, weight, z0, p, w1z, w2, b2, gram, u0, r, start, result);
  });
  return result;
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CPU, m) { m.impl("fista_mlp", TORCH_BOX(&vjvcr::fista_mlp)); }
