"""A decoded frame to the square picture that the VQGAN sees.

In: a frame of FFmpeg, of any size, pixel format and rotation, and its pixels' aspect. Out: uint8 [size, size, 3] RGB.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from av.error import FFmpegError
from av.filter import Graph
from av.video.frame import VideoFrame

from storage.errors import BadData


class SquareConverter:
    """Crops decoded frames to the central square, resizes and rotates them; one filter graph for each kind of frame."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kind: tuple[object, ...] | None = None
        self._graph: Graph | None = None

    def __call__(self, frame: VideoFrame, aspect: Fraction) -> np.ndarray:
        """Convert one frame. aspect: width of a pixel over its height. Raises BadData if it cannot be resized."""
        kind = (frame.width, frame.height, frame.format.name, aspect, frame.rotation)
        try:
            if self._graph is None or kind != self._kind:
                self._graph, self._kind = self._build(frame, aspect), kind
            frame.pts = None  # the graph converts one frame at a time and needs no times
            self._graph.vpush(frame)
            return self._graph.vpull().to_ndarray()
        except FFmpegError as error:
            raise BadData(f"video frame of {frame.width}x{frame.height} cannot be resized: {error.strerror}") from error

    def _build(self, frame: VideoFrame, aspect: Fraction) -> Graph:
        # A square on the screen is not one of pixels, which are `aspect` times as wide as high.
        width = max(1, min(frame.width, round(frame.height / aspect)))
        height = max(1, min(frame.height, round(frame.width * aspect)))
        graph = Graph()
        last = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
        )
        steps = [
            ("crop", f"w={width}:h={height}:exact=1"),
            # bitexact gives the same bytes on every kind of CPU.
            ("scale", f"w={self._size}:h={self._size}:flags=bicubic+accurate_rnd+full_chroma_int+bitexact"),
            ("format", "pix_fmts=rgb24"),
            *_ROTATIONS[round(frame.rotation / 90) % 4],
            ("buffersink", ""),
        ]
        for name, arguments in steps:
            step = graph.add(name, arguments) if arguments else graph.add(name)
            last.link_to(step)
            last = step
        graph.configure()
        return graph


# By quarter turns counter-clockwise that the display matrix asks for.
_ROTATIONS = {0: [], 1: [("transpose", "cclock")], 2: [("hflip", ""), ("vflip", "")], 3: [("transpose", "clock")]}
