"""A small file of every format that a source may have, made from code, the same bytes in every run.

Out: `FORMATS`, by the name of the file.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from testing.made_media import encoded
from testing.made_tars import tar

SIDE = 32  # pixels of every picture, so that none has to be resized
RATE = 25

Family = Literal["text", "film", "picture", "tar", "pictures"]


@dataclass(frozen=True)
class Format:
    """make: a file of it. family: what is in it: text; a film; a picture; samples; records with pictures in them.

    source: what a recipe says of such files. fps: at which a film is sampled.
    """

    make: Callable[[], bytes]
    family: Family
    source: dict[str, Any] = field(default_factory=dict)
    fps: float = RATE


TITLES = [f"The {number}th act" for number in range(40)]
TEXTS = [f'She "{number**5}", and\n{number**7:x}, \u00e9t\u00e9' * (1 + number % 4) for number in range(40)]


def _plain() -> bytes:
    return "\n\n".join(TEXTS).encode()


def _json_lines() -> bytes:
    rows = [{"title": title, "text": text, "more": [1, {"a": None}]} for title, text in zip(TITLES, TEXTS)]
    return b"".join(json.dumps(row, ensure_ascii=len(row["text"]) % 2 == 0).encode() + b"\n" for row in rows)


def _csv(delimiter: str) -> bytes:
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    rows = [("title", "text", "number"), *zip(TITLES, quoted, map(str, range(40)))]
    return "".join(delimiter.join(row) + "\r\n" for row in rows).encode()


_TABLES: dict[str, Callable[[], bytes]] = {
    ".txt": _plain,
    ".md": _plain,
    ".jsonl": _json_lines,
    ".csv": partial(_csv, ","),
    ".tsv": partial(_csv, "\t"),
}


def _packed(make: Callable[[], bytes], codec: str) -> bytes:
    """Two frames, of which the first does not say how long it is."""
    whole = make()
    first, second = whole[: len(whole) // 2], whole[len(whole) // 2 :]
    if codec == ".gz":
        return gzip.compress(first, mtime=0) + gzip.compress(second, mtime=0)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(first)
    return sink.getvalue().to_pybytes() + pa.Codec("zstd").compress(second, asbytes=True)


def _parquet(**options: Any) -> bytes:
    more = [[{"a": number, "b": ["x"] * (number % 3)}] * (number % 4) for number in range(40)]
    kinds = pa.array([("play", None, "novel")[number % 3] for number in range(40)]).dictionary_encode()
    columns = {"title": TITLES, "text": TEXTS, "number": list(range(40)), "more": more, "kind": kinds}
    return _written(pa.table(columns), row_group_size=15, **options)


def _parquet_of_pictures(**options: Any) -> bytes:
    pictures = [{"bytes": _picture("JPEG", shift=7 * number), "path": f"{number}.jpg"} for number in range(6)]
    return _written(pa.table({"image": pictures, "text": TEXTS[:6]}), row_group_size=4, **options)


def _written(table: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def _tar(kind: int) -> bytes:
    members = []
    for number in range(4):
        folder = ("a/" * 60 if number == 2 else "") + ("\u00e9t\u00e9" if number == 3 else "")
        contents = {"jpg": _picture("JPEG", shift=9 * number), "txt": TITLES[number].encode()}
        contents["json"] = json.dumps({"question": TEXTS[number]}).encode()
        members += [(f"{folder}{number:03}.{extension}", content) for extension, content in contents.items()]
    return tar(members, kind)


def _pixels(shift: int = 0) -> np.ndarray:
    """A picture of slopes and a weave, of which each shift makes another."""
    y, x = np.mgrid[:SIDE, :SIDE]
    weave = x * y % 13 * 3
    return np.stack([7 * y + weave, (5 * shift + 7 * x) % 256, 3 * (x + y) + weave], axis=2).astype(np.uint8)


def _picture(kind: str, mode: str = "RGB", shift: int = 0, **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(_pixels(shift))
    if mode == "RGBA":
        image.putalpha(Image.fromarray(_pixels(shift)[:, :, 1]))
    elif mode == "P":
        image = image.quantize(64)
    else:
        image = image.convert(mode)
    image.save(file, kind, **options)
    return file.getvalue()


def _film(container: str, codec: str, pixels: str = "yuv420p", **more: Any) -> bytes:
    more["muxing"] = {"fflags": "+bitexact", **more.get("muxing", {})}  # Matroska has a random number otherwise
    more["options"] = {"threads": "1", "flags": "+bitexact", **more.get("options", {})}
    more |= {"codec": codec, "container": container, "pixels": pixels}
    return encoded(map(_pixels, range(12)), rate=RATE, time_base=Fraction(1, RATE), **more)


_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
_FAST = {"preset": "ultrafast", "g": "6"}
_WITH_B_FRAMES = {"preset": "veryfast", "bf": "2", "g": "12"}
_TEXT = {"fields": ["title,text"]}
_OF_TABLES = {".jsonl": _TEXT, ".csv": _TEXT, ".tsv": _TEXT}
_OF_PICTURES = {"media": "image", "fields": ["[vision],text"]}
_OF_TARS = {"fields": ["[caption],[question],vision"]}
_VP9 = {"deadline": "realtime", "cpu-used": "8"}

FORMATS: dict[str, Format] = {
    **{f"a{end}": Format(make, "text", _OF_TABLES.get(end, {})) for end, make in _TABLES.items()},
    **{
        f"a{end}{codec}": Format(partial(_packed, make, codec), "text", _OF_TABLES.get(end, {}))
        for codec in (".gz", ".zst")
        for end, make in _TABLES.items()
    },
    **{
        f"{codec}.parquet": Format(partial(_parquet, compression=codec), "text", _TEXT)
        for codec in ("none", "snappy", "zstd", "gzip", "brotli", "lz4")
    },
    "plain.parquet": Format(
        partial(_parquet, use_dictionary=False, data_page_version="2.0", compression="none"), "text", _TEXT
    ),
    "delta.parquet": Format(
        partial(_parquet, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}), "text", _TEXT
    ),
    "nested.parquet": Format(partial(_parquet, compression="none"), "text", {"fields": ["more,kind,text"]}),
    "pictures.parquet": Format(partial(_parquet_of_pictures, compression="none"), "pictures", _OF_PICTURES),
    "pictures-zstd.parquet": Format(partial(_parquet_of_pictures, compression="zstd"), "pictures", _OF_PICTURES),
    "ustar.tar": Format(partial(_tar, tarfile.USTAR_FORMAT), "tar", _OF_TARS),
    "pax.tar": Format(partial(_tar, tarfile.PAX_FORMAT), "tar", _OF_TARS),
    "gnu.tar": Format(partial(_tar, tarfile.GNU_FORMAT), "tar", _OF_TARS),
    "h264.mp4": Format(partial(_film, "mp4", "libx264", options=_FAST), "film"),
    "h264-thinned.mp4": Format(partial(_film, "mp4", "libx264", options=_WITH_B_FRAMES), "film", fps=6),
    "h264-fragments.mp4": Format(partial(_film, "mp4", "libx264", options=_FAST, muxing=_FRAGMENTS), "film"),
    "mpeg4.m4v": Format(partial(_film, "mp4", "mpeg4"), "film"),
    "mjpeg.mov": Format(partial(_film, "mov", "mjpeg", "yuvj420p"), "film"),
    "h264.mkv": Format(partial(_film, "matroska", "libx264", options=_FAST), "film"),
    "vp9.webm": Format(partial(_film, "webm", "libvpx-vp9", options=_VP9), "film"),
    "vp8.webm": Format(partial(_film, "webm", "libvpx", options=_VP9), "film"),
    "mpeg4.avi": Format(partial(_film, "avi", "mpeg4"), "film"),
    "mjpeg.avi": Format(partial(_film, "avi", "mjpeg", "yuvj420p"), "film"),
    "mpeg1.mpg": Format(partial(_film, "mpeg", "mpeg1video"), "film"),
    "mpeg2.mpg": Format(partial(_film, "vob", "mpeg2video"), "film"),
    "h264.ts": Format(partial(_film, "mpegts", "libx264", options=_FAST), "film"),
    "mpeg2.ts": Format(partial(_film, "mpegts", "mpeg2video"), "film"),
    "a.gif": Format(partial(_film, "gif", "gif", "rgb8"), "film"),
    "baseline.jpg": Format(partial(_picture, "JPEG"), "picture"),
    "progressive.jpeg": Format(partial(_picture, "JPEG", progressive=True), "picture"),
    "rgb.png": Format(partial(_picture, "PNG"), "picture"),
    "rgba.png": Format(partial(_picture, "PNG", "RGBA"), "picture"),
    "palette.png": Format(partial(_picture, "PNG", "P", transparency=3), "picture"),
    "lossy.webp": Format(partial(_picture, "WEBP"), "picture"),
    "lossless.webp": Format(partial(_picture, "WEBP", "RGBA", lossless=True), "picture"),
    "rgb.bmp": Format(partial(_picture, "BMP"), "picture"),
    "palette.bmp": Format(partial(_picture, "BMP", "P"), "picture"),
    "plain.tif": Format(partial(_picture, "TIFF"), "picture"),
    "packed.tiff": Format(partial(_picture, "TIFF", "L", compression="tiff_lzw"), "picture"),
}


@cache
def file_of(name: str) -> bytes:
    """The bytes of the format's file."""
    return FORMATS[name].make()


def neighbour(name: str) -> bytes:
    """A file of the next format of the same family, for what takes parts of another file."""
    family = [other for other, one in FORMATS.items() if one.family == FORMATS[name].family]
    return file_of(family[(family.index(name) + 1) % len(family)])
