// The operators' schemas. Names and defaults are what `torch.ops.vjvcr` shows; meaning is told in vjvcr_fast/ops.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(vjvcr, m) {
  m.def(
      "proximal_step(Tensor(a!) z, Tensor(b!) v, Tensor gradient, Tensor step, Tensor momentum, float weight, "
      "float lower, float upper) -> ()");
}
