"""Every kernel in every configuration, compiled for GPUs that are not there: aot.py checks the plan.

Compiling all of them takes minutes: `make aot` runs the tests marked so. The others compile a few.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="the kernels need triton: pip install 'vjvcr_fast[triton]'")

import aot

from vjvcr_fast.native_build import NVCC_FLAGS

ARCHITECTURES = 80, 90
# Kernels with a product, by the forms they serve. Each must use tensor cores in each precision.
FORMS = {
    "gram.whole": {"gram"},
    "gram.tiles": {"gram"},
    "covariance.covariance": {"covariance"},
    "gradient.gradient": {"gram", "covariance"},
    **{f"sigreg.{name}": {"gram"} for name in ("sums", "slopes", "product")},  # one, of all shapes
}
PRODUCTS = set(FORMS)
INPUTS = {"bf16", "fp16", "fp32", "fp32 as tf32"}
# These are split among as many programs as run at once.
SPLIT = {"gram.whole", "gram.tiles", "covariance.covariance", "sigreg.sums"}
OTHERS = {"moments.moments", "finish.finish", "finish.combine", "sigreg.finish", "sigreg.loss"}

# -- All of them: `make aot` -----------------------------------------------------------------------------------------


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is where no GPU was asked for; put back at the end."""
    monkeypatch.setattr(aot.driver, "_active", None)


@pytest.fixture(scope="module")
def table() -> Iterator[tuple[list[aot.Row], list[str]]]:
    """All rows, printed as they come, and what is wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot.driver, "_active", None)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        yield aot.compile_all(ARCHITECTURES, cores)


@pytest.fixture
def rows(table: tuple[list[aot.Row], list[str]]) -> list[aot.Row]:
    return table[0]


def named(rows: list[aot.Row]) -> list[str]:
    return [str(row) for row in rows]


@pytest.mark.aot
def test_the_plan_holds(table: tuple[list[aot.Row], list[str]]) -> None:
    assert table[1] == []


@pytest.mark.aot
def test_nothing_spills(rows: list[aot.Row]) -> None:
    assert (0 if aot.triton.__version__.startswith("3.7.") else 8) == aot.TOLERATED
    assert named([row for row in rows if row.spilled > aot.TOLERATED]) == []


@pytest.mark.aot
def test_registers_and_shared_memory_leave_room_for_the_planned_blocks(rows: list[aot.Row]) -> None:
    assert named([row for row in rows if row.possible < row.planned]) == []


@pytest.mark.aot
def test_sums_are_split_by_all_the_blocks_that_a_hopper_holds(rows: list[aot.Row]) -> None:
    """With sizes that are multiples of 16. Moments are left out: one more would fit, but not on an A100."""
    regular = [row for row in rows if row.arch == 90 and row.regular and row.kernel in SPLIT]
    assert {row.kernel for row in regular} == SPLIT
    least = {row.table: min(other.possible for other in regular if other.table == row.table) for row in regular}
    assert named([row for row in regular if row.planned != least[row.table]]) == []


@pytest.mark.aot
def test_products_use_tensor_cores_in_every_precision(rows: list[aot.Row]) -> None:
    products = [row for row in rows if row.product]
    assert named([row for row in products if not row.tensor.endswith("HMMA" if row.arch == 80 else "MMA")]) == []
    done = {(row.kernel, row.form, row.input, row.arch) for row in products}
    kernels = [(kernel, form) for kernel, forms in FORMS.items() for form in forms]
    assert done == {(*kernel, label, arch) for kernel in kernels for label in INPUTS for arch in ARCHITECTURES}


@pytest.mark.aot
def test_split_products_are_added_up_outside_the_tensor_cores(rows: list[aot.Row]) -> None:
    """Tensor cores truncate their sums, which would cost float32 its accuracy. A covariance gradient of a single panel
    has no loop, so nothing to add up."""
    looped = [row for row in rows if row.product and row.looped]
    assert {row.kernel for row in looped} == PRODUCTS
    assert named([row for row in looped if row.outside != (row.input == "fp32")]) == []


@pytest.mark.aot
def test_large_tiles_use_the_warp_groups_of_hopper(rows: list[aot.Row]) -> None:
    large = [row for row in rows if row.arch == 90 and row.product and row.form == "gram"]
    large = [row for row in large if int(row.shape.split("x")[0]) >= 63]
    assert {row.kernel for row in large} == PRODUCTS - {"covariance.covariance"}
    assert named([row for row in large if not row.tensor.endswith("HGMMA")]) == []


@pytest.mark.aot
def test_loads_of_the_products_are_asynchronous_where_rows_are_aligned(rows: list[aot.Row]) -> None:
    pipelined = [row for row in rows if row.regular and row.product and row.looped]
    assert named([row for row in pipelined if not row.asynchronous]) == []


# -- fista_mlp, by nvcc ----------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
PARAMETERS = (
    "(const __grid_constant__ FistaInput, const __grid_constant__ FistaPrepared, const __grid_constant__ FistaOutput)"
)
# The most instructions beside a tensor-core instruction in the loop of k-steps whose weights are in shared memory, and
# in that of streamed ones. nvcc 13.0 makes 5 to 10% less. By the kind of product and the groups of 8 samples.
MOST_BESIDE = {
    ("Bf16", 1): (3.5, 7.3),
    ("Bf16", 2): (2.1, 3.2),
    ("Bf16", 4): (1.3, 1.9),
    ("Tf32x3", 1): (5.2, 6.2),
    ("Tf32x3", 2): (3.2, 3.7),
    ("Tf32x3", 4): (2.2, 2.5),
}


class Loop(NamedTuple):
    """A loop without a loop in it. products: tensor-core instructions; beside: other instructions for each of them."""

    products: int
    beside: float
    streams: bool


def loops(sass: str) -> list[Loop]:
    """Those with products."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +(?:@\S+ +)?([A-Z]\w+)([^;]*);", sass)
    code = [(int(place, 16), name, rest) for place, name, rest in found]
    ends = {}
    for place, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)$", rest.strip()) if name == "BRA" else None
        if target and int(target[1], 16) < place:
            ends[int(target[1], 16)] = place
    inner = [(a, b) for a, b in ends.items() if not any(a < c <= b for c in ends)]
    bodies = [[name for place, name, _ in code if a <= place <= b] for a, b in inner]
    counted = [(body.count("HMMA"), body) for body in bodies if "HMMA" in body]
    return [Loop(n, (len(body) - n) / n, "LDG" in body) for n, body in counted]


@pytest.fixture(scope="module")
def fista_mlp(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], str]:
    """What its instances use, and their instructions."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    folder = tmp_path_factory.mktemp("fista_mlp")
    instances = (f"template __global__ void fista_mlp_kernel<{mode}, {n}>{PARAMETERS};" for mode, n in MOST_BESIDE)
    lines = '#include "fista_mlp.cuh"', "namespace vjvcr {", *instances, "}"
    (folder / "instances.cu").write_text("\n".join(lines))
    command = [nvcc, "-cubin", "-arch=sm_90a", *NVCC_FLAGS, "-I", ROOT / "csrc", "-o", "cubin", "instances.cu"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = aot.disassembled(folder / "cubin")
    used = dict(re.findall(r"Function (\S+):\s+(REG:.*)", text))
    name = re.compile(r"(Bf16|Tf32x3)ELi(\d)")
    parts = (part.split("\n", 1) for part in text.split("Function : ")[1:])
    return {(m[1], int(m[2])): used[at] + "\n" + sass for at, sass in parts for m in [name.search(at)]}


@pytest.mark.aot
@pytest.mark.parametrize("instance", MOST_BESIDE, ids=str)
def test_fista_mlp_multiplies_with_few_other_instructions(
    fista_mlp: dict[tuple[str, int], str], instance: tuple[str, int]
) -> None:
    mode, tiles = instance
    text = fista_mlp[instance]
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] * 256 <= aot.REGISTERS  # a block has 256 threads
    four_steps = 4 * 2 * tiles * (1 if mode == "Bf16" else 3)
    large = [loop for loop in loops(text) if loop.products == four_steps]
    assert sorted(loop.streams for loop in large) == [False, True]
    print(instance, used["REG"], *large)
    for loop in large:
        assert loop.beside <= MOST_BESIDE[instance][loop.streams]


# -- A few of them ---------------------------------------------------------------------------------------------------


@pytest.fixture
def one_of_each(monkeypatch: pytest.MonkeyPatch, one_thread: None, no_driver: None) -> dict[str, aot.Job]:
    """A job of each kernel, in bfloat16 for an H100, in the place of all; compiled in threads, not in processes."""
    found: dict[str, aot.Job] = {}
    for job in aot.jobs([90]):
        if job.input == "bf16" and job.h.shape[0] % 16 == 0:
            found.setdefault(aot.kernel_name(job), job)
    monkeypatch.setattr(aot, "jobs", lambda archs: list(found.values()))
    monkeypatch.setattr(aot, "_jobs", [])
    monkeypatch.setattr(aot, "ProcessPoolExecutor", ThreadPoolExecutor)
    return found


def test_every_configuration_is_planned() -> None:
    """There is a job for every configuration of every table."""
    planned = {id(config) for config in aot.tables().values()}
    assert {id(job.launch.config) for job in aot.jobs(ARCHITECTURES)} == planned


def test_one_of_each(one_of_each: dict[str, aot.Job], capfd: pytest.CaptureFixture[str]) -> None:
    assert set(one_of_each) == PRODUCTS | OTHERS
    rows, violations = aot.compile_all([90], 1)
    said = capfd.readouterr().out.splitlines()
    assert [row.kernel for row in rows] == sorted(one_of_each)
    assert said[1 : 1 + len(rows)] == named(rows)
    assert all(row.registers > 0 and row.possible >= row.planned and row.spilled == 0 for row in rows)
    assert {row.kernel for row in rows if row.product} == PRODUCTS
    assert {row.kernel for row in rows if row.tensor.endswith("MMA")} == PRODUCTS
    missing = sorted(set(aot.tables()) - {row.table for row in rows})
    assert violations == [f"never compiled: {name}" for name in missing], "most configurations were not compiled"
    assert said[-len(missing) :] == violations

    # What breaks the plan is named.
    row = next(row for row in rows if row.product and row.regular)
    for broken, words in (
        ({"shared": aot.BLOCK[90] + 1}, "too much shared memory"),
        ({"tensor": ""}, "without tensor cores"),
        ({"spilled": aot.TOLERATED + 8}, "spills registers"),
        ({"possible": row.planned - 1}, f"is planned {row.planned} times"),
    ):
        assert any(words in line for line in aot.violations([row._replace(**broken)])), words


def test_what_does_not_compile_is_told(
    one_of_each: dict[str, aot.Job], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(job: aot.Job) -> aot.Row:
        raise ValueError("no such instruction")

    monkeypatch.setattr(aot, "distinct", lambda jobs: [one_of_each["finish.combine"]] * 50)
    monkeypatch.setattr(aot, "compiled", fails)
    rows, wrong = aot.compile_all([90], 1)
    assert rows == []
    assert capfd.readouterr().out.startswith("50 of 50, ")
    told = [line for line in wrong if not line.startswith("never compiled: ")]
    assert len(told) == 50
    assert told[0].startswith("does not compile: _combine")
    assert told[0].endswith("sm_90: no such instruction")
