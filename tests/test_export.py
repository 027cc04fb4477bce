"""`vjvcr-fast export`: the folder, its model card, and the encoder as a program that needs torch alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from test_embed import SIMVP, made_run

import vjvcr_fast
from vjvcr_fast.cli import main
from vjvcr_fast.training import checkpoint

pytest.importorskip("safetensors", reason="the extra hub is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_folder_to_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = made_run(tmp_path / "run", {**SIMVP, "data.stride": 2}), tmp_path / "clips"
    assert main(["export", str(run), str(folder)]) == 0
    names = ("model.safetensors", "config.json", "README.md")
    assert capsys.readouterr().out == f"wrote {', '.join(str(folder / name) for name in names)}\n"
    frames = torch.rand(2, 2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(vjvcr_fast.load(folder).predict(frames), vjvcr_fast.load(run).predict(frames))
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: vjvcr_fast\n")
    assert "# clips" in card
    assert "| data | folder, 2 context and 3 target frames, 16x16, stride 2 |" in card
    assert "| model | VJ-VCR without decoder (simvp), d = 64 features a frame |" in card
    assert "Measured" not in card
    assert str(tmp_path) not in card


def test_a_card_has_what_was_measured_on_the_same_checkpoint(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", TINY)
    measured = {"psnr": 21.98765, "rank_me": 12.5, "validation_data": "blobs: 40 digits", "singular_values": [1.0]}
    for best, name in ((checkpoint.digest(run / "best.pt"), "same"), ("0123456789abcdef", "other")):
        (run / "evaluation.json").write_text(json.dumps({**measured, "best": best}))
        assert main(["export", str(run), str(tmp_path / name)]) == 0
    card = (tmp_path / "same" / "README.md").read_text()
    assert "Measured on blobs: 40 digits:" in card
    assert "| PSNR of decoded predictions, dB | 21.99 |\n| RankMe | 12.5 |\n" in card
    assert "Measured" not in (tmp_path / "other" / "README.md").read_text()


def test_a_readme_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = made_run(tmp_path / "run", TINY), tmp_path / "clips"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    assert main(["export", str(run), str(folder)]) == 0
    assert (folder / "README.md").read_text() == "mine"
    assert "README.md" not in capsys.readouterr().out


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path / "run", TINY)
    assert main(["export", str(run), str(run)]) == 2
    assert (
        capsys.readouterr().err == f"vjvcr-fast: {run}: the folder of a run; choose another one for the saved model\n"
    )
    assert main(["export", str(tmp_path), str(tmp_path / "clips")]) == 2
    assert f"{tmp_path}/config.json: not a readable config file" in capsys.readouterr().err
    assert not (tmp_path / "clips").exists()


ALONE = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
torch.save(program(torch.load(sys.argv[2])), sys.argv[3])
print("vjvcr_fast" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("changes", [TINY, SIMVP], ids=["conv", "simvp"])
def test_the_encoder_needs_torch_alone(tmp_path: Path, changes: dict[str, Any]) -> None:
    """With equal outputs, for any number of videos and frames, one included."""
    run, file = made_run(tmp_path / "run", changes), tmp_path / "encoder.pt2"
    assert main(["export", str(run), str(tmp_path / "clips"), "--encoder", str(file)]) == 0
    trained = vjvcr_fast.load(run, "cpu")
    program = torch.export.load(file).module()
    channels = trained.config.data.channels
    for n, t in ((2, 3), (1, 1), (5, 2), (1, 7)):
        frames = torch.rand(n, t, channels, 16, 16)
        with torch.no_grad():
            assert torch.equal(program(frames), trained.encode(frames))
    torch.save(frames, tmp_path / "frames.pt")
    command = [sys.executable, "-c", ALONE, str(file), str(tmp_path / "frames.pt"), str(tmp_path / "h.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "h.pt"), trained.encode(frames))
