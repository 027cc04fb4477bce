"""What a step of vcr_loss on a GPU costs the host: forward and backward, until all is launched.

    pytest benchmarks/bench_host.py

On a GPU nothing is waited for inside a step. Without one, tensors lie on the CPU, and Triton compiles for an H100 and
hands its launches to a driver that does nothing: torch's and Triton's Python run, only the driver's share is missing.

nothing              an autograd.Function without work and without checks: torch's own part
launches left out    ours, up to the launches
ours                 all of it
operators            what compiled code calls: the same behind torch.library's custom operators
"""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import providers
import pytest
import records
import torch
from providers import ALPHA, BETA, Case, Parts, Provider
from torch import Tensor

from vjvcr_fast.bench.timing import Host, timed
from vjvcr_fast.losses import backends, ops
from vjvcr_fast.losses.analytic import Settings

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter launches nothing", allow_module_level=True)
sys.path.append(str(records.ROOT / "tests" / "kernels"))

import aot
from vjvcr_fast.kernels.launch import Kernel

CASES = [Case(256, (15,), 512), Case(256, (10, 5), 512), Case(160, (10,), 2048), Case(4096, (1,), 64)]
MOST_US = {"256, 15, 512": 150.0}
SECONDS, ROUNDS = 1.0, (200, 2000)


class Launching(Host):
    """The host, which begins each step with an idle GPU, or with a driver that has forgotten the step before."""

    def sweep(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        else:
            aot.driver.active.launched.clear()


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*parts)
        return tuple(torch.empty((), device=parts[0].device) for _ in range(3))

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(part) for part in ctx.saved_tensors)


ours = providers.ours_with(backend="triton")


def without_launches(parts: Parts) -> tuple[Tensor, ...]:
    launch = Kernel.launch
    Kernel.launch = lambda *given, **arguments: None  # type: ignore[method-assign]
    try:
        return providers.step(ours, parts)
    finally:
        Kernel.launch = launch  # type: ignore[method-assign]


def stepping(function: Provider) -> Callable[[Parts], tuple[Tensor, ...]]:
    return lambda parts: providers.step(function, parts)


STEPS = {
    "nothing": stepping(lambda parts: Nothing.apply(*parts)[0]),
    "launches left out": without_launches,
    "ours": stepping(ours),
    "operators": stepping(lambda parts: ops.vcr(parts, *Settings(ALPHA, BETA, 1.0, 1e-4, gram=_gram(parts)))[0]),
}


def _gram(parts: Parts) -> bool:
    return parts[0].shape[0] < parts[0].shape[2]


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The GPU, or the CPU with what makes Triton take it for one."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    monkeypatch.setattr(aot.driver, "_active", None)
    monkeypatch.setattr(backends, "against_triton", lambda device, dtype: None)
    aot.pretend()
    yield torch.device("cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_host(case: Case, gpu: torch.device, check_only: bool, report: Any) -> None:
    parts = [torch.randn(case.n, steps, case.d, device=gpu, requires_grad=True) for steps in case.steps]
    rows: dict[str, records.Row] = {name: {"N, T, d": str(case), "provider": name} for name in STEPS}
    for step in STEPS.values():
        assert [tuple(gradient.shape) for gradient in step(parts)[1:]] == [tuple(part.shape) for part in parts]
    if check_only:
        return
    functions = {name: lambda step=step: step(parts) for name, step in STEPS.items()}
    for name, times in timed(Launching(), functions, SECONDS, *ROUNDS).items():
        rows[name] |= {"us": 1e3 * times["_median_ms"], **times}
    if str(case) in MOST_US:
        most, found = MOST_US[str(case)], rows["ours"]["us"]
        rows["ours"]["target"] = f"us <= {most:g}: {'met' if found <= most else 'missed'}"
    report(list(rows.values()))
