"""Every kernel in every configuration, compiled for GPUs that are not there: kernels/aot.py holds the plan."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need triton: pip install 'vjvcr_fast[triton]'")

ARCHITECTURES = 80, 90
# Kernels with a product, and a precision each of which must use tensor cores.
PRODUCTS = {"gram.whole", "gram.tiles", "gram.gradient", "covariance.covariance", "covariance.gradient"}
INPUTS = {"bf16", "fp16", "fp32", "fp32 as tf32"}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("aot") / "table.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "vjvcr_fast.kernels.aot", "--json", str(path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert path.exists(), run.stderr[-4000:]
    return {"status": run.returncode, "printed": run.stdout} | json.loads(path.read_text())


@pytest.fixture
def rows(table: dict[str, Any]) -> list[dict[str, Any]]:
    return table["rows"]


def named(rows: list[dict[str, Any]]) -> list[str]:
    keys = "kernel", "input", "shape", "tiles", "warps", "stages", "arch", "registers", "spilled", "shared", "possible"
    return [" ".join(str(row[key]) for key in keys) for row in rows]


def test_the_plan_holds(table: dict[str, Any]) -> None:
    assert table["violations"] == []
    assert table["status"] == 0
    assert table["printed"].count("\n") > len(table["rows"])


def test_nothing_spills(table: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    assert table["tolerated"] == (0 if table["triton"].startswith("3.7.") else 8)
    assert named([row for row in rows if row["spilled"] > table["tolerated"]]) == []


def test_registers_and_shared_memory_leave_room_for_the_planned_blocks(rows: list[dict[str, Any]]) -> None:
    assert named([row for row in rows if row["possible"] < (row["planned"] if row["regular"] else 1)]) == []


def test_products_use_tensor_cores_in_every_precision(rows: list[dict[str, Any]]) -> None:
    products = [row for row in rows if row["product"]]
    assert named([row for row in products if not row["tensor"].endswith("HMMA" if row["arch"] == 80 else "MMA")]) == []
    done = {(row["kernel"], row["input"], row["arch"]) for row in products}
    assert done == {(kernel, label, arch) for kernel in PRODUCTS for label in INPUTS for arch in ARCHITECTURES}


def test_large_tiles_use_the_warp_groups_of_hopper(rows: list[dict[str, Any]]) -> None:
    large = [row for row in rows if row["arch"] == 90 and "gram" in row["kernel"] and row["product"]]
    large = [row for row in large if int(row["shape"].split("x")[0]) >= 63]
    assert large
    assert named([row for row in large if not row["tensor"].endswith("HGMMA")]) == []


def test_loads_of_the_products_are_asynchronous_where_rows_are_aligned(rows: list[dict[str, Any]]) -> None:
    """covariance.gradient with one panel has no loop to load ahead of."""
    pipelined = [row for row in rows if row["regular"] and row["product"] and row["kernel"] != "covariance.gradient"]
    assert named([row for row in pipelined if not row["asynchronous"]]) == []


def test_few_configurations_to_choose_from(rows: list[dict[str, Any]]) -> None:
    choices: dict[tuple[str, int], set[int]] = {}
    for row in rows:
        choices.setdefault((row["table"], row["arch"]), set()).add(row["choice"])
    assert max(map(len, choices.values())) <= 2
    assert {"gram.GRADIENT[bf16, 64]", "covariance.COVARIANCE[tf32x3, 64]", "moments.MOMENTS"} <= {
        t for t, _ in choices
    }


def test_the_interpreter_is_refused() -> None:
    command = [sys.executable, "-m", "vjvcr_fast.kernels.aot"]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 2
    assert "TRITON_INTERPRET" in run.stderr
