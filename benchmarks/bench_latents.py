"""Inference of z* for the MLP predictor: ours against loops in plain torch.

    pytest benchmarks/bench_latents.py                        checks and times
    pytest benchmarks/bench_latents.py --benchmark-disable    checks alone

N = 256, and z has 20 components. Every provider makes K = 100 steps of the same rule with a tolerance of 0, so that
none wins by stopping early. Only the last lines of each shape have a tolerance. They show what is saved by freezing
converged samples and, on a CPU, by the quasi-Newton method, whose energy may be up to 1% higher. If torch has several
threads, both of our methods also run on one, which shows what the others add.

`eager autograd` is the loop with autograd of the energy, `compiled autograd` the same with its step through
torch.compile (on a GPU with --full only), and `G and r` the closed form in plain torch operations. On a GPU all but the
first are replayed as CUDA graphs; the first counts with its launches. We compare mean energies at z*, from the true
residual, with the first's.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from records import Row, achieved, latent_floor_bytes, latent_floor_flops

from vjvcr_fast import latents, native
from vjvcr_fast.bench.timing import BusyElsewhere, Cuda, Device, Region, peak_bytes, spread, take_turns
from vjvcr_fast.latents import LatentResult, MLPEnergy, SparseLatent

N, LATENT, STEPS, WEIGHT = 256, 20, 100, 1e-3
SECONDS, SECONDS_FULL, ROUNDS = 2.0, 8.0, (3, 30)
FLOAT32, BFLOAT16 = 1e-4, 1e-2  # how far mean energies may be from the eager loop's
COMPARED = "eager autograd"


class Case(NamedTuple):
    """Sizes of the predictor: width of the hidden layers, and T_y d outputs."""

    hidden: int
    frames: int
    d: int

    def __str__(self) -> str:
        return f"{self.hidden}, {self.frames}x{self.d}"


CASES = [Case(hidden, frames, d) for frames, d in ((3, 256), (12, 512)) for hidden in (256, 512, 1024)]
CPU_CASES = [Case(512, 3, 256)]
MORE_CPU_CASES = [Case(256, 3, 256), Case(512, 12, 512)]  # with --full

# (provider, metric, at least or, of a time, at most, for which cases)
Target = tuple[str, str, float, list[Case]]
CPU_TARGETS: list[Target] = [("ours", "x eager", 8, [Case(512, 12, 512)])]
GPU_TARGETS: list[Target] = [
    ("ours in bf16", "x eager", 60, CASES),
    ("ours in bf16", "x G and r", 3, [case for case in CASES if case.hidden < 1024]),
    ("ours in bf16", "us a step", 5, [case for case in CASES if case.hidden == 256]),
    ("ours in bf16", "us a step", 6, [case for case in CASES if case.hidden == 512]),
]


def predictor(case: Case, device: torch.device) -> MLPEnergy:
    """Random weights, scaled as torch initialises them, and targets that some z explains in part."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    hidden, width = case.hidden, case.frames * case.d
    w1z = torch.nn.functional.normalize(random(hidden, LATENT), dim=0)
    tensors = {
        "p": random(N, hidden),
        "w1z": w1z,
        "w2": random(hidden, hidden) * hidden**-0.5,
        "b2": 0.1 * random(hidden),
        "w3": random(width, hidden) * hidden**-0.5,
        "b3": 0.1 * random(width),
    }
    energy = MLPEnergy(**tensors, target=torch.zeros(N, width))
    hidden_z = energy.activations(2 * random(N, LATENT))[1]
    target = energy.residual(hidden_z) + 0.1 * random(N, width)
    return MLPEnergy(**{name: x.to(device) for name, x in (tensors | {"target": target}).items()})


@contextlib.contextmanager
def in_torch() -> Iterator[None]:
    """As if the operators were not built."""
    before, native.MISSING = native.MISSING, "not wanted here"
    try:
        yield
    finally:
        native.MISSING = before


def compared(energy: MLPEnergy, cuda: bool, full: bool) -> dict[str, Callable[[], LatentResult]]:
    latent = partial(SparseLatent, LATENT, WEIGHT, STEPS, check=False)
    device, whole = energy.p.device, lambda z: energy(z)

    def plain(settings: SparseLatent, function: latents.LatentEnergy) -> LatentResult:
        with in_torch():
            return settings.infer(function, N, device=device, dtype=torch.float32)

    def ours(**options: Any) -> LatentResult:
        return latent(**options).infer(energy, N, device=device, dtype=torch.float32)

    found = {COMPARED: partial(plain, latent(tolerance=0.0), whole)}
    if full or not cuda:
        found["compiled autograd"] = partial(plain, latent(tolerance=0.0, compile=True), whole)
    found |= {"G and r": partial(plain, latent(tolerance=0.0), energy), "ours": partial(ours, tolerance=0.0)}
    if cuda:
        found["ours in bf16"] = partial(ours, tolerance=0.0, bf16=True)
    found["ours, tolerance 1e-4"] = partial(ours, tolerance=1e-4)
    if not cuda:
        found["ours, quasi-Newton, tolerance 1e-3"] = partial(ours, tolerance=1e-3, method="newton")
        if torch.get_num_threads() > 1:
            for name in ("ours", "ours, quasi-Newton, tolerance 1e-3"):
                found[f"{name}, one thread"] = partial(on_one_thread, found[name])
    return found


def on_one_thread(function: Callable[[], LatentResult]) -> LatentResult:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = CPU_CASES + (MORE_CPU_CASES if metafunc.config.getoption("--full") else [])
        if torch.cuda.is_available():
            cases = CASES
        metafunc.parametrize("case", cases, ids=lambda case: str(case).replace(", ", "-"))


@pytest.mark.skipif(native.MISSING is not None, reason=f"the operators are {native.MISSING}")
class TestLatents:
    def test_infer(self, case, device, check_only, report, full, request):
        torch._dynamo.reset()
        cuda = isinstance(device, Cuda)
        with device.stream():
            energy = predictor(case, device.torch_device)
            functions = compared(energy, cuda, full)
            rows: dict[str, Row] = {name: {"hidden, T_y x d": str(case), "provider": name} for name in functions}
            check(functions, rows)
            if check_only:
                return
            for name, function in functions.items():
                rows[name]["_peak_mb"] = peak_bytes(function, device)[1] / 1e6
            found = request.getfixturevalue("ceilings")
            busy = BusyElsewhere()
            times = take_turns(device, regions(functions, device), SECONDS_FULL if full else SECONDS, *ROUNDS)
            elsewhere = 0.0 if cuda else busy.share()
        put_times(rows, times, elsewhere)
        sizes = N, LATENT, case.hidden, case.frames * case.d
        for name in rows:
            # The floor counts all steps. With a tolerance fewer are made, and there is no rate.
            if "tolerance" not in name:
                work = latent_floor_bytes(*sizes), latent_floor_flops(*sizes, STEPS)
                product = found.products["bf16" if "bf16" in name else "fp32"]
                rows[name] |= achieved(rows[name]["_median_ms"], *work, found.copy, product)
            if cuda:
                rows[name]["us a step"] = 1e3 * rows[name]["_median_ms"] / STEPS
            judge(rows[name], name, case, GPU_TARGETS if cuda else CPU_TARGETS)
        report(list(rows.values()))


def check(functions: dict[str, Callable[[], LatentResult]], rows: dict[str, Row]) -> None:
    """Runs each function once, which compiles it, and puts its mean energy and its error into its row."""
    for name, function in functions.items():
        started = time.perf_counter()
        result = function()
        value = float(result.energy.double().mean())
        first = rows[COMPARED].get("_energy", value)
        rows[name] |= {"_energy": value, "_first_seconds": time.perf_counter() - started}
        rows[name] |= {"energy": (value - first) / first, "_mean_steps": float(result.steps.double().mean())}
        bound = BFLOAT16 if "bf16" in name or "tolerance" in name else FLOAT32
        off = value - first if "quasi-Newton" in name else abs(value - first)
        assert off <= bound * first, f"{name}: mean energy {value:.6f}, not {first:.6f}"


def regions(functions: dict[str, Callable[[], object]], device: Device) -> dict[str, Region]:
    graphs = isinstance(device, Cuda)
    return {
        name: Region(device.capture(function)[0] if graphs and name != COMPARED else function)
        for name, function in functions.items()
    }


def put_times(rows: dict[str, Row], times: dict[str, list[float]], elsewhere: float) -> None:
    medians = {name: spread(of_one).median for name, of_one in times.items()}
    for name, row in rows.items():
        found = spread(times[name])
        row |= {"x eager": medians[COMPARED] / found.median, "_median_ms": found.median, "_min_ms": found.least}
        row |= {"_iqr_ms": found.iqr, "_rounds": len(times[name]), "_busy_elsewhere": elsewhere}
        row["x G and r"] = medians["G and r"] / found.median


def judge(row: Row, name: str, case: Case, targets: list[Target]) -> None:
    """Writes into the row which targets it has and whether it meets them."""
    said = []
    for provider, metric, bound, cases in targets:
        if provider == name and case in cases:
            timed = metric == "us a step"
            met = row[metric] <= bound if timed else row[metric] >= bound
            said.append(f"{metric} {'<=' if timed else '>='} {bound:g}: {'met' if met else 'missed'}")
    if said:
        row["target"] = "; ".join(said)
