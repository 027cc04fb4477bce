"""Inference of z* for the MLP predictor, and the choice among its heads: ours against loops in plain torch.

    pytest benchmarks/bench_latents.py                        checks and times
    pytest benchmarks/bench_latents.py --benchmark-disable    checks alone

N = 256, z of 20, K = 100 steps of the same rule everywhere (latents.py). With a tolerance of 0, so that nobody wins by
stopping early; the last lines of each shape have a tolerance and show what freezing converged samples saves,
and on a CPU what another method does, whose energies may be 1% higher at most.
`eager autograd` is the loop through autograd of the energy, `compiled autograd` the same with its step through
torch.compile, `G and r` the closed form in plain torch operations. On a GPU all are replayed as CUDA graphs but the
first, whose launches count. Mean energies at z*, from the true residual, are compared with the first one's.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from records import Row, achieved, latent_floor_bytes, latent_floor_flops
from timing import BusyElsewhere, Cuda, Host, Region, peak_bytes, spread, take_turns

from vjvcr_fast import latents, native
from vjvcr_fast.latents import HeadEnergy, LatentResult, MLPEnergy, SparseLatent

N, LATENT, STEPS, WEIGHT, HEADS = 256, 20, 100, 1e-3, 5
SECONDS, SECONDS_FULL, ROUNDS = 2.0, 8.0, (3, 30)
FLOAT32, BFLOAT16 = 1e-4, 1e-2  # mean energies against the eager loop's
COMPARED = "eager autograd"


class Case(NamedTuple):
    """Sizes of the predictor: hidden layers, and T_y d outputs."""

    hidden: int
    frames: int
    d: int

    def __str__(self) -> str:
        return f"{self.hidden}, {self.frames}x{self.d}"


CASES = [Case(hidden, frames, d) for frames, d in ((3, 256), (12, 512)) for hidden in (256, 512, 1024)]
CPU_CASES = [Case(512, 3, 256)]
MORE_CPU_CASES = [Case(256, 3, 256), Case(512, 12, 512)]  # with --full

# (provider, metric, least or most, of which hidden sizes)
Target = tuple[str, str, float, tuple[int, ...]]
CPU_TARGETS: list[Target] = [("ours", "x eager", 8, (512,))]
GPU_TARGETS: list[Target] = [
    ("ours in bf16", "x eager", 60, (256, 512, 1024)),
    ("ours in bf16", "x G and r", 3, (256, 512)),
    ("ours in bf16", "us a step", 5, (256,)),
    ("ours in bf16", "us a step", 6, (512,)),
]


@pytest.fixture(scope="module")
def device() -> Cuda | Host:
    return Cuda() if torch.cuda.is_available() else Host()


def predictor(case: Case, device: torch.device) -> MLPEnergy:
    """Of random weights, scaled as torch initialises them; targets that some z explains in part."""
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
    """As where the operators are not built."""
    before, native.MISSING = native.MISSING, "not wanted here"
    try:
        yield
    finally:
        native.MISSING = before


def compared(energy: MLPEnergy, case: Case, cuda: bool) -> dict[str, Callable[[], LatentResult]]:
    latent = partial(SparseLatent, LATENT, WEIGHT, STEPS, check=False)
    device, whole = energy.p.device, lambda z: energy(z)

    def plain(settings: SparseLatent, function: latents.LatentEnergy) -> LatentResult:
        with in_torch():
            return settings.infer(function, N, device=device, dtype=torch.float32)

    def ours(**options: Any) -> LatentResult:
        return latent(**options).infer(energy, N, device=device, dtype=torch.float32)

    found = {
        COMPARED: partial(plain, latent(tolerance=0.0), whole),
        "compiled autograd": partial(plain, latent(tolerance=0.0, compile=True), whole),
        "G and r": partial(plain, latent(tolerance=0.0), energy),
        "ours": partial(ours, tolerance=0.0),
    }
    if cuda:
        found["ours in bf16"] = partial(ours, tolerance=0.0, bf16=True)
    found["ours, tolerance 1e-4"] = partial(ours, tolerance=1e-4)
    if not cuda:
        found["ours, quasi-Newton, tolerance 1e-3"] = partial(ours, tolerance=1e-3, method="newton")
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = CPU_CASES + (MORE_CPU_CASES if metafunc.config.getoption("--full") else [])
        if torch.cuda.is_available():
            cases = CASES
        metafunc.parametrize("case", cases, ids=lambda case: str(case).replace(", ", "-"))


@pytest.mark.skipif(native.MISSING is not None, reason=f"the operators are {native.MISSING}")
class TestLatents:
    def test_infer(self, case, device, benchmark, report, full, request):
        torch._dynamo.reset()
        cuda = isinstance(device, Cuda)
        with device.stream():
            energy = predictor(case, device.torch_device)
            functions = compared(energy, case, cuda)
            rows: dict[str, Row] = {name: {"hidden, T_y x d": str(case), "provider": name} for name in functions}
            check(functions, rows)
            if benchmark.disabled:
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
            # Of all steps: where converged samples are frozen there are fewer, and no rate.
            if "tolerance" not in name:
                work = latent_floor_bytes(*sizes), latent_floor_flops(*sizes, STEPS)
                product = found.products["bf16" if "bf16" in name else "fp32"]
                rows[name] |= achieved(rows[name]["_median_ms"], *work, found.copy, product)
            if cuda:
                rows[name]["us a step"] = 1e3 * rows[name]["_median_ms"] / STEPS
            judge(rows[name], name, case, GPU_TARGETS if cuda else CPU_TARGETS)
        report(list(rows.values()))

    def test_heads(self, device, benchmark, report):
        """The plain route makes one prediction after the other."""
        case = Case(512, 12, 512)
        with device.stream():
            energy = predictor(case, device.torch_device)
            u = energy.activations(torch.zeros(N, LATENT, device=device.torch_device))[1]
            w3 = torch.stack([energy.w3.roll(i, 0) for i in range(HEADS)])
            b3 = torch.stack([energy.b3.roll(i, 0) for i in range(HEADS)])

            def of_head(i: int) -> torch.Tensor:
                return (torch.nn.functional.linear(u, w3[i], b3[i]) - energy.target).square().mean(dim=1)

            def in_plain_torch() -> torch.Tensor:
                return HeadEnergy(HEADS, lambda z: z[:, 0], of_head).all()

            linear = (u, w3, b3, energy.target)
            functions = {"one head after the other": in_plain_torch, "ours": partial(argmin, linear)}
            rows: dict[str, Row] = {n: {"hidden, T_y x d": f"{case}, {HEADS} heads", "provider": n} for n in functions}
            right, found = in_plain_torch(), argmin(linear)
            rows["ours"]["_error"] = error = float(((found - right).abs() / right).max())
            assert error <= FLOAT32
            if benchmark.disabled:
                return
            busy = BusyElsewhere()
            times = take_turns(device, regions(functions, device), SECONDS / 4, *ROUNDS)
            put_times(rows, times, 0.0 if isinstance(device, Cuda) else busy.share(), "one head after the other")
        report(list(rows.values()))


def argmin(linear: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.ops.vjvcr.discrete_argmin(*linear)[0]


def check(functions: dict[str, Callable[[], LatentResult]], rows: dict[str, Row]) -> None:
    """Runs each once, which compiles, and puts its mean energy and its error into its row."""
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


def regions(functions: dict[str, Callable[[], object]], device: Cuda | Host) -> dict[str, Region]:
    found = {}
    for name, function in functions.items():
        launched = not isinstance(device, Cuda) or name == COMPARED
        found[name] = Region(function if launched else device.capture(function)[0])
    return found


def put_times(rows: dict[str, Row], times: dict[str, list[float]], elsewhere: float, first: str = COMPARED) -> None:
    medians = {name: spread(of_one).median for name, of_one in times.items()}
    for name, row in rows.items():
        found = spread(times[name])
        row |= {"x eager": medians[first] / medians[name], "_median_ms": found.median, "_min_ms": found.least}
        row |= {"_iqr_ms": found.iqr, "_rounds": len(times[name]), "_busy_elsewhere": elsewhere}
        if "G and r" in medians:
            row["x G and r"] = medians["G and r"] / medians[name]


def judge(row: Row, name: str, case: Case, targets: list[Target]) -> None:
    """Says which targets the row has and whether they are met."""
    mine = [t for t in targets if t[0] == name and case.hidden in t[3]]
    if targets is CPU_TARGETS and case.frames * case.d < 6144:
        mine = []  # the is of the larger output
    said = []
    for _, metric, bound, _ in mine:
        met = row[metric] <= bound if metric == "us a step" else row[metric] >= bound
        said.append(f"{metric} {'<=' if metric == 'us a step' else '>='} {bound:g}: {'met' if met else 'missed'}")
    if said:
        row["target"] = "; ".join(said)
