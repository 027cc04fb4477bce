"""The targets `make gpu-...`: dry runs on the CPU by as_if_cuda.py, and what they say where there is no GPU."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vjvcr_fast import native

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import check_gpu  # noqa: E402

TARGETS = ("gpu-smoke", "gpu-bench", "gpu-test", "gpu-memcheck", "gpu-racecheck")
BENCHMARKS = ("losses_cuda", "latents", "host", "training", "sigreg_cuda")
AS_IF = f"{sys.executable} tests/as_if_cuda.py"
BENCH = ["-m", "pytest", "-s", "benchmarks/bench_losses_cuda.py"]

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def run(*command: str, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """stdout holds both streams."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    path = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "LC_ALL": "C"}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, cwd=root, env=clean | path | environment, text=True, check=False, **both)


@pytest.fixture
def dry(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """dry(targets and variables, AS_IF_CUDA=...): make, with a virtual environment that is there already."""
    done = tmp_path / "venv" / ".done"
    done.parent.mkdir()
    done.touch()
    folders = [f"GPU_VENV={done.parent}", f"GPU_OUT={tmp_path}/out", f"GPU_RESULTS={tmp_path}/results"]
    return lambda *words, **env: run("make", *words, f"PYTHON={AS_IF}", f"GPU={AS_IF}", *folders, **env)


def rows(folder: Path, of: str = "") -> dict[str, Any]:
    """The results in a folder, of a partial or a whole run. of: the start of their file's name; none is the losses'."""
    (path,) = folder.glob(f"{of}gpu-*.json")
    return json.loads(path.read_text()) | {"name": path.name}


# -- Dry runs -------------------------------------------------------------------------------------------------------


@needs_make
@pytest.mark.slow
def test_one_call_checks_and_measures(dry, tmp_path) -> None:
    pytest.importorskip("triton")
    if native.MISSING or not native.ARCHITECTURES:
        pytest.skip(f"the operators: {native.explain()}")
    done = dry("gpu-smoke", "gpu-bench")
    assert done.returncode == 0, done.stdout
    smoke = json.loads((tmp_path / "out" / "gpu-smoke.json").read_text())
    assert "partial" not in smoke
    assert all(row["ok"] for row in smoke["rows"]), smoke
    assert len({row["operator"] for row in smoke["rows"]}) >= 11
    results = rows(tmp_path / "results")
    assert "partial" not in results
    assert "-partial" not in results["name"]
    assert {row["precision"] for row in results["rows"]} == {"bf16", "fp32", "tf32"}
    for name in ("training", "latents", "sigreg_cuda"):
        assert list((tmp_path / "results").glob(f"{name}-gpu-*.json"))
    for name in ("smoke", "bench"):
        assert f"make gpu-{name}: passed" in (tmp_path / "out" / f"gpu-{name}.txt").read_text()


@needs_make
@pytest.mark.slow
def test_nothing_that_fails_stops_the_next(dry, tmp_path) -> None:
    """Of one call: a check that fails, the target that has it, and a target that is stopped at its limit."""
    sanitizer = tmp_path / "bin" / "compute-sanitizer"
    sanitizer.parent.mkdir()
    sanitizer.write_text('#!/bin/sh\necho "sanitizing with $2"; shift 4; exec "$@" --collect-only\n')
    sanitizer.chmod(0o755)
    path = f"{sanitizer.parent}{os.pathsep}{os.environ['PATH']}"
    limit = ("LIMIT_bench=25", "ARGS=--seconds=1000")
    done = dry("gpu-smoke", "gpu-bench", "gpu-sanitize", *limit, AS_IF_CUDA="wrong hangs", PATH=path)
    assert done.returncode != 0

    smoke = json.loads((tmp_path / "out" / "gpu-smoke.json").read_text())
    reasons = {row["operator"]: row.get("reason") for row in smoke["rows"]}
    assert reasons == {
        "wrong": "off by nan",
        "raises": "ZeroDivisionError: integer division or modulo by zero",
        "dies": "the process died: SIGSEGV",
        "hangs": "no answer after 3 s",
        "right": None,
    }
    assert len(re.findall("^FAILED ", done.stdout, re.MULTILINE)) == 4
    assert re.search("^ok +right ", done.stdout, re.MULTILINE)
    assert "make gpu-smoke: failed (exit code 1)" in done.stdout

    assert "make gpu-bench: stopped at its limit" in done.stdout
    if not list((tmp_path / "results").glob("sigreg_cuda-*")):  # a busy machine, which needs longer
        dry("gpu-bench", "LIMIT_bench=200", "ARGS=--seconds=1000", AS_IF_CUDA="wrong hangs", PATH=path)
    results = rows(tmp_path / "results", "sigreg_cuda-")  # the first that compiles, which hangs
    assert results["partial"]
    assert len(results["rows"]) == 4

    for tool in ("memcheck", "racecheck"):
        said = (tmp_path / "out" / f"gpu-{tool}.txt").read_text()
        assert f"sanitizing with {tool}" in said
        assert "not found" not in said, "a test that is named there"
        assert f"make gpu-{tool}: passed" in said


@pytest.mark.slow
def test_a_killed_benchmark_leaves_its_rows(tmp_path) -> None:
    command = [*AS_IF.split(), *BENCH, f"--results={tmp_path}"]
    environment = os.environ | {"AS_IF_CUDA": "hangs", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        end = time.monotonic() + 120
        while not list(tmp_path.glob("gpu-*.json")) and time.monotonic() < end:
            time.sleep(0.1)
        process.kill()
        process.communicate()
    results = rows(tmp_path)
    assert results["partial"]
    assert results["name"].endswith("-partial.json")
    assert [row["provider"] for row in results["rows"]] == ["eager reference", "ours", "ours in torch"]
    assert all(row["us"] > 0 for row in results["rows"])
    assert len(results["left_out"]) == 6
    assert set(results["left_out"].values()) == {"not measured"}
    assert not list(tmp_path.glob(".*")), "no half-written file"


@pytest.mark.slow
def test_a_benchmark_that_may_not_write_still_shows_its_figures(tmp_path) -> None:
    (tmp_path / "file").touch()
    where = f"--results={tmp_path / 'file' / 'folder'}"
    done = run(*AS_IF.split(), *BENCH, where, "-k", "6x2x20-bf16")
    assert done.returncode == 0, done.stdout
    assert "not written: " in done.stdout
    assert re.search(r"6, 2, 20 +bf16 +ours ", done.stdout)


@pytest.mark.slow
def test_what_begins_too_late_is_left_out(tmp_path) -> None:
    done = run(*AS_IF.split(), *BENCH, f"--results={tmp_path}", "--seconds=-1")
    assert done.returncode == 0, done.stdout
    assert "6 skipped" in done.stdout
    assert "left out: the -1 s were over" in done.stdout


@pytest.mark.slow
def test_what_matters_most_is_measured_first() -> None:
    command = ["-m", "pytest", "--collect-only", "-q", *(f"benchmarks/bench_{x}.py" for x in BENCHMARKS)]
    done = run(*AS_IF.split(), *command)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    losses, training = "benchmarks/bench_losses_cuda.py::test_vcr_loss", "benchmarks/bench_training.py::"
    latents = "benchmarks/bench_latents.py::TestLatents::test_infer"
    first = [f"{losses}[160x100x2048-{name}]" for name in ("bf16", "fp32", "tf32")]
    first += [f"{losses}[256x15x512-{name}]" for name in ("bf16", "fp32", "tf32")]
    first += [f"{latents}[{hidden}-{frames}]" for hidden in (256, 512) for frames in ("3x256", "12x512")]
    first += [f"{losses}[{shape}-{p}]" for shape in ("256x26x2048", "2600000x1x64") for p in ("bf16", "fp32", "tf32")]
    assert names[: len(first)] == first
    after = [name for name in names[len(first) :] if "bench_host.py" not in name]  # not in the interpreter
    assert after[0] == f"{training}test_videos_per_second[moving-mnist]"
    assert names[-1].startswith(training)


@needs_make
@pytest.mark.slow
def test_the_tests_run_in_several_processes(dry, tmp_path) -> None:
    pytest.importorskip("xdist")
    some = "-n 2 tests/latents/test_operators.py -k 'opcheck or both_devices_round_alike'"
    done = dry("gpu-test", f"ARGS={some}")
    assert "2 passed, 1 error" in done.stdout, "the one that needs a GPU may not be skipped"
    assert "no CUDA device" in done.stdout
    assert "make gpu-test: failed (exit code 1)" in (tmp_path / "out" / "gpu-test.txt").read_text()


@pytest.mark.slow
def test_what_needs_the_gpu_is_tested_first() -> None:
    collect = [*AS_IF.split(), "-m", "pytest", "--collect-only", "-q", "tests/latents/test_operators.py"]
    every, on_gpu = (
        [line for line in run(*collect, *more).stdout.splitlines() if "::" in line] for more in ((), ("-m", "cuda"))
    )
    assert len(every) > len(on_gpu) > 0
    assert every[: len(on_gpu)] == on_gpu


@needs_make
@pytest.mark.slow
def test_the_set_up_needs_no_network(quick, tmp_path) -> None:
    """From the interpreter's own packages, in a copy of the tree: the operators are built there."""
    copy = tmp_path / "copy"
    names = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*.so", "build", "dist", "runs")
    shutil.copytree(ROOT, copy, ignore=names)
    for link in (copy / "vjvcr_fast").glob("kernels"):
        shutil.rmtree(link)
    settings = quick | {"PIP_NO_INDEX": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    done = run("make", ".venv-gpu/.done", f"PYTHON={AS_IF}", root=copy, **settings)
    assert done.returncode == 0, done.stdout
    probe = "import torch, vjvcr_fast.kernels, vjvcr_fast.native as n; print(n.__file__, n.MISSING)"
    said = run(str(copy / ".venv-gpu" / "bin" / "python"), "-c", probe, root=copy, PYTHONPATH="").stdout
    assert said.strip() == f"{copy / 'vjvcr_fast' / 'native.py'} None"
    made = (copy / ".venv-gpu" / ".done").stat().st_mtime_ns
    assert run("make", ".venv-gpu/.done", f"PYTHON={AS_IF}", root=copy).returncode == 0
    assert (copy / ".venv-gpu" / ".done").stat().st_mtime_ns == made, "made once"


# -- Without a GPU --------------------------------------------------------------------------------------------------


@needs_make
def test_every_target_fails_at_once_without_a_gpu() -> None:
    """And says why."""
    done = run("make", *TARGETS, "gpu-paper", f"PYTHON={sys.executable}", CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    assert re.search(r"make gpu: torch \S+, built (for CUDA \S+|without CUDA), sees no CUDA device", done.stdout)
    for target in (*TARGETS, "gpu-paper"):
        assert f"Target '{target}' not remade" in done.stdout
    assert "pytest" not in done.stdout
    assert "reproduce" not in done.stdout


@needs_make
def test_gpu_is_all_four_in_order() -> None:
    done = run("make", "-n", "gpu", f"PYTHON={sys.executable}", "GPU_VENV=not-made-yet")
    assert done.returncode == 0, done.stdout
    steps = ["check_gpu.py", "-m venv", "--no-index", "smoke.py", "bench_losses_cuda.py", "FAIL_WITHOUT_CUDA=1"]
    steps += ["--tool memcheck", "--tool racecheck"]
    places = [done.stdout.find(step) for step in steps]
    assert -1 not in places
    assert places == sorted(places)


@needs_make
def test_the_paper_comes_in_pieces_that_go_on() -> None:
    done = run("make", "-n", "gpu-paper", f"PYTHON={sys.executable}", "GPU_VENV=not-made-yet", "PIECE=77")
    assert done.returncode == 0, done.stdout
    assert re.search(r"timeout --signal=INT \S+ \S+ -m vjvcr_fast reproduce .*moving-mnist-stochastic", done.stdout)
    assert "$((77 + " in done.stdout


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_gpu, "NEEDED", ("torch",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert check_gpu.obstacle() == f"torch {torch.__version__}, built for CUDA 13.0, sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check_gpu.obstacle() is None
    assert "has no no_such_package; what is" in (check_gpu.obstacle(["no_such_package"]) or "")
    monkeypatch.setattr(check_gpu, "SETUPTOOLS", 10**6)
    assert "setuptools" in (check_gpu.obstacle() or "")


@pytest.mark.slow
@pytest.mark.parametrize(("wanted", "code", "word"), [("0", 0, "skipped"), ("1", 1, "error")])
def test_tests_that_need_cuda_skip_or_fail(wanted: str, code: int, word: str) -> None:
    tests = ["tests/latents/test_operators.py", "-k", "both_devices_round_alike"]
    environment = {"FAIL_WITHOUT_CUDA": wanted, "CUDA_VISIBLE_DEVICES": ""}
    done = run(sys.executable, "-m", "pytest", "-q", "-m", "cuda", *tests, **environment)
    assert done.returncode == code, done.stdout
    assert f"1 {word}" in done.stdout
    assert "no CUDA device" in done.stdout


def test_smoke_reaches_every_way_through_the_kernels() -> None:
    pytest.importorskip("triton")
    import smoke
    from vjvcr_fast.kernels import gram, vcr

    ways = {(n < d, vcr.route(n, d, n < d)) for n, _, d in smoke.SHAPES}
    assert ways == {(True, "gram"), (True, "torch_product"), (False, "covariance"), (False, "torch_product")}
    small = [n for n, _, d in smoke.SHAPES if n < d and vcr.route(n, d, True) == "gram"]
    whole = max(sum(panels) for _, panels in gram.WHOLE)
    assert min(small) <= whole < max(small), "all samples in a program, and tiles"
