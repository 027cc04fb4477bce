"""What `vjvcr-fast bench` shows: how long the VCR loss of a user's shape takes, ours and written plainly in PyTorch."""

import re
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from vjvcr_fast.bench.loss import OURS, Row, measure
from vjvcr_fast.config import ConfigError, parse, resolve_device
from vjvcr_fast.data.files import say
from vjvcr_fast.losses.backends import against_native, against_triton
from vjvcr_fast.paper.machine import processor

BUSY = 0.1  # the share of the machine that others may use


def show(shape: str, dtype: str, device: str) -> None:
    """Prints the table, and on stderr what is being done.

    shape: "N,T,d". dtype: one of `bench.loss.DTYPES`. device: auto, cpu, cuda or cuda:N. Raises ConfigError for a shape
    or device that cannot be; BenchError.
    """
    n, steps, d = _sizes(shape)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ConfigError(f"--device={device!r}: must be auto, cpu, cuda or cuda:N")
    on = resolve_device(device, "--device")
    with torch.cuda.device(on) if on.type == "cuda" else nullcontext():
        rows, others = measure(n, steps, d, dtype, on, say)
    name = torch.cuda.get_device_name(on) if on.type == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    print(f"VCR of ({n}, {steps}, {d}), {dtype}, forward and backward; {name}; torch {torch.__version__}")
    print(f"vjvcr_fast: {_chosen(on, getattr(torch, dtype))}\n\n{table(rows, others)}")


def _sizes(shape: str) -> tuple[int, int, int]:
    try:
        n, steps, d = parse("--shape", tuple[int, int, int], shape)
    except ConfigError:
        n = steps = d = 0
    if n < 2 or steps < 1 or d < 1:
        raise ConfigError(f"--shape={shape!r}: must be N,T,d, whole numbers with N >= 2, T >= 1 and d >= 1")
    return n, steps, d


def _chosen(device: torch.device, dtype: torch.dtype) -> str:
    """Which way vcr_loss takes, and why not the faster one."""
    name = "triton" if device.type == "cuda" else "native"
    obstacle = against_triton(device, dtype) if name == "triton" else against_native(device)
    return f"backend {name}" if obstacle is None else f"backend torch, plain operations: {obstacle}"


def table(rows: Sequence[Row], others: float = 0.0) -> str:
    """The rows of `measure` as text. others: the share of the machine that other processes used."""
    own = next(row["ms"] for row in rows if row["way"] == OURS)
    lines = [f"{'':26}{'time':>12}{'as long':>10}{'memory':>10}{'error':>10}"]
    for row in rows:
        if "ms" in row:
            time = f"{row['ms']:,.0f} ms" if row["ms"] >= 100 else f"{row['ms']:.3g} ms"
            ratio, memory = f"{row['ms'] / own:.1f}x", f"{row['copies']:.1f}"
            lines.append(f"{row['way']:26}{time:>12}{ratio:>10}{memory:>10}{row['error']:>10.0e}")
        else:
            lines.append(f"{row['way']:26}  {row['note']}")
    lines += ["", "as long: times as long as vjvcr_fast. memory: the peak beyond h, gradient included, in copies of h."]
    lines += ["error: of loss or gradient, the larger one, relative to the reference in float64."]
    if others > BUSY:
        lines += [f"Other processes used {others:.0%} of this machine meanwhile: on a quiet one ratios may differ."]
    return "\n".join(lines)
