"""The build of the operators and its errors, with scripts as compiler and nvcc; and the warning without operators.

test_packaging.py compiles for real.
"""

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vjvcr_fast import cli, native, native_build
from vjvcr_fast.latents import SparseLatent
from vjvcr_fast.losses import vcr_loss

ROOT = Path(__file__).parents[1]

# Writes into the file after -o which sources or objects it was given.
COMPILES = """#!{python}
import sys
arguments = sys.argv[1:]
if "--version" in arguments:
    print("Cuda compilation tools, release {release}, V{release}.1")
elif "--dryrun" not in arguments:
    out = arguments[arguments.index("-o") + 1]
    inputs = [x for x in arguments if x.endswith((".cpp", ".cu", ".o")) and x != out]
    if any(x.endswith({fails!r}) for x in inputs):
        print("In file included from x.h:\\nx.h(3): error: no such thing\\n1 error detected")
        sys.exit(2)
    open(out, "w").write(" ".join(x.rpartition("/")[2] for x in inputs))
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """tools(fails=".x", release="13.0", nvcc=True) puts a C++ compiler, and an nvcc, onto a path that has nothing else.
    What ends with `fails` does not compile. Returns where to build."""
    for name in ("CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "VJVCR_CUDA", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)

    def made(fails: str = ".none", release: str = "13.0", nvcc: bool = True) -> Path:
        folder = tmp_path / "toolkit" / "bin"
        folder.mkdir(parents=True)
        text = COMPILES.format(python=sys.executable, release=release, fails=fails)
        for name in ("c++", "nvcc") if nvcc else ("c++",):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return tmp_path / "out" / "library.so"

    return made


def build(target: Path) -> list[str]:
    """Returns what it says."""
    said: list[str] = []
    native_build.build(target, said.append, for_setup=True)
    return said


def test_all_sources_become_one_library(tools: Callable[..., Path], tmp_path: Path) -> None:
    target = tools()
    said = build(target)
    sources = {path.name for path in (ROOT / "csrc").iterdir() if path.suffix in (".cpp", ".cu")} - {"native.cpp"}
    assert {*target.read_text().split()} == {f"{name}.o" for name in sources}
    assert said[0].startswith(f"compiling {len(sources)} files with c++ and {tmp_path}/toolkit/bin/nvcc, ")
    assert said[-1] == "[1/1] _operators.abi3.so, 0 s"
    assert len(said) == len(sources) + 2
    assert [path.name for path in target.parent.iterdir()] == ["library.so"]


def test_without_nvcc(tools: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    target = tools(nvcc=False)
    assert build(target)[0] == "no operators for CUDA: there is no nvcc: put it on PATH or set CUDA_HOME"
    assert ".cu" not in target.read_text()
    monkeypatch.setenv("CUDA_HOME", "/there/is/none")
    assert build(target)[0] == "no operators for CUDA: there is no /there/is/none/bin/nvcc"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("VJVCR_CUDA", "0")
    assert "CUDA" not in build(target)[0]
    monkeypatch.setenv("VJVCR_CUDA", "1")
    with pytest.raises(native_build.BuildError, match="VJVCR_CUDA=1, but there is no nvcc"):
        build(target)


def test_an_nvcc_of_another_cuda(tools: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's minor versions fit each other."""
    target = tools(release="12.8")
    monkeypatch.setattr(torch.version, "cuda", "12.1")
    assert ".cu.o" in " ".join([*build(target), target.read_text()])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    said = build(target)[0]
    assert "nvcc is of CUDA 12.8, torch" in said
    assert said.endswith("of CUDA 13.0: set CUDA_HOME to a toolkit of CUDA 13")
    assert ".cu.o" not in target.read_text()
    monkeypatch.setenv("VJVCR_CUDA", "1")
    with pytest.raises(native_build.BuildError, match=r"VJVCR_CUDA=1, but .* is of CUDA 12.8"):
        build(target)


def test_if_cuda_does_not_compile_the_cpu_still_does(
    tools: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tools(fails=".cu")
    said = "\n".join(build(target))
    assert "_cuda.cu: " in said
    assert "nvcc fails: x.h(3): error: no such thing; going on without" in said
    assert ".cu.o" not in target.read_text()
    target.unlink()
    monkeypatch.setenv("VJVCR_CUDA", "1")
    with pytest.raises(native_build.BuildError, match=r"_cuda\.cu: .*nvcc fails: x\.h\(3\)"):
        build(target)
    assert not target.exists()


def test_what_fails_leaves_what_was_there(tools: Callable[..., Path]) -> None:
    target = tools(fails="library.cpp", nvcc=False)
    target.parent.mkdir()
    target.write_text("the old one")
    with pytest.raises(native_build.BuildError, match=r"library\.cpp: c\+\+ fails: x\.h\(3\): error: no such thing"):
        build(target)
    assert target.read_text() == "the old one"
    assert [path.name for path in target.parent.iterdir()] == ["library.so"]


def test_a_library_that_does_not_load_is_not_kept(tools: Callable[..., Path]) -> None:
    target = tools(nvcc=False)
    with pytest.raises(native_build.BuildError, match=r"compiled, but torch does not load it: OSError: .*library"):
        native_build.build(target, print)
    assert not target.exists()


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("VJVCR_CUDA", "maybe", "VJVCR_CUDA='maybe': choose auto, 0 or 1"),
        ("CXX", "no-such-compiler -O1", r"no C\+\+ compiler: no-such-compiler is not on PATH; install one"),
        ("MAX_JOBS", "many", "MAX_JOBS='many': a whole number from 1 on"),
        ("MAX_JOBS", "0", "MAX_JOBS='0': a whole number from 1 on"),
    ],
)
def test_wrong_variables(
    tools: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    target = tools(nvcc=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(native_build.BuildError, match=says):
        build(target)


def test_interrupted(tools: Callable[..., Path], tmp_path: Path) -> None:
    """By Ctrl-C, while compilers run: they end, too, and nothing is left."""
    target = tools(nvcc=False)
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\necho $$ >>{tmp_path}/pids\nexec {sys.executable} -c 'import time; time.sleep(60)'\n")
    slow.chmod(0o755)
    code = f"from pathlib import Path; from vjvcr_fast import native_build as n; n.build(Path({str(target)!r}), print)"
    environment = {**os.environ, "CXX": str(slow), "PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path), "VJVCR_CUDA": "0"}
    environment["MAX_JOBS"] = "1"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "pids").exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)  # it knows by then that the compiler has started
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert error.rstrip().endswith(b"KeyboardInterrupt")
    assert not target.exists()
    assert not [*tmp_path.glob("vjvcr-fast-build-*")]
    for pid in (tmp_path / "pids").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


# -- Where it is put and found --------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A package's folder, and the user's cache, both empty but for the sources."""
    package, cache = tmp_path / "package", tmp_path / "cache"
    (package / "csrc").mkdir(parents=True)
    (package / "csrc" / "library.cpp").write_text("// a source")
    monkeypatch.setattr(native_build, "HERE", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return package, cache / "vjvcr_fast"


def test_into_the_package_or_else_the_cache(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    package, cache = places
    assert native_build.destination().parent == package
    assert native_build.destination().name.startswith("_operators-")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert native_build.destination().parent == cache


def test_in_a_checkout_it_is_what_setup_makes(places: tuple[Path, Path]) -> None:
    package, _ = places
    (package / "csrc").rename(package.parent / "csrc")
    assert native_build.destination() == package / native_build.INSTALLED


def test_the_library_of_these_sources_is_found(places: tuple[Path, Path]) -> None:
    package, cache = places
    assert native_build.libraries() == []
    installed, name = package / native_build.INSTALLED, native_build.destination().name
    cache.mkdir(parents=True)
    for path in (installed, cache / name, package / name):
        path.touch()
    assert native_build.libraries() == [package / name, cache / name, installed]
    (package / "csrc" / "library.cpp").write_text("// another one, of an upgrade")
    assert native_build.libraries() == [installed]


def test_a_build_removes_those_of_older_sources(places: tuple[Path, Path], tools: Callable[..., Path]) -> None:
    tools(nvcc=False)
    package, _ = places
    (package / "_operators-000000000000.so").touch()
    build(native_build.destination())
    assert [path.name for path in package.glob("*.so")] == [native_build.destination().name]


def test_no_sources(places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    (places[0] / "csrc" / "library.cpp").unlink()
    (places[0] / "_operators-000000000000.so").touch()
    assert native_build.libraries() == []
    assert cli.main(["build"]) == 1
    assert "no csrc, the sources of the operators" in capsys.readouterr().err


# -- What is said without the operators -----------------------------------------------------------------------------


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MISSING", f"not built: {native_build.COMMAND}")
    monkeypatch.delenv("RANK", raising=False)
    native._warn.cache_clear()


def loss() -> torch.Tensor:
    return vcr_loss(torch.ones(4, 2, 3), alpha=0.5, beta=0.1).loss


def infer() -> object:
    square = lambda z: (z - 1).square().sum(1)  # noqa: E731
    return SparseLatent(3, 1e-2, 2).infer(square, 4, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("use", [loss, infer])
def test_the_first_use_warns(use: Callable[[], object], missing: None) -> None:
    with pytest.warns(UserWarning, match=r"the compiled operators are not built: `vjvcr-fast build` compiles them"):
        use()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loss()
        infer()


def test_what_does_not_warn(missing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled graph, other processes of a job, and a backend that needs no operators."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "vjvcr_fast")
        torch.compile(loss, fullgraph=True, backend="eager")()
        vcr_loss(torch.ones(4, 2, 3), alpha=0.5, beta=0.1, backend="torch")
        monkeypatch.setenv("RANK", "1")
        loss()


def test_info_names_the_command(missing: None) -> None:
    assert "`vjvcr-fast build`" in native.explain()
