"""One call of every operator on the GPU, against the reference in float64: `make gpu-smoke`.

    python benchmarks/smoke.py FILE

Prints a line for every result as it comes, and exits with 1 if one FAILED. FILE (JSON) is written anew after every
check; it is marked as partial until the last. A check runs in a process of its own, forked before CUDA is touched: a
crash, a hang or a lost CUDA context costs that check alone. Several run at once, since most of their time is the
compiler's.
"""

import functools
import math
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import providers
import records
import torch
import triton
from providers import SIGMA
from records import Row

from vjvcr_fast import reference
from vjvcr_fast.bench import timing
from vjvcr_fast.data.files import reason, write_atomic

sys.path.append(str(records.ROOT / "tests"))
import tolerances

SECONDS, SIDE_BY_SIDE = 40.0, 8  # for a check; checks at once
# (N, T, d) for each way through the kernels: N and d of CATER, MovingMNIST, (2.6M, 1, 64), and what torch multiplies.
SHAPES = [(160, 3, 2048), (256, 3, 512), (4096, 1, 64), (1100, 1, 1200), (1100, 1, 400)]
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}
SIGREG = [(256, 3, 512, 1024), (300, 1, 65, 130)]  # (N, T, d, K)
HIDDEN = (256, 512, 1024)  # of the predictor, for `fista_mlp`
TRAINED = "moving-mnist"


class Result(NamedTuple):
    """Of one output: its error relative to the reference, and the error that is allowed."""

    output: str
    error: float
    allowed: float
    note: str = ""


Check = Callable[[], list[Result]]


def checks() -> dict[tuple[str, str], Check]:
    """By operator and shape. What matters most comes first."""
    found: dict[tuple[str, str], Check] = {("operators", "built for CUDA"): built}
    for shape in SHAPES:
        found |= {(f"vcr_loss {name}", str(shape)): functools.partial(loss, shape, name) for name in PRECISIONS}
    for shape in SIGREG:
        found |= {(f"sigreg {name}", str(shape)): functools.partial(sigreg, shape, name) for name in PRECISIONS}
    for hidden in HIDDEN:
        for name in ("bf16", "fp32"):
            check = functools.partial(fista, hidden, name == "bf16")
            found[f"fista_mlp {name}, 100 steps", f"hidden {hidden}"] = check
    for name in ("float32", "float64"):
        found[f"proximal_step {name}", "(256, 20)"] = functools.partial(proximal, getattr(torch, name))
    found["variance_hinge fp32", str(SHAPES[0])] = functools.partial(hinge, SHAPES[0])
    found["vcr_loss bf16, CUDA graph", str(SHAPES[0])] = functools.partial(loss, SHAPES[0], "bf16", True)
    return found | {("training step bf16", TRAINED): training}


# -- Checks: each runs in its own process, which imports what it needs ----------------------------------------------


def built() -> list[Result]:
    from vjvcr_fast import native

    if "CUDA for" not in native.explain():
        raise RuntimeError(f"the operators are not built for CUDA: {native.explain()}")
    note = f"{native.explain()}; fista_mlp on {native.explain_plan()}"
    return [Result("", 0.0, 0.0, f"{torch.cuda.get_device_name()}: {note}")]


def loss(shape: tuple[int, int, int], name: str, captured: bool = False) -> list[Result]:
    """Forward and backward by the kernels, whatever "auto" would take."""
    device = timing.current()
    with timing.precision("tf32" if name == "tf32" else "fp32"), device.stream():
        parts = [features(shape, PRECISIONS[name], device)]
        step = functools.partial(providers.step, providers.ours_with(backend="triton"), parts)
        if captured:
            replay, outputs = device.capture(step)
            replay()
        else:
            outputs = step()
        found = providers.errors(outputs, *providers.judge(parts))
    # float16 goes through the tensor cores as TF32 does.
    allowed = providers.TOLERANCES["tf32" if name == "fp16" else name]
    return [Result(*made) for made in zip(("loss", "gradient"), found, allowed, strict=True)]


def hinge(shape: tuple[int, int, int]) -> list[Result]:
    """Moments alone, without a product."""
    from vjvcr_fast.losses import variance_hinge

    h = features(shape, torch.float32, timing.current())
    right = h.detach().double().requires_grad_()
    value, expected = variance_hinge(h, backend="triton"), reference.variance_hinge(right)
    gradients = torch.autograd.grad(value, h)[0], torch.autograd.grad(expected, right)[0]
    allowed = tolerances.TF32X3
    return [compared("value", value, expected, allowed), compared("gradient", *gradients, allowed)]


def sigreg(shape: tuple[int, int, int, int], name: str) -> list[Result]:
    from bench_sigreg_cuda import judge

    from vjvcr_fast.losses import projections, sigreg

    device = timing.current()
    directions = projections.drawn(0, *shape[2:], device.torch_device)
    with timing.precision("tf32" if name == "tf32" else "fp32"):
        parts = [features(shape[:3], PRECISIONS[name], device)]
        step = functools.partial(sigreg, directions=directions, backend="triton")
        found = providers.errors(providers.step(step, parts), *judge(parts, directions))
    allowed = providers.TOLERANCES["tf32" if name == "fp16" else name]
    return [Result(*made) for made in zip(("loss", "gradient"), found, allowed, strict=True)]


def fista(hidden: int, bf16: bool) -> list[Result]:
    """The mean energy at z*, against the loop in plain torch and float64."""
    import bench_latents
    from bench_latents import LATENT, STEPS, WEIGHT, N

    from vjvcr_fast import native
    from vjvcr_fast.latents import SparseLatent

    device = timing.current().torch_device
    if native.MISSING is not None:
        raise RuntimeError(f"the operators are {native.MISSING}")
    if not native.serves_fista(torch.empty(N, LATENT, device=device), hidden, bf16):
        raise RuntimeError(f"not served: {native.explain_plan()}")
    energy = bench_latents.predictor(bench_latents.Case(hidden, 3, 256), device)
    exact = energy.to(torch.float64)
    latent = functools.partial(SparseLatent, LATENT, WEIGHT, STEPS, tolerance=0.0)
    z = latent(bf16=bf16).infer(energy, N, device=device, dtype=torch.float32).z.double()
    made = exact(z) + WEIGHT * z.abs().sum(dim=1)
    with bench_latents.in_torch():
        right = latent().infer(exact, N, device=device, dtype=torch.float64).energy
    allowed = tolerances.LATENT_BFLOAT16 if bf16 else tolerances.LATENT_ROUTES
    return [compared("mean energy", made.mean(), right.mean(), allowed)]


def proximal(dtype: torch.dtype) -> list[Result]:
    from vjvcr_fast import native

    if native.MISSING is not None:
        raise RuntimeError(f"the operators are {native.MISSING}")
    generator = torch.Generator().manual_seed(0)
    before, start, gradient = (torch.randn(256, 20, generator=generator, dtype=torch.float64) for _ in range(3))
    step, momentum = (torch.rand(256, generator=generator, dtype=torch.float64) for _ in range(2))
    inputs = (before, start, gradient, step, momentum)
    z, v, *others = (tensor.to(timing.current().torch_device, dtype, copy=True) for tensor in inputs)
    weight, low, high = 0.3, 0.0, 1.0
    torch.ops.vjvcr.proximal_step(z, v, *others, weight, low, high)
    step, momentum = step[:, None], momentum[:, None]
    after = reference.soft_threshold(start - step * gradient, step * weight).clamp(low, high)
    ahead = after + momentum * (after - before)
    ahead = torch.where(ahead * after > 0, ahead, 0).clamp(low, high)
    allowed = tolerances.FLOAT64 if dtype == torch.float64 else tolerances.FLOAT32
    return [compared("z", z.cpu(), after, allowed), compared("v", v.cpu(), ahead, allowed)]


def training() -> list[Result]:
    """A run's first loss, its videos drawn on the GPU, against the same in float32 on the CPU."""
    from bench_training import SAME, config_of, ours, sources_of

    host, device = torch.device("cpu"), timing.current().torch_device
    config = config_of(TRAINED, timing.Host())  # the mini preset
    sources = zip((device, host), sources_of(config, device, Path()), strict=True)
    made, right = (float(ours(config, videos, place, "off", None)()) for place, videos in sources)
    return [Result("loss", abs(made / right - 1), SAME["bf16"])]


def features(shape: tuple[int, int, int], dtype: torch.dtype, device: timing.Device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (SIGMA * torch.randn(shape, generator=generator)).to(device.torch_device, dtype).requires_grad_()


def compared(output: str, made: torch.Tensor, right: torch.Tensor, allowed: float) -> Result:
    return Result(output, tolerances.relative(made, right), allowed)


# -- Processes ------------------------------------------------------------------------------------------------------


class Running(NamedTuple):
    operator: str
    shape: str
    process: BaseProcess
    since: float


def child(check: Check, pipe: connection.Connection) -> None:
    """Sends the results, or why there are none."""
    torch.set_num_threads(1)
    try:
        found: list[Result] | str = check()
    except BaseException as error:
        found = f"{type(error).__name__}: {reason(error)}"
    pipe.send(found)
    pipe.close()
    os._exit(0)  # a lost CUDA context may hang what runs at an interpreter's end


def answer(pipe: connection.Connection, one: Running) -> list[Result] | str:
    """What a process that has ended, or has something to say, sent."""
    try:
        return pipe.recv()
    except EOFError:
        one.process.join()
        code = one.process.exitcode or 0
        return f"the process died: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


def rows_of(one: Running, found: list[Result] | str) -> list[Row]:
    row = {"operator": one.operator, "shape": one.shape}
    seconds = {"seconds": time.monotonic() - one.since}
    if isinstance(found, str):
        return [row | {"ok": False, "reason": found} | seconds]
    rows = []
    for output, error, allowed, note in found:
        right = error <= allowed  # NaN is not
        why = {} if right else {"reason": f"off by {error:.1e}"}
        number = error if math.isfinite(error) else None
        more = {"note": note} if note else {}
        rows.append(row | {"output": output, "error": number, "allowed": allowed, "ok": right} | why | more | seconds)
    return rows


def line(row: Row) -> str:
    what = f"{'ok' if row['ok'] else 'FAILED':6} {row['operator']:28} {row['shape']:16} {row.get('output', ''):12}"
    numbers = f"error {row['error']:.1e}, allowed {row['allowed']:.1e}" if row.get("error") is not None else ""
    return f"{what} {numbers:33} {row['seconds']:4.1f} s  {row.get('reason', row.get('note', ''))}".rstrip()


def run(wanted: dict[tuple[str, str], Check], say: Callable[[list[Row]], None]) -> None:
    """Runs all checks; say(rows) as each ends."""
    fork = multiprocessing.get_context("fork")
    waiting, running = list(wanted.items()), dict[connection.Connection, Running]()
    while waiting or running:
        while waiting and len(running) < min(SIDE_BY_SIDE, len(os.sched_getaffinity(0))):
            (operator, shape), check = waiting.pop(0)
            pipe, end = fork.Pipe(duplex=False)
            process = fork.Process(target=child, args=(check, end), daemon=True)
            process.start()
            end.close()
            running[pipe] = Running(operator, shape, process, time.monotonic())
        ready = connection.wait(list(running), timeout=0.5)
        for pipe, one in list(running.items()):
            late = time.monotonic() - one.since > SECONDS
            if pipe not in ready and not late:
                continue
            found = answer(pipe, one) if pipe in ready else f"no answer after {SECONDS:.0f} s"
            one.process.kill()
            del running[pipe]
            say(rows_of(one, found))


def main(path: Path) -> int:
    commit, dirty = records.commit()
    about = {"commit": commit, "dirty": dirty, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    about |= {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    rows: list[Row] = []
    started = time.monotonic()

    def say(more: list[Row], partial: bool = True) -> None:
        rows.extend(more)
        for row in more:
            print(line(row), flush=True)
        marked = {"partial": True} if partial else {"seconds": time.monotonic() - started}
        try:
            write_atomic(path, records.dumps(records.results("smoke", about | marked, rows)))
        except OSError as error:
            print(f"not written: {error}", flush=True)

    run(checks(), say)
    say([], partial=False)
    failed = sum(not row["ok"] for row in rows)
    print(f"{len(rows) - failed} ok, {failed} FAILED, {time.monotonic() - started:.0f} s: {path}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
