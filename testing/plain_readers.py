"""What others' readers, used as their manuals say, make of a file: the reference for what the tokenize stage accepts.

In: the bytes of a file, and its name. Out: records, samples or pictures, or `Refused`. They may crash and hang on
damaged bytes: `ReferenceProcess` runs them in a process of its own.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import resource
import signal
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Generic, TypeVar

import av
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from av.sidedata.sidedata import Type as SideData
from PIL import Image, ImageOps
from webdataset.tariterators import group_by_keys, tar_file_iterator

Result = TypeVar("Result")
_MEMORY = 2 << 30
_CPU_SECONDS = 20
_MOST_FRAMES = 400


@dataclass(frozen=True)
class Refused:
    """The reader fails, for this reason."""

    reason: str


@dataclass(frozen=True)
class Film:
    """A video's frames in order: timestamp and duration in ticks, and uint8 [size, size, 3].

    A frame of another size, or that is to be turned or stretched, has no picture. tick: seconds. failed: why it ends
    early.
    """

    frames: list[tuple[int | None, int, np.ndarray | None]]
    tick: Fraction
    failed: str | None


def text_table(content: bytes, name: str) -> list[dict[str, Any] | None]:
    """The lines or rows of a text-like file by `json` and `csv`, None for one that they refuse."""
    plain = _unpacked(content, name)
    if ".jsonl" in name:
        lines = plain.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        return [_json_object(line) for line in (lines if lines[-1] else lines[:-1])]
    if ".csv" in name or ".tsv" in name:
        return _csv_rows(plain, "\t" if ".tsv" in name else ",")
    return [{"text": plain.decode("utf-8-sig")}]


def _unpacked(content: bytes, name: str) -> bytes:
    if name.endswith(".gz"):
        return _streams(content)
    if name.endswith(".zst"):
        # In one call, which wants to know the size, and refuses whatever is missing or follows.
        size = len(pa.input_stream(pa.py_buffer(content), compression="zstd").read())
        return pa.Codec("zstd").decompress(content, size, asbytes=True)
    return content


def _streams(content: bytes) -> bytes:
    """What gzip's streams hold, each by one call; nothing of a damaged one and of what follows it, all of a cut one."""
    plain = b""
    while content:
        stream = zlib.decompressobj(16 + zlib.MAX_WBITS)
        try:
            plain += stream.decompress(content)
        except zlib.error:
            if not plain:
                raise
            break
        content = stream.unused_data.lstrip(b"\0")
    return plain


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _csv_rows(plain: bytes, delimiter: str) -> list[dict[str, Any] | None]:
    text = plain.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    rows = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter)
    header = next(rows)
    found: list[dict[str, Any] | None] = []
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return found
        except csv.Error:
            found.append(None)
        else:
            found.append(dict(zip(header, row)) if len(row) == len(header) else None)


def parquet_rows(content: bytes, columns: list[str]) -> list[dict[str, Any] | None]:
    """The rows of a Parquet file, by `read_table` or, where that fails, row group by row group; None for lost ones."""
    try:
        return _rows(pq.read_table(io.BytesIO(content), columns=columns, use_threads=False))
    except (pa.ArrowException, OSError, ValueError, KeyError):
        file = pq.ParquetFile(io.BytesIO(content))
    found: list[dict[str, Any] | None] = []
    for number in range(file.num_row_groups):
        try:
            found += _rows(file.read_row_group(number, columns=columns, use_threads=False))
        except (pa.ArrowException, OSError, ValueError):
            found += [None] * file.metadata.row_group(number).num_rows
    return found


def _rows(table: pa.Table) -> list[dict[str, Any] | None]:
    return [_row(table.slice(number, 1)) for number in range(table.num_rows)]


def _row(table: pa.Table) -> dict[str, Any] | None:
    try:
        return table.to_pylist()[0]
    except ValueError:  # of text that is not UTF-8
        return None


def tar_samples(content: bytes) -> list[dict[str, Any]]:
    """The samples of a tar by webdataset, up to its damage: `__key__`, and each member's bytes by extension."""
    members = []
    with suppress(Exception):  # tarfile's, and zlib's of a stream that looks packed
        for member in tar_file_iterator(io.BytesIO(content), skip_meta=None):
            members.append({**member, "__url__": ""})
    return list(group_by_keys(members))


def picture(content: bytes, size: int) -> np.ndarray:
    """An image by Pillow: opened, upright, on white, converted and fitted to uint8 [size, size, 3]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            try:
                upright = ImageOps.exif_transpose(image)
            except Exception:  # of a damaged note of the camera
                upright = image
            if upright.mode not in ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"):
                raise ValueError(f"mode {upright.mode}, which Pillow clips instead of converting")
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return np.asarray(ImageOps.fit(upright.convert("RGB"), (size, size), Image.Resampling.BICUBIC))


def film(content: bytes, size: int) -> Film:
    """A video by PyAV: opened, and every frame of its best video stream decoded and converted.

    Decoded twice, with the memory of frames used again and not: a picture that depends on it is none.
    """
    first, again = _film(content, size, []), _film(content, size, None)
    pairs = zip(first.frames, again.frames)
    frames = [(*one[:2], one[2] if np.array_equal(one[2], other[2]) else None) for one, other in pairs]  # type: ignore[arg-type]
    return Film(frames, first.tick, first.failed)


def _film(content: bytes, size: int, held: list[av.VideoFrame] | None) -> Film:
    frames: list[tuple[int | None, int, np.ndarray | None]] = []
    failed = None
    with av.open(io.BytesIO(content), "r", metadata_errors="ignore") as container:
        stream = container.streams.best("video") or container.streams.video[0]
        assert isinstance(stream, av.VideoStream)
        stream.thread_type = "NONE"
        tick = Fraction(stream.time_base or 0)
        try:
            for frame in container.decode(stream):
                frames.append((frame.pts, frame.duration or 0, _pixels(frame, stream, size)))
                if held is not None and frames[-1][2] is not None:
                    held.append(frame)
                if len(frames) == _MOST_FRAMES:
                    failed = "too long for the reference"
                    break
        except (av.FFmpegError, IndexError, ValueError) as error:
            failed = repr(error)
    return Film(frames, tick, failed)


def _pixels(frame: av.VideoFrame, stream: av.VideoStream, size: int) -> np.ndarray | None:
    sides: Any = frame.side_data
    is_turned = sides.get(SideData.DISPLAYMATRIX) is not None
    if is_turned or (frame.width, frame.height) != (size, size) or (stream.sample_aspect_ratio or 1) != 1:
        return None
    return frame.reformat(format="rgb24", threads=1).to_ndarray()  # others stay until memory is short


class ReferenceProcess:
    """A process that runs readers one by one, under limits, and is replaced when one ends it."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def begin(self, reader: Callable[..., Result], *arguments: Any) -> Pending[Result]:
        """Have a reader begin with these arguments."""
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_confine)
        try:
            return Pending(self, self._pool.submit(_run, reader, arguments))
        except BrokenProcessPool:  # by a reader whose result nobody has asked for
            self.close()
            return self.begin(reader, *arguments)

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


@dataclass(frozen=True)
class Pending(Generic[Result]):
    """What a reader will return."""

    process: ReferenceProcess
    future: Future[Any]

    def result(self) -> Result | Refused:
        """It, or why the reader failed, with or without its process."""
        try:
            found: Result | Refused = self.future.result()
        except BrokenProcessPool:
            self.process.close()
            return Refused("it crashes, or takes too much time or memory")
        return found


def _confine() -> None:
    imported = psutil.Process().memory_info().data
    resource.setrlimit(resource.RLIMIT_DATA, (imported + _MEMORY, imported + _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _run(reader: Callable[..., Result], arguments: tuple[Any, ...]) -> Result | Refused:
    signal.setitimer(signal.ITIMER_VIRTUAL, _CPU_SECONDS)  # its signal ends the process
    try:
        return reader(*arguments)
    except MemoryError:
        os._exit(1)  # for what it holds may be lost
    except Exception as error:  # of any library, on hostile data
        return Refused(repr(error)[:300])
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
