"""The CPU operators under the sanitizers for addresses and undefined behaviour: the tests of what they compute, in a
process of its own, with a copy of the package whose operators have them compiled in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
TESTS = ("latents/test_operators", "latents/test_newton", "latents/test_fuzz_latents", "losses/test_losses")
TESTS += ("losses/test_fuzz_losses", "losses/test_sigreg")


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=environment.pop("folder"),
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def library(name: str) -> str:
    """A library of the compiler's, or "" where it has none."""
    compiler = shutil.which("g++")
    found = subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() if compiler else ""
    return found if os.path.isabs(found) else ""


@pytest.mark.slow
@pytest.mark.long
def test_the_cpu_operators_under_sanitizers(tmp_path: Path) -> None:
    preloaded = library("libasan.so"), library("libstdc++.so")
    if not all(preloaded):
        pytest.skip("there is no g++ with libasan")
    lib, said = tmp_path / "lib", tmp_path / "said"
    shutil.copytree(ROOT / "vjvcr_fast", lib / "vjvcr_fast", ignore=shutil.ignore_patterns("*.so", "kernels"))
    (lib / "vjvcr_fast" / "kernels").symlink_to(ROOT / "kernels")
    build = ("setup.py", "build_ext", f"--build-lib={lib}", f"--build-temp={tmp_path / 'temp'}")
    run(*build, folder=str(ROOT), CXX="g++", VJVCR_CUDA="0", CXXFLAGS=f"-g1 -O0 {SANITIZERS}", LDFLAGS=SANITIZERS)

    environment = {
        "folder": str(tmp_path),
        "PYTHONPATH": str(lib),
        "LD_PRELOAD": " ".join(preloaded),  # the second has what the first looks for when it is loaded
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={said}",  # Python itself leaks
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={said}",
    }
    where = run("-c", "from vjvcr_fast import native; print(native.__file__, native.MISSING)", **environment)
    assert where.split() == [str(lib / "vjvcr_fast" / "native.py"), "None"]
    files = [str(ROOT / "tests" / f"{name}.py") for name in TESTS]
    options = ("-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not cuda", "-c", str(ROOT / "pyproject.toml"))
    try:
        run("-m", "pytest", *options, *files, **environment)
    finally:
        for log in tmp_path.glob("said*"):
            print(log.read_text()[:4000])
