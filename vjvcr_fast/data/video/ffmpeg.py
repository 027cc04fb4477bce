"""Decoding with PyAV, which brings an FFmpeg of its own: every frame from the first on, without any seek.

These are FFmpeg's frames of whatever file, also where decord and torchcodec return other frames or none after a seek,
because a file has no times or no index (see `Facts.alone`). The price: a window at the end of a video costs decoding
all of it, so that training should read such videos from the cache.
"""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast.data.files import load
from vjvcr_fast.data.video.file import TURNS, Facts, Video, opened


class AvVideo(Video):
    """A video, decoded in order. It goes on from the frame that it has reached, and starts anew for earlier ones."""

    backend = "av"
    mirrors = True

    def __init__(self, path: Path, facts: Facts, device: torch.device, threads: int) -> None:
        self._av = load("av", "video")
        super().__init__(path, facts, device, threads)
        self._frames: Iterator[Any] = iter(())
        self._next = facts.frames  # the number of the frame that comes next
        self._graphs: dict[tuple[int, int, str], Any] = {}

    def _read(self, indices: list[int]) -> Tensor:
        if indices[0] < self._next:
            self._frames, self._next = self._decoded(), 0
        frame: Any = None
        found = torch.empty(len(indices), self.height, self.width, 3, dtype=torch.uint8)
        for row, index in enumerate(indices):
            while self._next <= index:
                frame = next(self._frames, None)
                if frame is None:
                    raise RuntimeError(f"there are only {self._next} of {self.frame_count}")
                self._next += 1
            if frame.is_corrupt:
                raise RuntimeError(f"frame {index} is damaged")
            found[row] = torch.from_numpy(self._shown(frame))
        return found

    def _decoded(self) -> Iterator[Any]:
        with opened(self.path) as container:
            stream = container.streams[self._facts.stream]
            stream.codec_context.thread_count = self.threads
            yield from container.decode(stream)

    def _shown(self, frame: Any) -> Any:
        """A frame as it is shown: (H, W, 3) uint8, of FFmpeg's command to the bit."""
        kind = frame.width, frame.height, frame.format.name
        if kind not in self._graphs:
            self._graphs[kind] = self._graph(frame)
        self._graphs[kind].vpush(frame)
        return self._graphs[kind].vpull().to_ndarray()

    def _graph(self, frame: Any) -> Any:
        graph = self._av.filter.Graph()
        time = frame.time_base or Fraction(1, 25)  # required, and without effect
        steps = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=time)]
        # A frame of another size than the first is scaled to that, as FFmpeg and decord do.
        scale = ("scale", f"{self.width}:{self.height}:flags=bicubic")
        steps += [
            graph.add(*step) for step in (*TURNS[self._facts.matrix], scale, ("format", "rgb24"), ("buffersink",))
        ]
        graph.link_nodes(*steps).configure()
        return graph
