// The operators' schemas. Names and defaults are what `torch.ops.vjvcr` shows; meaning is told in vjvcr_fast/losses/ops.py.
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
      "newton_trial(Tensor(a!) v, Tensor gradient, Tensor B, Tensor damping, Tensor active, float weight, float low, "
      "int sweeps, float settled) -> ()");
  m.def(
      "newton_update(Tensor(a!) z, Tensor(b!) energy, Tensor(c!) gradient, Tensor(d!) B, Tensor(e!) damping, "
      "Tensor(f!) active, Tensor(g!) lost, Tensor(h!) steps, Tensor v, Tensor value, Tensor gradient_v, "
      "float weight, float tolerance, float damped, float least, float most) -> ()");
  m.def(
      "newton_mlp(Tensor z0, Tensor p, Tensor w1z, Tensor w2, Tensor b2, Tensor gram, Tensor u0, Tensor r, Tensor start, "
      "Tensor B, float scale, float weight, float low, float tolerance, int steps, int sweeps, float settled, "
      "float damped, float least, float most) -> (Tensor z, Tensor energy, Tensor damping, Tensor steps, Tensor lost)");
  m.def("discrete_argmin(Tensor u, Tensor w3, Tensor b3, Tensor target) -> (Tensor energies, Tensor index)");
}
