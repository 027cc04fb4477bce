"""Helpers for tests on generated examples (few by default, many under `-m slow`): strides, damaged JSON and files."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

SLOW_EXAMPLES = [HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large]


def fuzz(few: int, many: int, **strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """Decorates a test to run on `few` examples drawn from `strategies` and, marked slow, on `many`.

    The test may also take fixtures.
    """

    def decorate(test: Callable[..., None]) -> Any:
        def run(examples: int, **fixtures: Any) -> None:
            def example(**drawn: Any) -> None:
                test(**fixtures, **drawn)

            example.__name__ = example.__qualname__ = test.__name__
            settings(max_examples=examples, suppress_health_check=SLOW_EXAMPLES)(given(**strategies)(example))()

        own = [p for name, p in inspect.signature(test).parameters.items() if name not in strategies]
        examples = inspect.Parameter("examples", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        run.__signature__ = inspect.Signature([examples, *own])  # type: ignore[attr-defined]
        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        run.pytestmark = getattr(test, "pytestmark", [])  # type: ignore[attr-defined]
        many_are_slow = pytest.param(many, marks=pytest.mark.slow, id="many")
        return pytest.mark.parametrize("examples", [pytest.param(few, id="few"), many_are_slow])(run)

    return decorate


# -- Strides --------------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn, h: Tensor, alike: bool = True) -> Tensor:
    """h with other strides: permuted, with steps, behind an offset.

    alike: it may also be a tensor of h's shape with some of h's numbers, each in several places: one repeated by a
    stride of 0, or overlapping windows.
    """
    what = draw(st.sampled_from(("repeated", "windows", "", "", "", "") if alike else ("",)))
    if what == "repeated":
        dim = draw(st.integers(1 if h.ndim > 2 else 0, h.ndim - 1))
        return h.narrow(dim, 0, 1).expand_as(h)
    if what == "windows":
        largest = (h.numel() - 1) // max(1, sum(h.shape) - h.ndim)  # stride, so that they end within h
        return h.contiguous().as_strided(h.shape, draw(st.tuples(*[st.integers(0, largest)] * h.ndim)))
    order = draw(st.permutations(range(h.ndim)))
    steps = draw(st.lists(st.integers(1, 3), min_size=h.ndim, max_size=h.ndim))
    offset = draw(st.integers(0, 3))
    fill = torch.nan if h.is_floating_point() else 1
    room = torch.full([h.shape[i] * steps[i] + offset for i in order], fill, dtype=h.dtype)
    room = room.permute([order.index(i) for i in range(h.ndim)])
    view = room[tuple(slice(offset, None, step) for step in steps)]
    return view[tuple(slice(size) for size in h.shape)].copy_(h)


# -- JSON -----------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.floats(),  # NaN and infinities too: Python writes and reads them
    st.sampled_from([10**30, 10**400, -(2**63), 2**53 + 1, 1e308, 5e-324, True, False]),
)
TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "a\nb", "\ud800", "\0", "9" * 5000, "..", "cuda:٣", "1e999", "true"])
)
JSON = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one part, at any depth, replaced, removed, or there twice."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(JSON)
    key = draw(st.sampled_from([*value] if isinstance(value, dict) else range(len(value))))
    copy = value.copy()
    match draw(st.sampled_from(["deeper", "deeper", "deeper", "gone", "more"])):
        case "deeper":
            copy[key] = draw(changed(value[key]))
        case "gone":
            del copy[key]
        case "more" if isinstance(value, dict):
            copy[draw(TEXTS)] = draw(JSON)
        case "more":
            copy.insert(key, value[key])
    return copy


# -- Bytes ----------------------------------------------------------------------------------------------------------

NOISE = st.one_of(
    st.binary(max_size=64),
    st.binary(min_size=1, max_size=8).map(lambda part: part * 500),
    st.sampled_from(
        [b"[" * 100_000, b'{"a":' * 5_000, b"\xff\xfe", b"\xef\xbb\xbf{}", bytes(5000), b"9" * 5000, b"NaN"]
    ),
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes of a file with one damage: cut off, bits flipped, or bytes overwritten, left out, inserted or moved."""
    at = draw(st.integers(0, len(content) - 1))
    end = min(len(content), at + draw(st.integers(1, 64)))
    match draw(st.sampled_from(["flip", "flip", "cut", "over", "out", "in", "zero", "moved"])):
        case "flip":
            flips = draw(
                st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 7)), min_size=1, max_size=4)
            )
            bad = bytearray(content)
            for place, bit in flips:
                bad[place] ^= 1 << bit
            return bytes(bad)
        case "cut":
            return content[:at]
        case "over":
            return content[:at] + draw(st.binary(min_size=end - at, max_size=end - at)) + content[end:]
        case "out":
            return content[:at] + content[end:]
        case "in":
            return content[:at] + draw(st.binary(min_size=1, max_size=32)) + content[at:]
        case "zero":
            return content[:at] + bytes(end - at) + content[end:]
        case _:
            return content[end:] + content[:end]


# -- What must happen -----------------------------------------------------------------------------------------------


def read_or_refuse(read: Callable[[], Any], error: type[Exception], path: Path, says: str | None = None) -> Any:
    """What read() returns, or None if it raises `error`.

    Any other exception fails the test, and so does a message of several lines or without the file's name (or `says`).
    The files around `path` must stay as they were.
    """
    folder = path if path.is_dir() else path.parent
    before = listing(folder)
    try:
        return read()
    except error as refusal:
        message = str(refusal)
        assert message.isprintable(), repr(message)
        assert (says or str(path)) in message
        return None
    finally:
        assert listing(folder) == before


def listing(folder: Path) -> dict[str, bytes | str]:
    """Every file below a folder with its content."""
    content = lambda p: p.read_bytes() if p.is_file() else str(p.stat(follow_symlinks=False).st_mode)  # noqa: E731
    return {str(p.relative_to(folder)): content(p) for p in sorted(folder.rglob("*"))}
