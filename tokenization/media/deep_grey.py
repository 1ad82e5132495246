"""Grey pictures of more than 8 bits to 8 bits, as bright as they are, or refused: what is white is not always said.

In: an image of Pillow of mode I, F or I;16. Out: one of mode L.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, TiffImagePlugin

from storage.errors import BadData

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF 6.0
_UNSIGNED = 1
_OVERSHOOT = 0.1  # of white, by which a picture of floats that was resized may pass black and white


def is_deep_grey(image: Image.Image) -> bool:
    """Whether `to_8_bits` is for it."""
    return image.mode == "F" or image.mode.startswith("I")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Black to white in 256 steps: the high byte of integers.

    16-bit integers are of the whole range; floats are from 0 to 1. 32-bit and signed integers may be of 8 bits, 16 bits
    or all: of the fewest that hold them, if the brightest takes the highest of these. Raises BadData on any others.
    """
    values = np.asarray(image)
    if image.mode == "F":
        grey = _of_floats(values)
    else:
        unsigned = _tag(image, _SAMPLE_FORMAT, _UNSIGNED) == _UNSIGNED
        if values.dtype.itemsize == 4 and unsigned:
            values = values.view(np.uint32)  # Pillow has only a signed mode
        bits = _bits(image, values, unsigned)
        grey = (values >> (bits - 8) if bits > 8 else values).clip(0, 255).astype(np.uint8)
    if _tag(image, _PHOTOMETRIC, 1) == 0:  # white is zero, which Pillow minds only up to 8 bits
        grey = 255 - grey
    if isinstance(transparent := image.info.get("transparency"), int):
        grey = np.where(values == transparent, np.uint8(255), grey)
    return Image.fromarray(grey)


def _of_floats(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):  # nor is NaN
        raise BadData(f"an image of floats from {low:g} to {high:g}, where 0 to 1 is black to white")
    return np.rint(values.clip(0, 1) * 255).astype(np.uint8)


def _bits(image: Image.Image, values: np.ndarray, unsigned: bool) -> int:
    if image.format == "PPM":  # Pillow has scaled it
        return 16
    bits = _tag(image, _BITS, 16)
    if bits <= 16 and unsigned:
        return bits
    low, high = int(values.min()), int(values.max())
    enough = [n for n in (8, 16, bits if unsigned else bits - 1) if low >= 0 and high < 1 << n]
    if not enough or high < 1 << min(enough) - 1:
        raise BadData(f"an image of {bits}-bit integers from {low} to {high}, which do not say what is white")
    return min(enough)


def _tag(image: Image.Image, tag: int, default: int) -> int:
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return default
    value = image.tag_v2.get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)
