"""`vjvcr-fast bench`: what it checks, times and shows. How time is measured: test_benchmarks.py."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vjvcr_fast import cli
from vjvcr_fast.bench import loss, timing

ARGUMENTS = ["bench", "--device", "cpu", "--shape"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled, and a round or three have to do."""
    monkeypatch.setattr(loss, "compiled", lambda function: function)
    monkeypatch.setattr(loss, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "MOST_COPIES", 3)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main([*ARGUMENTS, *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("dtype", loss.DTYPES)
@pytest.mark.parametrize("shape", ["7,2,20", "20,1,7"])
def test_every_way_has_its_time(capsys: pytest.CaptureFixture[str], dtype: str, shape: str) -> None:
    lines = shown(capsys, shape, "--dtype", dtype).splitlines()
    assert lines[0].startswith(f"VCR of ({shape.replace(',', ', ')}), {dtype}, forward and backward; ")
    rows = [re.split(r" {2,}", line) for line in lines[4:9]]
    assert [way for way, *_ in rows] == [*(row[0] for row in rows[:4]), "vjvcr_fast"]
    assert all(re.fullmatch(r"[\d.,e+-]+ ms", time) for _, time, *_ in rows)
    assert rows[-1][2] == "1.0x"


def test_a_gpu_gets_several_passes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the host in its place."""
    monkeypatch.setattr(timing, "current", timing.Host)
    times, take_turns = dict[str, timing.Region](), timing.take_turns
    monkeypatch.setattr(timing, "take_turns", lambda on, of, *how: times.update(of) or take_turns(on, of, *how))
    rows, others = loss.measure(7, 2, 20, "float32", torch.device("cuda"), print)
    assert len(rows) == len(times) == 5
    assert {region.passes for region in times.values()} == {loss.LAUNCHED}
    assert others == 0.0


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    before: Any = getattr(loss, name)
    monkeypatch.setattr(loss, name, lambda parts: change(before(parts)))


def test_a_wrong_result_is_not_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, "smaller_form", lambda result: 1.01 * result)
    text = shown(capsys, "7,2,20")
    assert "smaller product             wrong: loss off by 1e-02, gradient off by 1e-02" in text
    replaced(monkeypatch, "ours", lambda result: 1.01 * result)
    assert cli.main([*ARGUMENTS, "7,2,20"]) == 1
    assert "vjvcr-fast: (7, 2, 20), float32: wrong: loss off by 1e-02" in capsys.readouterr().err


def test_what_does_not_compile_says_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(parts: loss.Parts) -> torch.Tensor:
        raise ValueError("no working compiler\nand more")

    monkeypatch.setattr(loss, "compiled", lambda function: fails)
    assert "plain PyTorch, compiled     left out: ValueError: no working compiler\n" in shown(capsys, "7,2,20")


def test_what_does_not_fit_into_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With 50 steps the covariances (T, d, d) of the whole take more than a check of one step at a time."""
    monkeypatch.setattr(loss, "_free", lambda on: 2e5)
    text = shown(capsys, "7,50,20")
    assert text.count("left out: it takes some 0.0 GB, and 0.0 GB are free") == 2
    monkeypatch.setattr(loss, "_free", lambda on: 1e3)
    assert cli.main([*ARGUMENTS, "7,50,20"]) == 1
    assert "(7, 50, 20): to check it takes some" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["7,20", "1,2,3", "7,0,3", "7,2,0", "a,b,c", "7.5,2,3", ""])
def test_wrong_shapes(capsys: pytest.CaptureFixture[str], shape: str) -> None:
    assert cli.main([*ARGUMENTS[:-1], f"--shape={shape}"]) == 2
    assert f"--shape={shape!r}: must be N,T,d, whole numbers with N >= 2" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:99"])
def test_wrong_devices(capsys: pytest.CaptureFixture[str], device: str) -> None:
    assert cli.main(["bench", "--shape", "7,2,20", "--device", device]) == 2
    assert f"--device='{device}': " in capsys.readouterr().err
