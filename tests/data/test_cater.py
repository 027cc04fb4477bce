"""CATER: hand-written scenes and lists, the actions of each sampled frame, and errors that name the file."""

import importlib.util
import inspect
import json
import os
import shutil
from pathlib import Path

import cater_files
import pytest
import torch
from cater_files import ACTIVE, FRAMES, SCENE
from videos import needs

from vjvcr_fast.config import preset
from vjvcr_fast.data import cater
from vjvcr_fast.data.cater import CLASSES, CaterError, load_split, read_list, read_scene, sampled
from vjvcr_fast.data.digits import ENVIRONMENT
from vjvcr_fast.data.simulated.cater import ENCODING, simulate_cater
from vjvcr_fast.data.video.clips import VideoClips
from vjvcr_fast.data.video.decode import VideoError, open_video
from vjvcr_fast.data.video.file import examine, find_damage
from vjvcr_fast.data.video.workers import Pool

pytest.importorskip("av", reason="the extra video is not installed: no videos to test with")
pytest.importorskip("decord", reason="the extra video is not installed: no decoder")

REAL_DALI = 1.0  # levels on average over frames of the real video; measured 0.27


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cater_files.make(tmp_path_factory.mktemp("cater"))


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "data"))


def test_classes_are_the_14_in_order() -> None:
    assert CLASSES == (
        "sphere slide",
        "sphere pick_place",
        "spl slide",
        "spl pick_place",
        "spl rotate",
        "cylinder pick_place",
        "cylinder slide",
        "cylinder rotate",
        "cube slide",
        "cube pick_place",
        "cube rotate",
        "cone contain",
        "cone pick_place",
        "cone slide",
    )


def test_a_scene_is_active_from_start_to_before_end(made: Path) -> None:
    active = read_scene(made / "scenes" / "CLEVR_new_000000.json", FRAMES)
    expected = torch.zeros(14, FRAMES, dtype=torch.bool)
    for name, frames in ACTIVE.items():
        expected[CLASSES.index(name), list(frames)] = True
    assert active.equal(expected)


@pytest.mark.parametrize("stride", [1, 3, 4])
def test_a_sampled_frame_has_the_actions_of_those_it_stands_for(stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(14, FRAMES, generator=generator) < 0.2
    found = sampled(active, stride)
    assert found.shape == (14, -(-FRAMES // stride))
    for t in range(found.shape[1]):
        assert found[:, t].equal(active[:, stride * t : stride * t + stride].any(dim=1))


def test_the_targets_union_is_that_of_the_original_frames() -> None:
    """Of the published length: sampled frames 50 to 99 are the original ones 150 to 299."""
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(14, 301, generator=generator) < 0.004
    assert sampled(active, 3)[:, 50:100].any(dim=1).equal(active[:, 150:300].any(dim=1))


def test_splits_windows_and_targets(made: Path) -> None:
    train, validation = (load_split(made, split, 4, 6) for split in ("train", "validation"))
    assert [source.name for source in train.sources] == [f"videos/CLEVR_new_{i:06d}.avi" for i in range(4)]
    assert len(validation) == 2
    assert train.notes == []
    for i, source in enumerate(train.sources):
        assert (source.frames, source.stride, source.starts.tolist()) == (11, 3, [0])
        assert source.targets.shape == (1, 14, 10)
        active = read_scene(made / "scenes" / f"CLEVR_new_{i:06d}.json", FRAMES)
        assert source.targets[0].bool().equal(sampled(active, 3)[:, :10])


def test_clips_are_every_third_frame(made: Path) -> None:
    train = load_split(made, "train", 4, 6)
    clips = VideoClips(train.sources, frames=10, size=(48, 64), seed=0, stream="train")
    batch = clips.batch(0, 4)
    for window, frames in zip(clips.sampler.windows(0, 4), batch.frames, strict=True):
        right = open_video(train.sources[window.source].path).frames(range(0, 30, 3))
        assert frames.equal(right)
    assert batch.target.shape == (4, 14, 10)


@pytest.mark.parametrize("backend", ["decord", "torchcodec", "dali"])
def test_motion_jpeg_is_decoded_by_every_backend(made: Path, backend: str) -> None:
    """DALI on a CPU too; grey has no colour to interpolate, so all agree within a level."""
    needs(backend)
    video = open_video(made / "videos" / "CLEVR_new_000000.avi", backend)
    assert (video.frame_count, video.fps, video.height, video.width) == (FRAMES, 24.0, 48, 64)
    frames = video.frames(range(FRAMES)).float()
    expected = 8.0 * torch.arange(FRAMES)
    assert (frames.mean(dim=(1, 2, 3)) - expected).abs().max() < 2
    assert (frames - frames.mean(dim=(1, 2, 3), keepdim=True)).abs().max() <= 2


@pytest.fixture(scope="module")
def real() -> Path:
    roots = [os.environ.get(ENVIRONMENT), Path(__file__).parents[3] / "shared" / "data"]
    found = [path for root in roots if root for path in sorted(Path(root).glob("cater/*.avi"))]
    return next(iter(found), None) or pytest.skip(f"no CATER video in {ENVIRONMENT}/cater or ../shared/data/cater")


def test_a_real_video_is_what_the_code_assumes(real: Path) -> None:
    """Its length, rate and size are those that the simulator writes, and that the preset's windows and stride need."""
    facts, made, data = examine(real), inspect.signature(simulate_cater).parameters, preset("cater").data
    assert (facts.codec, facts.container, round(facts.fps, 2)) == (ENCODING.codec, ENCODING.container, ENCODING.fps)
    assert (facts.frames, (facts.width, facts.height)) == (made["frames"].default, made["size"].default)
    assert (facts.open_gops, facts.tail) == (False, 1)  # each frame is a keyframe
    assert data.stride == cater.STRIDE
    assert (data.frames_in + data.frames_out) * data.stride <= facts.frames
    assert find_damage(real) is None


def test_every_backend_reads_a_real_video_alike(real: Path) -> None:
    """DALI interpolates the colour of 4:2:0, so it differs a little."""
    frames = range(0, 300, 30)
    judge = open_video(real, "decord").frames(frames)
    assert judge.shape == (10, 3, 240, 320)
    assert judge.float().std() > 10
    for backend, tolerance in (("torchcodec", 0), ("dali", REAL_DALI)):
        if importlib.util.find_spec({"dali": "nvidia.dali"}.get(backend, backend)) is not None:
            found = open_video(real, backend).frames(frames)
            assert (found.float() - judge.float()).abs().mean() <= tolerance


def test_a_real_video_in_the_layout_of_the_data_set(real: Path, tmp_path: Path) -> None:
    """With a scene and lists of our own, because its own are not published with it."""
    for name in ("videos", "scenes", cater.LIST_FOLDER):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "videos" / real.name).symlink_to(real)
    (tmp_path / "scenes" / f"{real.stem}.json").write_text(json.dumps(SCENE))
    numbers = ",".join(str(CLASSES.index(name)) for name in ACTIVE)
    (tmp_path / cater.LIST_FOLDER / "train.txt").write_text(f"{real.name} {numbers}\n")
    data = preset("cater").data
    (source,) = load_split(tmp_path, "train", data.frames_in, data.frames_out, data.stride).sources
    assert (source.frames, source.starts.tolist(), source.targets.shape) == (101, [0], (1, 14, 100))
    clips = VideoClips([source], frames=100, size=(32, 32), seed=0, stream="train")
    assert clips.batch(0, 1).frames[0].equal(open_video(real).frames(range(0, 300, 3), 32))


def test_lists_and_scenes_that_disagree_are_reported(root: Path) -> None:
    (root / cater.LIST_FOLDER / "train.txt").write_text("CLEVR_new_000000.avi 2,4\nCLEVR_new_000002.avi 10,0\n")
    notes = load_split(root, "train", 4, 6).notes
    assert notes[0] == "train.txt and the scenes disagree about 2 of 2 videos; the scenes are used:"
    assert notes[1] == ("  CLEVR_new_000000.avi: sphere slide, cone contain, cone pick_place in the scene, not listed")
    assert notes[2] == "  CLEVR_new_000002.avi: sphere slide listed, not in the scene"


def test_scenes_may_lie_beside_their_videos(root: Path) -> None:
    for scene in (root / "scenes").iterdir():
        scene.rename(root / "videos" / scene.name)
    assert len(load_split(root, "train", 4, 6)) == 4


def test_partial_downloads_work(root: Path) -> None:
    (root / "videos" / "CLEVR_new_000001.avi").unlink()
    assert len(load_split(root, "train", 4, 6)) == 3
    for number in (4, 5):
        (root / "videos" / f"CLEVR_new_{number:06d}.avi").unlink()
    with pytest.raises(CaterError, match=r"none of the 2 videos of val\.txt is there"):
        load_split(root, "validation", 4, 6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.avi 14\n", "line 1: 'a.avi 14'"),
        ("a.avi 1\na.avi 2\n", "line 2"),
        ("a.avi one\n", "line 1"),
        ("../a.avi 1\n", "line 1"),
        ("a.avi 1 -2\n", "line 1"),
    ],
)
def test_a_wrong_list_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "train.txt"
    file.write_text(text)
    with pytest.raises(CaterError, match=said) as error:
        read_list(file)
    assert str(file) in str(error.value)


def test_lists_as_they_come(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a.avi 0,3,7\n\nb.avi\nc.avi 13,\n")
    assert read_list(tmp_path / "a.txt") == {"a.avi": {0, 3, 7}, "b.avi": set(), "c.avi": {13}}
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CaterError, match="not text"):
        read_list(tmp_path / "b.txt")
    with pytest.raises(CaterError, match="No such file"):
        read_list(tmp_path / "c.txt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("objects"), "objects"),
        (lambda s: s.pop("movements"), "movements"),
        (lambda s: s["movements"].update(Ball_0=[["_slide", None, 1, 2]]), "Ball_0"),
        (lambda s: s["movements"].update(Cube_0=[["_contain", None, 1, 2]]), "Cube_0 does _contain"),
        (lambda s: s["movements"].update(Cube_0=[["_slide", None, 5, 2]]), "_slide from 5 to 2"),
        (lambda s: s["movements"].update(Cube_0=[["_slide", None, -1, 2]]), "_slide from -1 to 2"),
        (lambda s: s["movements"].update(Cube_0=[["_slide", 1, 2]]), "not a CATER scene"),
        (lambda s: s.update(movements=[]), "not a CATER scene"),
    ],
)
def test_a_wrong_scene_is_named(tmp_path: Path, change, said: str) -> None:
    scene = json.loads(json.dumps(SCENE))
    change(scene)
    file = tmp_path / "scene.json"
    file.write_text(json.dumps(scene))
    with pytest.raises(VideoError, match=said) as error:
        read_scene(file, FRAMES)
    assert str(file) in str(error.value)


def test_faults_stop_or_are_listed(root: Path) -> None:
    (root / "scenes" / "CLEVR_new_000001.json").unlink()
    (root / "videos" / "CLEVR_new_000003.avi").write_bytes(b"")
    with pytest.raises(VideoError, match="there is no such scene"):
        load_split(root, "train", 4, 6)
    split = load_split(root, "train", 4, 6, on_bad="skip", pool=Pool(0))
    assert len(split) == 2
    assert len(split.bad) == 2


def test_videos_too_short_for_a_window(made: Path) -> None:
    with pytest.raises(CaterError, match="none has 20 frames at stride 3"):
        load_split(made, "train", 10, 10)


@pytest.mark.parametrize("there", ["missing", "file", "empty"])
def test_a_wrong_root_is_named(tmp_path: Path, there: str) -> None:
    root = tmp_path / there
    if there == "file":
        root.touch()
    if there == "empty":
        root.mkdir()
    with pytest.raises(CaterError, match=str(root)):
        load_split(root, "train", 4, 6)
