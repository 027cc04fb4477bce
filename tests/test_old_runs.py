"""A run of an earlier version (commit 3f2ffcf) can be loaded, evaluated and resumed, and predicts what it did then."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import vjvcr_fast
from vjvcr_fast.cli import main
from vjvcr_fast.config import Config
from vjvcr_fast.training import checkpoint

RUN = Path(__file__).parent / "run_of_3f2ffcf"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def test_it_predicts_what_it_did_then(run: Path) -> None:
    model = vjvcr_fast.load(run, device="cpu")
    x = torch.rand(2, 2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = {"encoded": model.encode(x).flatten()[::16], "predicted": model.predict(x).flatten()[::24]}
    for name, then in json.loads((run / "expected.json").read_text()).items():
        torch.testing.assert_close(found[name], torch.tensor(then))


def test_its_config_says_what_it_said_then(run: Path) -> None:
    written, read = json.loads((run / "config.json").read_text()), Config.load(run / "config.json").to_dict()
    for group, values in written.items():
        for name, value in values.items() if isinstance(values, dict) else ():
            if f"{group}.{name}" == "train.tensorboard":
                assert read[group]["log"] == ("tensorboard" if value else "none")
                continue
            now = read[group][name]
            assert (list(now) if isinstance(now, tuple) else now) == value, f"{group}.{name}"


def test_it_is_evaluated_and_goes_on(run: Path, embedded_digits: None) -> None:
    assert main(["evaluate", str(run)]) == 0
    assert json.loads((run / "evaluation.json").read_text())["step"] == 4
    assert (
        main(["train", "--config", str(run / "config.json"), "--out", str(run), "--steps", "6", "--resume=must"]) == 0
    )
    assert checkpoint.load(run / "last.pt")["step"] == 6
