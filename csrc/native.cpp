// What Python can ask about the build: for which CUDA architectures it has kernels, how fista_mlp would be launched,
// and constants that C++ and Python must agree on.
#include <pybind11/pybind11.h>

#include "latent_math.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Facts about the build.";
  m.attr("architectures") = VJVCR_ARCHITECTURES;
  m.attr("GROWTH_AT_FIRST") = vjvcr::kGrowthAtFirst;
  m.attr("GROWTH") = vjvcr::kGrowth;
  m.attr("SHRINKAGE") = vjvcr::kShrinkage;
}
