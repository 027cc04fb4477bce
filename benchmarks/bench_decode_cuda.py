"""On a GPU with NVDEC: DALI's frames/s against those of the CPU decoders on all cores, with the CPUs left free.

    pytest benchmarks/bench_decode_cuda.py

Videos, windows and sizes as in bench_decode.py; frames of both differ by the interpolation of colour (dali.py).
"""

from functools import partial

import pytest
import torch
from bench_decode import BATCH, ROUNDS, SECONDS, SIZE, WINDOW, judged, sources, videos
from records import Row
from timing import Host, Region, spread, take_turns

from vjvcr_fast.data.video.clips import Source, VideoClips
from vjvcr_fast.data.video.workers import Pool

__all__ = ["sources", "videos"]  # fixtures
SHARE = 0.7  # of the CPU decoders' frames/s on 16 cores

pytest.importorskip("nvidia.dali", reason="the extra dali is not installed")


def test_dali(sources: list[Source], benchmark, report) -> None:
    options = {"frames": WINDOW, "size": SIZE, "seed": 0, "stream": "bench", "device": "cuda"}
    with Pool() as pool:
        loaders = {
            "CPU decoders": VideoClips(sources, **options, pool=pool).batches(0, BATCH),
            "DALI": VideoClips(sources, **options, backend="dali").batches(0, BATCH),
        }
        for loader in loaders.values():
            next(loader)
        if benchmark.disabled:
            return

        def batch(loader) -> None:
            next(loader)
            torch.cuda.synchronize()

        times = take_turns(
            Host(), {n: Region(partial(batch, loader)) for n, loader in loaders.items()}, SECONDS, *ROUNDS
        )
        rows = []
        for name, of_one in times.items():
            median = spread(of_one).median
            row: Row = {"what": f"GPU, {name}", "_frames_per_second": BATCH * WINDOW / (1e-3 * median)}
            row["x CPU"] = spread(times["CPU decoders"]).median / median
            rows.append(row)
    report([rows[0], judged(rows[1], "x CPU", SHARE)])
