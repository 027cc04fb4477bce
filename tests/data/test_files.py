"""Small helpers: working ahead, in order and within bounds; what is said of a package that cannot be imported."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from vjvcr_fast.data.files import ahead, load


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_work_ahead_is_bounded(depth: int) -> None:
    """Items without end: only `depth` are drawn before they are needed."""
    drawn = []

    def endless() -> Iterator[int]:
        while True:
            drawn.append(len(drawn))
            yield drawn[-1]

    items = ahead(endless(), depth)
    for k in range(6):
        assert next(items) == k
        assert len(drawn) == k + 1 + depth


@pytest.mark.parametrize("count", [0, 2, 9])
def test_all_items_come_in_order(count: int) -> None:
    assert list(ahead(range(count), 4)) == list(range(count))


def test_an_error_comes_after_the_items_before_it() -> None:
    def failing() -> Iterator[int]:
        yield from (1, 2)
        raise KeyError("mine")

    items = ahead(failing(), 5)
    assert (next(items), next(items)) == (1, 2)
    with pytest.raises(KeyError, match="mine"):
        next(items)


def test_a_missing_package_and_what_a_package_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "incomplete.py").write_text("import there_is_none")
    with pytest.raises(ImportError, match=r"^there_is_none is not installed: pip install 'vjvcr_fast\[train\]'$"):
        load("there_is_none", "train")
    with pytest.raises(ImportError, match=r"^incomplete cannot be imported \(.*there_is_none"):
        load("incomplete", "train")
