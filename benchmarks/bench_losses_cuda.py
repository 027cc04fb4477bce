"""vcr_loss on a CUDA GPU, forward and backward, against plain PyTorch in three precisions.

    pytest benchmarks/bench_losses_cuda.py [--full]               checks and times
    pytest benchmarks/bench_losses_cuda.py --benchmark-disable    checks alone

The loss and gradient of every provider are checked against the reference in float64, and those of its CUDA graph again
after timing. Columns:

    us           median time of a pass on the GPU, replayed as a CUDA graph (vjvcr_fast/bench). If a provider cannot be
                 captured, the note says so and the time of its launches counts.
    over floor   us over the time of two reads of h and one write at the bandwidth of a copy
    x eager      the eager reference's time over the provider's
    x compiled   the time of the faster of the two compiled baselines over the provider's
    copies       peak memory beyond the input, gradient included, in copies of h

The file also has `launched_us`, passes launched from Python one after the other.

Shapes with a target (records.py) are timed in all precisions, the README's others in float32 "highest". What compiles
comes after the rest of a shape has been timed and reported; then all take turns. `ours compiled` is timed with --full.
"""

import contextlib
import functools
import gc
from collections.abc import Callable, Sequence

import providers
import pytest
import records
import torch
from providers import SLACK, Case, Outputs, Parts, Provider
from records import Row
from torch import Tensor

from vjvcr_fast.bench import timing

SECONDS, SECONDS_FULL, ROUNDS = 0.6, 5.0, (10, 100)  # for graphs
LAUNCHED_ROUNDS, LAUNCHED_PASSES = 5, 8  # for launches

TARGETED = [Case(160, (100,), 2048), Case(256, (15,), 512), Case(256, (26,), 2048), Case(2_600_000, (1,), 64)]
PRECISIONS = ("bf16", "fp32", "tf32")  # in this order
OTHERS = [
    Case(256, (10, 5), 512),
    Case(256, (26,), 1024),
    Case(16384, (1,), 64),
    Case(32, (4,), 64),
    Case(1024, (1,), 256),
    Case(256, (15,), 256),
    Case(128, (9,), 256),
    Case(64, (8,), 128),
    Case(4096, (1,), 64),
]
Check = Callable[[Row, Outputs], bool]
KERNELS = ("ours", "ours compiled")


def compared(
    case: Case,
    full: bool = True,
    compiled: Callable[[Provider | str], Provider | str] = providers.compiled,
) -> dict[str, Provider | str]:
    """Name to function, or to the reason why it is left out."""
    found = {
        "eager reference": providers.eager_reference,
        "ours": providers.ours,
        "ours in torch": providers.ours_in_torch,
        "compiled reference": compiled(providers.eager_reference),
        "compiled gram form": compiled(providers.gram_form_of(case)),
    }
    return found | ({"ours compiled": compiled(providers.ours)} if full else {})


# -- The benchmark --------------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    wanted = [(case, name) for case in TARGETED for name in PRECISIONS]
    wanted += [(case, name) for case in OTHERS for name in (PRECISIONS if full else ("fp32",))]
    ids = [f"{str(case).replace(', ', 'x')}-{name}" for case, name in wanted]
    metafunc.parametrize(("case", "name"), wanted, ids=ids)


def test_vcr_loss(case, name, device, found, report, full):
    seconds = SECONDS_FULL if full else SECONDS
    run = functools.partial(compare, case, name, device, found, seconds, compared(case, full))
    report_or_skip(run, case, name, found, report)


def report_or_skip(
    run: Callable[..., tuple[list[Row], list[str]]],
    case: Case,
    name: str,
    found: timing.Ceilings | None,
    report: Callable[..., None],
) -> None:
    """A whole test. run(say): `compare`, with all its other arguments."""
    torch._dynamo.reset()
    rows, wrong = [], []
    with contextlib.suppress(torch.OutOfMemoryError):
        rows, wrong = run(say=functools.partial(report, more=True))
    gc.collect()
    torch.cuda.empty_cache()
    if not rows:
        note = "left out: too large for this GPU"
        report([{"N, T, d": str(case), "precision": name, "provider": "ours", "note": note}])
        pytest.skip(note)
    if found is not None:
        report(rows)
    assert not wrong, "; ".join(wrong)


def compare(
    case: Case,
    name: str,
    device: timing.Device,
    found: timing.Ceilings | None,
    seconds: float,
    functions: dict[str, Provider | str],
    say: Callable[[list[Row]], object] = lambda rows: None,
    judge: Callable[[Parts], tuple[Tensor, Tensor]] = providers.judge,
    flops: float | None = None,
) -> tuple[list[Row], list[str]]:
    """Returns a row for each function, and what is wrong with any of them. Without ceilings nothing is timed.

    say: is given the rows of the functions that do not compile, before any other runs. judge, flops: of another loss
    than VCR the right result, and the work that no method can avoid."""
    rows: dict[str, Row] = {}
    checked: dict[str, Provider] = {}
    with timing.precision(name) as dtype, device.stream():
        sets = providers.inputs(*case[:3], dtype, device)
        check = functools.partial(_wrong, judge(sets[0]), name, case)
        for last in (False, True):
            for provider in [provider for provider in functions if ("compiled" in provider) == last]:
                row = rows[provider] = {"N, T, d": str(case), "precision": name, "provider": provider}
                function = functions[provider]
                if isinstance(function, str):
                    row["note"] = function
                elif _run(function, sets[0], check, device, row):
                    checked[provider] = function
            if found is not None:
                _time_graphs(checked, sets, check, device, seconds, rows)
                _time_launches(checked, sets, device, rows)
                _put_ratios(rows, case, name, found, dtype.itemsize, flops)
                if not last:
                    say(list(rows.values()))
    wrong = [f"{row['provider']} at {case}, {name}: {row['note']}" for row in rows.values() if row.pop("_wrong", False)]
    return list(rows.values()), wrong


def _wrong(judge: tuple[Tensor, Tensor], name: str, case: Case, row: Row, outputs: Outputs) -> bool:
    """Whether the errors of outputs are too large. Puts them into row, or a note that says so."""
    loss, gradient = providers.errors(outputs, *judge)
    bounds = [SLACK * bound for bound in providers.tolerance(name, case.n)]
    if row["provider"] in KERNELS:
        bounds = list(providers.TOLERANCES[name])
    if loss <= bounds[0] and gradient <= bounds[1]:
        row |= {"_loss_error": loss, "_gradient_error": gradient}
        return False
    allowed = " and ".join(f"{bound:.1e}" for bound in bounds)
    row |= {"note": f"wrong: loss off by {loss:.1e}, gradient by {gradient:.1e}, allowed {allowed}", "_wrong": True}
    return True


def _run(function: Provider, parts: Parts, check: Check, device: timing.Device, row: Row) -> bool:
    """Whether function runs and is right. Puts its errors and memory into row, or the reason why not."""
    try:
        providers.step(function, parts)  # compiles
        outputs, peak = timing.peak_bytes(functools.partial(providers.step, function, parts), device)
    except torch.OutOfMemoryError:
        row["note"] = "out of memory"
        return False
    except Exception as error:  # errors of compilers and drivers have no common class
        row |= {"note": _first_line(error), "_wrong": True}
        return False
    row["copies"] = peak / sum(part.nbytes for part in parts)
    return not check(row, outputs)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def _time_graphs(
    checked: dict[str, Provider],
    sets: Sequence[Parts],
    check: Check,
    device: timing.Device,
    seconds: float,
    rows: dict[str, Row],
) -> None:
    """Puts the times of graphs into rows. If a provider cannot be captured, its launches are timed and the row says so;
    it also says so if a graph's outputs are wrong."""
    regions, captured = {}, {}
    for provider, function in checked.items():
        try:
            replay, captured[provider] = device.capture(functools.partial(_passes, function, sets))
            regions[provider] = timing.Region(replay, len(sets))
        except RuntimeError as error:
            rows[provider]["note"] = f"not captured, so its launches count: {_first_line(error)}"
            regions[provider] = _launched(function, sets)
    for provider, times in timing.take_turns(device, regions, seconds, *ROUNDS).items():
        found = timing.spread([1e3 * x for x in times])
        rows[provider] |= {"us": found.median, "_least_us": found.least, "_iqr_us": found.iqr, "_rounds": len(times)}
    for provider, outputs in captured.items():
        if check(rows[provider], outputs):
            rows[provider]["note"] += ", in its graph"


def _time_launches(
    checked: dict[str, Provider], sets: Sequence[Parts], device: timing.Device, rows: dict[str, Row]
) -> None:
    regions = {provider: _launched(function, sets) for provider, function in checked.items()}
    for provider, times in timing.take_turns(device, regions, 0.0, LAUNCHED_ROUNDS, LAUNCHED_ROUNDS).items():
        rows[provider]["_launched_us"] = 1e3 * timing.spread(times).median


def _launched(function: Provider, sets: Sequence[Parts]) -> timing.Region:
    """LAUNCHED_PASSES passes, launched from Python one after the other."""
    passes = [sets[i % len(sets)] for i in range(LAUNCHED_PASSES)]
    return timing.Region(functools.partial(_passes, function, passes), len(passes))


def _passes(function: Provider, sets: Sequence[Parts]) -> Outputs:
    """One pass over each copy. Returns the outputs of the last one."""
    for parts in sets[:-1]:
        providers.step(function, parts)  # a list of all outputs would hold their memory
    return providers.step(function, sets[-1])


def _put_ratios(
    rows: dict[str, Row], case: Case, name: str, found: timing.Ceilings, element_size: int, flops: float | None
) -> None:
    """Puts ratios to the floor and to the baselines into rows, and for the file the floors' own times."""
    shape = case.n, sum(case.steps), case.d
    work = records.floor_bytes(*shape, element_size), flops or records.floor_flops(*shape)
    rates = found.copy, found.products[name]
    floor, product = (1e6 * amount / rate for amount, rate in zip(work, rates, strict=True))
    eager = rows["eager reference"].get("us")
    plain = [rows[other]["us"] for other in records.COMPILED if "us" in rows.get(other, {})]
    for row in rows.values():
        if "us" not in row:
            continue
        row["over floor"] = row["us"] / floor
        row |= records.achieved(1e-3 * row["us"], *work, *rates)
        if eager:
            row["x eager"] = eager / row["us"]
        if plain:
            row["x compiled"] = min(plain) / row["us"]
        row |= {"copies": row.pop("copies"), "_floor_us": floor, "_product_us": product}
        if "note" in row:
            row["note"] = row.pop("note")  # the last column
