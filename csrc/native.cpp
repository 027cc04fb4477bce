// What Python asks of the build: which CUDA architectures it has kernels for, and the host's latent math, vectorised
// over numpy arrays, for the tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "latent_math.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Facts of the build, and the math of csrc/latent_math.h for float64 arrays.";
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
