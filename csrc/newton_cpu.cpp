// newton_mlp on the CPU: all steps of the proximal quasi-Newton method for an MLP predictor.
#include "latent_math.h"
#include "mlp_energy_cpu.h"

namespace vjvcr {
namespace {

// The options that all samples share, by the names in reference.py. B: (m, m), at the start.
template <typename T>
struct Options {
  T weight, low, tolerance;
  int64_t sweeps;
  T settled, damped, least, most;
  const T* B;
};

// What changes of one sample from step to step besides z, its gradient and B. step: 1 / b, always a power of two.
// steps: -1 before the first evaluation.
template <typename T>
struct Search {
  T energy, step;
  int64_t steps;
  bool active, lost;
};

}  // namespace
}  // namespace vjvcr

#define VJVCR_KERNELS "newton_cpu_kernels.h"
#include "instruction_sets.h"

namespace vjvcr {
namespace {

Result newton_mlp(Tensor z0, Tensor p, Tensor w1z, Tensor w2, Tensor b2, Tensor gram, Tensor u0, Tensor r, Tensor start,
                  Tensor B, double scale, double weight, double low, double tolerance, int64_t steps, int64_t sweeps,
                  double settled, double damped, double least, double most) {
  check_mlp("newton_mlp", z0, p, w1z, w2, b2, gram, u0, r, start);
  STD_TORCH_CHECK(is_shaped(B, {z0.size(1), z0.size(1)}), "newton_mlp: B must be (m, m), m = ", z0.size(1));
  check_alike("newton_mlp", {&z0, &B});
  Result result = empty_result(z0, start);
  by_type(z0, [&](auto zero) {
    using T = decltype(zero);
    const Options<T> options{T(weight), T(low),   T(tolerance), sweeps,    T(settled),
                             T(damped), T(least), T(most),      data<T>(B)};
    solve(VJVCR_OF_THIS_CPU(kKernels<T>), options, steps, scale, weight, z0, p, w1z, w2, b2, gram, u0, r, start,
          result);
  });
  return result;
}

}  // namespace
}  // namespace vjvcr

STABLE_TORCH_LIBRARY_IMPL(vjvcr, CPU, m) { m.impl("newton_mlp", TORCH_BOX(&vjvcr::newton_mlp)); }
