"""The benchmarks' own code: floors, goals, result files, tables, the order of timing.

What is meant for a GPU runs here on the host, with shapes too small to mean anything.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tolerances
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # behind tests, whose conftest.py processes of tests import

import bench_losses  # noqa: E402
import bench_losses_cuda  # noqa: E402
import bench_losses_grid  # noqa: E402
import bench_sigreg  # noqa: E402
import compare as compare_commits  # noqa: E402
import providers  # noqa: E402
import records  # noqa: E402
import report  # noqa: E402
from providers import Case  # noqa: E402

from vjvcr_fast.bench import timing  # noqa: E402
from vjvcr_fast.losses import projections  # noqa: E402

MACHINE = {
    "device": "NVIDIA H100 80GB HBM3",
    "torch": "2.11.0+cu130",
    "cuda": "13.0",
    "triton": "3.6.0",
    "commit": "unknown",
    "dirty": None,
    "date": "2026-01-02T03:04:05+00:00",
    "copy_gb_per_s": 3000.0,
    "product_tflop_per_s": {"fp32": 50.0, "tf32": 400.0, "bf16": 800.0},
}


class Host(timing.Host):
    """The host in the place of a GPU: a small cache, small ceilings, all precisions. clock() gives milliseconds."""

    precisions = timing.PRECISIONS
    copied, side = 1 << 10, 8

    def __init__(self, clock: Callable[[], float] = lambda: 1e3 * time.perf_counter()) -> None:
        super().__init__()
        self.cache_bytes, self.clock, self.sweeps = 1 << 12, clock, 0

    def sweep(self) -> None:
        self.sweeps += 1

    def event(self) -> float:
        return self.clock()

    def milliseconds(self, start: float, end: float) -> float:
        return end - start


# -- Floors and targets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "megabytes", "gigaflops"),
    [((160, 100, 2048), 393, 15.7), ((256, 26, 2048), 164, 10.5), ((256, 15, 512), 24, 1.5)],
)
def test_floors(shape, megabytes, gigaflops):
    """As docs and plans state them, for float32 and the Gram form."""
    assert round(records.floor_bytes(*shape, 4) / 1e6) == megabytes
    assert round(records.floor_flops(*shape) / 1e9, 1) == gigaflops


def test_floor_of_the_covariance_form():
    assert records.floor_flops(2_600_000, 1, 64) == 3 * 2_600_000 * 64 * 64
    assert records.floor_bytes(2_600_000, 1, 64, 2) == 3 * 2_600_000 * 64 * 2


def rows_of(shape: str, precision: str, **times: float) -> list[records.Row]:
    """Rows as in a file: microseconds of providers, whose names have underscores for blanks."""
    same = {"N, T, d": shape, "precision": precision, "floor_us": 100.0, "copies": 2.0}
    rows = [{**same, "provider": name.replace("_", " "), "us": us} for name, us in times.items()]
    return [row | {"over floor": row["us"] / 100.0} for row in rows]


def got(rows: list[records.Row]) -> dict[str, tuple[str, Any, Any]]:
    return {record["target"]: (record["wanted"], record["got"], record["met"]) for record in records.judged(rows)}


def test_targets_met_and_missed():
    times = {"ours": 160.0, "eager_reference": 4800.0, "compiled_reference": 1279.0, "compiled_gram_form": 400.0}
    rows = rows_of(records.CATER, "bf16", **times)
    found = got(rows)
    assert found["CATER bf16: time over floor"] == ("<= 1.6", 1.6, True)
    assert found["CATER bf16: x eager reference"] == (">= 30", 30.0, True)
    assert found["CATER bf16: x compiled reference"] == (">= 8", 7.994, False)
    assert found["CATER bf16: x compiled gram form"] == (">= 1.5", 2.5, True)
    assert found["CATER bf16: copies above input and gradient"] == ("<= 1.2", 1.0, True)
    assert found["CATER tf32: time over floor"] == ("<= 1.6", None, None), "not measured"
    assert found["every row: x the faster of the compiled two"] == (">= 1", 2.5, True)
    assert records.judged(rows, partial=True)[-1]["met"] is None, "the rows that are missing may be slower"
    left_out = {"N, T, d": "9, 9, 9", "precision": "fp32", "provider": "ours", "note": "left out"}
    last = records.judged([*rows, left_out])[-1]
    assert (last["got"], last["met"]) == (2.5, None), "a row that is missing may be a slower one"


def test_goals_of_a_row():
    row = {"provider": "ours", "x reference": 3.0, "x compiled reference": 1.2}
    said = records.goals(row, {"x reference": 3.0, "x compiled reference": 1.3})
    assert said == row | {"target": "x reference >= 3: met (3); x compiled reference >= 1.3: missed (1.2)"}
    assert records.goals(row, {}) == row


def test_the_time_of_full_precision_is_absolute():
    assert got(rows_of(records.CATER, "fp32", ours=421.0))["CATER fp32: us"] == ("<= 420", 421.0, False)


def test_one_slower_row_misses_the_target_of_all():
    rows = rows_of(records.CATER, "fp32", ours=100.0, compiled_reference=800.0)
    rows += rows_of("32, 4, 64", "fp32", ours=20.0, compiled_gram_form=18.0, compiled_reference=40.0)
    assert got(rows)["every row: x the faster of the compiled two"] == (">= 1", 0.9, False)


def test_every_target_belongs_to_a_case_that_is_timed():
    timed = {str(case) for case in bench_losses_cuda.TARGETED}
    assert {shape for shape, *_ in records.TARGETS} <= timed
    assert {precision for _, precisions, *_ in records.TARGETS for precision in precisions} == set(timing.PRECISIONS)
    assert set(got([])) == {record["target"] for record in records.judged([])}, "no two have the same name"
    assert all(met is None for _, _, met in got([]).values())


# -- Files ----------------------------------------------------------------------------------------------------------


def test_file_names():
    assert records.file_name("losses", {"device": "cpu", "cuda": None}) == "losses-cpu.json"
    key = "nvidia-h100-80gb-hbm3-torch2.11.0-cu130-triton3.6.0"
    assert records.file_name("losses_cuda", MACHINE) == f"gpu-{key}-unknown.json"
    commit = {"commit": "0123456789abcdef" * 2 + "01234567", "triton": None}
    named = records.file_name("accuracy", MACHINE | commit)
    assert named == f"accuracy-gpu-{key.replace('3.6.0', 'none')}-0123456789.json"


def test_a_quick_run_knows_the_results_of_a_full_one(tmp_path):
    path = tmp_path / "losses-cpu.json"
    assert not records.of_a_full_run(path)
    for machine, full in ((MACHINE, False), (MACHINE | {"full": False}, False), (MACHINE | {"full": True}, True)):
        path.write_text(records.dumps(records.results("losses", machine, [])))
        assert records.of_a_full_run(path) == full


def test_a_row_is_a_line():
    rows = rows_of(records.CATER, "bf16", ours=160.00001)
    rows[0]["_least_us"] = 159.87654
    results = records.results("losses_cuda", MACHINE, rows)
    text = records.dumps(results)
    assert json.loads(text) == results
    assert (results["rows"][0]["us"], results["rows"][0]["least_us"]) == (160.0, 159.9)
    assert sum('"provider"' in line for line in text.splitlines()) == len(rows)
    assert "targets" not in records.results("losses", MACHINE, [])


def test_commit(monkeypatch, tmp_path):
    """The checkout's. A copy has that of the environment, or none, even within another project's checkout."""
    monkeypatch.delenv("VJVCR_COMMIT", raising=False)
    answers = {"--show-toplevel": str(tmp_path), "HEAD": "f" * 40, "--porcelain": " M README.md"}
    monkeypatch.setattr(records, "git", lambda root, *arguments: answers.get(arguments[-1], ""))
    assert records.commit(tmp_path) == ("f" * 40, True)
    answers["--porcelain"] = ""
    assert records.commit(tmp_path) == ("f" * 40, False)
    answers["--show-toplevel"] = str(tmp_path.parent)
    assert records.commit(tmp_path) == ("unknown", None)
    answers.clear()
    assert records.commit(tmp_path) == ("unknown", None)
    monkeypatch.setenv("VJVCR_COMMIT", "v1.0")
    assert records.commit(tmp_path) == ("v1.0", None)


def test_git_is_optional(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert records.git(tmp_path, "rev-parse", "HEAD") == ""


# -- Tables ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def results() -> dict[str, Any]:
    times = {"eager_reference": 4800.0, "compiled_reference": 1280.0, "compiled_gram_form": 400.0, "ours": 160.0}
    rows = rows_of(records.CATER, "bf16", **times)
    rows += rows_of("32, 4, 64", "fp32", eager_reference=60.0, compiled_reference=18.0, ours=20.0)
    rows[-1] |= {"x compiled": 0.9}
    rows.append({"N, T, d": "4096, 1, 64", "precision": "fp32", "provider": "ours", "note": "left out: time"})
    return records.results("losses_cuda", MACHINE, rows)


def test_report_of_a_gpu(results):
    text = report.gpu_report(results)
    assert "# Losses on NVIDIA H100 80GB HBM3\n" in text
    assert "| CATER bf16: x eager reference | >= 30 | 30 | yes |" in text
    assert "| CATER fp32: us | <= 420 |  | not measured |" in text
    assert "| (160, 100, 2048) | bf16 | 4,800.0 us | 1,280.0 us | 400.0 us | 160.0 us | 1.6x | 2 |" in text
    slower = text.split("## Compiled plain code is faster\n")[1].split("##")[0]
    assert "| (32, 4, 64) | fp32 | 0.90x |" in slower
    assert "2048" not in slower
    assert "| (4096, 1, 64) | fp32 | ours | left out: time |" in text


def test_a_table_is_made_of_columns():
    rows = [{"N, T, d": "2, 1, 3", "ours": {"ms": 1.25, "note": None}}, {"N, T, d": "4, 1, 3"}]
    columns = [
        report.SHAPE,
        ("time", report.show("ours", "ms", form="{:.1f} ms")),
        ("note", report.show("ours", "note")),
    ]
    lines = ["| (N, T, d) | time | note |", "| --- | --- | --- |", "| (2, 1, 3) | 1.2 ms |  |", "| (4, 1, 3) |  |  |"]
    assert report.table(rows, columns).splitlines() == lines


def test_rows_are_joined():
    rows = [{"N": 1, "who": "a", "x": 3}, {"N": 2, "who": "a", "x": 4}, {"N": 1, "who": "b", "x": 5}]
    assert report.pivot(rows, "who", "N") == [{"N": 1, "a": rows[0], "b": rows[2]}, {"N": 2, "a": rows[1]}]


def test_shapes_are_joined_and_sorted_by_what_they_gain():
    rows = [{"N, T, d": "2, 1, 1", "provider": "ours", "x eager": 3.0, "median_ms": 1.0}]
    rows += [{"N, T, d": "2, 1, 9", "provider": "ours", "x eager": 4.0, "median_ms": 2.0}, {"N, d": "256, 8192"}]
    rows += [{"N, T, d": row["N, T, d"], "provider": "compiled reference", "median_ms": 3.0} for row in rows[:2]]
    assert [(row["N, T, d"], row["compiled"]) for row in report.by_shape("N, T, d")(rows)] == [
        ("2, 1, 9", 1.5),
        ("2, 1, 1", 3.0),
    ]


def test_figures(tmp_path):
    pytest.importorskip("matplotlib")
    import plots

    rates = {"copy_gb_per_s": 20.0, "product_tflop_per_s": {"fp32": 0.4, "torch.mm": 0.2}}
    measured = [{"provider": "ours", "flop_per_byte": x, "tflop_per_s": 0.1} for x in (0.25, 8.0, 40.0)]
    ratios = [{"N, T, d": shape, "x plain": 2.0, "x eager": 9.0} for shape in ("2, 1, 1", "2, 1, 8")]
    for draw, content in ((plots.roofline, rates | {"rows": measured}), (plots.ratios, {"rows": ratios})):
        (tmp_path / "made-cpu.json").write_text(json.dumps(content))
        draw(tmp_path / "made-cpu.json", tmp_path / f"{draw.__name__}.png")
        assert (tmp_path / f"{draw.__name__}.png").read_bytes().startswith(b"\x89PNG")

    shapes = ("4, 1, 8", "4, 2, 8", "4, 1, 16", "5, 1, 8", "4, 1+1, 8")
    names = ("eager reference", "compiled smaller form", "ours")
    rows = [{"N, T, d": s, "provider": p, "x eager": 2.0, "copies": 1.0} for s in shapes for p in names]
    (tmp_path / "made-cpu.json").write_text(json.dumps({"rows": [*rows, {"N, d": "4, 8", "provider": "ours"}]}))
    plots.gain(tmp_path / "made-cpu.json", 4, tmp_path / "gain.png")
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")

    row = {"provider": "ours", "N": 4, "d": 8, "T": 2, "copies": 2.0, "error": 1e-7}
    rows = [row | {"sweep": size, size: value} for size in "NdT" for value in (4, 16)]
    (tmp_path / "made-cpu.json").write_text(json.dumps({"rows": rows}))
    out = tmp_path / "out" / "made.png"
    plots.sweeps(tmp_path / "made-cpu.json", {"memory": "copies", "error": "error"}, out)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_inputs_rotate():
    seen = []
    run = timing.Rotating(seen.append, "abc", first=2)
    for _ in range(4):
        run()
    assert seen == ["c", "a", "b", "c"]


# -- Timing ---------------------------------------------------------------------------------------------------------


def test_copies_of_the_inputs_exceed_the_cache():
    cache = 50 << 20
    assert timing.copies(160 * 100 * 2048 * 4, cache) == 1
    assert timing.copies(256 * 15 * 512 * 4, cache) == 14
    assert timing.copies(1 << 10, cache) == timing.MOST_COPIES


def test_regions_take_turns_there_and_back():
    now, order = 0.0, []

    def passing(name: str, milliseconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += milliseconds
            order.append(name)

        return run

    host = Host(lambda: now)
    regions = {"a": timing.Region(passing("a", 8.0), passes=4), "b": timing.Region(passing("b", 12.0))}
    times = timing.take_turns(host, regions, seconds=0.12, fewest=1, most=5)
    assert times == {"a": [2.0] * 3, "b": [12.0] * 3}, "120 ms hold three rounds of 20 ms, each region run twice"
    assert "".join(order) == "ab" + "aabb" + "bbaa" + "aabb", "the first does not count"
    assert host.sweeps == 8
    assert len(timing.take_turns(host, regions, 0.0, fewest=2, most=5)["a"]) == 2
    assert len(timing.take_turns(host, regions, 9.0, fewest=2, most=5)["a"]) == 5


def test_times_are_put_into_rows():
    now = 0.0

    def passing() -> None:
        nonlocal now
        now += 2.0

    (row,) = timing.timed(Host(lambda: now), {"a": passing}, seconds=0.0, fewest=3, most=5).values()
    assert row.pop("_busy_elsewhere") >= 0
    assert row == {"_median_ms": 2.0, "_iqr_ms": 0.0, "_rounds": 3}


def test_spread():
    assert timing.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 1.0, 3.0)
    assert timing.spread([2.0]) == (2.0, 2.0, 0.0)


@pytest.mark.parametrize("name", timing.PRECISIONS)
def test_precision_is_set_and_restored(name):
    def fails() -> None:
        with timing.precision(name) as dtype:
            assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == (name == "tf32")
            assert dtype == (torch.bfloat16 if name == "bf16" else torch.float32)
            raise KeyError

    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError):
        fails()
    assert torch.get_float32_matmul_precision() == before
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"


def test_ceilings():
    found = timing.ceilings(Host())
    assert found.copy > 0
    assert set(found.products) >= set(timing.PRECISIONS)
    assert all(found.products["fp32"] >= found.products.get(library, 0) for library in ("torch.mm", "oneDNN"))


# -- The benchmarks of a CPU ----------------------------------------------------------------------------------------

SMALL = timing.Ceilings(1e9, dict.fromkeys(timing.PRECISIONS, 1e9))


def plain(vicreg: bool) -> bench_losses.Functions:
    """What is compared, without what compiles."""
    return {name: f for name, f in bench_losses.compared(vicreg).items() if "compiled" not in name}


@pytest.fixture
def one_copy(monkeypatch):
    monkeypatch.setattr(timing, "copies", lambda *_: 2)


@pytest.mark.parametrize("case", [Case(6, (2, 3), 20, eager=1e9, plain=1e-9, product=2.0), Case(20, (3,), 6)])
def test_losses_are_checked_and_timed(case, one_copy):
    rows = bench_losses.compare(case, plain(False), SMALL, (0.0, 2, 2))
    assert all(row["x plain"] > 0 and row["copies"] > 0 and row["_rounds"] == 2 for row in rows.values())
    said = rows["ours"]["target"]
    if case.eager:
        assert re.fullmatch(
            r"x eager >= 1e\+09: missed \(.+\); x plain >= 1e-09: met \(.+\); of product >= 2: .+", said
        )
    else:
        assert said.startswith("x plain >= 1: ")


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_vicreg_with_and_without_lightly(shape, one_copy, monkeypatch):
    """A stand-in for the package, which must agree with the formula as all providers do."""
    case = Case(shape[0], (1, 1), shape[1])
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    assert "no lightly" in bench_losses.compare(case, plain(True), None, (0.0, 1, 1), vicreg=True)["lightly"]["note"]
    module, made = ModuleType("lightly.loss"), []

    class VICRegLoss(torch.nn.Module):
        def __init__(self, **weights: float) -> None:
            super().__init__()
            made.append(weights)

        def forward(self, z_a: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
            assert z_a.shape == z_b.shape == shape
            return providers.vicreg([z_a.unsqueeze(1), z_b.unsqueeze(1)])

    module.VICRegLoss = VICRegLoss
    monkeypatch.setitem(sys.modules, "lightly", ModuleType("lightly"))
    monkeypatch.setitem(sys.modules, "lightly.loss", module)
    rows = bench_losses.compare(case, plain(True), SMALL, (0.0, 2, 2), vicreg=True)
    assert made == [{"lambda_param": 25.0, "mu_param": 25.0, "nu_param": 1.0}]
    fastest = min(row["_median_ms"] for name, row in rows.items() if name != "ours")
    assert rows["ours"]["x plain"] == pytest.approx(fastest / rows["ours"]["_median_ms"]), "lightly counts as plain"


def test_a_wrong_loss_is_not_timed(one_copy):
    wrong = {"ours": lambda parts: 1.001 * providers.ours(parts)}
    with pytest.raises(AssertionError, match=r"ours at 6, 2, 20: off by 1\.0e-03"):
        bench_losses.compare(Case(6, (2,), 20), wrong, SMALL, (0.0, 1, 1))


def test_sigreg_is_checked_and_timed(monkeypatch):
    monkeypatch.setattr(bench_sigreg, "copies", lambda *_: 2)
    monkeypatch.setitem(bench_sigreg.CASES, (6, 2, 20), {"x eager": 1e9, "x memory": 1e-9})
    directions = projections.drawn(0, 20, 40, torch.device("cpu"))
    functions = {name: f for name, f in bench_sigreg.compared(directions).items() if "compiled" not in name}
    rows = bench_sigreg.compare((6, 2, 20), directions, functions, (0.0, 2, 2))
    assert all(row["x plain"] > 0 and row["x memory"] > 0 and row["_rounds"] == 2 for row in rows)
    said = next(row["target"] for row in rows if row["provider"] == "ours")
    assert re.fullmatch(r"x eager >= 1e\+09: missed \(.+\); x memory >= 1e-09: met \(.+\)", said)
    wrong = {"eager reference": functions["eager reference"], "ours": lambda h: 1.001 * functions["ours"](h)}
    with pytest.raises(AssertionError, match=r"ours at \(6, 2, 20\): off by 1\.0e-03"):
        bench_sigreg.compare((6, 2, 20), directions, wrong, None)


def test_the_grid():
    """60 shapes over the whole range. Of the plain covariances (T, d, d) there are some five in memory at once."""
    shapes = bench_losses_grid.SHAPES
    assert len(set(shapes)) == len(shapes) == 60
    for sizes, limits in zip(zip(*shapes, strict=True), [(2, 16_384), (1, 128), (1, 8192)], strict=True):
        assert (min(sizes), max(sizes)) == limits
        assert len(set(sizes)) >= 8
    assert all(5 * 4 * t * d * d + 8 * 4 * n * t * d <= 4e9 for n, t, d in shapes)


# -- The benchmark of a GPU, on the host ----------------------------------------------------------------------------


def compare(case: Case, name: str = "fp32", device: timing.Device | None = None) -> tuple[list[records.Row], list[str]]:
    """Nothing is compiled."""
    functions = bench_losses_cuda.compared(case, compiled=lambda function: function)
    return bench_losses_cuda.compare(case, name, device or Host(), SMALL, 0.0, functions)


@pytest.mark.parametrize("name", timing.PRECISIONS)
@pytest.mark.parametrize("case", [Case(6, (2, 3), 20), Case(20, (3,), 6)])
def test_every_provider_is_checked_and_timed(case, name):
    rows, wrong = compare(case, name)
    assert wrong == []
    assert [row["provider"] for row in rows] == list(bench_losses_cuda.compared(case))
    for row in rows:
        if row["provider"] == "compiled gram form" and case.n > case.d:
            assert "N > d" in row["note"]
            continue
        assert row["us"] > 0
        assert row["_launched_us"] > 0
        assert row["_gradient_error"] <= bench_losses_cuda.SLACK * providers.tolerance(name, case.n)[1]
        assert row["over floor"] == pytest.approx(row["us"] / row["_floor_us"])
    text = report.gpu_report(records.results("losses_cuda", MACHINE, rows))
    assert f"| ({case}) | {name} |" in text


@pytest.mark.parametrize("provider", ["ours", "eager_reference"])
def test_wrong_outputs_are_found(monkeypatch, provider):
    right = getattr(providers, provider)
    monkeypatch.setattr(providers, provider, lambda parts: 1.001 * right(parts))
    rows, wrong = compare(Case(6, (2,), 20))
    row = next(row for row in rows if row["provider"] == provider.replace("_", " "))
    assert "us" not in row
    assert "wrong: loss off by 1.0e-03" in row["note"]
    assert any(line.startswith(f"{row['provider']} at 6, 2, 20, fp32: wrong") for line in wrong)


def test_a_failing_provider_does_not_hide_the_others(monkeypatch):
    def failing(parts: providers.Parts) -> torch.Tensor:
        raise ValueError("no such\nthing")

    monkeypatch.setattr(providers, "ours_in_torch", failing)
    rows, wrong = compare(Case(6, (2,), 20))
    assert wrong == ["ours in torch at 6, 2, 20, fp32: ValueError: no such"]
    assert sum("us" in row for row in rows) == len(rows) - 1


def test_memory_that_runs_out_is_no_failure(monkeypatch):
    def large(parts: providers.Parts) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(providers, "eager_reference", large)
    rows, wrong = compare(Case(6, (2,), 20))
    assert wrong == []
    assert rows[0]["note"] == "out of memory"
    assert all("x eager" not in row for row in rows)


def test_what_cannot_be_captured_says_so():
    class NoGraphs(Host):
        def capture(self, function):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    rows, wrong = compare(Case(6, (2,), 20), device=NoGraphs())
    assert wrong == []
    assert all(row["us"] > 0 for row in rows)
    assert all(row["note"].startswith("not captured, so its launches count: RuntimeError: operation") for row in rows)


def test_outputs_of_graphs_are_checked():
    class Forgetful(Host):
        def capture(self, function):
            outputs = function()
            return function, (outputs[0], *(0 * gradient for gradient in outputs[1:]))

    rows, wrong = compare(Case(6, (2,), 20), device=Forgetful())
    assert len(wrong) == len(rows)
    assert all(row["note"].endswith("in its graph") for row in rows)


@pytest.mark.cuda
@pytest.mark.parametrize("name", timing.PRECISIONS)
def test_on_a_gpu(name):
    device = timing.Cuda()
    rows, wrong = compare(Case(64, (4, 3), 128), name, device)
    assert wrong == []
    assert all(row["us"] > 0 and row["copies"] > 0 and "note" not in row for row in rows)


# -- Two commits ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_trees_that_are_compared(tmp_path, monkeypatch):
    """A commit's, and the working tree's with its changes, which stays as it is."""
    root, file = tmp_path / "root", tmp_path / "root" / "file"
    (root / "vjvcr_fast").mkdir(parents=True)
    (root / "kernels").mkdir()
    for made in (file, root / "vjvcr_fast" / "a.py", root / "kernels" / "gram.py"):
        made.write_text("before")
    for arguments in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c"]):
        subprocess.run(["git", *arguments], cwd=root, check=True)
    monkeypatch.setattr(compare_commits, "ROOT", root)
    clean = compare_commits.checked_out(".", tmp_path / "clean", build=False)
    file.write_text("after")
    changed = compare_commits.checked_out(".", tmp_path / "changed", build=False)
    committed = compare_commits.checked_out("HEAD", tmp_path / "committed", build=False)
    assert [(tree / "file").read_text() for tree in (clean, changed, committed, root)] == [
        "before",
        "after",
        "before",
        "after",
    ]
    assert (changed / "vjvcr_fast" / "kernels" / "gram.py").exists()
    with pytest.raises(SystemExit, match="no-such"):
        compare_commits.checked_out("no-such", tmp_path / "none", build=False)


def test_cases_that_a_tree_does_not_have_are_left_out(monkeypatch, tmp_path):
    """Of the others the second tree's times are put over the first's; the trees take turns, there and back."""
    trees, order = [tmp_path / "before", tmp_path / "after"], []

    def said(command, folder, **options):
        order.append(folder.name)
        times = {"MovingMNIST": 1.0 + 0.1 * len(order)} | ({"sparse latent": 1.0} if folder.name == "after" else {})
        return f"warning\n{json.dumps(times)}".encode()

    monkeypatch.setattr(compare_commits, "said", said)
    ((case, least, median, noise),) = compare_commits.compare(trees, rounds=2)
    assert order == ["before", "after", "after", "before"]
    assert case == "MovingMNIST"
    assert (least, median, noise) == pytest.approx((1.2 / 1.1, 1.25 / 1.25, 1.4 / 1.1))


# -- Commands -------------------------------------------------------------------------------------------------------


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    return subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=False)


def test_a_cpu_collects_the_benchmarks_of_a_cpu():
    done = run(sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout
    assert "bench_losses.py" in done.stdout
    assert "bench_losses_cuda.py" not in done.stdout


def test_benchmarks_allow_what_tests_allow():
    expected = {
        "fp32": (tolerances.TF32X3, tolerances.TF32X3),
        "tf32": (tolerances.TF32, tolerances.TF32_GRADIENT),
        "bf16": (tolerances.BFLOAT16_PRODUCTS, tolerances.BFLOAT16_PRODUCTS_GRADIENT),
    }
    assert expected == providers.TOLERANCES
