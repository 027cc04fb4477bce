"""The parts of the build that pyproject.toml cannot describe.

`kernels/` is at the top of the tree and installs as `vjvcr_fast.kernels`, `csrc/` as `vjvcr_fast/csrc`, from where
`vjvcr-fast build` compiles it. They must not install as a top-level `kernels`, which is the name of a popular package.

`_operators` has the operators; vjvcr_fast/native_build.py compiles it and says which variables it reads. `_native` is a
small pybind11 module with which the tests of a checkout compare constants; no wheel has it, so one serves every Python.

torch is used if it can be imported. It is not a build requirement, because an isolated build would then download
several gigabytes. Without torch or a C++ compiler the package installs without extensions and says so.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # an isolated build has it nowhere

from vjvcr_fast import native_build  # noqa: E402

OPERATORS, FACTS = "vjvcr_fast._operators", "vjvcr_fast._native"


def say(text):
    print(f"vjvcr_fast: {text}", file=sys.stderr, flush=True)


class BuildExtensions(build_ext):
    """`native_build` compiles the operators."""

    def run(self):
        if not (self.inplace or self.editable_mode):
            self.extensions = [extension for extension in self.extensions if extension.name != FACTS]
        super().run()

    def build_extension(self, extension):
        if extension.name != OPERATORS:
            return super().build_extension(extension)
        try:
            native_build.build(Path(self.get_ext_fullpath(extension.name)), say, for_setup=True)
        except native_build.BuildError as error:
            sys.exit(f"vjvcr_fast: {error}")


def extensions():
    """The arguments of setup() for the two extensions."""
    if importlib.util.find_spec("torch") is None:
        say(
            "torch is not importable in this build environment, so this is a pure-Python install (nothing compiled). "
            "Once it is installed, `vjvcr-fast build` compiles the operators."
        )
        return {}
    try:
        native_build.compiler()
    except native_build.BuildError as error:
        say(f"{error}. Without it no operators are installed; `vjvcr-fast build` compiles them later")
        return {}
    found = [Extension(OPERATORS, [], py_limited_api=True)]
    if importlib.util.find_spec("pybind11") is not None:
        from pybind11.setup_helpers import Pybind11Extension

        found.append(Pybind11Extension(FACTS, ["csrc/native.cpp"], cxx_std=20, optional=True))
    options = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return {"ext_modules": found, "cmdclass": {"build_ext": BuildExtensions}, "options": options}


setup(
    packages=sorted({*find_packages(include=["vjvcr_fast*"]), "vjvcr_fast.csrc", "vjvcr_fast.kernels"}),
    package_dir={"vjvcr_fast.csrc": "csrc", "vjvcr_fast.kernels": "kernels"},
    package_data={"vjvcr_fast": ["py.typed"], "vjvcr_fast.csrc": ["*"]},
    **extensions(),
)
