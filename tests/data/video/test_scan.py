"""Looking at files before training: damage after the first frame, what is kept, the command that shows it all."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY_SIMVP
from test_decode import real_videos
from videos import HARD, KINDS, Kind, cut, damage, make_video, needs, quick_workers, read_numbers

from vjvcr_fast import cli_scan
from vjvcr_fast.cli import main
from vjvcr_fast.config import override, preset
from vjvcr_fast.data.folder import load_split
from vjvcr_fast.data.video.cache import fill
from vjvcr_fast.data.video.clips import ClipLoader, Source, VideoClips
from vjvcr_fast.data.video.decode import VideoError, open_video
from vjvcr_fast.data.video.file import find_damage
from vjvcr_fast.data.video.scan import TAIL, probe
from vjvcr_fast.data.video.workers import Pool

pytest.importorskip("av", reason="the extra video is not installed: no videos to test with")
pytest.importorskip("decord", reason="the extra video is not installed: no decoder")
pytestmark = pytest.mark.usefixtures("one_thread")

DAMAGED = {
    f"{codec} {suffix}": Kind(codec, suffix, 64, 320, keys, b, "yuvj420p" if codec == "mjpeg" else "yuv420p")
    for codec, suffix, keys, b in (
        ("libx264", "mp4", 1000, 0),
        ("libx264", "mkv", 12, 2),
        ("libx264", "avi", 12, 0),
        ("mjpeg", "mp4", 1, 0),
        ("mjpeg", "mkv", 1, 0),
        ("mjpeg", "avi", 1, 0),
        ("libvpx-vp9", "mp4", 12, 0),
        ("libvpx-vp9", "mkv", 12, 0),
        ("libvpx-vp9", "avi", 12, 0),
    )
}


# -- Damage after the first frame -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_named_by_its_frame(tmp_path: Path, kind: str) -> None:
    path = make_video(tmp_path, DAMAGED[kind], 30)
    in_the_middle, at_the_end = damage(path, range(17, 18)), damage(path, range(29, 30))
    assert find_damage(path) is None
    assert re.match("frame 17 (cannot be decoded|is damaged)", find_damage(in_the_middle) or "")
    assert re.match("frame 29 (cannot be decoded|is damaged)", find_damage(at_the_end) or "")
    if kind == "libx264 avi":
        return  # after a seek decord reads other frames of it, damaged or not
    with pytest.raises(VideoError, match=rf"^{in_the_middle}: \w+ cannot decode frames 12 to 21 .*; frame 17 "):
        open_video(in_the_middle).frames(range(12, 22))
    if DAMAGED[kind].keys <= TAIL:
        with pytest.raises(VideoError, match=rf"^{at_the_end}: .*frame 29"):
            probe(at_the_end, "auto")


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_was_never_written_is_noticed_without_decoding(tmp_path: Path, kind: str) -> None:
    path = damage(make_video(tmp_path, DAMAGED[kind], 30), range(20, 30), zeros=True)
    with pytest.raises(VideoError, match=rf"^{path}: .*frame \d+ of (30|unknown) is all zeros"):
        open_video(path)


def test_a_header_that_states_more_frames_than_decode(tmp_path: Path) -> None:
    path = make_video(tmp_path, Kind("libx264", "mp4", 32, 320, keys=1000), 431)
    noise = damage(path, range(300, 431)).rename(path.with_stem("noise"))
    zeros = damage(path, range(300, 431), zeros=True)
    with pytest.raises(VideoError, match="frame 300 of 431 is all zeros"):
        probe(zeros, "auto")
    assert probe(noise, "auto")["frames"] == 431  # its last frame is far from a keyframe
    assert (find_damage(noise) or "").startswith("frame 300 cannot be decoded")
    with pytest.raises(VideoError, match=r"cannot decode frames 290 to 309 .*; frame 300 cannot be decoded"):
        open_video(noise).frames(range(290, 310))


@pytest.mark.parametrize("kind", [*KINDS, *HARD])
def test_whole_videos_have_no_damage(tmp_path: Path, kind: str) -> None:
    assert find_damage(make_video(tmp_path, kind, 30)) is None


def test_real_videos_have_no_damage() -> None:
    paths = real_videos() or pytest.skip("no CLEVRER videos in VJVCR_DATA or ../shared/data")
    assert find_damage(paths[0]) is None


# -- What training does about it ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos. The third is broken from its frame 12 on, which no scan of first and last frames notices."""
    folder = tmp_path_factory.mktemp("made")
    for i in range(6):
        path = make_video(folder, Kind("libx264", "mp4", 32, 320, keys=1000), 40, first=40 * i)
        path.rename(folder / f"{i}.mp4")
    damage(folder / "2.mp4", range(12, 40)).replace(folder / "2.mp4")
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "videos"))


@pytest.fixture(scope="module")
def processes() -> Iterator[Pool]:
    with quick_workers(), Pool(1, timeout=30) as pool:
        yield pool


@pytest.fixture(params=["in the caller", "in a process"])
def pool(request: pytest.FixtureRequest) -> Pool:
    return Pool(0) if request.param == "in the caller" else request.getfixturevalue("processes")


def clips(sources: list[Source], **options: object) -> VideoClips:
    return VideoClips(sources, frames=10, size=(16, 16), seed=0, stream="train", **options)  # type: ignore[arg-type]


def test_batches_stop_at_it_or_go_on(root: Path, pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    sources = load_split(root, None, 4, 6).sources
    named = rf"{root}/2\.mp4: \w+ cannot decode frames .*; frame 12 cannot be decoded"
    with pytest.raises(VideoError, match=f"^{named}"):
        clips(sources, pool=pool).batch(0, 24)
    going_on = clips(sources, pool=pool, on_bad="skip")
    assert going_on.batch(0, 24).frames.shape == (24, 10, 3, 16, 16)
    assert [*going_on.bad] == ["2.mp4"]
    assert len(re.findall(f"left out: {named}", capsys.readouterr().err)) == 1


def test_what_lies_before_the_damage_is_read(root: Path) -> None:
    """decord decodes ahead and may fail; torchcodec does not."""
    needs("torchcodec")
    for _ in range(10):
        assert read_numbers(open_video(root / "2.mp4").frames(range(12))) == [*range(80, 92)]


def test_windows_are_replaced_the_same_way_every_time(root: Path) -> None:
    """From any step on, prepared ahead or not. Those that lie before the damage are used."""
    needs("torchcodec")
    sources = load_split(root, None, 4, 2).sources
    loaded = VideoClips(sources, frames=6, size=(32, 320), seed=0, stream="train", on_bad="skip")
    windows = loaded.sampler.windows(0, 48)
    expected = loaded.batch(0, 48).frames
    whole = [w.number for w in windows if w.source == 2 and int(sources[2].starts[w.choice]) <= 6]
    assert 0 < len(whole) < 8
    for i in whole:
        first = int(sources[2].starts[windows[i].choice])
        assert read_numbers(expected[i]) == [*range(80 + first, 86 + first)]
    for step, prefetch in ((0, 0), (0, 3), (4, 2)):
        loader = ClipLoader(clips_like(loaded), 6, step=step, prefetch=prefetch)
        for k in range(step, 8):
            assert next(loader).frames.equal(expected[6 * k : 6 * k + 6])
        loader.close()


def clips_like(loaded: VideoClips) -> VideoClips:
    return VideoClips(loaded.sources, frames=6, size=(32, 320), seed=0, stream="train", on_bad="skip")


def test_the_cache_stops_at_it_or_goes_on(root: Path, pool: Pool) -> None:
    sources, named = load_split(root, None, 4, 6).sources, r"2\.mp4: .*frame 12 cannot be decoded"
    with pytest.raises(VideoError, match=named):
        fill(sources, root / "cache", (16, 16), "auto", pool)
    done = fill(sources, root / "cache", (16, 16), "auto", pool, on_bad="skip")
    assert (done.written, done.kept, [*done.bad]) == (3, 2, ["2.mp4"])
    assert re.search(named, done.bad["2.mp4"])


SETTINGS = TINY_SIMVP | {
    "data.frames_in": 4, "data.frames_out": 6, "data.stride": 1, "train.steps": 4, "train.validate_every": 2,
    "train.batch": 6, "train.validation_videos": 6, "evaluate.validation_videos": 6, "evaluate.decoder_steps": 2,
}  # fmt: skip
LOOK = ["--frames-in=4", "--frames-out=6", "--stride=1", "--workers=0"]


def test_commands_stop_at_it_or_go_on(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training, evaluating, embedding."""
    pytest.importorskip("tqdm")
    run, named = tmp_path / "run", r"2\.mp4: .*frame 12 cannot be decoded"
    train = [
        "train",
        "--data=folder",
        f"--data.root={root}",
        f"--out={run}",
        *(f"--{k}={v}" for k, v in SETTINGS.items()),
    ]
    embed = ["embed", str(run), str(root), "--out", str(tmp_path / "features")]
    assert main(train) == 1
    assert re.search(f"^vjvcr-fast: .*{named}", capsys.readouterr().err, re.MULTILINE)
    assert main([*train, "--on-bad-video=skip"]) == 0
    assert re.search(f"left out: .*{named}", capsys.readouterr().err)
    assert main(["evaluate", str(run)]) == 0
    assert main([*embed, "--on-bad-video=stop"]) == 1
    assert re.search(f"^vjvcr-fast: .*{named}", capsys.readouterr().err, re.MULTILINE)
    assert main(embed) == 0
    shown = capsys.readouterr()
    assert re.search(f"^left out: .*{named}", shown.err, re.MULTILINE)
    assert shown.out.endswith("features: 20 windows of 5 videos\n")


def test_what_every_frame_has_found_is_kept(root: Path, tmp_path: Path) -> None:
    index = tmp_path / "scan.pt"
    assert len(load_split(root, None, 4, 6, index=index)) == 6
    with pytest.raises(VideoError, match=r"2\.mp4: frame 12 cannot be decoded"):
        load_split(root, None, 4, 6, index=index, every_frame=True)
    with pytest.raises(VideoError, match=r"2\.mp4: frame 12 cannot be decoded"):
        load_split(root, None, 4, 6, index=index)
    whole = load_split(root, None, 4, 6, index=index, on_bad="skip")
    assert (len(whole), [*whole.bad]) == (5, ["2.mp4"])
    shutil.copy(root / "1.mp4", root / "2.mp4")
    assert len(load_split(root, None, 4, 6, index=index)) == 6


# -- The command ----------------------------------------------------------------------------------------------------


def test_scan_of_a_folder(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mixed one: what is usable, what is bad (once, with all names), what is short."""
    pytest.importorskip("tqdm")
    for name in ("mjpeg", "vp9"):
        make_video(root, name, 12)
    make_video(root, "mpeg4", 6)
    for i in range(6):
        cut(make_video(root, "mjpeg", 8), 0.5 + i / 20)
    (root / "mjpeg-0-8.avi").unlink()
    for name in ("a.srt", "b.SRT", "README", ".hidden.txt"):
        (root / name).touch()
    assert main(["scan", str(root), *LOOK, "--canvas=16"]) == 1
    shown = capsys.readouterr().out
    assert "\nFiles not looked at: 2 .srt, 1 README\n" in shown
    assert re.search(r"^split +files +usable +bad +short +frames +seconds +windows$", shown, re.MULTILINE)
    rows = dict(re.findall(r"^(train|validation) +([\d., ]+)$", shown, re.MULTILINE))
    totals = torch.tensor([[float(n.replace(",", "")) for n in row.split()] for row in rows.values()]).sum(dim=0)
    assert totals.tolist() == pytest.approx([15, 8, 6, 1, 6 * 40 + 24, 264 / 25, 6 * 31 + 2 * 3], abs=0.1)
    # decord decodes ahead; if that comes upon the damage in 2.mp4, torchcodec takes this file and those that follow.
    one, either = "(decord|torchcodec)", "(decord|torchcodec|decord or torchcodec)"
    assert re.search(rf"^mp4 +h264 +320x32 +25 +{either} +6 +240 +9\.6$", shown, re.MULTILINE)
    assert re.search(rf"^matroska +vp9 +80x48 +25 +{one} +1 +12 +0\.5$", shown, re.MULTILINE)
    assert re.search(r"^\w+, no window of 10 frames in: mpeg4-0-6\.avi$", shown, re.MULTILINE)
    assert shown.count("\n  cut off: ") <= 2
    assert f"would hold {264 * 768 / 1000:.0f} kB" in shown


def test_scan_as_json_and_with_every_frame(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    assert main(["scan", str(root), *LOOK, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(["scan", str(root), *LOOK, "--json", "--every-frame"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {name for split in found["splits"].values() for name in split["bad"]} == {"2.mp4"}
    assert sum(split["usable"] for split in first["splits"].values()) == 6
    assert sum(split["usable"] for split in found["splits"].values()) == 5
    assert main(["scan", str(root), *LOOK, "--json"]) == 1  # it is remembered


def test_a_kind_that_two_decoders_read_has_one_row() -> None:
    """Which of them reads a file depends on what a worker has read before."""
    about = {"container": "mp4", "codec": "h264", "width": 64, "height": 48, "fps": 25.0, "frames": 50}
    found = [about | {"decoder": decoder} for decoder in ("torchcodec", "decord", "decord")]
    rows = cli_scan._kinds(found, override(preset("clevrer-mini"), {"train.device": "cpu"}))
    assert rows == [about | {"decoder": "decord or torchcodec", "videos": 3, "frames": 150, "seconds": 6.0}]


def test_scan_of_clevrer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    import clevrer_files

    root = clevrer_files.make(tmp_path, 3, 2)
    clevrer_files.write(root, "train", 3, size=(64, 48))
    assert main(["scan", str(root), "--data=clevrer", *LOOK, "--cache=off"]) == 1
    shown = capsys.readouterr().out
    assert "train, bad: video_train/video_00000-01000/video_00003.mp4\n  frames are 64x48, those of the" in shown
    assert "would hold" not in shown
    clevrer_files.paths(root, "train", 3)[0].unlink()
    assert main(["scan", str(root), "--data=clevrer", *LOOK, "--cache=off"]) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["none"], "none: no such folder"),
        (["empty"], r"empty: no videos for train; of files named \*\.3gp, .*"),
        (["empty", "--data=clevrer"], "empty: no CLEVRER here: .*"),
    ],
)
def test_where_there_is_nothing_to_scan(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert main(["scan", *options]) == 1
    assert re.fullmatch(f"vjvcr-fast: {said}\n", capsys.readouterr().err)


def test_a_split_without_windows_is_a_problem(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    assert main(["scan", str(root), *LOOK, "--frames-out=90"]) == 1
    assert "videos for train, but none has 94 frames at stride 1" in capsys.readouterr().out
