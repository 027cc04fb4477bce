"""Files with any content are either read, or refused with the documented error in one line that names the file. Nothing
crashes, hangs or leaves a file behind."""

import contextlib
import gzip
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cater_files
import clevrer_files
import pytest
import torch
from fuzz import JSON, NOISE, changed, damaged, fuzz, listing, read_or_refuse
from hypothesis import strategies as st
from videos import make_video, needs

from vjvcr_fast.config import PRESETS, Config, ConfigError, fields, resolve_device
from vjvcr_fast.data import cater, clevrer, digits
from vjvcr_fast.data.cater import CaterError
from vjvcr_fast.data.digits import DigitsError, load_digits
from vjvcr_fast.data.video import cache, workers
from vjvcr_fast.data.video.cache import CacheError, FrameCache, fill
from vjvcr_fast.data.video.decode import VideoError, open_video
from vjvcr_fast.latents import SparseLatent
from vjvcr_fast.training import checkpoint
from vjvcr_fast.training.checkpoint import CheckpointError, read_metrics

DRAWN = st.data()


def text_of(value: Any) -> bytes:
    """JSON as Python writes it, NaN and lone surrogates included."""
    return json.dumps(value).encode()


def or_noise(content: bytes) -> st.SearchStrategy[bytes]:
    """Mostly the bytes of a file, damaged; else bytes of no file at all."""
    return st.one_of(damaged(content), damaged(content), NOISE)


# -- Videos ---------------------------------------------------------------------------------------------------------

KINDS = ("h264", "h264-mkv", "mjpeg", "mpeg4", "vp9", "vp9-mp4", "hevc-closed")
FOR_DALI = ("vp9", "mjpeg")  # what it decodes on a CPU


def shape_of(path: Path, backend: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Decodes all of a video: its shape, and the one expected."""
    video = open_video(path, backend)
    return tuple(video.frames(range(video.frame_count)).shape), (video.frame_count, 3, video.height, video.width)


@pytest.fixture(scope="module")
def pool() -> Iterator[workers.Pool]:
    """Where a crash is an error, and a hang ends."""
    pytest.importorskip("pebble", reason="the extra video is not installed")
    with workers.Pool(1, timeout=30) as shared:
        yield shared


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[bytes, str]]:
    """Bytes and suffix of each kind of video, made once."""
    pytest.importorskip("av", reason="the extra video is not installed")
    folder, made = tmp_path_factory.mktemp("videos"), dict[str, tuple[bytes, str]]()

    def content(kind: str) -> tuple[bytes, str]:
        if kind not in made:
            path = make_video(folder, kind, 12)
            made[kind] = path.read_bytes(), path.suffix
        return made[kind]

    return content


def decoded_or_refused(pool: workers.Pool, path: Path, content: bytes, backend: str) -> None:
    path.write_bytes(content)
    found = read_or_refuse(lambda: pool.submit(path, shape_of, backend).result(), VideoError, path)
    assert found is None or found[0] == found[1]
    path.unlink()


@pytest.mark.parametrize("backend", ["auto", "decord", "torchcodec", "av"])
@fuzz(60, 250, kind=st.sampled_from(KINDS), data=DRAWN)
def test_videos(whole: Any, pool: workers.Pool, tmp_path: Path, backend: str, kind: str, data: st.DataObject) -> None:
    needs({"auto": "decord"}.get(backend, backend))
    content, suffix = whole(kind)
    decoded_or_refused(pool, tmp_path / f"video{suffix}", data.draw(or_noise(content)), backend)


@fuzz(6, 15, kind=st.sampled_from(FOR_DALI), data=DRAWN)
def test_videos_for_dali(whole: Any, pool: workers.Pool, tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """Its own crashes, at some damaged files, are errors of the process that it runs in."""
    pytest.importorskip("nvidia.dali")
    content, suffix = whole(kind)
    decoded_or_refused(pool, tmp_path / f"video{suffix}", data.draw(damaged(content)), "dali")


@pytest.mark.parametrize("backend", ["auto", "decord", "torchcodec"])
def test_an_mp4_that_states_billions_of_frames(whole: Any, tmp_path: Path, backend: str) -> None:
    """One flipped bit; decord set memory aside for all of them, and ended the process."""
    needs({"auto": "decord"}.get(backend, backend))
    content, path = bytearray(whole("h264")[0]), tmp_path / "video.mp4"
    at = content.index(b"stts") + 12  # behind version, flags and the number of entries: frames of the first
    assert content[at : at + 4] == struct.pack(">I", 12)
    content[at] = 0x80
    path.write_bytes(content)
    with pytest.raises(VideoError, match=rf"^{path}: damaged: it states 2,147,483,660 frames in "):
        open_video(path, backend)


def test_what_decord_alone_cannot_open_is_left_to_torchcodec(whole: Any, tmp_path: Path) -> None:
    """Its own error is no RuntimeError, and was not caught."""
    decord = pytest.importorskip("decord")
    needs("torchcodec")
    content, path = bytearray(whole("vp9")[0]), tmp_path / "video.webm"
    content[content.index(b"\x44\x89\x88") + 3 :][:8] = bytes(8)  # Duration
    refused = 0
    for at in range(200, len(content) - 400, 7):
        path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
        try:
            decord.VideoReader(str(path))
        except Exception:
            refused += 1
            read_or_refuse(lambda: open_video(path).frames([0]), VideoError, path)
            read_or_refuse(lambda: open_video(path, "decord").frames([0]), VideoError, path)
    assert refused


# -- Annotations ----------------------------------------------------------------------------------------------------

ANNOTATION = clevrer_files.annotation(torch.tensor([[True, False], [True, True], [False, True]]), torch.ones(3, 2, 3))


@fuzz(150, 750, content=st.one_of(JSON.map(text_of), changed(ANNOTATION).map(text_of), or_noise(text_of(ANNOTATION))))
def test_clevrer_annotations(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "annotation_00000.json"
    path.write_bytes(content)
    found = read_or_refuse(lambda: clevrer.read_annotation(path), VideoError, path)
    if found is not None:
        visible, speed = found
        assert visible.dtype == torch.bool
        assert visible.shape == speed.shape
        assert speed.isfinite().all()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("velocity", 5, r"velocity of shape \(\)"),  # were taken for three equal numbers
        ("velocity", [5], r"velocity of shape \(1,\)"),
        ("velocity", [[1, 2, 3]], r"velocity of shape \(1, 3\)"),
        ("velocity", [10**400, 0, 0], "OverflowError"),
        ("velocity", [3e38, 3e38, 0], "not finite"),  # each is, their norm is not
        ("inside_camera_view", "false", "inside_camera_view false"),  # was true
        ("object_id", {}, "unhashable"),
    ],
)
def test_values_that_are_no_annotations(tmp_path: Path, field: str, value: Any, said: str) -> None:
    content, path = json.loads(text_of(ANNOTATION)), tmp_path / "a.json"
    content["motion_trajectory"][1]["objects"][0][field] = value
    path.write_bytes(text_of(content))
    with pytest.raises(VideoError, match=said):
        clevrer.read_annotation(path)


SCENE = cater_files.SCENE


@fuzz(150, 750, content=st.one_of(JSON.map(text_of), changed(SCENE).map(text_of), or_noise(text_of(SCENE))))
def test_cater_scenes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "CLEVR_new_000000.json"
    path.write_bytes(content)
    found = read_or_refuse(lambda: cater.read_scene(path, 31), VideoError, path)
    assert found is None or (found.shape == (14, 31) and found.dtype == torch.bool)


LINE = st.one_of(st.text("a.v, 0139-٣\n\r\x85\0/", max_size=12), st.just("a.avi " + "9" * 5000), st.just("a.avi ²"))
LINES = st.lists(LINE, max_size=4).map(lambda lines: "\n".join(lines).encode())


@fuzz(100, 750, content=st.one_of(LINES, or_noise(b"a.avi 0,3,7\n\nb.avi\nc.avi 13,\n")))
def test_cater_lists(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(content)
    found = read_or_refuse(lambda: cater.read_list(path), CaterError, path)
    assert found is None or all(classes <= {*range(14)} for classes in found.values())


NOT_A_NAME = {
    "long": "x" * 300 + ".avi",
    "long as json": "x" * 253 + ".a",
    "zero": "\0.avi",
    "long in UTF-8": "\ufffd" * 100,
}


@pytest.mark.parametrize("name", NOT_A_NAME.values(), ids=NOT_A_NAME)
def test_a_list_may_name_what_no_file_can_be_called(tmp_path: Path, name: str) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / cater.LIST_FOLDER).mkdir(parents=True)
    (tmp_path / cater.LIST_FOLDER / "train.txt").write_text(f"{name} 3\n")
    with pytest.raises(CaterError, match=r"none of the 1 videos of train\.txt is there"):
        cater.load_split(tmp_path, "train", 4, 6)


# -- Digits ---------------------------------------------------------------------------------------------------------

NAMES = digits.SETS["train"]
PLAIN = {
    NAMES[0]: struct.pack(">4I", 0x803, 3, 28, 28) + bytes(range(256)) * 9 + bytes(48),
    NAMES[1]: struct.pack(">2I", 0x801, 3) + b"\1\2\3",
}


@pytest.fixture
def small_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    """PLAIN in the place of MNIST."""
    sums = {name: hashlib.md5(content, usedforsecurity=False).hexdigest() for name, content in PLAIN.items()}
    monkeypatch.setattr(digits, "MD5", sums)


@fuzz(100, 750, victim=st.sampled_from(NAMES), zipped=st.booleans(), data=DRAWN)
def test_digits(small_mnist: None, tmp_path: Path, victim: str, zipped: bool, data: st.DataObject) -> None:
    right = {name: gzip.compress(content, mtime=0) if zipped else content for name, content in PLAIN.items()}
    for name, content in right.items():
        (tmp_path / (name + ".gz" * zipped)).write_bytes(content)
    path = tmp_path / (victim + ".gz" * zipped)
    path.write_bytes(data.draw(or_noise(right[victim])))
    found = read_or_refuse(lambda: load_digits(tmp_path), DigitsError, tmp_path, says=str(path))
    if found is not None:  # damage that says nothing, as in the time stamp of a .gz
        assert found.images.numpy().tobytes() == PLAIN[NAMES[0]][16:]
        assert found.labels.tolist() == [1, 2, 3]
    path.unlink()


def test_little_that_unpacks_to_much(small_mnist: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "LARGEST", 10_000)
    (tmp_path / NAMES[1]).write_bytes(PLAIN[NAMES[1]])
    (tmp_path / f"{NAMES[0]}.gz").write_bytes(gzip.compress(PLAIN[NAMES[0]][:16] + bytes(1 << 22)))
    with pytest.raises(DigitsError, match=r"damaged or not MNIST's .* \(10,001 bytes"):
        load_digits(tmp_path)


# -- Runs -----------------------------------------------------------------------------------------------------------

CONFIG = PRESETS["cater-mini"].to_dict()
GROUPS = st.dictionaries(
    st.sampled_from([*fields()]),
    st.one_of(JSON, st.sampled_from(["4", "8,8", "sparse", "simvp", [8, 8], 8, 0.5])),
    max_size=4,
)


@fuzz(
    200,
    750,
    content=st.one_of(JSON.map(text_of), GROUPS.map(text_of), changed(CONFIG).map(text_of), or_noise(text_of(CONFIG))),
)
def test_configs(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    config = read_or_refuse(lambda: Config.load(path), ConfigError, path)
    if config is not None:
        assert Config.from_dict(json.loads(config.to_json())) == config
        read_or_refuse(lambda: resolve_device(config.train.device), ConfigError, path, says="train.device")
        of = config.latent
        SparseLatent(of.dim, of.weight, of.iterations, lr=of.step_size, tolerance=of.tolerance)


@pytest.mark.parametrize("device", ["cuda:٣", "cuda:01", "cuda:-1", "cuda: 1", "cpu:0"])
def test_devices_that_torch_does_not_know(tmp_path: Path, device: str) -> None:
    (tmp_path / "config.json").write_bytes(text_of({"train.device": device}))
    with pytest.raises(ConfigError, match=r"train\.device="):
        Config.load(tmp_path / "config.json")


STATE = {"model": {"weight": torch.arange(60.0)}, "step": 3, "best": float("inf"), "name": "x", "list": [1, None]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    """A checkpoint, and what is in it."""
    path = tmp_path_factory.mktemp("run") / "last.pt"
    checkpoint.save(path, STATE)
    return path.read_bytes(), checkpoint.load(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@fuzz(200, 750, data=DRAWN)
def test_checkpoints(saved: tuple[bytes, dict[str, Any]], tmp_path: Path, data: st.DataObject) -> None:
    """What loads is what was saved: torch checks the sums of what it reads."""
    content, right = saved
    path = tmp_path / "last.pt"
    path.write_bytes(data.draw(or_noise(content)))
    state = read_or_refuse(lambda: checkpoint.load(path), CheckpointError, path)
    if state is not None:
        assert state.pop("model")["weight"].equal(right["model"]["weight"])
        assert state == {name: value for name, value in right.items() if name != "model"}


ROWS = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
METRICS = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@fuzz(
    100,
    750,
    content=st.one_of(changed(ROWS[1]).map(lambda row: METRICS + text_of(row) + b"\n" + METRICS), or_noise(METRICS)),
)
def test_metrics(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    for up_to in (None, 2):
        rows = read_or_refuse(lambda up_to=up_to: read_metrics(path, up_to), CheckpointError, path)
        assert all(type(row["step"]) is int and (up_to is None or row["step"] <= up_to) for row in rows)


# -- The cache ------------------------------------------------------------------------------------------------------

SIZE, COUNTS = (4, 4), (3, 5, 2)
CACHE = ("meta.json", "index.jsonl", "frames.u8")


def frames_of(path: Path, *_: Any) -> Any:
    """In the place of `decode.decode`: frames that tell the video."""
    number = int(path.stem)
    return torch.arange(number, number + COUNTS[number] * 48).view(COUNTS[number], 3, *SIZE).byte().numpy()


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], Path, dict[str, bytes]]:
    """Three videos, their cache, and what is in it."""
    monkeypatch.setattr(cache, "decode", frames_of)
    sources = [
        SimpleNamespace(path=tmp_path / f"{i}.mp4", name=f"videos/{i}.mp4", frames=count, stride=1)
        for i, count in enumerate(COUNTS)
    ]
    for i, source in enumerate(sources):
        source.path.write_bytes(bytes(100 + i))
    fill(sources, tmp_path / "cache", SIZE, "auto", workers.Pool(0))
    return sources, tmp_path / "cache", {name: (tmp_path / "cache" / name).read_bytes() for name in CACHE}


def read_cache(sources: list[Any], folder: Path) -> list[bool]:
    """Which videos are there. Every frame that is must be the right one."""
    cache = FrameCache(folder, SIZE)
    lines = [cache.find(source) for source in sources]
    for source, line in zip(sources, lines, strict=True):
        if line:
            found = cache.read([(line, 0)], source.frames)[0]
            assert found.equal(torch.from_numpy(frames_of(source.path))), f"other frames for {source.name}"
    return [line is not None for line in lines]


ENTRY = {"video": "videos/1.mp4", "bytes": 101, "frames": 5, "stride": 1, "first": 3, "crc32": 7}


@fuzz(150, 750, victim=st.sampled_from(CACHE), gone=st.integers(0, 9), data=DRAWN)
def test_a_damaged_cache(cached: Any, victim: str, gone: int, data: st.DataObject) -> None:
    """It serves right frames or none; one `--verify` repairs it."""
    sources, folder, right = cached
    for name, content in right.items():
        (folder / name).write_bytes(content)
    content = or_noise(right[victim])
    if victim == "index.jsonl":  # also whole lines that say something else
        line = changed(ENTRY).map(lambda entry: right[victim] + text_of(entry) + b"\n")
        content = st.one_of(content, line)
    if gone == 0:
        (folder / victim).unlink()
    else:
        (folder / victim).write_bytes(data.draw(content))
    read_or_refuse(lambda: read_cache(sources, folder), CacheError, folder)
    repaired = None
    with contextlib.suppress(CacheError):
        repaired = fill(sources, folder, SIZE, "auto", workers.Pool(0), verify=True)
    if repaired is None:
        assert victim == "meta.json"
    else:
        assert read_cache(sources, folder) == [True] * 3


def test_lines_that_claim_the_same_frames_are_repaired_at_once(cached: Any) -> None:
    """To repair one in its place damaged the other, for ever."""
    sources, folder, right = cached
    index = right["index.jsonl"].replace(b'"first": 3', b'"first": 0')
    assert index != right["index.jsonl"]
    (folder / "index.jsonl").write_bytes(index)
    assert read_cache(sources, folder) == [False, False, True]
    assert fill(sources, folder, SIZE, "auto", workers.Pool(0), verify=True) == (2, 1, {})
    assert read_cache(sources, folder) == [True] * 3
    assert fill(sources, folder, SIZE, "auto", workers.Pool(0), verify=True) == (0, 3, {})


def test_a_fill_that_was_killed_before_its_first_frame(cached: Any) -> None:
    sources, folder, _ = cached
    for name in CACHE[1:]:
        (folder / name).unlink()
    assert read_cache(sources, folder) == [False] * 3
    assert fill(sources, folder, SIZE, "auto", workers.Pool(0)) == (3, 0, {})
    assert read_cache(sources, folder) == [True] * 3


# -- What is no file at all -----------------------------------------------------------------------------------------

READERS: dict[str, tuple[str, Callable[[Path], Any], type[Exception]]] = {
    "video": ("a.mp4", open_video, VideoError),
    "annotation": ("a.json", clevrer.read_annotation, VideoError),
    "scene": ("a.json", lambda path: cater.read_scene(path, 31), VideoError),
    "list": ("train.txt", cater.read_list, CaterError),
    "images": (NAMES[0], lambda path: load_digits(path.parent), DigitsError),
    "config": ("config.json", Config.load, ConfigError),
    "checkpoint": ("last.pt", checkpoint.load, CheckpointError),
    "metrics": ("metrics.jsonl", read_metrics, CheckpointError),
    "cache": ("cache", lambda path: FrameCache(path, SIZE), CacheError),
    "meta": ("meta.json", lambda path: FrameCache(path.parent, SIZE), CacheError),
}


def forbid(path: Path) -> None:
    path.write_bytes(b"{}")
    path.chmod(0)


NO_FILES: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda path: None,
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path),
    "link to nothing": lambda path: path.symlink_to("gone"),
    "not allowed": forbid,
    "empty": Path.touch,
}


@pytest.mark.parametrize("what", NO_FILES)
@pytest.mark.parametrize("reader", READERS)
def test_no_file_at_all(tmp_path: Path, reader: str, what: str) -> None:
    name, read, error = READERS[reader]
    if reader == "video":
        pytest.importorskip("av")
        pytest.importorskip("decord")
    path = tmp_path / name
    NO_FILES[what](path)

    def as_nobody() -> Any:
        root = os.geteuid() == 0 and what == "not allowed"  # root may read everything
        if root:
            os.seteuid(65534)
        try:
            return read(path)
        finally:
            if root:
                os.seteuid(0)

    says = str(tmp_path) if reader in ("images", "meta") else None
    found = read_or_refuse(as_nobody, error, path if what != "folder" else tmp_path, says)
    harmless = {"metrics": ("nothing", "link to nothing", "empty"), "list": ("empty",)}
    assert (found is not None) == (what in harmless.get(reader, ()))
    assert listing(tmp_path).keys() == (set() if what == "nothing" else {name})
