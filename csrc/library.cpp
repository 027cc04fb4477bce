// The operators' schemas, as `torch.ops.vjvcr` shows them. vjvcr_fast/native.py says what the arguments mean.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(vjvcr, m) {
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
}
