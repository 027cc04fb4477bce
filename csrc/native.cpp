// Constants that C++ and Python must agree on: the tests of a checkout compare them.
#include <pybind11/pybind11.h>

#include "latent_math.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Constants of csrc/latent_math.h.";
  m.attr("GROWTH_AT_FIRST") = vjvcr::kGrowthAtFirst;
  m.attr("GROWTH") = vjvcr::kGrowth;
  m.attr("SHRINKAGE") = vjvcr::kShrinkage;
}
