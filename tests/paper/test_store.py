"""Results of finished runs as small files: they replace training, unless they are of something else."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from vjvcr_fast.cli import main
from vjvcr_fast.config import Config, ConfigError, override, preset
from vjvcr_fast.evaluation.evaluate import MEASURES
from vjvcr_fast.models.energy import ROWS
from vjvcr_fast.paper import figures, jobs, store
from vjvcr_fast.paper import table1 as paper
from vjvcr_fast.paper.store import POINTS, Store, open_store

PRESET = "moving-mnist-mini"
OPTIONS = ["--preset", PRESET, *(f"--{name}={value}" for name, value in TINY.items()), "--processes=1"]
EVALUATION = {"measures": MEASURES, "data": "some digits", "speed_mse": 0.1}


def table(out: Path, *options: str) -> list[str]:
    return ["reproduce", "table1", "--out", str(out), *OPTIONS, *options]


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing is trained or loaded")


@pytest.fixture
def tiny_mini() -> Config:
    return override(preset(PRESET), {**TINY, "data.root": "/some/where"})


@pytest.fixture
def kept(tmp_path: Path, tiny_mini: Config) -> tuple[Store, Path]:
    """A store with one run, and the run's folder."""
    run, into = tmp_path / "vj-vcr-seed0", Store(tmp_path / "store", writes=True)
    run.mkdir()
    lines = [{"step": 5 * i, "hidden": 1 / (i + 1), "videos_per_second": 9.0} for i in range(1, 334)]
    lines.append({"step": 5 * 333, "validation_energy_true": 0.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    into.add(run, tiny_mini, "evaluation.json", EVALUATION)
    return into, run


@pytest.mark.usefixtures("digits", "one_thread")
def test_a_table_without_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same rows again, in another folder, where nothing is trained; a run that is missing is trained."""
    for name in ("spectrum", "probes"):
        monkeypatch.setattr(figures, name, lambda *_: None)
    monkeypatch.setattr(paper, "figure5", lambda table, path: path.touch())
    results = tmp_path / "results"
    assert main(table(tmp_path / "first", "--results", str(results))) == 0
    assert {file.stem for file in (results / PRESET).iterdir()} == {f"{row}-seed0" for row in ROWS}
    assert str(tmp_path) not in "".join(file.read_text() for file in (results / PRESET).iterdir())
    shown = capsys.readouterr()
    assert "taken" not in shown.err
    assert "figure5.png" in shown.out

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "train", never)
        patch.setattr(paper, "figure5", never)
        assert main(table(tmp_path / "second", "--results", str(results))) == 0
    shown = capsys.readouterr()
    assert shown.err.count("taken, not trained: ") == 4
    assert "figure5.png" not in shown.out
    pages = [(tmp_path / name / "table1.md").read_text() for name in ("first", "second")]
    assert [line for line in pages[1].splitlines() if line.startswith("|")] == [
        line for line in pages[0].splitlines() if line.startswith("|")
    ]
    assert "Figure 5 is not drawn: the weights of vj-vcr-seed0, generative-seed0 are not here" in pages[1]
    assert "taken from files of results: vj-vcr-seed0, vj-vcr-decoder-seed0, generative-vcr-seed0, gen" in pages[1]
    assert (tmp_path / "second" / "curves.png").stat().st_size > 0
    numbers = json.loads((tmp_path / "second" / "table1.json").read_text())
    assert [*numbers["taken"]] == [f"{row}-seed0" for row in ROWS]

    trained: list[str] = []
    (results / PRESET / "generative-seed0.json").unlink()
    with monkeypatch.context() as patch:
        real = jobs.train
        patch.setattr(jobs, "train", lambda config, run, **more: (trained.append(run.name), real(config, run, **more)))
        assert main(table(tmp_path / "third", "--results", str(results))) == 0
    assert trained == ["generative-seed0"]
    assert (results / PRESET / "generative-seed0.json").exists()


def test_what_a_file_holds(kept: tuple[Store, Path], tiny_mini: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """The evaluation as it was, and the curves with few points. It needs no folder of the run."""
    into, run = kept
    content = into.file(run, tiny_mini).read_text()
    assert "/some/where" not in content
    assert "videos_per_second" not in content
    elsewhere = Path("elsewhere") / run.name
    found = into.take(elsewhere, override(tiny_mini, {"data.root": "", "train.keep": 7}), "evaluation.json")
    assert found is not None
    assert found.evaluation == EVALUATION
    assert len(found.curves) <= POINTS
    *curve, last, energy = found.curves
    assert last == {"step": 5 * 333, "hidden": 0.002994}
    assert energy == {"step": 5 * 333, "validation_energy_true": 0.5}
    assert [row["step"] for row in (*curve, last)] == sorted({row["step"] for row in found.curves})
    assert "taken, not trained" in capsys.readouterr().err
    assert into.take(run.with_name("vj-vcr-seed1"), tiny_mini, "evaluation.json") is None


@pytest.mark.parametrize(
    ("changes", "content", "says"),
    [
        ({"model.beta": 0.2}, {}, "another config (model.beta 0.1 -> 0.2)"),
        ({"train.steps": 13}, {}, "another config (train.steps 12 -> 13)"),
        ({"evaluate.probe_epochs": 9}, {}, "another config (evaluate.probe_epochs 3 -> 9)"),
        ({}, {"measured": "latents.json"}, "measured as ('latents.json', "),
        ({}, {"evaluation": {**EVALUATION, "measures": 0}}, "measured as ('evaluation.json', 0)"),
        ({}, {"evaluation": 3}, "not a file of results"),
        ({}, {"curves": [1]}, "not a file of results"),
        ({}, {"config": {"train": {"lr": -1}}}, "not a file of results: train.lr=-1.0: must be above 0"),
    ],
)
def test_what_is_not_taken(
    kept: tuple[Store, Path],
    tiny_mini: Config,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    content: dict[str, Any],
    says: str,
) -> None:
    into, run = kept
    file = into.file(run, tiny_mini)
    file.write_text(json.dumps({**json.loads(file.read_text()), **content}))
    assert into.take(run, override(tiny_mini, changes), "evaluation.json") is None
    assert f"not taken: {file}: {says}" in capsys.readouterr().err


def test_a_cut_off_file(kept: tuple[Store, Path], tiny_mini: Config, capsys: pytest.CaptureFixture[str]) -> None:
    into, run = kept
    file = into.file(run, tiny_mini)
    file.write_text(file.read_text()[:300])
    assert into.take(run, tiny_mini, "evaluation.json") is None
    assert "not a file of results" in capsys.readouterr().err


@pytest.mark.usefixtures("digits")
def test_results_of_other_data(
    kept: tuple[Store, Path], tiny_mini: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone they are shown as they are. Beside runs of these data, of a third kind, or if the data are named, they are
    not taken."""
    monkeypatch.delenv("VJVCR_DATA", raising=False)
    into, run = kept
    configs, anywhere = {run: tiny_mini}, override(tiny_mini, {"data.root": ""})
    assert [*jobs._taken(anywhere, configs, {}, paper.TABLE1, into)] == [run]
    assert jobs._taken(tiny_mini, configs, {}, paper.TABLE1, into) == {}
    assert jobs._taken(override(anywhere, {"data.download": True}), configs, {}, paper.TABLE1, into) == {}
    with monkeypatch.context() as patch:
        patch.setenv("VJVCR_DATA", "/some/where")
        assert jobs._taken(anywhere, configs, {}, paper.TABLE1, into) == {}
    tiny_mini = anywhere
    configs[run.with_name("generative-seed0")] = override(tiny_mini, {"model.row": "generative"})
    assert jobs._taken(tiny_mini, configs, {}, paper.TABLE1, into) == {}
    assert "is of some digits; here are blobs: 40 digits" in capsys.readouterr().err


@pytest.mark.usefixtures("digits")
def test_finished_runs_of_other_data(tiny_mini: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not put into one table with others, nor shown as results of data that are named."""
    monkeypatch.delenv("VJVCR_DATA", raising=False)
    anywhere = override(tiny_mini, {"data.root": ""})
    blobs, some = {"data": "blobs: 40 digits"}, {"data": "some digits"}
    for here, config, more in (
        ({Path("a"): some, Path("b"): blobs}, anywhere, False),
        ({Path("a"): some}, anywhere, True),
        ({Path("a"): some}, tiny_mini, False),
    ):
        with pytest.raises(ConfigError, match=r"trained on (some|blobs).*; the others' data are (blobs|some)"):
            jobs._check_sources(config, here, more)
    jobs._check_sources(anywhere, {Path("a"): some}, False)
    jobs._check_sources(tiny_mini, {Path("a"): blobs}, True)
    jobs._check_sources(anywhere, {}, True)


def test_what_is_there_is_not_lost(
    kept: tuple[Store, Path], tiny_mini: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file still says where its results were made, and stays if another config is run; an old measurement goes."""
    into, run = kept
    file = into.file(run, tiny_mini)
    before = file.read_text()
    monkeypatch.setattr(store, "machine", lambda config: {"commit": "later", "name": "another machine"})
    into.add(run, tiny_mini, "evaluation.json", EVALUATION)
    assert file.read_text() == before
    into.add(run, override(tiny_mini, {"train.steps": 13}), "evaluation.json", EVALUATION | {"speed_mse": 9.0})
    assert file.read_text() == before
    said = f"not kept: vj-vcr-seed0: {file} is of another config (train.steps 12 -> 13); choose another --results"
    assert said in capsys.readouterr().err
    file.write_text(before.replace(f'"measures": {MEASURES}', '"measures": 0'))
    into.add(run, tiny_mini, "evaluation.json", EVALUATION)
    assert json.loads(file.read_text())["machine"]["commit"] == "later"


def test_make_train_trains() -> None:
    """Even in a checkout that has results of these runs."""
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert "vjvcr-fast reproduce table1 --dataset moving-mnist --results off $(ARGS)" in makefile


def test_which_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a folder that is asked for is written to."""
    monkeypatch.setattr(store, "package_parent", lambda: tmp_path)
    assert open_store(None) is None
    assert open_store("there") == Store(Path("there"), writes=True)
    own = tmp_path / "docs" / "results" / "runs"
    own.mkdir(parents=True)
    assert open_store(None) == Store(own, writes=False)
    assert open_store("off") is None
    (tmp_path / "file").touch()
    for target in ("table1", "all"):  # before anything is trained
        assert main(["reproduce", target, "--results", str(tmp_path / "file")]) == 2


def test_a_folder_that_is_only_read(tmp_path: Path, tiny_mini: Config) -> None:
    Store(tmp_path, writes=False).add(tmp_path / "run", tiny_mini, "evaluation.json", EVALUATION)
    assert not [*tmp_path.iterdir()]
