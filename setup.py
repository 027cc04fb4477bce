"""The parts of the build that pyproject.toml cannot describe.

`kernels/` is at the top of the tree and installs as `vjvcr_fast.kernels`. It must not install as a top-level `kernels`,
which is the name of a popular package.

`csrc/` becomes two extensions. `_operators` has the operators. It uses torch's stable ABI and no Python, so one library
works with CPU and CUDA builds of torch. `_native` is a small pybind11 module with facts about the build.

torch is used if it can be imported. It is not a build requirement, because an isolated build would then download
several gigabytes. Without torch or a C++ compiler the package installs without extensions and says so.

VJVCR_CUDA decides whether CUDA kernels are built: "auto" if there is an nvcc, "0" never, "1" always (the build fails
without an nvcc).
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
TORCH_TARGET = "0x020b000000000000ULL"  # 2.11, the oldest supported version
# What nvcc makes of the CUDA kernels: machine code for 8.x (sm_80) and for 9.0 alone (sm_90a, for fista_mlp), and PTX,
# which the driver compiles for newer GPUs.
ARCHITECTURES = ("sm_80", "sm_90a", "compute_80")
# Without fused multiply-adds, so that host and device round alike.
CXX_FLAGS = ["-O3", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false", "-Xptxas=-v"]
NVCC_FLAGS += [f"-gencode=arch=compute_{a.partition('_')[2]},code={a}" for a in ARCHITECTURES]


def say(text):
    print(f"vjvcr_fast: {text}", file=sys.stderr)


def cuda_home():
    """The folder of the CUDA toolkit, or None if CUDA kernels are not to be built."""
    wanted = os.environ.get("VJVCR_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"VJVCR_CUDA={wanted!r}: choose auto, 0 or 1")
    if wanted == "0":
        return None
    nvcc = shutil.which("nvcc")
    found = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or (nvcc and _home_of(nvcc))
    if found and (Path(found) / "bin" / "nvcc").exists():
        return found
    if wanted == "1":
        sys.exit("VJVCR_CUDA=1, but there is no nvcc: put it on PATH or set CUDA_HOME")
    say("no nvcc on PATH and no CUDA_HOME: building without CUDA kernels for latent variables")
    return None


def _home_of(nvcc):
    """The toolkit's folder as nvcc itself tells it. The nvcc on PATH may be a script, or a link into the toolkit."""
    import re
    import subprocess

    shown = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", shown.stderr, re.MULTILINE)
    return os.path.normpath(top[1].strip()) if top else str(Path(nvcc).resolve().parents[1])


def extensions():
    """The arguments of setup() for the two extensions."""
    if importlib.util.find_spec("torch") is None:
        say(
            "torch is not importable in this build environment, so this is a pure-Python install (nothing compiled). "
            "For compiled operators install torch first and use pip's --no-build-isolation."
        )
        return {}
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        say(
            "no C++ compiler (c++ or $CXX): installing without compiled operators, latent inference runs in torch alone"
        )
        return {}
    import torch
    from torch.utils import cpp_extension

    home = cuda_home()
    facts = [("VJVCR_ARCHITECTURES", f'"{" ".join(ARCHITECTURES) if home else ""}"')]
    sources, macros = sorted((ROOT / "csrc").glob("*.cpp")), [("TORCH_TARGET_VERSION", TORCH_TARGET), *facts]
    sources = [path for path in sources if path.name != "native.cpp"]
    # libtorch.so leads the loader to libtorch_cuda.so, if the torch at run time has it. No symbol of libtorch.so itself
    # is used, so the linker would leave it out.
    link, library_dirs = ["-Wl,--no-as-needed", "-ltorch"], []
    if home is not None:
        sources += sorted((ROOT / "csrc").glob("*.cu"))
        macros.append(("USE_CUDA", None))
        link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        library_dirs = [str(Path(home) / name) for name in ("lib64", "lib") if (Path(home) / name).is_dir()]
        cpp_extension.CUDA_HOME = home
        if torch.version.cuda is None:
            cpp_extension._check_cuda_version = lambda *_: None  # a CPU build of torch has no CUDA version to compare
    found = [
        cpp_extension.CppExtension(
            "vjvcr_fast._operators",
            [str(path.relative_to(ROOT)) for path in sources],
            define_macros=macros,
            extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
            extra_link_args=link,
            library_dirs=library_dirs,
            depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("*.*h"))],
            py_limited_api=True,
        )
    ]
    if importlib.util.find_spec("pybind11") is None:
        say("pybind11 is not installed: building without the module of build facts")
    else:
        from pybind11.setup_helpers import Pybind11Extension

        found.append(
            Pybind11Extension(
                "vjvcr_fast._native", ["csrc/native.cpp"], define_macros=facts, extra_compile_args=CXX_FLAGS[2:]
            )
        )
    return {"ext_modules": found, "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(
    packages=sorted({*find_packages(include=["vjvcr_fast*"]), "vjvcr_fast.kernels"}),
    package_dir={"vjvcr_fast.kernels": "kernels"},
    package_data={"vjvcr_fast": ["py.typed"]},
    **extensions(),
)
