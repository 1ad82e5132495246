"""An image file to one square frame, in the same geometry as a video's frames.

In: a path or a binary file. Out: uint8 [size, size, 3] RGB.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from storage.errors import BadData
from tokenization.media.deep_grey import is_deep_grey, to_8_bits

# Formats of pixels only. Pillow also reads PostScript, which it passes to an interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_MAX_BYTES = 1 << 28  # of the file, which is in memory; Pillow's limit of 89 million pixels, uncompressed
_TURNS = Image.Transpose
_EXIF_TURNS: dict[object, Image.Transpose] = {
    2: _TURNS.FLIP_LEFT_RIGHT,
    3: _TURNS.ROTATE_180,
    4: _TURNS.FLIP_TOP_BOTTOM,
    5: _TURNS.TRANSPOSE,
    6: _TURNS.ROTATE_270,
    7: _TURNS.TRANSVERSE,
    8: _TURNS.ROTATE_90,
}
_PNG = b"\x89PNG\r\n\x1a\n"
_UNNEEDED = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}
_NOTES = (b"XML:com.adobe.xmp\0",)
_SHORT = 1 << 16  # bytes of XMP


def load_image(file: BinaryIO | str | Path, size: int) -> np.ndarray:
    """The central square of an image, resized to uint8 [size, size, 3] RGB.

    The camera's orientation is applied, transparency becomes white, deep greys become 8 bits (`deep_grey`), the first
    picture of an animation is taken. Texts, and a camera's note that is damaged, cost no picture. Raises BadData on a
    file that is no image, damaged, cut off, larger than 256 MiB, or of more pixels than Pillow's limit (89 million).
    Errors of reading the file pass through.
    """
    if isinstance(file, (str, Path)):
        with open(file, "rb") as opened:
            return load_image(opened, size)
    data = bytearray()
    while len(data) <= _MAX_BYTES and (piece := file.read(1 << 20)):
        data += piece
    if len(data) > _MAX_BYTES:
        raise BadData(f"not an image that can be read: larger than {_MAX_BYTES} bytes")
    try:
        return _square(data, size)
    except UnidentifiedImageError as error:  # its message has an address in memory
        raise BadData("not an image that can be read: of no known format") from error
    except Exception as error:  # a hostile or damaged image can raise any exception
        raise BadData(f"not an image that can be read: {error}") from error


def _square(data: bytearray, size: int) -> np.ndarray:
    try:
        return _decoded(data, size)
    except Exception:
        # Pillow refuses a PNG for a text or a colour profile that is damaged, or large when unpacked.
        if (lean := _without_texts(data)) is None:
            raise
    return _decoded(lean, size)


def _decoded(data: bytes | bytearray, size: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            side = min(image.size)
            # JPEG can be decoded at a fraction of its size in less time, and a thumbnail needs no more.
            image.draft("RGB", (2 * size * image.width // side, 2 * size * image.height // side))
            image.load()  # which turns a TIFF upright, and says so in its EXIF
            upright = _EXIF_TURNS.get(_orientation(image))
            picture = _opaque(image)
            picture = picture if upright is None else picture.transpose(upright)
            return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC))


def _orientation(image: Image.Image) -> object:
    """As a camera noted it; none where its note is damaged, which costs no picture."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of a parser of hostile data, too
        return None


def _opaque(image: Image.Image) -> Image.Image:
    if is_deep_grey(image):
        return to_8_bits(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _without_texts(data: bytes | bytearray) -> bytes | None:
    """A PNG without texts and colour profile, except a short text with an orientation. None if it has none to lose."""
    if data[: len(_PNG)] != _PNG:
        return None
    kept, place = bytearray(_PNG), len(_PNG)
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4])
        name, body = bytes(data[place + 4 : place + 8]), data[place + 8 : end - 4]
        if name not in _UNNEEDED or (body.startswith(_NOTES) and len(body) < _SHORT and b"rientation" in body):
            kept += data[place:end]
        place = end
    return None if len(kept) == len(data) else bytes(kept)
