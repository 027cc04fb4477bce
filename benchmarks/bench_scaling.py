"""Time, memory and error of the loss as d, N and T grow: ours, each of its two forms, and the reference.

    pytest benchmarks/bench_scaling.py [--full]

Forward and backward in float32, with outputs checked against the reference in float64 first. One size grows, the others
stay as in FIXED. `ours` chooses its form from the shape. The forms beside it show where they cross, and what the choice
costs: `choice` is the time of the chosen form over that of the faster one, and should be at most CHOICE.
"""

from functools import partial
from typing import Any

import providers
import torch
from providers import ALPHA, BETA, SIGMA, Parts, Provider
from records import Row
from torch import Tensor

from vjvcr_fast.bench.timing import Device, Rotating, copies, peak_bytes, timed
from vjvcr_fast.losses import vcr_loss

SWEEPS = {"d": (64, 256, 1024, 4096), "N": (32, 128, 512, 1024, 4096), "T": (1, 4, 16, 64, 128)}
MORE = {"d": (128, 512, 2048, 8192, 16_384), "N": (64, 256, 2048), "T": (2, 8, 32)}  # with --full
FIXED = {"d": {"N": 256, "T": 1}, "N": {"d": 512, "T": 2}, "T": {"N": 128, "d": 256}}
SECONDS, SECONDS_FULL, ROUNDS = 0.5, 2.0, (5, 60)
CHOICE = 1.10


def in_form(form: Any) -> Provider:
    def loss(parts: Parts) -> Tensor:
        return vcr_loss(parts[0], alpha=ALPHA, beta=BETA, form=form).loss

    return loss


FORMS = ("ours, Gram form", "ours, covariance form")
PROVIDERS = {
    "eager reference": providers.eager_reference,
    "ours": providers.ours,
    FORMS[0]: in_form("gram"),
    FORMS[1]: in_form("covariance"),
}


def pytest_generate_tests(metafunc: Any) -> None:
    full = metafunc.config.getoption("--full")
    points = [(s, v) for s, values in SWEEPS.items() for v in sorted({*values, *(MORE[s] if full else ())})]
    metafunc.parametrize(("sweep", "value"), points)


def test_scaling(sweep: str, value: int, device: Device, full: bool, check_only: bool, report: Any) -> None:
    sizes = FIXED[sweep] | {sweep: value}
    shape = n, _, d = sizes["N"], sizes["T"], sizes["d"]
    with device.stream():
        h = (SIGMA * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(device.torch_device)
        sets = [[h.clone().requires_grad_()] for _ in range(copies(h.nbytes, device.cache_bytes))]
        loss, gradient = providers.judge(sets[0])
        rows, steps = dict[str, Row](), {}
        for number, (name, function) in enumerate(PROVIDERS.items()):
            step = partial(providers.step, function, sets[0])
            step()
            outputs, peak = peak_bytes(step, device)
            error = max(providers.errors(outputs, loss, gradient))
            assert error <= max(providers.tolerance("fp32", n)), (name, sizes, error)
            rows[name] = {"sweep": sweep, **sizes, "provider": name, "copies": peak / h.nbytes, "error": error}
            steps[name] = Rotating(partial(providers.step, function), sets, number * len(sets) // len(PROVIDERS))
            del outputs
        del loss, gradient
        if check_only:
            return
        times = timed(device, steps, SECONDS_FULL if full else SECONDS, *ROUNDS)
    medians = {name: measured["_median_ms"] for name, measured in times.items()}
    for name, row in rows.items():
        row |= {"x reference": medians["eager reference"] / medians[name], **times[name]}
    # `ours` runs the same code as one of its forms, so we compare the two forms.
    chosen, other = FORMS if n < d else reversed(FORMS)
    choice = max(1.0, medians[chosen] / medians[other])
    rows["ours"] |= {"choice": choice, "target": f"choice <= {CHOICE:g}: {'met' if choice <= CHOICE else 'missed'}"}
    report(list(rows.values()))
