// What Python can ask about the build: for which CUDA architectures it has kernels, how fista_mlp would be launched,
// and constants that C++ and Python must agree on.
#include <pybind11/pybind11.h>

#include "latent_math.h"
#include "launch_plan.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Facts about the build.";
  m.def(
      "launch_plan",
      [](int n, int hidden, int latent, bool bf16, int multiprocessors, int shared_limit) {
        const vjvcr::Plan plan = vjvcr::launch_plan(n, hidden, latent, bf16, multiprocessors, shared_limit);
        py::dict found;
        if (plan.cluster == 0) return found;
        found["cluster"] = plan.cluster;
        found["clusters"] = plan.clusters;
        found["samples"] = plan.samples;
        found["resident"] = double(plan.resident) / plan.fragments();
        found["shared_bytes"] = plan.shared_bytes;
        return found;
      },
      "How fista_mlp is launched on compute capability 9.0; empty if it does not serve these sizes. resident: the "
      "fraction of the weights that stays in shared memory.",
      py::arg("n"), py::arg("hidden"), py::arg("latent"), py::arg("bf16"), py::arg("multiprocessors"),
      py::arg("shared_limit"));
  m.attr("architectures") = VJVCR_ARCHITECTURES;
  m.attr("GROWTH_AT_FIRST") = vjvcr::kGrowthAtFirst;
  m.attr("GROWTH") = vjvcr::kGrowth;
  m.attr("SHRINKAGE") = vjvcr::kShrinkage;
}
