"""The ways in which a loss is computed on a CPU, to be tested one by one."""

import pytest

from vjvcr_fast import native
from vjvcr_fast.losses import analytic

SETS = ("baseline", "avx2", "avx512")  # of the compiled operator; a CPU that has one has those before it
HERE = () if native.MISSING is not None else SETS[: SETS.index(native.instruction_set()) + 1]
# Instruction sets of the operator; or plain operations, with the elements of a block.
WAYS: tuple[str | int, ...] = (*HERE, 1, analytic._BLOCK)


def take(way: str | int, patch: pytest.MonkeyPatch) -> None:
    """From here on backend="auto" takes this way for CPU tensors."""
    if isinstance(way, str):
        patch.setenv("VJVCR_CPU", way)
    else:
        patch.setattr(native, "MISSING", "not wanted here")
        patch.setattr(analytic, "_BLOCK", way)
