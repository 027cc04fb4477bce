"""What an install is: the content of wheel and sdist, and that they work elsewhere. Built from a copy of the tree."""

import email.message
import email.parser
import importlib.metadata
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import tolerances
import torch
import ways
from filelock import FileLock  # torch needs it
from tolerances import relative

pytestmark = pytest.mark.slow  # builds, installs and virtual environments
ROOT = Path(__file__).parents[1]
MODULES = ("vjvcr_fast", "vjvcr_fast.kernels", "vjvcr_fast.losses", "vjvcr_fast.cli", "vjvcr_fast.paper.table1")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """stdout holds both streams. Neither the tree nor what the caller has on its path is importable."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    settings = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore", **environment}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run([*map(str, command)], cwd=cwd, env=clean | settings, text=True, check=False, **both)


def pip(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    done = run(sys.executable, "-m", "pip", *arguments, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("copy") / "source"
    # Asked in a process: looking for pip in this one makes setuptools give up its distutils, which the compiler needs.
    if run(sys.executable, "-m", "pip", "--version", cwd=copy.parent).returncode:
        pytest.skip("there is no pip in this environment")
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*.so", "build", "dist", "runs")
    )
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, quick: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the hook that pip calls, in one process; pip would load torch for two more questions."""
    out = tmp_path_factory.mktemp("wheel")
    hook = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = run(sys.executable, "-c", hook, cwd=source, **quick)
    assert done.returncode == 0, done.stdout
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def full_build(source: Path, shared: Path) -> tuple[Path, str]:
    """A user's wheel, optimised and with CUDA kernels where there is an nvcc, and what its build said. Made once."""
    copy, out, said = shared / "full", shared / "full-wheel", shared / "full-said"
    with FileLock(shared / "full.lock"):
        if not said.exists():
            shutil.rmtree(copy, ignore_errors=True)  # of a build that failed
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build"))  # nothing of the quick build's
            options = "--verbose", "--no-deps", "--no-build-isolation", "--wheel-dir", out
            said.write_text(pip("wheel", ".", *options, cwd=copy))
    (built,) = out.iterdir()
    return built, said.read_text()


@pytest.fixture(scope="module")
def full_wheel(full_build: tuple[Path, str]) -> Path:
    return full_build[0]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("installed") / "target")


def install(wheel: Path, target: Path) -> Path:
    pip("install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target.parent)
    return target


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode())


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}


# -- The wheel ------------------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    package = {f"vjvcr_fast/{p.relative_to(ROOT / 'vjvcr_fast')}" for p in (ROOT / "vjvcr_fast").rglob("*.py")}
    kernels = {f"vjvcr_fast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    csrc = {f"vjvcr_fast/csrc/{p.name}" for p in (ROOT / "csrc").iterdir()}
    assert "vjvcr_fast/kernels/__init__.py" in kernels
    assert "vjvcr_fast/csrc/library.cpp" in csrc
    compiled = {name for name in files(wheel) if name.endswith(".so")}
    assert files(wheel) == package | kernels | csrc | {"vjvcr_fast/py.typed"} | compiled
    assert {name.partition(".")[0] for name in compiled} <= {"vjvcr_fast/_operators"}


def test_one_wheel_serves_every_python(wheel: Path, quick: dict[str, str]) -> None:
    assert ("-cp310-abi3-linux_" if "CXX" in quick else "-py3-none-any") in wheel.name


def test_no_top_level_kernels(wheel: Path) -> None:
    assert {name.split("/")[0] for name in files(wheel)} == {"vjvcr_fast"}


def test_metadata(metadata: email.message.Message) -> None:
    from vjvcr_fast import __version__

    assert metadata["Name"].replace("-", "_") == "vjvcr_fast"
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert {*metadata.get_all("Provides-Extra")} >= {"train", "video", "dali", "dev"}
    needed = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert needed == ["torch>=2.11"]
    assert "Apache" in (metadata["License-Expression"] or metadata["License"])
    assert metadata.get_payload().strip(), "no README in the metadata"


def test_entry_point_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = {name.split(".dist-info/")[1]: name for name in archive.namelist() if ".dist-info/" in name}
        assert "vjvcr-fast = vjvcr_fast.__main__:main" in archive.read(text["entry_points.txt"]).decode()
        assert any(name.endswith("LICENSE") for name in text)


def test_torch_is_never_a_build_requirement() -> None:
    """Read as text: tomllib came with Python 3.11."""
    text = (ROOT / "pyproject.toml").read_text()
    (requires,) = (line for line in text.splitlines() if line.startswith("requires ="))
    assert "torch" not in requires
    assert "setuptools" in requires


def test_every_package_is_listed(wheel: Path) -> None:
    """A new folder of the package must be in the wheel."""
    folders = {p.parent.relative_to(ROOT).as_posix() for p in (ROOT / "vjvcr_fast").rglob("__init__.py")}
    assert {name.rpartition("/")[0] for name in files(wheel)} == folders | {"vjvcr_fast/csrc", "vjvcr_fast/kernels"}


# -- What is compiled -----------------------------------------------------------------------------------------------


def test_one_operator_library_serves_cpu_and_cuda_torch(installed: Path, tmp_path: Path) -> None:
    """It has no Python ABI and needs no CUDA library; it loads here and its CPU operators run."""
    assert_serves(installed, tmp_path)


def test_the_full_operator_library_serves_cpu_and_cuda_torch(full_wheel: Path, tmp_path: Path) -> None:
    assert_serves(install(full_wheel, tmp_path / "target"), tmp_path)


# Forward and backward of a product of rows, and FISTA. What the instruction sets return differs in the last bits.
RUN = """
import os, sys, torch
from vjvcr_fast.latents import MLPEnergy, SparseLatent
from vjvcr_fast.losses import vcr_loss
from vjvcr_fast.losses.backends import explain
torch.manual_seed(0)
shapes = [(40, 64), (64, 5), (64, 64), (64,), (9, 64), (9,), (40, 9)]
h, energy = torch.randn(40, 3, 200), MLPEnergy(*(torch.randn(shape) for shape in shapes))
found = {}
for name in sys.argv[2:]:
    os.environ.pop("VJVCR_CPU", None)
    if name:
        os.environ["VJVCR_CPU"] = name
    leaf = h.clone().requires_grad_()
    vcr_loss(leaf, alpha=0.5, beta=0.1).loss.backward()
    found_z = SparseLatent(5, 1e-2, 20).infer(energy, 40, device="cpu", dtype=torch.float32)
    found[name] = explain()["cpu"], leaf.grad, found_z.energy
torch.save(found, sys.argv[1])
"""


@pytest.mark.parametrize("compiler", ["c++", "clang++"])
def test_a_wheel_uses_what_the_cpu_has(
    compiler: str, source: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    if compiler == "c++":
        wheel = request.getfixturevalue("full_wheel")
    else:
        copy = tmp_path / "tree"
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build"))
        options = "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "wheel"
        pip("wheel", ".", *options, cwd=copy, VJVCR_CUDA="0", CXX=compiler)
        (wheel,) = (tmp_path / "wheel").iterdir()
    target, results = install(wheel, tmp_path / "target"), tmp_path / "results.pt"
    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    names = ways.SETS[: ways.SETS.index(best) + 1]
    done = run(sys.executable, "-c", RUN, results, "", *names, cwd=tmp_path, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stdout
    found = torch.load(results)
    assert [said for said, *_ in found.values()] == [f"native (a compiled operator, for {x})" for x in (best, *names)]
    _, *unasked = found.pop("")
    assert all(torch.equal(a, b) for a, b in zip(unasked, found[best][1:], strict=True))
    gradients = [gradient for _, gradient, _ in found.values()]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(gradients)), "the same code for two of them"
    for _, gradient, energy in found.values():
        assert relative(gradient, unasked[0].double()) <= tolerances.FLOAT32
        assert relative(energy.mean(), unasked[1].double().mean()) <= tolerances.LATENT_ROUTES


def assert_serves(target: Path, tmp_path: Path) -> None:
    """The operator library of an install runs, needs no CUDA library, and has the code that it says it has."""
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    (library,) = target.glob("vjvcr_fast/_operators*.so")
    assert "cpython" not in library.name
    lines = (
        f"import torch; torch.ops.load_library({str(library)!r})",
        "z = torch.ones(2, 3); one = torch.ones(2)",
        "torch.ops.vjvcr.proximal_step(z, z.clone(), z.clone(), one, one, 0.0, -1.0, 1.0); print(z.sum().item())",
        "print(torch.ops.vjvcr.architectures())",
    )
    total, built = run(sys.executable, "-c", "\n".join(lines), cwd=tmp_path).stdout.splitlines()
    assert total == "0.0"
    assert_links(library)
    if cuobjdump := find_cuobjdump():
        assert code_in(library, cuobjdump) == {*built.split()}


def assert_links(library: Path) -> None:
    """No CUDA library and no Python, but libtorch.so, or the kernels find no libtorch_cuda.so. That the library loads
    beside a CPU torch shows that every source takes CUDA's own symbol as a weak one."""
    if shutil.which("readelf") is None:
        return
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", library, cwd=library.parent).stdout)
    assert not [name for name in needed if "python" in name or "cuda" in name]
    assert "libtorch.so" in needed


def find_cuobjdump() -> str | None:
    """CUDA's, or the one that comes with Triton."""
    found = importlib.util.find_spec("triton")
    beside = Path(found.origin).parent / "backends/nvidia/bin" if found and found.origin else Path()
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(beside))


def code_in(library: Path, cuobjdump: str) -> set[str]:
    """Machine code is listed as sm_80.cubin, PTX as sm_80.ptx."""
    listed = run(cuobjdump, "--list-elf", "--list-ptx", library, cwd=library.parent).stdout
    return {
        number.replace("sm_", "compute_") if kind == "ptx" else number
        for number, kind in re.findall(r"(sm_\w+)\.(?:\w+\.)*(cubin|ptx)", listed)
    }


def test_the_operators_here_have_the_code_that_they_say() -> None:
    from vjvcr_fast import native, native_build

    if native.MISSING is not None:
        pytest.skip(f"the operators are {native.MISSING}")
    library = native_build.libraries()[0]
    assert_links(library)
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("there is no cuobjdump")
    assert code_in(library, cuobjdump) == {*native.ARCHITECTURES.split()}


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")


@needs_nvcc
def test_cuda_kernels_do_not_spill(full_build: tuple[Path, str]) -> None:
    compiled = re.findall(r"Compiling entry function '.*' for '(sm_\w+)'", full_build[1])
    assert {"sm_80", "sm_90a"} == set(compiled)
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", full_build[1])
    assert used == [("0", "0", "0")] * len(compiled)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", full_build[1])]
    assert len(registers) == len(compiled)
    assert max(registers) * 256 <= 65536  # of a block, of a multiprocessor


@needs_nvcc
def test_cuda_products_run_on_tensor_cores(full_wheel: Path, tmp_path: Path) -> None:
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("there is no cuobjdump")
    with zipfile.ZipFile(full_wheel) as archive:
        (library,) = (name for name in archive.namelist() if name.startswith("vjvcr_fast/_operators"))
        archive.extract(library, tmp_path)
    listed = run(cuobjdump, "-sass", "-arch", "sm_90a", tmp_path / library, cwd=tmp_path).stdout
    kernels = dict(part.split("\n", 1) for part in listed.split("Function : ")[1:])
    products = {name: code for name, code in kernels.items() if "fista_mlp_kernel" in name}
    assert len(products) == 6
    for name, code in products.items():
        assert "HMMA.1688.F32.TF32" in code, name
        assert ("HMMA.16816.F32.BF16" in code) == ("Bf16" in name), name
        assert "LDL" not in code, name


def test_cuda_wanted_and_missing_fails(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tree"
    shutil.copytree(source, copy)
    hidden = os.pathsep.join(
        folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "nvcc").exists()
    )
    command = (sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path)
    done = run(*command, cwd=copy, VJVCR_CUDA="1", PATH=hidden, CUDA_HOME="", CUDA_PATH="")
    assert done.returncode != 0
    assert "VJVCR_CUDA=1, but there is no nvcc" in done.stdout
    done = run(*command, cwd=copy, VJVCR_CUDA="maybe")
    assert done.returncode != 0
    assert "choose auto, 0 or 1" in done.stdout


# -- Installs -------------------------------------------------------------------------------------------------------


def assert_imports(python: Path | str, cwd: Path, inside: Path, **environment: str) -> None:
    """All MODULES import, from files under `inside`."""
    lines = "\n".join(f"import {name}; print({name}.__file__)" for name in MODULES)
    done = run(python, "-c", lines, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout
    for line in done.stdout.splitlines():
        assert Path(line).resolve().is_relative_to(inside.resolve()), line


def test_the_installed_wheel_works_elsewhere(installed: Path, tmp_path: Path) -> None:
    assert_imports(sys.executable, tmp_path, installed, PYTHONPATH=str(installed))
    assert not (installed / "kernels").exists()


def made_venv(folder: Path, *seen: str) -> Path:
    """A virtual environment without pip that sees these folders' packages; returns its python."""
    assert run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent).returncode == 0
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    (Path(purelib) / "parent.pth").write_text("\n".join(seen) + "\n")
    return folder / "bin" / "python"


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """One that sees this one's packages."""
    return made_venv(tmp_path / "venv", *(path for path in sys.path if path.endswith("-packages")))


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """One that sees torch and what torch needs, nothing else."""
    packages, wanted, seen = tmp_path / "packages", ["torch"], set[str]()
    packages.mkdir()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        found = importlib.metadata.distribution(name)
        for top in {Path(str(file)).parts[0] for file in found.files or () if ".." not in str(file)}:
            if not (packages / top).exists() and top != "__pycache__":
                (packages / top).symlink_to(found.locate_file(top))
        wanted += [re.split(r"[^\w.-]", need)[0] for need in found.requires or () if "extra ==" not in need]
    return made_venv(tmp_path / "bare", str(packages))


@pytest.mark.parametrize("compiled", [False, True])
def test_editable_install(compiled: bool, source: Path, venv: Path, quick: dict[str, str], tmp_path: Path) -> None:
    """Without a compiler it is one of Python alone."""
    copy = tmp_path / "tree"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build"))
    arguments = "--python", venv, "install", "--verbose", "--no-deps", "--no-build-isolation", "--editable", copy
    said = pip(*arguments, cwd=tmp_path, **(quick if compiled else quick | {"CXX": "no-such-compiler"}))
    assert ("no C++ compiler" in said) != (compiled and "CXX" in quick)
    assert bool(list(copy.glob("vjvcr_fast/_operators*.so"))) == (compiled and "CXX" in quick)
    assert_imports(venv, tmp_path, copy)
    shown = run(venv.parent / "vjvcr-fast", "--version", cwd=tmp_path)
    assert shown.stdout.startswith("vjvcr_fast ")


USED = """
import warnings, torch
from vjvcr_fast.latents import MLPEnergy, SparseLatent
from vjvcr_fast.losses import vcr_loss
h = torch.randn(40, 3, 50, requires_grad=True)
shapes = [(40, 64), (64, 5), (64, 64), (64,), (9, 64), (9,), (40, 9)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        vcr_loss(h, alpha=0.5, beta=0.1).loss.backward()
    found = SparseLatent(5, 1e-2, 20).infer(MLPEnergy(*map(torch.randn, shapes)), 40, device="cpu", dtype=torch.float32)
assert h.grad.isfinite().all() and found.energy.isfinite().all()
for warning in caught:
    print(warning.message)
"""


def used(python: Path, cwd: Path, **environment: str) -> list[str]:
    """Our warnings in a program that computes the loss and infers z*. torch warns that there is no numpy."""
    done = run(python, "-c", USED, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout
    return [line for line in done.stdout.splitlines() if line.startswith("vjvcr_fast:")]


def test_the_repaired_wheel_works_beside_torch_alone(full_wheel: Path, bare: Path, tmp_path: Path) -> None:
    """What `make wheel` does."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if full_wheel.name.endswith("-any.whl") or None in [shutil.which(x, path=path) for x in ("auditwheel", "patchelf")]:
        pytest.skip("no operators were built, or auditwheel or patchelf is not installed")
    repair = re.search(r"^REPAIR := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert repair
    done = run(*shlex.split(repair[1]), "--wheel-dir", tmp_path, full_wheel, cwd=tmp_path, PATH=path)
    assert done.returncode == 0, done.stdout
    (repaired,) = tmp_path.glob("*.whl")
    assert re.search(r"-cp310-abi3-.*manylinux_2_\d+_", repaired.name)
    assert files(repaired) == files(full_wheel), "a library was copied into the wheel"
    pip("--python", bare, "install", "--no-deps", "--no-index", repaired, cwd=tmp_path)
    assert used(bare, tmp_path) == []
    assert "No module named 'numpy'" in run(bare, "-c", "import numpy", cwd=tmp_path).stdout


def test_from_the_sdist_to_operators(source: Path, bare: Path, tmp_path: Path, quick: dict[str, str]) -> None:
    """As most people install it: an isolated build, which has no torch, and `vjvcr-fast build` once they read of it."""
    copy, out, cache = tmp_path / "tree", tmp_path / "out", tmp_path / "cache"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build"))
    hook = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    assert run(sys.executable, "-c", hook, cwd=copy).returncode == 0
    (sdist,) = out.iterdir()
    command = (sys.executable, "-m", "pip", "wheel", sdist, "--verbose", "--no-deps", "--wheel-dir", out)
    done = run(*command, cwd=tmp_path, PIP_RETRIES="1", PIP_TIMEOUT="10")
    if done.returncode and "No matching distribution found for setuptools" in done.stdout:
        pytest.skip("pip reaches no package index here")
    assert done.returncode == 0, done.stdout
    assert "this is a pure-Python install" in done.stdout
    (wheel,) = out.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert {name for name in files(wheel) if name.endswith(".so")} == set()
    pip("--python", bare, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)

    (said,) = used(bare, tmp_path, XDG_CACHE_HOME=str(cache))
    assert "the compiled operators are not built: `vjvcr-fast build` compiles them" in said
    settings = quick | {"XDG_CACHE_HOME": str(cache)}
    missing = run(bare.parent / "vjvcr-fast", "build", cwd=tmp_path, **settings | {"CXX": "no-such-compiler"})
    assert missing.returncode == 1
    assert "vjvcr-fast: no C++ compiler: no-such-compiler is not on PATH" in missing.stdout
    if "CXX" not in quick:
        pytest.skip("there is no C++ compiler")
    built = run(bare.parent / "vjvcr-fast", "build", cwd=tmp_path, **settings)
    assert built.returncode == 0, built.stdout
    assert re.search(r"^\[1/\d\] \w+\.cpp, \d+ s$", built.stdout, re.MULTILINE)
    assert used(bare, tmp_path) == []
    shown = run(bare.parent / "vjvcr-fast", "info", cwd=tmp_path).stdout
    assert "operators         CPU; not built for CUDA" in shown
    assert not cache.exists()
