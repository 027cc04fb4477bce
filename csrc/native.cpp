// What Python asks of the build: which CUDA architectures it has kernels for and how they would be launched, and the
// host's latent math, vectorised over numpy arrays, for the tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "latent_math.h"
#include "launch_plan.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Facts of the build, and the math of csrc/latent_math.h for float64 arrays.";
  m.def(
      "launch_plan",
      [](int n, int hidden, int latent, bool bf16, int architecture, int multiprocessors, int shared_limit) {
        const vjvcr::Plan plan =
            vjvcr::launch_plan(n, hidden, latent, bf16, architecture, multiprocessors, shared_limit);
        py::dict found;
        if (plan.cluster == 0) return found;
        found["cluster"] = plan.cluster;
        found["clusters"] = plan.clusters;
        found["samples"] = plan.samples;
        found["resident"] = double(plan.resident) / plan.fragments();
        found["shared_bytes"] = plan.shared_bytes;
        return found;
      },
      "How fista_mlp is launched; empty where it does not serve. resident: the part of the weights in shared memory.",
      py::arg("n"), py::arg("hidden"), py::arg("latent"), py::arg("bf16"), py::arg("architecture"),
      py::arg("multiprocessors"), py::arg("shared_limit"));
  m.attr("architectures") = VJVCR_ARCHITECTURES;
  m.def("soft_threshold", py::vectorize(vjvcr::soft_threshold<double>), py::arg("v"), py::arg("threshold"));
  m.def("proximal", py::vectorize(vjvcr::proximal<double>), py::arg("v"), py::arg("gradient"), py::arg("step"),
        py::arg("weight"), py::arg("lower"), py::arg("upper"));
  m.def("extrapolate_in_sign", py::vectorize(vjvcr::extrapolate_in_sign<double>), py::arg("x"), py::arg("previous"),
        py::arg("momentum"), py::arg("weight"), py::arg("lower"), py::arg("upper"));
  m.attr("GROWTH_AT_FIRST") = vjvcr::kGrowthAtFirst;
  m.attr("GROWTH") = vjvcr::kGrowth;
  m.attr("SHRINKAGE") = vjvcr::kShrinkage;
}
