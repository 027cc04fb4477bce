"""CLEVRER: the format, the windows and their speeds, splits by number, and errors that name the file."""

import json
import math
import os
import shutil
from pathlib import Path

import clevrer_files
import pytest
import torch
from videos import needs

from vjvcr_fast.data import clevrer
from vjvcr_fast.data.clevrer import ClevrerError, examine, load_split, read_annotation, windows
from vjvcr_fast.data.video.decode import VideoError, open_video, resize
from vjvcr_fast.data.video.scan import Split

pytest.importorskip("av", reason="the extra video is not installed: no videos to test with")
pytest.importorskip("decord", reason="the extra video is not installed: no decoder")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clevrer_files.make(tmp_path_factory.mktemp("clevrer"))


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "data"))


def load(root: Path, split: str = "train", **options) -> Split:
    return load_split(root, split, 4, 6, **options)


# -- Windows --------------------------------------------------------------------------------------------------------


def naive_windows(visible: torch.Tensor, frames_in: int, frames_out: int) -> list[int]:
    """The rule, word for word."""
    found = []
    for start in range(len(visible) - frames_in - frames_out + 1):
        x = range(start, start + frames_in)
        y = range(start + frames_in, start + frames_in + frames_out)
        objects = range(visible.shape[1])
        new = any(any(visible[t, o] for t in y) and not any(visible[t, o] for t in x) for o in objects)
        last = any(visible[y[-1], o] for o in objects)
        if not new and last:
            found.append(start)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_windows_are_those_without_a_new_object(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Objects that come and go: runs of frames, as in real annotations.
    visible = torch.rand(30, 4, generator=generator).cumsum(0).fmod(3.0) < 1.8
    assert windows(visible, 3, 5).tolist() == naive_windows(visible, 3, 5)


def test_an_object_that_enters_in_y_drops_the_window_and_one_that_leaves_does_not() -> None:
    visible = torch.ones(10, 2, dtype=torch.bool)
    visible[:6, 1] = False  # enters at frame 6
    assert windows(visible, 2, 3).tolist() == [0, 1, 5]
    assert windows(~visible | torch.tensor([True, False]), 2, 3).tolist() == [0, 1, 2, 3, 4, 5]  # leaves at 6
    assert windows(visible[:4], 2, 3).tolist() == []


def test_a_window_whose_last_frame_is_empty_has_no_speed_and_is_dropped() -> None:
    visible = torch.ones(8, 1, dtype=torch.bool)
    visible[6] = False
    assert windows(visible, 2, 3).tolist() == [0, 1, 3]


# -- Annotations ----------------------------------------------------------------------------------------------------


def test_fastest_is_the_largest_norm_among_visible_objects(root: Path) -> None:
    video, notes = clevrer_files.paths(root, "train", 0)
    visible = torch.ones(20, 3, dtype=torch.bool)
    visible[:, 0] = False
    velocity = torch.zeros(20, 3, 3)
    velocity[:, 0] = 100.0
    velocity[:, 1] = torch.tensor([3.0, -4.0, 0.0])
    velocity[:, 2] = torch.tensor([1.0, 2.0, 2.0])
    notes.write_text(json.dumps(clevrer_files.annotation(visible, velocity)))
    found = examine(video, notes, "auto")
    assert found["fastest"].tolist() == [5.0] * 20
    assert (found["frames"], found["height"], found["width"]) == (20, 32, 64)


def test_objects_are_told_apart_by_id_not_by_place(tmp_path: Path) -> None:
    visible = torch.tensor([[True, False]] * 3)
    velocity = torch.arange(18.0).view(3, 2, 3)
    content = clevrer_files.annotation(visible, velocity)
    content["motion_trajectory"][1]["objects"].reverse()
    (tmp_path / "a.json").write_text(json.dumps(content))
    seen, speed = read_annotation(tmp_path / "a.json")
    assert seen.equal(visible)
    torch.testing.assert_close(speed, velocity.norm(dim=2))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: c.clear(), "motion_trajectory"),
        (lambda c: c["motion_trajectory"].pop(3), "frame_id 4 where 3"),
        (lambda c: c["motion_trajectory"][2]["objects"][0].pop("velocity"), "velocity"),
        (lambda c: c["motion_trajectory"][2]["objects"][0].update(velocity=[1, 2]), "not a CLEVRER annotation"),
        (lambda c: c["motion_trajectory"][2]["objects"][0].update(velocity=[1, 2, float("nan")]), "not finite"),
        (lambda c: c.update(motion_trajectory=7), "not a CLEVRER annotation"),
    ],
)
def test_a_wrong_annotation_is_named(tmp_path: Path, damage, said: str) -> None:
    content = clevrer_files.annotation(torch.ones(5, 1, dtype=torch.bool), torch.zeros(5, 1, 3))
    damage(content)
    file = tmp_path / "annotation.json"
    file.write_text(json.dumps(content))
    with pytest.raises(VideoError, match=said) as error:
        read_annotation(file)
    assert str(file) in str(error.value)


# -- The data set ---------------------------------------------------------------------------------------------------


def test_a_split_has_its_videos_windows_and_speeds(made: Path) -> None:
    train = load(made)
    assert [source.name for source in train.sources][:2] == [
        f"video_train/video_00000-01000/video_{n:05d}.mp4" for n in range(2)
    ]
    assert (len(train), sum(len(source.starts) for source in train.sources)) == (6, 66)
    for number, source in enumerate(train.sources):
        assert source.starts.tolist() == list(range(11))
        assert source.targets.tolist() == [1.0 + number % 4] * 11
    assert len(load(made, "validation")) == 3
    assert train.source == "CLEVRER: 6 videos"


def test_splits_are_by_index(root: Path) -> None:
    """A file in the wrong folder is of no split."""
    stray, _ = clevrer_files.paths(root, "train", 10_000)
    stray.parent.mkdir(parents=True)
    shutil.copy(clevrer_files.paths(root, "train", 0)[0], stray)
    assert len(load(root)) == 6


def test_a_root_may_be_the_folder_around(root: Path) -> None:
    around = root.parent / "all"
    around.mkdir()
    root.rename(around / "clevrer")
    assert len(load(around)) == 6


def test_partial_downloads_work(root: Path) -> None:
    for number in (0, 3, 4):
        for path in clevrer_files.paths(root, "train", number):
            path.unlink()
    assert len(load(root)) == 3
    shutil.rmtree(root / "video_validation")
    assert len(load(root)) == 3
    with pytest.raises(ClevrerError, match="no videos such as"):
        load(root, "validation")


def test_fingerprints_follow_the_content(made: Path, root: Path) -> None:
    before = load(made).fingerprint()
    assert load(root).fingerprint() == before
    _, notes = clevrer_files.paths(root, "train", 2)
    notes.write_text(notes.read_text().replace("3.0, 0.0, 0.0", "3.5, 0.0, 0.0"))
    assert load(root).fingerprint() != before


@pytest.mark.parametrize("there", ["missing", "file", "empty"])
def test_a_wrong_root_is_named(tmp_path: Path, there: str) -> None:
    root = tmp_path / there
    if there == "file":
        root.touch()
    if there == "empty":
        root.mkdir()
    with pytest.raises(ClevrerError, match=str(root)):
        load(root)


def truncate(video: Path, notes: Path) -> None:
    video.write_bytes(video.read_bytes()[:-400])


def empty(video: Path, notes: Path) -> None:
    video.write_bytes(b"")


def text(video: Path, notes: Path) -> None:
    video.write_text("no video at all\n" * 50)


def other_size(video: Path, notes: Path) -> None:
    clevrer_files.write(video.parents[2], "train", 2, size=(128, 32))


def no_annotation(video: Path, notes: Path) -> None:
    notes.unlink()


def short_annotation(video: Path, notes: Path) -> None:
    content = json.loads(notes.read_text())
    del content["motion_trajectory"][15:]
    notes.write_text(json.dumps(content))


FAULTS = {
    truncate: "video_00002.mp4",
    empty: "video_00002.mp4",
    text: "video_00002.mp4",
    other_size: "frames are 128x32, those of the other videos 64x32",
    no_annotation: "annotation_00002.json: there is no such annotation",
    short_annotation: "annotates 15 frames, video_00002.mp4 has 20",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_when_the_folder_is_scanned(root: Path, fault) -> None:
    fault(*clevrer_files.paths(root, "train", 2))
    with pytest.raises(VideoError, match=FAULTS[fault]):
        load(root)


def test_all_faults_are_left_out_counted_and_listed(root: Path) -> None:
    broken = {1: empty, 3: no_annotation, 5: short_annotation}
    for number, fault in broken.items():
        fault(*clevrer_files.paths(root, "train", number))
    split = load(root, on_bad="skip")
    assert len(split) == 3
    assert sorted(int(name[-9:-4]) for name in split.bad) == [1, 3, 5]
    assert split.source == "CLEVRER: 3 videos, 3 unreadable left out"
    lines = split.remarks()
    assert lines[0] == "3 left out, unreadable:"
    assert len(lines) == 4


def test_an_unreadable_folder_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs this may be allowed to read everything, so the refusal is played."""
    folder, scandir = root / "video_train", clevrer.os.scandir

    def refuse(path):
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(path)

    monkeypatch.setattr(clevrer.os, "scandir", refuse)
    with pytest.raises(ClevrerError, match=f"{folder}: Permission denied"):
        load(root)


def test_findings_are_kept_and_changed_files_looked_at_again(root: Path, tmp_path: Path, monkeypatch) -> None:
    index = tmp_path / "cache" / "train-scan.pt"
    first = load(root, index=index)
    asked = []
    real = clevrer.examine
    monkeypatch.setattr(clevrer, "examine", lambda v, a, backend: asked.append(v.name) or real(v, a, backend))
    assert load(root, index=index).fingerprint() == first.fingerprint()
    assert asked == []
    clevrer_files.write(root, "train", 4, frames=22)
    assert load(root, index=index).fingerprint() != first.fingerprint()
    assert asked == ["video_00004.mp4"]
    index.write_bytes(b"damaged")
    load(root, index=index)
    assert len(asked) == 7


def test_simulated_scenes_are_called_so(root: Path) -> None:
    (root / "simulated.json").write_text("{}")
    assert load(root).source == "simulated scenes in CLEVRER's format: 6 videos"


# -- The published files --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Path:
    given = os.environ.get("VJVCR_DATA")
    try:
        return clevrer.find_root(Path(given or "VJVCR_DATA is not set"))
    except ClevrerError as error:
        pytest.skip(f"no real CLEVRER files to read: {error}")


NUMBERS = {"train": (0, 1000), "validation": (10_000,)}
EVERY = [(split, number) for split, numbers in NUMBERS.items() for number in numbers]


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
@pytest.mark.parametrize(("split", "number"), EVERY)
def test_real_frames_are_exact(real: Path, split: str, number: int, backend: str) -> None:
    """The same frames as FFmpeg itself converts, whichever way they are asked for."""
    av = pytest.importorskip("av")
    needs(backend)
    path, _ = clevrer_files.paths(real, split, number)
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    expected = torch.stack(frames).permute(0, 3, 1, 2)
    video = open_video(path, backend)
    assert (video.frame_count, video.fps, video.height, video.width) == (128, 25.0, 320, 480)
    assert video.frames(range(128)).equal(expected)
    asked = [127, 3, 3, 64, 0]
    assert video.frames(asked).equal(expected[asked])
    small = video.frames(range(100, 126), (64, 64))
    assert small.equal(resize(expected[100:126], (64, 64)))


@pytest.mark.parametrize(("split", "number"), EVERY)
def test_real_windows_and_speeds_are_exact(real: Path, split: str, number: int) -> None:
    """Worked out once more from the JSON, object by object and frame by frame."""
    _, notes = clevrer_files.paths(real, split, number)
    frames = json.loads(notes.read_text())["motion_trajectory"]
    source = next(s for s in load_split(real, split, 6, 20).sources if f"{number:05d}.mp4" in s.name)
    visible = [{o["object_id"] for o in frame["objects"] if o["inside_camera_view"]} for frame in frames]
    expected = {}
    for start in range(128 - 26 + 1):
        in_x, in_y = (set.union(*visible[a:b]) for a, b in ((start, start + 6), (start + 6, start + 26)))
        last = frames[start + 25]["objects"]
        speeds = [math.hypot(*o["velocity"]) for o in last if o["inside_camera_view"]]
        if in_y <= in_x and speeds:
            expected[start] = max(speeds)
    assert source.starts.tolist() == [*expected]
    torch.testing.assert_close(source.targets, torch.tensor([*expected.values()]))
    assert 0 < len(expected) < 103


def test_a_real_location_moves_by_seven_tenths_of_the_velocity(real: Path) -> None:
    """What the module says of the unit: 0.028 s of the objects' time a frame, which at 25 frames a second is 0.7."""
    _, notes = clevrer_files.paths(real, "train", 0)
    frames = json.loads(notes.read_text())["motion_trajectory"]
    place, velocity = (torch.tensor([f["objects"][0][key] for f in frames]) for key in ("location", "velocity"))
    step, mean = (place[2:] - place[:-2]).norm(dim=1) / 2, velocity[1:-1].norm(dim=1)
    ratio = 25 * step / mean
    assert (ratio.median() - 0.7).abs() < 0.002


def test_targets_with_a_stride_are_of_the_last_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clevrer_files.write(tmp_path, "train", 0, frames=12)
    real = clevrer.examine
    monkeypatch.setattr(clevrer, "examine", lambda *a, **k: {**real(*a, **k), "fastest": torch.arange(12.0)})
    (source,) = load_split(tmp_path, "train", 2, 2, stride=2).sources
    assert source.starts.tolist() == [0, 1, 2]
    assert source.targets.tolist() == [2.0 * (start + 3) for start in (0, 1, 2)]
