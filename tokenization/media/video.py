"""A video file to square frames sampled by time, in bounded chunks.

In: a path or a seekable binary file. Out: chunks of uint8 frames with their times. The file is decoded once and
sequentially, since a seek for every sample takes ten times as long, with one decoded frame and one chunk in memory.

**Time.** Time 0 is the first frame. Sample k is what a viewer sees at `k / fps`: the last frame whose timestamp is no
later, with a tolerance of half a tick of the stream's clock, to which containers round. The last frame is shown for its
duration, or to the end that the header declares (`extent`). This handles variable frame rates, dropped frames and still
images. A long video can be cut by time (`Samples.pieces`), and each piece decodes to the same frames.

**Errors.** A video that cannot be decoded from its first to its last frame raises `BadData` with the place; the caller
discards the chunks yielded before. Errors of the file object itself, such as a lost connection, pass through. A frame
that is neither sampled nor needed by other frames is not decoded (`skip_unused_frames`), and may be damaged.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from storage.errors import BadData
from tokenization.media import skip_unused_frames
from tokenization.media.cropping import Cropping, cropping_of
from tokenization.media.extent import LONGEST_STILL, MISSING_TAIL, Extent, frame_period
from tokenization.media.frame_sampling import FrameChunk, FrameRequest
from tokenization.media.resize import SquareConverter

# Containers of their own media. FFmpeg also reads playlists and scripts that name other files and addresses, whatever
# the extension; an input must not make the reader open anything else.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,mxf,ivf,h264,hevc,m4v,nut,apng"
_HALF = Fraction(1, 2)
_MAX_PIXELS = 2**26  # of one frame; 8K video has 2^25
_WORTH_A_SEEK = 10  # seconds of decoding that a seek has to save
# Decoders that show damage unless told otherwise: that of Motion JPEG leaves the rest of a picture as an older one left
# its memory, that of PNG does not look at the checksums.
_STRICT = frozenset({"mjpeg", "png", "apng"})
_LONGEST = 366 * 24 * 3600  # seconds of a video; a longer one is a broken clock, and would be cut into endless pieces


def decode_frames(file: BinaryIO | str | Path, request: FrameRequest) -> Iterator[FrameChunk]:
    """Sample a video as requested, each frame cropped to its central square and resized, a chunk at a time.

    If only some samples are taken, little more than the part with these is decoded, to the same frames and times;
    choosing them by number or share takes a pass over the packets. Rotation and non-square pixels are applied. An open
    `file` is read from its beginning and left open. Raises BadData on a video that cannot be decoded.
    """
    if isinstance(file, (str, Path)):
        with open(file, "rb") as opened:
            yield from decode_frames(opened, request)
        return
    clock = _Clock(Fraction(request.fps))
    wanted: frozenset[int] | None = None
    samples, total = request.choose(lambda: count_samples(file, request.fps))
    if samples is not None:
        if not len(samples):
            return
        end = None if samples.to_end else int(samples.numbers[-1]) + 1
        clock = _Clock(clock.fps, int(samples.numbers[0]), end, samples.numbers)
        wanted = frozenset(samples.numbers.tolist())
    converted = (
        (picture, float(clock.time(sample)))
        for sample, picture in _pictures(_samples(file, clock, request.threads), SquareConverter(request.size), wanted)
    )
    while chunk := list(islice(converted, request.chunk)):
        frames, times = zip(*chunk)
        yield FrameChunk(np.stack(frames), np.array(times), total)
        del chunk, frames, times  # before the next chunk is decoded


def _pictures(
    samples: Iterator[tuple[int, _TimedFrame]], convert: SquareConverter, wanted: frozenset[int] | None
) -> Iterator[tuple[int, np.ndarray]]:
    """The wanted samples with their pictures; one frame's picture, which may stand for an hour, is made once."""
    last, picture = None, None
    for sample, frame in samples:
        if wanted is None or sample in wanted:
            if picture is None or frame.picture is not last:
                last, picture = frame.picture, convert(frame.picture, frame.aspect, frame.cropping)
            yield sample, picture


@dataclass(frozen=True)
class _Clock:
    """The exact times of the samples. first: the first to take. end: one more than the last, if it is known. numbers:
    int64 [n], those to take, None for all."""

    fps: Fraction
    first: int = 0
    end: int | None = None
    numbers: np.ndarray | None = None

    def time(self, sample: int) -> Fraction:
        return sample / self.fps

    def samples_before(self, moment: Fraction) -> int:
        """The number of the first sample not before `moment`, `end` at most."""
        before = max(0, math.ceil(moment * self.fps))
        return before if self.end is None else min(before, self.end)

    def has_sample(self, begin: Fraction, end: Fraction) -> bool:
        """Whether a sample to take is in [begin, end)."""
        low, high = max(self.first, self.samples_before(begin)), self.samples_before(end)
        if self.numbers is None or low >= high:
            return low < high
        place = int(np.searchsorted(self.numbers, low))
        return place < len(self.numbers) and int(self.numbers[place]) < high


@dataclass(frozen=True)
class _TimedFrame:
    """A decoded frame. at, until: the seconds from the first frame between which it is shown. slack: half a tick of
    its clock. aspect: width of a pixel over its height. cropping: what of it is not shown."""

    picture: VideoFrame
    at: Fraction
    until: Fraction
    slack: Fraction
    aspect: Fraction
    cropping: Cropping


def _samples(file: BinaryIO, clock: _Clock, threads: int) -> Iterator[tuple[int, _TimedFrame]]:
    """(sample number, the frame shown at its time), in order."""
    shown: _TimedFrame | None = None
    sample = clock.first
    for frame in _timed_frames(file, clock, threads):
        if shown is not None:
            if frame.at - shown.at > LONGEST_STILL:
                raise BadData(f"video clock jumps by {float(frame.at - shown.at):.0f} s at {float(shown.at):.2f} s")
            while sample < clock.samples_before(frame.at - frame.slack):
                yield sample, shown
                sample += 1
        shown = frame
        if clock.end is not None and frame.at - frame.slack >= clock.time(clock.end):
            return
    if shown is not None:
        for last in range(sample, clock.samples_before(shown.until)):
            yield last, shown


def _timed_frames(file: BinaryIO, clock: _Clock, threads: int) -> Iterator[_TimedFrame]:
    """The frames from the start or from a keyframe at or before the first sample; unused frames may be missing."""
    start = clock.time(clock.first)
    try:
        yield from _decode(file, clock, threads, start if start >= _WORTH_A_SEEK else Fraction(0))
    except _SeekMissedError:  # before any frame has been yielded
        yield from _decode(file, clock, threads, Fraction(0))


class _SeekMissedError(Exception):
    """The container did not seek to a keyframe at or before the place."""


def _decode(file: BinaryIO, clock: _Clock, threads: int, seek_to: Fraction) -> Iterator[_TimedFrame]:
    at = until = Fraction(0)
    origin: int | None = None

    def is_used(appears: int, goes: int) -> bool:
        return origin is None or clock.has_sample((appears - origin - _HALF) * tick, (goes - origin - _HALF) * tick)

    with _opened(file) as (container, stream):
        stream.codec_context.thread_count = threads
        stream.codec_context.thread_type = "AUTO" if threads > 1 else "NONE"
        tick, cropping, aspect = Fraction(stream.time_base or 0), cropping_of(stream), _aspect(stream)
        extent = Extent(stream)
        try:
            frames = _whole_frames(container, stream, extent, is_used)
            first = next(frames, None)
            if first is None:
                raise BadData("video without a single frame")
            origin = first.pts or 0
            if seek_to and tick:
                _seek(container, stream, origin + int(seek_to / tick))
                frames = _whole_frames(container, stream, extent, is_used)
                first = next(frames, None)
                if first is None or first.pts is None or (first.pts - origin) * tick > seek_to:
                    raise _SeekMissedError
            for frame in chain([first], frames):
                # A frame without a timestamp, or with one that goes back, follows the frame before it.
                at = until if frame.pts is None else max(at, (frame.pts - origin) * tick)
                until = at + (frame.duration * tick or frame_period(stream))
                yield _TimedFrame(frame, at, until, tick / 2, aspect(), cropping)
            if extent.last - origin * tick - at > MISSING_TAIL:
                raise _DamagedError("its last frames do not decode")
            yield _TimedFrame(frame, at, extent.shown_until(file), tick / 2, aspect(), cropping)
        except (FFmpegError, _DamagedError) as error:
            reason = error.strerror if isinstance(error, FFmpegError) else error
            raise BadData(f"video damaged after {float(at):.2f} s: {reason}") from error


class _DamagedError(Exception):
    """FFmpeg marked a packet or a frame as damaged."""


def _seek(container: InputContainer, stream: VideoStream, stamp: int) -> None:
    try:
        container.seek(stamp, stream=stream)
    except FFmpegError as error:
        raise _SeekMissedError from error


def _whole_frames(
    container: InputContainer, stream: VideoStream, extent: Extent, is_used: Callable[[int, int], bool]
) -> Iterator[VideoFrame]:
    packets = extent.passed(container)
    decoder = stream.codec_context
    if decoder.name in skip_unused_frames.CODECS and decoder.has_b_frames:
        packets = skip_unused_frames.skip_unused(packets, decoder, is_used)
    for packet in packets:
        if packet.is_corrupt:
            raise _DamagedError("a packet is incomplete")
        for frame in packet.decode():
            # A decoder conceals the effect of flipped bits and reports it only here.
            if frame.is_corrupt:
                raise _DamagedError("a frame does not decode whole")
            yield frame


def _aspect(stream: VideoStream) -> Callable[[], Fraction]:
    """The width of a pixel over its height, of the frame that was decoded last.

    A container's own word goes before the codec's. Where it has none, as in MPEG-TS, a film may change in the middle.
    """
    decoder = stream.codec_context
    fixed = stream.sample_aspect_ratio
    if fixed != decoder.sample_aspect_ratio:
        return lambda: fixed or Fraction(1)
    return lambda: decoder.sample_aspect_ratio or Fraction(1)


def count_samples(file: BinaryIO, fps: float) -> int:
    """How many frames `decode_frames` samples from a whole video, by its packets' timestamps alone. Raises BadData."""
    with _opened(file) as (container, stream):
        extent = Extent(stream)
        try:
            for _ in extent.passed(container):
                pass
        except FFmpegError as error:
            raise BadData(f"video damaged: its packets cannot be listed: {error.strerror}") from error
        if extent.frames_until > _LONGEST:
            raise BadData(f"video clock of {float(extent.frames_until):.0f} s")
        return _Clock(Fraction(fps)).samples_before(extent.shown_until(file))


class _Inside:
    """The file as FFmpeg reads it: a seek to before its beginning means damage, not an error of the disk."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.read, self.tell = file.read, file.tell

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            raise BadData("video damaged: it points to bytes before its beginning") from error


def _best_stream(container: InputContainer) -> VideoStream:
    best = container.streams.best("video")
    # To FFmpeg, the cover picture of a song is a video stream.
    films = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not films:
        raise BadData("no video stream in it")
    return next((stream for stream in films if stream is best), films[0])


@contextmanager
def _opened(file: BinaryIO) -> Iterator[tuple[InputContainer, VideoStream]]:
    file.seek(0)
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
    try:
        container = av.open(_Inside(file), mode="r", options=options, metadata_errors="ignore")
    except FFmpegError as error:
        raise BadData(f"not a video that can be read: {error.strerror}") from error
    with container:
        stream = _best_stream(container)
        if stream.codec_context is None:
            raise BadData("video of an unknown codec")
        pixels = stream.codec_context.width * stream.codec_context.height
        if pixels > _MAX_PIXELS:
            raise BadData(f"video of {stream.codec_context.width}x{stream.codec_context.height} pixels, over the limit")
        options = {"err_detect": "crccheck+explode"} if stream.codec_context.name in _STRICT else {}
        stream.codec_context.options = {"max_pixels": str(_MAX_PIXELS), **options}
        yield container, stream
