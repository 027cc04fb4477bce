"""Compiles every kernel in every configuration, without a GPU, and checks the configurations' plan.

    python -m vjvcr_fast.kernels.aot

The launchers are called on tensors without data; what they would launch is compiled as Triton's own launch compiles it.
Exit status 1, and the reasons, where a configuration was not compiled, registers are spilled, a product does without
tensor cores, a block needs too much shared memory, or, with sizes that are multiples of 16, fewer blocks fit a
multiprocessor than planned; other sizes take more registers. What Triton has in its cache is not compiled again: it
took 0.0 s.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from vjvcr_fast.kernels import covariance, gram, library, moments
from vjvcr_fast.kernels.launch import INTERPRETED, Config, Launch, recording
from vjvcr_fast.kernels.moments import Incoming, Weights

# Of a multiprocessor: registers, threads, blocks, bytes of shared memory. A block's share may be as large as BLOCK
# says: what 80 is given must fit GPUs of 86 and 89, too.
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32
SHARED = {80: 164 << 10, 90: 228 << 10}
BLOCK = {80: 99 << 10, 90: 227 << 10}

# Bytes spilled. The configurations were chosen with 3.7; other versions' assemblers may miss by a register or two.
TOLERATED = 0 if triton.__version__.startswith("3.7.") else 8

# dtype of h and torch's setting for float32 products.
INPUTS = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "fp32": (torch.float32, "ieee"),
    "fp32 as tf32": (torch.float32, "tf32"),
}
STEPS = 3
# (N, d): each route and panel of gram.py, each panel of covariance.py, and two panels of features.
REGULAR = [*((sum(panels), 4096) for panels in gram.PANELS), (512, 4096), *((4096, d) for d in (16, 32, 64, 128, 256))]
ODD = [*((sum(panels) - 1, 4095) for panels in gram.PANELS), (511, 4095), *((2047, d) for d in (13, 29, 61, 127))]
WEIGHTS = Weights(alpha=25.0, beta=1.0, threshold=1.0, eps=1e-4)


class Job(NamedTuple):
    """A kernel in one configuration, with arguments like a caller's."""

    launch: Launch
    config: Config
    arch: int
    input: str
    h: Tensor


class Row(NamedTuple):
    """What a job came to. choice: which configuration of the table's entry; spilled: bytes; planned, possible: blocks
    of a multiprocessor; tensor: tensor-core instructions; asynchronous: loads into shared memory that a pipeline makes
    ahead of time."""

    kernel: str
    input: str
    shape: str
    tiles: str
    warps: int
    stages: int
    arch: int
    registers: int
    spilled: int
    shared: int
    planned: int
    possible: int
    tensor: str
    asynchronous: int
    seconds: float
    table: str
    choice: int
    regular: bool
    product: bool


# -- What to compile ------------------------------------------------------------------------------------------------


def tables() -> dict[str, list[Config]]:
    """Every entry of every table of configurations, by its name."""
    found: dict[str, list[Config]] = {}
    for module in (moments, gram, covariance, library):
        for name, table in vars(module).items():
            for key, configs in table.items() if isinstance(table, dict) else [(None, table)]:
                if isinstance(configs, list) and all(isinstance(c, Config) for c in configs):
                    label = f"{_tail(module.__name__)}.{name}"
                    found[label if key is None else f"{label}[{key}]".translate({ord(c): None for c in "()'"})] = (
                        configs
                    )
    return found


def jobs(archs: Sequence[int]) -> list[Job]:
    found = []
    for label, (dtype, precision) in INPUTS.items():
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = precision
        try:
            for h, arch in itertools.product(_tensors(label, dtype), archs):
                with recording(arch) as launches:
                    _call_launchers(h)
                found += [Job(r, c, arch, label, h) for r in launches for c in r.configs if arch in c.archs]
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
    return found


def _tensors(label: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """(N, T, d): the sizes above, and in float32 one for each form whose strides need 64 bits."""
    yield from (torch.empty(n, STEPS, d, dtype=dtype, device="meta") for n, d in REGULAR)
    if label != "fp16":  # as float32 for TF32, but for the loads
        yield from (torch.empty(n, STEPS, d, dtype=dtype, device="meta") for n, d in ODD)
    if label == "fp32":
        yield from (torch.empty(n, (1 << 32) // d, d, dtype=dtype, device="meta") for n, d in [(64, 4096), (4096, 64)])


def _call_launchers(h: Tensor) -> None:
    n, steps, d = h.shape
    form: Any = gram if n < d else covariance
    scalar, out = torch.empty((), device="meta"), torch.empty_like(h)
    # What backward is given depends on which of the three values the caller used.
    incoming = Incoming(scalar, None, None) if _regular(h) else Incoming(None, scalar, scalar)
    product, found, norms = (gram.gram if n < d else covariance.covariance)(h, WEIGHTS)
    form.gradient(h, product, found.means, found.squares, out, incoming, WEIGHTS, steps * d)
    moments.moments(h, WEIGHTS)
    moments.hinge_gradient(h, found.means, found.squares, out, incoming, WEIGHTS, steps * d)
    moments.combine([found], [norms], WEIGHTS, n < d, n, steps * d)
    moments.scale_(h, scalar)
    library.centred(h, found.means)


def _regular(h: Tensor) -> bool:
    return h.shape[0] % 16 == 0 and h.shape[2] % 16 == 0


def _tail(name: str) -> str:
    return name.rpartition(".")[2]


# -- Compilation ----------------------------------------------------------------------------------------------------


def pretend() -> None:
    """Lets Triton believe in GPUs: number 80 is an A100, number 90 an H100. The one in use is `at.arch`."""
    at = SimpleNamespace(arch=90)
    target, device = lambda: GPUTarget("cuda", at.arch, 32), lambda: at.arch
    driver.set_active(
        SimpleNamespace(at=at, get_current_target=target, get_current_device=device, get_current_stream=lambda _: 0)
    )


def _binary(job: Job) -> Any:
    """As a launch would compile it, but for the shape class: a constant that only autotuning looks at."""
    kernel, _, args, constants = job.launch
    constants = constants | dict(job.config.tiles) | ({"SHAPE": 0} if "SHAPE" in constants else {})
    driver.active.at.arch = job.arch
    return kernel.warmup(*args, **constants, num_warps=job.config.warps, num_stages=job.config.stages, grid=(1,))


def distinct(jobs: Sequence[Job]) -> list[Job]:
    """The first of those that Triton takes for the same."""
    found: dict[tuple[Any, ...], Job] = {}
    for job in jobs:

        def instead(key: str, job: Job = job, **_: Any) -> bool:
            found.setdefault((job.launch.kernel, job.arch, id(job.config), key), job)
            return True

        triton.knobs.runtime.jit_cache_hook = instead
        _binary(job)
    triton.knobs.runtime.jit_cache_hook = None
    return list(found.values())


def compiled(job: Job) -> Row:
    kernel, _, _, constants = job.launch
    start = time.monotonic()
    binary = _binary(job)
    seconds = round(time.monotonic() - start, 1)
    used, shared = _usage(binary.asm["cubin"]), binary.metadata.shared
    tiles = {name: size for name, size in constants.items() if name in ("BN", "BD")} | dict(job.config.tiles)
    table, choice = next((t, i) for t, cs in tables().items() for i, c in enumerate(cs) if c is job.config)
    return Row(
        kernel=f"{_tail(kernel.__module__)}.{kernel.__name__.lstrip('_')}",
        input=job.input,
        shape="x".join(map(str, job.h.shape)),
        tiles=" ".join(f"{name}={size}" for name, size in tiles.items()),
        warps=job.config.warps,
        stages=job.config.stages,
        arch=job.arch,
        registers=used["REG"],
        spilled=used["STACK"] + used["LOCAL"],
        shared=shared,
        planned=job.config.blocks,
        possible=_blocks(used["REG"], job.config.warps, shared, job.arch),
        tensor=next((f"{used[name]} {name}" for name in ("HGMMA", "HMMA") if used[name]), ""),
        asynchronous=used["LDGSTS"],
        seconds=seconds,
        table=table,
        choice=choice,
        regular=_regular(job.h),
        product="tt.dot" in binary.asm["ttir"],
    )


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, bytes of its stack (where ptxas spills, there is one), and how many there are of some
    instructions."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}  # cuobjdump calls nvdisasm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [folder / "cuobjdump", "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | path).stdout
    numbers = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return numbers | {name: len(re.findall(rf"\b{name}\b", text)) for name in ("HGMMA", "HMMA", "LDGSTS")}


def _blocks(registers: int, warps: int, shared: int, arch: int) -> int:
    """How many fit a multiprocessor. A warp is given registers by 256; a kilobyte of shared memory is the system's."""
    warps_at_once = REGISTERS // (math.ceil(registers * 32 / 256) * 256) // 4 * 4
    return min(warps_at_once // warps, SHARED[arch] // (shared + 1024), THREADS // (32 * warps), BLOCKS)


# -- The plan -------------------------------------------------------------------------------------------------------


def violations(rows: Sequence[Row], archs: Sequence[int]) -> list[str]:
    """Of the plan, each with the row in question."""
    found = []
    for row in rows:
        wrong = {
            "needs too much shared memory": row.shared > BLOCK[row.arch],
            "is a product without tensor cores": row.product and not row.tensor,
            "spills registers": row.spilled > TOLERATED,
            f"is planned {row.planned} times a multiprocessor": row.regular and row.possible < row.planned,
        }
        found += [f"{words}: {line(row)}" for words, true in wrong.items() if true]
    done = {(row.table, row.choice, row.arch) for row in rows}
    planned = {(t, i, a) for t, cs in tables().items() for i, c in enumerate(cs) for a in c.archs if a in archs}
    return found + [f"never compiled: {t}, configuration {i}, sm_{a}" for t, i, a in sorted(planned - done)]


TITLES = "kernel", "input", "N x T x d", "tiles", "warps", "stages", "sm", "registers", "spilled", "shared"
WIDTHS = 21, 12, 20, 22, 5, 6, 2, 9, 7, 6
HEADER = " ".join(f"{t:{w}}" for t, w in zip(TITLES, WIDTHS, strict=True)) + " blocks tensor     async seconds"


def line(row: Row) -> str:
    cells = (*row[:9], f"{row.shared / 1024:.0f} K")
    text = " ".join(f"{c:<{w}}" if isinstance(c, str) else f"{c:>{w}}" for c, w in zip(cells, WIDTHS, strict=True))
    return f"{text} {row.planned:>3}/{row.possible:<2} {row.tensor:10} {row.asynchronous:5} {row.seconds:7.1f}"


# -- All of them ----------------------------------------------------------------------------------------------------

_jobs: list[Job] = []  # of this process, in the same order in all


def _prepare(archs: Sequence[int]) -> None:
    torch.set_num_threads(1)
    pretend()
    _jobs[:] = distinct(jobs(archs))


def _run(index: int) -> Row | str:
    """A row, or why there is none."""
    job = _jobs[index]
    try:
        return compiled(job)
    except Exception as error:
        what = f"{job.launch.kernel.__name__} {job.config} {job.input} {tuple(job.h.shape)} sm_{job.arch}"
        return f"does not compile: {what}: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vjvcr_fast.kernels.aot", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--archs", default="80,90", help="compute capabilities (default: 80,90)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to FILE, too")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=cores, help="processes that compile (default: one a core)")
    options = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    archs = [int(arch) for arch in options.archs.split(",")]
    _prepare(archs)
    start, rows, wrong = time.monotonic(), [], []
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), _prepare, (archs,)) as pool:
        for done, result in enumerate(pool.map(_run, range(len(_jobs))), 1):
            (rows if isinstance(result, Row) else wrong).append(result)
            if done % 50 == 0:
                print(f"{done} of {len(_jobs)}, {time.monotonic() - start:.0f} s", flush=True)
    rows.sort(key=lambda row: (row.kernel, row.arch))
    wrong += violations(rows, archs)
    print(HEADER, *map(line, rows), sep="\n")
    print(f"Triton {triton.__version__}: {len(rows)} kernels compiled, {time.monotonic() - start:.0f} s")
    if options.json:
        partial = options.json.with_name(options.json.name + ".partial")
        table = {
            "triton": triton.__version__,
            "tolerated": TOLERATED,
            "rows": [row._asdict() for row in rows],
            "violations": wrong,
        }
        partial.write_text(json.dumps(table, indent=1))
        partial.replace(options.json)
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
