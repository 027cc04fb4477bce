"""Saving a trained model and loading it again: from a folder, and from a cache of the Hugging Face Hub. No network."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from test_embed import SIMVP, made_run

import vjvcr_fast
from vjvcr_fast.config import Config, ConfigError, override
from vjvcr_fast.runs import CONFIG, WEIGHTS
from vjvcr_fast.training.checkpoint import CheckpointError
from vjvcr_fast.training.loop import train

safetensors = pytest.importorskip("safetensors.torch", reason="the extra hub is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {**TINY, "latent.kind": "sparse", "latent.dim": 4, "latent.iterations": 5}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def saved(folder: Path, changes: dict[str, Any] = TINY) -> Path:
    """A saved model; its run is beside it. The statistics of x and y differ, as after training."""
    run = made_run(folder / "run", changes)
    trained = vjvcr_fast.load(run)
    for i, (name, buffer) in enumerate(trained.model.named_buffers()):
        if "running" in name:
            buffer.add_(0.01 * (i + 1))
    trained.save_pretrained(folder / "saved")
    return folder / "saved"


def rewrite(folder: Path, change: Any) -> None:
    tensors = safetensors.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("changes", [TINY, SPARSE, SIMVP, {**TINY, "model.row": "vj-vcr-decoder"}])
def test_saved_and_loaded_it_is_the_same_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    """With the calibrated weight and the statistics of both encoders, in an encoder and a `twin` that share weights."""
    first = vjvcr_fast.load(saved(tmp_path, changes))
    first.save_pretrained(tmp_path / "again")
    second = vjvcr_fast.load(tmp_path / "again")
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert second.config == override(first.config, {"train.device": "auto"})
    assert second.config.latent.weight == 0.1
    assert not second.model.training
    if second.model.twin is not None:
        shared = zip(second.model.encoder.parameters(), second.model.twin.parameters(), strict=True)
        assert all(a is b for a, b in shared)
        assert not torch.equal(ours["encoder.spatial.0.1.running_mean"], ours["twin.spatial.0.1.running_mean"])


def test_a_saved_model_tells_no_paths(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", {**TINY, "data.root": "/home/me/data", "data.cache": "/home/me/cache"})
    vjvcr_fast.load(run, device="cpu").save_pretrained(tmp_path / "saved")
    assert "/home" not in (tmp_path / "saved" / CONFIG).read_text()
    assert Config.load(tmp_path / "saved" / CONFIG).train.device == "auto"
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [CONFIG, WEIGHTS]


def test_it_is_not_saved_into_a_run(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", TINY)
    before = (run / CONFIG).read_text()
    with pytest.raises(ConfigError, match="the folder of a run; choose another one"):
        vjvcr_fast.load(run).save_pretrained(run)
    assert (run / CONFIG).read_text() == before


def test_no_run_is_begun_in_the_folder_of_a_saved_model(tmp_path: Path) -> None:
    """It would lose its config, and `load` would find two models."""
    folder = saved(tmp_path)
    before = (folder / CONFIG).read_text()
    with pytest.raises(ConfigError, match="saved holds a saved model: choose another --out"):
        train(override(Config(preset="tiny"), TINY), folder)
    assert (folder / CONFIG).read_text() == before


# -- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("encoder.spatial.0.0.weight"), "missing encoder.spatial.0.0.weight"),
        (lambda t: [t.pop(n) for n in [*t] if n.startswith("twin.")], "missing twin.spatial.0.1.running_mean"),
        (lambda t: t.update({"head.weight": torch.ones(1)}), "unexpected head.weight"),
        (
            lambda t: t.update({"encoder.spatial.0.0.weight": torch.ones(4, 1, 5, 5)}),
            r"shape \(4, 1, 5, 5\), not \(4, ",
        ),
    ],
)
def test_other_weights_are_refused_and_named(tmp_path: Path, change: Any, says: str) -> None:
    folder = saved(tmp_path)
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=f"^{folder / WEIGHTS}: not the weights of its config.json: .*{says}"):
        vjvcr_fast.load(folder)


def test_other_files_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    content = (folder / WEIGHTS).read_bytes()
    for wrong in (content[:-7], b"", b"\x80\x04pickle"):
        (folder / WEIGHTS).write_bytes(wrong)
        with pytest.raises(CheckpointError, match=f"^{folder / WEIGHTS}: damaged, or not a safetensors file"):
            vjvcr_fast.load(folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "backbone": "resnet"}))
    with pytest.raises(ConfigError, match=f"^{folder / CONFIG}: backbone: no such field"):
        vjvcr_fast.load(folder)


# -- From the Hub's cache -------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of huggingface_hub, which is offline; nobody may ask for an address."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="the extra hub is not installed")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked for an address"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def cached(cache: Path, folder: Path) -> Path:
    """Puts a saved model into the cache as the repository user/clips. Returns the folder of its files."""
    repository = cache / "models--user--clips"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    return folder.rename(repository / "snapshots" / COMMIT)


@pytest.mark.parametrize("name", ["user/clips", "user/clips@main", f"user/clips@{COMMIT}"])
def test_a_repository_from_the_cache(cache: Path, tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path)
    right = vjvcr_fast.load(folder).model.state_dict()
    cached(cache, folder)
    loaded = vjvcr_fast.load(name).model.state_dict()
    assert all(torch.equal(right[key], loaded[key]) for key in right)


def test_a_folder_comes_first(cache: Path, tmp_path: Path) -> None:
    cached(cache, saved(tmp_path))
    (tmp_path / "user").mkdir()
    made_run(tmp_path / "user" / "clips", {**TINY, "model.hidden": 24})
    assert vjvcr_fast.load("user/clips").config.model.hidden == 24
    assert vjvcr_fast.load("user/clips@main").config.model.hidden == 16


def test_what_is_nowhere(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^runs/typo: no such folder, and not from the Hugging Face Hub: Local"):
        vjvcr_fast.load("runs/typo")
    files = cached(cache, saved(tmp_path))
    with pytest.raises(CheckpointError, match=r"^user/clips@v2: no such folder"):
        vjvcr_fast.load("user/clips@v2")
    (files / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=rf"^user/clips: has no {WEIGHTS} on the Hugging Face Hub"):
        vjvcr_fast.load("user/clips")
    for name in (Path("runs/typo"), "typo", "runs/typo/deeper"):  # a Path is a folder; a repository has one slash
        with pytest.raises(ConfigError, match=f"^{name}/config.json: not a readable config file"):
            vjvcr_fast.load(name)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without huggingface_hub a folder is loaded; runs need neither package."""
    folder = saved(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert vjvcr_fast.load(folder).d == 32
    with pytest.raises(ImportError, match=r"^runs/typo: no such folder, .*pip install 'vjvcr_fast\[hub\]'"):
        vjvcr_fast.load("runs/typo")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    trained = vjvcr_fast.load(tmp_path / "run")
    for call in (lambda: vjvcr_fast.load(folder), lambda: trained.save_pretrained(tmp_path / "again")):
        with pytest.raises(ImportError, match=r"^safetensors is not installed: pip install 'vjvcr_fast\[hub\]'"):
            call()
