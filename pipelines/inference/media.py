"""Pictures and films that a user gives or gets: frames of a codec's size from files and arrays, and back to files.

In: a path, a URL, bytes, a PIL image or frames. Out: frames uint8 [n, H, W, 3], evenly spaced over the medium, or a
`Film`. Files are decoded by the same bounded process as the media of a source.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.decoder.client import decoded_frames
from pipelines.decoder.content import Content
from storage.errors import BadData, UserError
from storage.public_url import public_url
from tokenization.media.frame_sampling import FrameRequest, uniform_sample
from tokenization.media.image import load_image
from tokenization.media.kinds import MediaKind, kind_by_name

Medium = str | Path | bytes | Image.Image | np.ndarray
"""A file's path or URL or content, a PIL image, or frames uint8 [H, W, 3] or [n, H, W, 3]."""

_CHUNK = 64
_FILM_ENDINGS = (".mp4", ".gif", ".png", ".webp")


def frames_of(medium: Medium, size: int, most: int, fps: float, kind: MediaKind | None = None) -> np.ndarray:
    """At most so many frames uint8 [n, size, size, 3] of a medium, evenly spaced over it.

    fps: at which a video is sampled before. kind: None where the name or the content says it. Raises UserError on what
    cannot be read or is neither picture nor film.
    """
    if isinstance(medium, Image.Image):
        medium = np.asarray(medium.convert("RGB"))
    if isinstance(medium, np.ndarray):
        return _fitted(medium, size, most)
    request = FrameRequest(fps=fps, size=size, chunk=min(_CHUNK, most), max_frames=most)
    return np.concatenate(list(_decoded(medium, request, kind)))


def last_frames(medium: Medium, size: int, most: int, fps: float) -> np.ndarray:
    """The last frames uint8 [n, size, size, 3] of a medium, at most so many, of which alone are held. Otherwise as
    `frames_of`.
    """
    if isinstance(medium, Image.Image):
        medium = np.asarray(medium.convert("RGB"))
    if isinstance(medium, np.ndarray):
        return _fitted(_in_a_row(medium)[-most:], size, most)
    held = np.empty((0, size, size, 3), np.uint8)
    for frames in _decoded(medium, FrameRequest(fps=fps, size=size, chunk=_CHUNK), None):
        held = np.concatenate((held, frames))[-most:]
    return held


def _decoded(medium: str | Path | bytes, request: FrameRequest, kind: MediaKind | None) -> Iterator[np.ndarray]:
    """Frames of a file, a chunk at a time, one at least."""
    if isinstance(medium, bytes):
        name, content = "the medium", Content(file=io.BytesIO(medium))
    else:
        name, content = str(medium), Content(str(medium))
        kind = kind or kind_by_name(name)
    is_empty = True
    try:
        for chunk in decoded_frames(content, kind, request):
            is_empty = False
            yield chunk.frames
    except (BadData, OSError) as error:
        why = "no such file or object" if isinstance(error, FileNotFoundError) else error
        raise UserError(f"{public_url(name)}: {why}; name a picture or a film") from error
    if is_empty:
        raise UserError(f"{public_url(name)}: it has no frame; name a picture or a film")


def _in_a_row(frames: np.ndarray) -> np.ndarray:
    return frames[None] if frames.ndim == 3 else frames


def _fitted(frames: np.ndarray, size: int, most: int) -> np.ndarray:
    """Frames that are there already, made square as a picture in a file is."""
    frames = _in_a_row(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise UserError(f"frames {frames.dtype} {list(frames.shape)}: give uint8 [n, H, W, 3]")
    if frames.shape[1:3] == (size, size):
        return frames[uniform_sample(len(frames), most)]
    fitted = []
    for place in uniform_sample(len(frames), most):
        file = io.BytesIO()
        Image.fromarray(frames[place]).save(file, "PNG")
        file.seek(0)
        fitted.append(load_image(file, size))
    return np.stack(fitted)


@dataclass(frozen=True)
class Film:
    """Frames uint8 [n, H, W, 3] and how many of them a second takes."""

    frames: np.ndarray
    fps: float

    @property
    def images(self) -> list[Image.Image]:
        """Its frames."""
        return [Image.fromarray(frame) for frame in self.frames]

    def save(self, path: str | Path) -> None:
        """Write .mp4 (H.264), .gif, .png or .webp, of which a picture holds the frames side by side.

        Raises UserError on another ending.
        """
        name, ending = str(path), check_film(path)
        with _as_user_error(name):
            if ending == ".mp4":
                self._write_mp4(name)
            elif ending == ".gif":
                first, *rest = self.images
                first.save(name, save_all=True, append_images=rest, duration=round(1000 / self.fps), loop=0)
            else:
                Image.fromarray(np.concatenate(list(self.frames), axis=1)).save(name)

    def _write_mp4(self, name: str) -> None:
        import av

        with av.open(name, "w") as file:
            stream: Any = file.add_stream("libx264", rate=Fraction(self.fps).limit_denominator(1000))
            stream.height, stream.width = self.frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            for frame in self.frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode())


def check_film(path: str | Path) -> str:
    """The ending of a file for a film, in small letters. Raises UserError on one that is not written."""
    ending = Path(path).suffix.lower()
    if ending not in _FILM_ENDINGS:
        raise UserError(f"{path}: films are written as {', '.join(_FILM_ENDINGS)}; name a file that ends so")
    return ending


def write_image(image: Image.Image, path: str) -> None:
    """Write a picture as its file's ending says. Raises UserError where it cannot be."""
    with _as_user_error(path):
        image.save(path)


def numbered(path: str, count: int) -> list[str]:
    """Names of so many files: one as it is, of several `NAME-1.png`, .. Raises UserError where it is no picture's."""
    stem, ending = Path(path).stem, Path(path).suffix
    if kind_by_name(path) != "image":
        raise UserError(f"{path}: pictures are written as .png, .jpg or .webp; name a file that ends so")
    if count < 1:
        raise UserError(f"-n {count}: ask for one picture at least")
    names = [f"{stem}-{number}{ending}" for number in range(1, count + 1)] if count > 1 else [stem + ending]
    return [str(Path(path).with_name(name)) for name in names]


@contextlib.contextmanager
def _as_user_error(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be written ({error}); name another file") from error


def as_list(media: Medium | Sequence[Medium] | None) -> list[Medium]:
    """One medium or several as a list."""
    if media is None:
        return []
    return list(media) if isinstance(media, list | tuple) else [media]  # type: ignore[list-item]
