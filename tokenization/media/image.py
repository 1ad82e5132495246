"""An image file to one square frame, in the same geometry as a video's frames.

In: a path or a binary file. Out: uint8 [size, size, 3] RGB.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from storage.errors import BadData

# Formats of pixels only. Pillow also reads PostScript, which it passes to an interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_MAX_BYTES = 1 << 28  # of the file, which is in memory; Pillow's limit of 89 million pixels, uncompressed


def load_image(file: BinaryIO | str | Path, size: int) -> np.ndarray:
    """The central square of an image, resized to uint8 [size, size, 3] RGB.

    The camera's orientation is applied, transparency becomes white, 16-bit greys keep their high byte, and the first
    picture of an animation is taken. Raises BadData on a file that is no image, damaged, cut off, larger than 256 MiB,
    or of more pixels than Pillow's limit (89 million). Errors of reading the file pass through.
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
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                side = min(image.size)
                # JPEG can be decoded at a fraction of its size in less time, and a thumbnail needs no more.
                image.draft("RGB", (2 * size * image.width // side, 2 * size * image.height // side))
                square = ImageOps.fit(_opaque(ImageOps.exif_transpose(image)), (size, size), Image.Resampling.BICUBIC)
    except UnidentifiedImageError as error:  # its message has an address in memory
        raise BadData("not an image that can be read: of no known format") from error
    except Exception as error:  # a hostile or damaged image can raise any exception
        raise BadData(f"not an image that can be read: {error}") from error
    return np.asarray(square)


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
