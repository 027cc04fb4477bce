"""Build script: what pyproject.toml cannot say.

`kernels/` sits at the top of the tree and installs as `vjvcr_fast.kernels`, never as a top-level
`kernels`, which is the name of a popular package. torch is used when it is importable and is never a
build requirement: an isolated build would download a CUDA build of several gigabytes.
"""

import importlib.util
import sys

from setuptools import setup

if importlib.util.find_spec("torch") is None:
    print(
        "vjvcr_fast: torch is not importable in this build environment, so this is a pure-Python install "
        "(nothing compiled). For compiled operators install torch first and use pip's --no-build-isolation.",
        file=sys.stderr,
    )

setup(
    packages=[
        "vjvcr_fast",
        "vjvcr_fast.data",
        "vjvcr_fast.evaluation",
        "vjvcr_fast.kernels",
        "vjvcr_fast.models",
        "vjvcr_fast.training",
    ],
    package_dir={"vjvcr_fast.kernels": "kernels"},
    package_data={"vjvcr_fast": ["py.typed"]},
)
