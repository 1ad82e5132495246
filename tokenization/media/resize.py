"""A decoded frame to the square picture that the VQGAN sees.

In: a frame of FFmpeg, of any size, pixel format and orientation, its pixels' aspect, and what of it is not shown. Out:
uint8 [size, size, 3] RGB.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from av.error import FFmpegError
from av.filter import Graph
from av.video.frame import VideoFrame

from storage.errors import BadData
from tokenization.media.cropping import Cropping
from tokenization.media.orientation import Matrix, display_matrix, odd_angle, quarter_turns

_NOTHING = Cropping()


class SquareConverter:
    """Crops decoded frames to the central square, resizes them and sets them upright, as FFmpeg's command line does.

    There is one filter graph for each kind of frame.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kind: tuple[object, ...] | None = None
        self._graph: Graph | None = None

    def __call__(self, frame: VideoFrame, aspect: Fraction, cropping: Cropping = _NOTHING) -> np.ndarray:
        """Convert one frame. aspect: width of a pixel over its height. Raises BadData if it cannot be resized."""
        matrix = display_matrix(frame)
        kind = (frame.width, frame.height, frame.format.name, aspect, cropping, matrix)
        try:
            if self._graph is None or kind != self._kind:
                self._graph, self._kind = self._build(frame, aspect, cropping, matrix), kind
            frame.pts = None  # the graph converts one frame at a time and needs no times
            self._graph.vpush(frame)
            return self._graph.vpull().to_ndarray()
        except FFmpegError as error:
            raise BadData(f"video frame of {frame.width}x{frame.height} cannot be resized: {error.strerror}") from error

    def _build(self, frame: VideoFrame, aspect: Fraction, cropping: Cropping, matrix: Matrix | None) -> Graph:
        shown_width = frame.width - cropping.left - cropping.right
        shown_height = frame.height - cropping.top - cropping.bottom
        if shown_width < 1 or shown_height < 1:
            raise BadData(f"video frame of {frame.width}x{frame.height} of which nothing is to be shown: {cropping}")
        # A square on the screen is not one of pixels, which are `aspect` times as wide as high.
        width = max(1, min(shown_width, round(shown_height / aspect)))
        height = max(1, min(shown_height, round(shown_width * aspect)))
        graph = Graph()
        last = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
        )
        shown = f"w={shown_width}:h={shown_height}:x={cropping.left}:y={cropping.top}:exact=1"
        odd = odd_angle(matrix)
        steps = [
            *([("crop", shown)] if cropping else []),
            *([odd] if odd else []),
            ("crop", f"w={width}:h={height}:exact=1"),
            # bitexact gives the same bytes on every kind of CPU.
            ("scale", f"w={self._size}:h={self._size}:flags=bicubic+accurate_rnd+full_chroma_int+bitexact"),
            ("format", "pix_fmts=rgb24"),
            *quarter_turns(matrix),
            ("buffersink", ""),
        ]
        for name, arguments in steps:
            step = graph.add(name, arguments) if arguments else graph.add(name)
            last.link_to(step)
            last = step
        graph.configure()
        return graph
