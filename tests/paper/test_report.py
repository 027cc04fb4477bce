"""`vjvcr-fast report`: one page of a run with everything inside it, also of runs that lack something."""

import base64
import re
import shutil
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import cater_files
import clevrer_files
import pytest
import torch
from conftest import TINY_SIMVP
from test_site import look

from vjvcr_fast.cli import main
from vjvcr_fast.config import Config, override, preset
from vjvcr_fast.evaluation.evaluate import decode, evaluate_run, kept_decoder
from vjvcr_fast.paper import figures
from vjvcr_fast.paper.report import report
from vjvcr_fast.paper.sweep import evaluation_of
from vjvcr_fast.runs import load, load_run
from vjvcr_fast.training.build import build_data, build_videos
from vjvcr_fast.training.calibration import Latents
from vjvcr_fast.training.loop import train
from vjvcr_fast.training.step import split_frames

pytestmark = pytest.mark.usefixtures("digits", "one_thread")
pytest.importorskip("matplotlib", reason="the extra train is not installed")
Image = pytest.importorskip("PIL.Image")

CPU = torch.device("cpu")
LOSSES = 0.03  # of the file of an animation: mean difference of values in [0, 1]

# Every row and every kind of latent, once.
KINDS = {
    "none": {"model.row": "vj-vcr"},
    "discrete": {"model.row": "vj-vcr-decoder", "latent.kind": "discrete"},
    "sparse": {"model.row": "generative-vcr", "latent.kind": "sparse"},
    "generative": {"model.row": "generative"},
    "sigreg": {"model.regulariser": "sigreg"},
}


class Page(HTMLParser):
    """The text of a page and its images. Fails unless every element is closed where it should be."""

    EMPTY: ClassVar = ("meta", "link", "img")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: dict[str, bytes] = {}
        self.text, source = "", path.read_text()
        self.feed(source)
        self.close()
        assert self.open == []
        assert len(source) < 1e6
        assert re.findall(r"(?:src|href)=\"(?!data:)|url\(|@import|<script", source) == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        if tag == "img":
            self.images[found["alt"]] = base64.b64decode(found["src"].partition(";base64,")[2])
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def clips(self) -> torch.Tensor:
        """The frames of the animation, (T, 2 S + 1, clips (S + 1) - 1, 3)."""
        film = Image.open(BytesIO(self.images["clips"]))
        frames = []
        for number in range(film.n_frames):
            film.seek(number)
            frames.append(torch.frombuffer(bytearray(film.convert("RGB").tobytes()), dtype=torch.uint8))
        return torch.stack(frames).view(len(frames), film.height, film.width, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_and_latent(tmp_path: Path, tiny_stochastic: Config, kind: str) -> None:
    config = override(tiny_stochastic, KINDS[kind] | {"train.telemetry_every": 4})
    train(config, tmp_path / "run")
    page = Page(report(tmp_path / "run", config))
    assert "Step 12 of 12, finished; lowest validation loss" in page.text
    named = {"energy", "standard deviation of h_x over a batch", "RankMe of h_x, a batch", "videos a second"}
    named |= {"discrete": {"share of the videos that choose a head"}, "sparse": {"L1 weight"}}.get(kind, set())
    named |= {"sigreg": {"SIGReg"}, "generative": {"pixel term D(y)"}, "none": {"hidden term D(h_y)"}}.get(kind, set())
    assert named | {"singular values"} <= page.images.keys()
    assert ("clips" in page.images) == (kind not in ("none", "sigreg"))
    assert ("The model has no decoder. vjvcr-fast report" in page.text) == (kind in ("none", "sigreg"))
    assert ("z is inferred" in page.text) == (kind in ("discrete", "sparse"))
    assert '"steps": 12,' in page.text


def test_the_clips_are_the_runs(tmp_path: Path, tiny: Config) -> None:
    """As decoded by a decoder that is trained for them."""
    run = tmp_path / "run"
    train(tiny, run)
    assert main(["report", str(run), "--decode"]) == 0
    page = Page(run / "report.html")
    assert "decoded by a decoder that was trained afterwards; black while the 2 input frames are shown." in page.text
    frames = page.clips()
    assert frames.shape == (5, 2 * 16 + 1, 4 * 17 - 1, 3)
    config, model = load_run(run)
    decoder = kept_decoder(run, config, model)
    assert decoder is not None
    x, y = split_frames(build_videos(config, build_data(config)[1], "validation", CPU).batch(0, 4), config)
    future = decode(Latents(config, model), decoder, x, y)
    rows = [torch.cat([x, y], dim=1), torch.cat([torch.zeros_like(x), future], dim=1)]
    for at, row in enumerate(rows):
        for clip, expected in enumerate(row):
            drawn = frames[:, 17 * at : 17 * at + 16, 17 * clip : 17 * clip + 16] / 255
            assert (drawn - expected.permute(0, 2, 3, 1)).abs().mean() < LOSSES, (at, clip)


def test_a_film_shows_its_frames() -> None:
    smooth = torch.linspace(0, 1, 16).expand(2, 5, 3, 16, 16) * torch.linspace(0.2, 1, 5).view(5, 1, 1, 1)
    buffer = BytesIO()
    figures.film(buffer, [smooth, 1 - smooth], 100)
    film = Image.open(buffer)
    assert (film.format, film.n_frames, film.size) == ("WEBP", 5, (33, 33))
    film.seek(4)
    pixels = torch.frombuffer(bytearray(film.convert("RGB").tobytes()), dtype=torch.uint8).view(33, 33, 3) / 255
    expected = smooth[0, 4].permute(1, 2, 0)
    assert (pixels[:16, :16] - expected).abs().mean() < LOSSES
    assert (pixels[17:, 17:] - (1 - expected)).abs().mean() < LOSSES


# -- Runs that lack something ---------------------------------------------------------------------------------------


def test_a_run_that_has_just_begun(tmp_path: Path, tiny: Config) -> None:
    (tmp_path / "config.json").write_text(tiny.to_json())
    page = Page(report(tmp_path, tiny))
    assert "Step 0 of 12, no step is logged yet." in page.text
    for said in ("Nothing is logged yet", "No spectrum. There are no weights (best.pt)", "No clips. There are no"):
        assert said in page.text
    assert page.images == {}
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 5, "loss": NaN, "new": 1.0}\n{"step": 6, "loss": 1.0, "x": null}\n{"step": 7, "lo'
    )
    page = Page(report(tmp_path, tiny))
    assert "Step 6 of 12, not finished." in page.text
    assert "Telemetry comes every 100 steps, and none is logged yet." in page.text
    assert page.images.keys() == {"energy", "new"}


def test_what_cannot_be_read_is_named(tmp_path: Path, tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    train(override(tiny, {"model.row": "generative"}), tmp_path)
    (tmp_path / "best.pt").write_bytes(b"no checkpoint")
    assert main(["report", str(tmp_path)]) == 0
    page, said = Page(tmp_path / "report.html"), f"{tmp_path / 'best.pt'}: damaged"
    assert f"No clips. The model or its videos cannot be used: {said}" in page.text
    assert said in capsys.readouterr().err
    assert "energy" in page.images


def test_a_saved_model(tmp_path: Path, tiny: Config) -> None:
    pytest.importorskip("safetensors", reason="the extra hub is not installed")
    train(override(tiny, {"model.row": "vj-vcr-decoder"}), tmp_path / "run")
    load(tmp_path / "run").save_pretrained(tmp_path / "saved")
    assert main(["report", str(tmp_path / "saved"), "--device", "cpu", "--out", str(tmp_path / "other.html")]) == 0
    page = Page(tmp_path / "other.html")
    assert "A saved model, without the history of its training." in page.text
    assert page.images.keys() == {"clips", "singular values"}
    assert not (tmp_path / "saved" / "report.html").exists()


def test_names_cannot_break_the_page(tmp_path: Path, tiny: Config) -> None:
    run = tmp_path / "<script>&'\"`"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "<b>": 2}\n')
    page = Page(report(run, tiny))
    assert run.name in page.text
    assert "<b>" in page.images


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none"], "none: not the folder of a run: it has no config.json"),
        (["run", "--out", "run"], "--out=run: a folder; the name of a file is needed"),
    ],
)
def test_wrong_folders(
    tmp_path: Path,
    tiny: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    (Path("run") / "config.json").write_text(tiny.to_json())
    assert main(["report", *arguments]) == 2
    assert capsys.readouterr().err == f"vjvcr-fast: {says}\n"


# -- Slow -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "files"), [("clevrer-mini", clevrer_files), ("cater-mini", cater_files)])
def test_videos_from_files(tmp_path: Path, name: str, files: Any) -> None:
    """Also after the videos are gone."""
    pytest.importorskip("av", reason="the extra video is not installed: no videos to test with")
    pytest.importorskip("decord", reason="the extra video is not installed: no decoder")
    (tmp_path / "data").mkdir()
    root = files.make(tmp_path / "data")
    small = {"data.frames_in": 2, "data.frames_out": 3, "data.stride": 1, "train.steps": 2, "train.validate_every": 2}
    small |= {"data.root": str(root), "train.validation_videos": 4, "latent.iterations": 2}
    config = override(preset(name), TINY_SIMVP | small | {"model.row": "generative"})
    train(config, tmp_path / "run")
    page = Page(report(tmp_path / "run", config))
    frames = page.clips()
    assert frames.shape == (5, 33, 67, 3)
    assert (frames[..., 0] != frames[..., 2]).any()  # colours
    assert ("z is the true actions." in page.text) == (name == "cater-mini")
    shutil.rmtree(root)
    page = Page(report(tmp_path / "run", config))
    assert f"No clips. The model or its videos cannot be used: {root}" in page.text


@pytest.mark.slow
def test_an_evaluation_is_shown_until_the_weights_change(tmp_path: Path, tiny: Config) -> None:
    """With its spectrum and its decoder."""
    run = tmp_path / "run"
    train(tiny, run)
    evaluated = evaluate_run(run)
    page = Page(report(run, tiny))
    assert f"{evaluated['speed_mse']:.4g}" in page.text
    assert "Encoder outputs of the target frames" not in page.text
    assert "clips" in page.images
    train(override(tiny, {"train.steps": 40}), run)
    page = Page(report(run, tiny))
    assert "The model has no decoder" in page.text
    assert "Not evaluated with these weights and settings" in page.text


def test_how_latents_were_inferred_is_shown(tmp_path: Path, tiny_stochastic: Config) -> None:
    """If not as in training: here with 9 iterations instead of 8."""
    config = override(tiny_stochastic, KINDS["sparse"] | {"train.steps": 4})
    train(config, tmp_path)
    told = override(config, {"latent.iterations": 9})
    evaluation_of(told).measure(tmp_path, told)
    assert "<th>iterations</th><td>9</td>" in report(tmp_path, told).read_text()


@pytest.mark.slow
def test_in_a_browser(tmp_path: Path, tiny_stochastic: Config) -> None:
    config = override(tiny_stochastic, KINDS["discrete"] | {"train.telemetry_every": 4})
    folder = tmp_path / "a-run-with-a-name-that-is-longer-than-the-window-of-a-phone-is-wide"
    train(config, folder)
    report(folder, config, folder / "whole.html")
    (folder / "best.pt").unlink()
    report(folder, config, folder / "less.html")
    look(folder, ["whole.html", "less.html"], tmp_path / "profile", folder.name)
