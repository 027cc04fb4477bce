"""Compiles every kernel in every configuration, without a GPU, and checks the plan of each configuration.

`make aot` calls `compile_all`. Launches are recorded instead of made, on tensors without data, and compiled as Triton's
own launch would compile them, for an A100 (80) and an H100 (90). `violations` lists what breaks the plan: a
configuration that was not compiled, spilled registers, a product without tensor cores, too much shared memory, or fewer
blocks on a multiprocessor than planned. Kernels that are in Triton's cache are not compiled again and take 0.0 s.
"""

import itertools
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from vjvcr_fast.kernels import covariance, finish, gradient, gram, moments, sigreg, vcr
from vjvcr_fast.kernels.launch import INTERPRETED, Config, Kernel

# Of a multiprocessor: registers, threads, blocks, bytes of shared memory. A block may have BLOCK bytes of it: what is
# compiled for 80 must fit GPUs of 86 and 89, too.
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32
SHARED = {80: 164 << 10, 90: 228 << 10}
BLOCK = {80: 99 << 10, 90: 227 << 10}

# Bytes spilled. The configurations were chosen with 3.7; other versions' assemblers may miss by a register or two.
TOLERATED = 0 if triton.__version__.startswith("3.7.") else 8

MODULES = moments, gram, covariance, finish, gradient, sigreg
# dtype of h and torch's setting for float32 products.
INPUTS = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "fp32": (torch.float32, "ieee"),
    "fp32 as tf32": (torch.float32, "tf32"),
}
STEPS = 3
KNOTS = [(16, False), (5, True)]  # how many above zero, and whether at half steps: as most have it, and eb_jepa
# (N, d): each route and panel of gram.py, each panel of covariance.py, and two panels of features.
REGULAR = [*((n, 4096) for n in (32, 64, 128, 160, 512)), *((4096, d) for d in (16, 32, 64, 128, 256))]
ODD = [*((n, 4095) for n in (31, 63, 127, 159, 511)), *((2047, d) for d in (13, 29, 61, 127))]


class Launch(NamedTuple):
    """A launch that was recorded instead of made."""

    kernel: Any
    config: Config
    arguments: dict[str, Any]


class Job(NamedTuple):
    """A launch to compile for an architecture, with arguments like a caller's."""

    launch: Launch
    arch: int
    input: str
    h: Tensor


class Row(NamedTuple):
    """What a job came to. spilled: bytes; planned, possible: blocks of a multiprocessor; tensor: tensor-core
    instructions; asynchronous: loads into shared memory that a pipeline makes ahead of time; looped: whether there is a
    loop; outside: whether products are added up outside the tensor cores."""

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
    form: str
    regular: bool
    product: bool
    looped: bool
    outside: bool

    def __str__(self) -> str:
        cells = (*self[:9], f"{self.shared / 1024:.0f} K")
        text = " ".join(f"{c:<{w}}" if isinstance(c, str) else f"{c:>{w}}" for c, w in zip(cells, WIDTHS, strict=True))
        return f"{text} {self.planned:>3}/{self.possible:<2} {self.tensor:10} {self.asynchronous:5} {self.seconds:7.1f}"


TITLES = "kernel", "input", "N x T x d", "tiles", "warps", "stages", "sm", "registers", "spilled", "shared"
WIDTHS = 21, 12, 20, 22, 5, 6, 2, 9, 7, 6
HEADER = " ".join(f"{t:{w}}" for t, w in zip(TITLES, WIDTHS, strict=True)) + " blocks tensor     async seconds"

# -- What to compile ------------------------------------------------------------------------------------------------


def tables() -> dict[str, Config]:
    """Every configuration of every table, by its name."""
    found = {}
    for module in MODULES:
        for name, table in vars(module).items():
            for key, config in table.items() if isinstance(table, dict) else [(None, table)]:
                if isinstance(config, Config):
                    label = f"{_tail(module.__name__)}.{name}"
                    found[label if key is None else f"{label}[{key}]".translate({ord(c): None for c in "()'"})] = config
    return found


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Launches for that architecture are listed instead of made. Tensors may be on the meta device."""
    launches: list[Launch] = []

    def record(kernel: Kernel, config: Config, programs: int, **arguments: Any) -> None:
        launches.append(Launch(kernel.jit, config, arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "launch", record)
        patch.setattr(gram, "architecture", lambda device: arch)
        yield launches


def jobs(archs: Sequence[int]) -> list[Job]:
    found = []
    for label, (dtype, precision) in INPUTS.items():
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = precision
        try:
            for h, arch in itertools.product(_tensors(label, dtype), archs):
                with recording(arch) as launches:
                    # What backward is given depends on which of the three values the caller used.
                    call_launchers(h, h.shape[0] < h.shape[2], [_regular(h), not _regular(h), not _regular(h)])
                found += [Job(one, arch, label, h) for one in launches]
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
    return found


def call_launchers(h: Tensor, use_gram: bool, used: Sequence[bool] = (True, False, False)) -> None:
    """Every kernel that serves h, with and without a penalty. used: of (loss, variance, covariance)."""
    g = torch.empty((), device=h.device)
    for penalty in (True, False):
        weights = vcr.Weights(alpha=25.0, beta=1.0, threshold=1.0, eps=1e-4, covariance=penalty)
        kept = vcr.forward([h], weights, use_gram)[3]
        vcr.backward([h], kept, vcr.Incoming(*(g if one else None for one in used)), weights, use_gram, [True])
    vcr.torch_product.centred(h, vcr.Kept(*kept))
    for count, half in KNOTS if _regular(h) else KNOTS[:1]:
        directions = torch.empty(h.shape[2], 1024 if _regular(h) else 1003, device=h.device)
        knots = sigreg.Knots(count, 3 / count, half)
        _, (sums,) = sigreg.forward([h], directions, knots, 0.1)
        sigreg.backward(h, directions, sums, g, vcr.like(h), knots, 0.2)


def _tensors(label: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """(N, T, d): the sizes above, and in float32 one for each form whose strides need 64 bits."""
    shapes = [(n, STEPS, d) for n, d in REGULAR]
    if label != "fp16":  # which differs from float32 for TF32 by its loads alone
        shapes += [(n, STEPS, d) for n, d in ODD]
    if label == "fp32":
        shapes += [(n, (1 << 32) // d, d) for n, d in [(64, 4096), (4096, 64)]]
    return (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)


def _regular(h: Tensor) -> bool:
    return h.shape[0] % 16 == 0 and h.shape[2] % 16 == 0


def _tail(name: str) -> str:
    return name.rpartition(".")[2]


def kernel_name(job: Job) -> str:
    return f"{_tail(job.launch.kernel.__module__)}.{job.launch.kernel.__name__.lstrip('_')}"


# -- Compilation ----------------------------------------------------------------------------------------------------


def pretend() -> None:
    """Makes Triton believe in GPUs: number 80 is an A100, number 90 an H100. The one in use is `at.arch`.

    What is launched there is put into the list `launched`, as Triton hands it to the driver, and nothing runs.
    """
    at, launched = SimpleNamespace(arch=90), []
    utils = SimpleNamespace(
        load_binary=lambda name, *_: (object(), f"{name} {next(numbers)}", 0, 0, THREADS),
        unload_module=lambda _: None,
        get_device_properties=lambda _: {"max_shared_mem": BLOCK[at.arch]},
    )
    numbers = itertools.count()
    driver.set_active(
        SimpleNamespace(
            at=at,
            launched=launched,
            get_current_target=lambda: GPUTarget("cuda", at.arch, 32),
            get_current_device=lambda: at.arch,
            get_current_stream=lambda _: 0,
            launcher_cls=lambda source, metadata: lambda *given: launched.append(given),
            utils=utils,
        )
    )


def _binary(job: Job) -> Any:
    """What Triton's launch would run."""
    kernel, config, arguments = job.launch
    driver.active.at.arch = job.arch
    compilation = {"num_warps": config.warps, "num_stages": config.stages, "grid": (1,)}
    return kernel.warmup(**arguments, **config.tiles, **compilation)


def distinct(jobs: Sequence[Job]) -> list[Job]:
    """The first job of each binary."""
    found: dict[tuple[Any, ...], Job] = {}
    for job in jobs:

        def instead(key: str, job: Job = job, **_: Any) -> bool:
            found.setdefault((job.launch.kernel, job.arch, id(job.launch.config), key), job)
            return True

        triton.knobs.runtime.jit_cache_hook = instead
        _binary(job)
    triton.knobs.runtime.jit_cache_hook = None
    return list(found.values())


def compiled(job: Job) -> Row:
    _, config, arguments = job.launch
    start = time.monotonic()
    binary = _binary(job)
    seconds = round(time.monotonic() - start, 1)
    used, shared = _usage(binary.asm["cubin"]), binary.metadata.shared
    tiles = {name: size for name, size in arguments.items() if name in ("BN", "BM", "BD")} | config.tiles
    return Row(
        kernel=kernel_name(job),
        input=job.input,
        shape="x".join(map(str, job.h.shape)),
        tiles=" ".join(f"{name}={size}" for name, size in tiles.items()),
        warps=config.warps,
        stages=config.stages,
        arch=job.arch,
        registers=used["REG"],
        spilled=used["STACK"] + used["LOCAL"],
        shared=shared,
        planned=config.planned(job.h.shape[2]),
        possible=_blocks(used["REG"], config.warps, shared, job.arch),
        tensor=next((f"{used[name]} {name}" for name in ("HGMMA", "HMMA") if used[name]), ""),
        asynchronous=used["LDGSTS"],
        seconds=seconds,
        table=next(name for name, one in tables().items() if one is config),
        form="gram" if job.h.shape[0] < job.h.shape[2] else "covariance",
        regular=_regular(job.h),
        product="tt.dot" in binary.asm["ttir"],
        looped="scf.for" in binary.asm["ttir"],
        outside=_adds_outside(binary.asm["ttgir"]),
    )


def _adds_outside(ttgir: str) -> bool:
    """Whether what a loop with a product hands on to its next round was added to by an ordinary instruction, not by the
    product."""
    added = set(re.findall(r"(%\S+) = arith\.addf .* : tensor<\S+ #mma\d*>", ttgir))
    own: dict[str, list[str]] = {}  # by their indentation the lines of the loops around
    for line in ttgir.splitlines():
        indent, text = re.match(r"( *)(.*)", line).groups()
        own = {before: lines for before, lines in own.items() if before <= indent}
        own.setdefault(indent, []).append(text)
        if text.startswith("scf.yield") and any("dot" in before for before in own[indent]):
            names = text.removeprefix("scf.yield ").partition(" :")[0].split(", ")
            if added & set(names):
                return True
    return False


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, bytes of its stack (ptxas spills to the stack), and how often some instructions occur."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = disassembled(file.name)
    numbers = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return numbers | {name: len(re.findall(rf"\b{name}\b", text)) for name in ("HGMMA", "HMMA", "LDGSTS")}


def disassembled(cubin: str | Path) -> str:
    """What the kernels in a file use, and their instructions."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}  # cuobjdump calls nvdisasm
    command = [folder / "cuobjdump", "-res-usage", "-sass", cubin]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | path).stdout


def _blocks(registers: int, warps: int, shared: int, arch: int) -> int:
    """How many blocks fit a multiprocessor. A warp gets registers by 256; the system takes 1 KiB of shared memory."""
    warps_at_once = REGISTERS // (math.ceil(registers * 32 / 256) * 256) // 4 * 4
    return min(warps_at_once // warps, SHARED[arch] // (shared + 1024), THREADS // (32 * warps), BLOCKS)


# -- The plan -------------------------------------------------------------------------------------------------------


def violations(rows: Sequence[Row]) -> list[str]:
    """What breaks the plan, each with its row."""
    found = []
    for row in rows:
        wrong = {
            "needs too much shared memory": row.shared > BLOCK[row.arch],
            "is a product without tensor cores": row.product and not row.tensor,
            "spills registers": row.spilled > TOLERATED,
            f"is planned {row.planned} times a multiprocessor": row.possible < row.planned,
        }
        found += [f"{words}: {row}" for words, true in wrong.items() if true]
    return found + [f"never compiled: {name}" for name in sorted(set(tables()) - {row.table for row in rows})]


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
        what = f"{job.launch.kernel.__name__} {job.launch.config} {job.input} {tuple(job.h.shape)} sm_{job.arch}"
        return f"does not compile: {what}: {error}"


def compile_all(archs: Sequence[int], processes: int) -> tuple[list[Row], list[str]]:
    """Compiles and prints all rows. Returns them and what is wrong."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter compiles nothing")
    _prepare(archs)
    start, rows, wrong = time.monotonic(), [], []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _prepare, (archs,)) as pool:
        for done, result in enumerate(pool.map(_run, range(len(_jobs))), 1):
            (rows if isinstance(result, Row) else wrong).append(result)
            if done % 50 == 0:
                print(f"{done} of {len(_jobs)}, {time.monotonic() - start:.0f} s", flush=True)
    rows.sort(key=lambda row: (row.kernel, row.arch))
    wrong += violations(rows)
    print(HEADER, *rows, sep="\n")
    print(f"Triton {triton.__version__}: {len(rows)} kernels compiled, {time.monotonic() - start:.0f} s")
    print(*wrong, sep="\n")
    return rows, wrong
