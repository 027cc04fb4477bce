"""Every kernel in every configuration, compiled for GPUs that are not there: kernels/aot.py holds the plan.

Compiling all of them takes minutes: `make aot` runs what is marked so, the other tests compile a few.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need triton: pip install 'vjvcr_fast[triton]'")

from vjvcr_fast.kernels import aot

ARCHITECTURES = 80, 90
# Kernels with a product, and a precision each of which must use tensor cores.
PRODUCTS = {"gram.whole", "gram.tiles", "gram.gradient", "covariance.covariance", "covariance.gradient"}
INPUTS = {"bf16", "fp16", "fp32", "fp32 as tf32"}
OTHERS = {"gram.finish", "covariance.join", "library.centred"} | {
    f"moments.{name}" for name in ("moments", "merge", "hinge_gradient", "combine", "scale")
}

# -- All of them: `make aot` -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes and says; it is shown as it comes."""
    path = tmp_path_factory.mktemp("aot") / "table.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "vjvcr_fast.kernels.aot", "--json", str(path)]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    printed = []
    with subprocess.Popen(command, env=environment, **both) as run:
        for line in run.stdout:
            printed.append(line)
            print(line, end="", flush=True)
    assert path.exists(), "".join(printed[-40:])
    return {"status": run.returncode, "printed": "".join(printed)} | json.loads(path.read_text())


@pytest.fixture
def rows(table: dict[str, Any]) -> list[dict[str, Any]]:
    return table["rows"]


def named(rows: list[dict[str, Any]]) -> list[str]:
    keys = "kernel", "input", "shape", "tiles", "warps", "stages", "arch", "registers", "spilled", "shared", "possible"
    return [" ".join(str(row[key]) for key in keys) for row in rows]


@pytest.mark.aot
def test_the_plan_holds(table: dict[str, Any]) -> None:
    assert table["violations"] == []
    assert table["status"] == 0
    assert table["printed"].count("\n") > len(table["rows"])


@pytest.mark.aot
def test_nothing_spills(table: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    assert table["tolerated"] == (0 if table["triton"].startswith("3.7.") else 8)
    assert named([row for row in rows if row["spilled"] > table["tolerated"]]) == []


@pytest.mark.aot
def test_registers_and_shared_memory_leave_room_for_the_planned_blocks(rows: list[dict[str, Any]]) -> None:
    assert named([row for row in rows if row["possible"] < (row["planned"] if row["regular"] else 1)]) == []


@pytest.mark.aot
def test_products_use_tensor_cores_in_every_precision(rows: list[dict[str, Any]]) -> None:
    products = [row for row in rows if row["product"]]
    assert named([row for row in products if not row["tensor"].endswith("HMMA" if row["arch"] == 80 else "MMA")]) == []
    done = {(row["kernel"], row["input"], row["arch"]) for row in products}
    assert done == {(kernel, label, arch) for kernel in PRODUCTS for label in INPUTS for arch in ARCHITECTURES}


@pytest.mark.aot
def test_large_tiles_use_the_warp_groups_of_hopper(rows: list[dict[str, Any]]) -> None:
    large = [row for row in rows if row["arch"] == 90 and "gram" in row["kernel"] and row["product"]]
    large = [row for row in large if int(row["shape"].split("x")[0]) >= 63]
    assert large
    assert named([row for row in large if not row["tensor"].endswith("HGMMA")]) == []


@pytest.mark.aot
def test_loads_of_the_products_are_asynchronous_where_rows_are_aligned(rows: list[dict[str, Any]]) -> None:
    """covariance.gradient with one panel has no loop to load ahead of."""
    pipelined = [row for row in rows if row["regular"] and row["product"] and row["kernel"] != "covariance.gradient"]
    assert named([row for row in pipelined if not row["asynchronous"]]) == []


@pytest.mark.aot
def test_few_configurations_to_choose_from(rows: list[dict[str, Any]]) -> None:
    choices: dict[tuple[str, int], set[int]] = {}
    for row in rows:
        choices.setdefault((row["table"], row["arch"]), set()).add(row["choice"])
    assert max(map(len, choices.values())) <= 2
    assert {"gram.GRADIENT[bf16, 64]", "covariance.COVARIANCE[tf32x3, 64]", "moments.MOMENTS"} <= {
        t for t, _ in choices
    }


# -- A few of them ---------------------------------------------------------------------------------------------------


@pytest.fixture
def one_of_each(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> dict[str, aot.Job]:
    """A job of each kernel, in bfloat16 for an H100, in the place of all; compiled in threads, not in processes."""
    every = aot.jobs([90])
    monkeypatch.setattr(aot.driver, "_active", None)  # as it is where no GPU was asked for; put back at the end
    found: dict[str, aot.Job] = {}
    for job in every:
        if job.input == "bf16" and job.h.shape[0] % 16 == 0:
            kernel = job.launch.kernel
            found.setdefault(f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__.lstrip('_')}", job)
    monkeypatch.setattr(aot, "jobs", lambda archs: list(found.values()))
    monkeypatch.setattr(aot, "_jobs", [])
    monkeypatch.setattr(aot, "ProcessPoolExecutor", ThreadPoolExecutor)
    return found


def test_every_configuration_is_planned() -> None:
    """Of every table's every entry there is a job, and of all jobs no more than are distinct to Triton are compiled."""
    planned = {id(c) for configs in aot.tables().values() for c in configs for a in c.archs if a in ARCHITECTURES}
    assert {id(job.config) for job in aot.jobs(ARCHITECTURES)} == planned


def test_the_command_on_one_of_each(
    one_of_each: dict[str, aot.Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert set(one_of_each) == PRODUCTS | OTHERS
    path = tmp_path / "table.json"
    monkeypatch.setattr(sys, "argv", ["aot", "--archs", "90", "--jobs", "1", "--json", str(path)])
    assert aot.main() == 1, "most configurations were not compiled"
    said, table = capfd.readouterr(), json.loads(path.read_text())
    rows = [aot.Row(**row) for row in table["rows"]]
    assert [row.kernel for row in rows] == sorted(one_of_each)
    assert said.out.splitlines()[1:-1] == [aot.line(row) for row in rows]
    assert all(row.registers > 0 and row.possible >= row.planned and row.spilled == 0 for row in rows)
    assert {row.kernel for row in rows if row.product} == PRODUCTS
    assert {row.kernel for row in rows if row.tensor.endswith("MMA")} == PRODUCTS
    assert all(violation.startswith("never compiled: ") for violation in table["violations"])
    done = {(row.table, row.choice) for row in rows}
    every = {(name, i) for name, configs in aot.tables().items() for i, c in enumerate(configs) if 90 in c.archs}
    assert len(table["violations"]) == len(every - done)
    assert said.err.splitlines() == table["violations"]

    # What breaks the plan is named.
    row = next(row for row in rows if row.product and row.regular)
    for broken, words in (
        ({"shared": aot.BLOCK[90] + 1}, "too much shared memory"),
        ({"tensor": ""}, "without tensor cores"),
        ({"spilled": aot.TOLERATED + 8}, "spills registers"),
        ({"possible": row.planned - 1}, f"is planned {row.planned} times"),
    ):
        assert any(words in line for line in aot.violations([row._replace(**broken)], [90])), words


def test_what_does_not_compile_is_told(
    one_of_each: dict[str, aot.Job], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(job: aot.Job) -> aot.Row:
        raise ValueError("no such instruction")

    monkeypatch.setattr(aot, "distinct", lambda jobs: [one_of_each["moments.scale"]] * 50)
    monkeypatch.setattr(aot, "compiled", fails)
    monkeypatch.setattr(sys, "argv", ["aot", "--archs", "90", "--jobs", "1"])
    assert aot.main() == 1
    said = capfd.readouterr()
    assert said.out.startswith("50 of 50, ")
    told = [line for line in said.err.splitlines() if not line.startswith("never compiled: ")]
    assert len(told) == 50
    assert told[0].startswith("does not compile: _scale")
    assert told[0].endswith("sm_90: no such instruction")
