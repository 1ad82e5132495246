"""Grey pictures of more than 8 bits are as bright as they are, or refused with a sentence; never black."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage.errors import BadData
from tokenization.media.image import load_image

SLOPE = np.linspace(0, 1, 64)[:, None] * np.ones((1, 64))  # from black above to white below


def tiff(pixels: bytes, bits: tuple[int, ...], form: int = 1, photometric: int = 1, order: str = "<") -> io.BytesIO:
    """A TIFF 6.0 of 64x64 pixels in one strip. form: 1 unsigned, 2 signed, 3 floats."""
    tags = [(256, 4, 64), (257, 4, 64), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 0), (277, 3, len(bits)), (278, 4, 64), (279, 4, len(pixels)), (339, 3, (form,) * len(bits))]
    head = 8 + 2 + 12 * len(tags) + 4
    extra, entries = b"", b""
    for tag, kind, value in tags:
        values = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"{order}{len(values)}{'HI'[kind - 3]}", *values)
        if tag == 273:
            packed = struct.pack(f"{order}I", head + 2 * 2 * 8)
        if len(packed) > 4:
            packed, extra = struct.pack(f"{order}I", head + len(extra)), extra + packed
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    body = struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + extra.ljust(32, b"\0")
    return io.BytesIO(mark + struct.pack(f"{order}I", 8) + body + pixels)


def packed12(values: np.ndarray) -> bytes:
    pairs = values.astype(np.uint16).reshape(-1, 2)
    first, second = pairs[:, 0], pairs[:, 1]
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


def saved(array: np.ndarray, kind: str, **more: Any) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **more)
    return io.BytesIO(file.getvalue())


GREY: dict[str, Any] = {
    "float 0 to 1": lambda: tiff(SLOPE.astype("<f4").tobytes(), (32,), 3),
    "float 0 to 1, big endian": lambda: tiff(SLOPE.astype(">f4").tobytes(), (32,), 3, order=">"),
    "float that overshoots": lambda: tiff((SLOPE * 1.1 - 0.05).astype("<f4").tobytes(), (32,), 3),
    "float, white is 0": lambda: tiff((1 - SLOPE).astype("<f4").tobytes(), (32,), 3, 0),
    "PFM": lambda: io.BytesIO(b"Pf\n64 64\n-1.0\n" + SLOPE[::-1].astype("<f4").tobytes()),
    "16 bits": lambda: tiff((SLOPE * 65535).astype("<u2").tobytes(), (16,)),
    "16 bits, big endian": lambda: tiff((SLOPE * 65535).astype(">u2").tobytes(), (16,), order=">"),
    "16 bits, white is 0": lambda: tiff((65535 - SLOPE * 65535).astype("<u2").tobytes(), (16,), 1, 0),
    "12 bits": lambda: tiff(packed12(SLOPE * 4095), (12,)),
    "signed 16 bits": lambda: tiff((SLOPE * 32767).astype("<i2").tobytes(), (16,), 2),
    "signed 16 bits of 8": lambda: tiff((SLOPE * 255).astype("<i2").tobytes(), (16,), 2),
    "32 bits": lambda: tiff((SLOPE * (2**32 - 1)).astype("<u4").tobytes(), (32,)),
    "32 bits of 8": lambda: tiff((SLOPE * 255).astype("<u4").tobytes(), (32,)),
    "32 bits of 16": lambda: tiff((SLOPE * 65535).astype("<u4").tobytes(), (32,)),
    "signed 32 bits": lambda: tiff((SLOPE * (2**31 - 1)).astype("<i4").tobytes(), (32,), 2),
    "signed 32 bits, big endian": lambda: tiff((SLOPE * (2**31 - 1)).astype(">i4").tobytes(), (32,), 2, order=">"),
    "signed 32 bits of 8": lambda: saved((SLOPE * 255).astype(np.int32), "TIFF"),
    "PNG of 16 bits": lambda: saved((SLOPE * 65535).astype(np.uint16), "PNG"),
    "PGM of 16 bits": lambda: saved((SLOPE * 65535).astype(np.uint16), "PPM"),
    "PGM of 10 bits": lambda: io.BytesIO(b"P5 64 64 1023\n" + (SLOPE * 1023).astype(">u2").tobytes()),
    "1 bit, white is 0": lambda: tiff(np.packbits(SLOPE < 0.5, axis=1).tobytes(), (1,), 1, 0),
    "16 bits of three colours": lambda: tiff(
        np.repeat(SLOPE * 65535, 3, 1).astype("<u2").tobytes(), (16, 16, 16), 1, 2
    ),
}


@pytest.mark.parametrize("kind", GREY)
def test_a_deep_grey_is_as_bright_as_it_is(kind: str) -> None:
    found = load_image(GREY[kind](), 64).astype(int)
    expected = np.where(SLOPE < 0.5, 0, 255) if kind.startswith("1 bit") else SLOPE * 255
    assert np.abs(found - expected[..., None]).max() <= (16 if "overshoots" in kind else 2)


REFUSED: dict[str, tuple[Any, str]] = {
    "floats to 255": (lambda: tiff((SLOPE * 255).astype("<f4").tobytes(), (32,), 3), "floats from 0 to 255"),
    "floats below 0": (lambda: tiff((SLOPE - 2).astype("<f4").tobytes(), (32,), 3), "floats from -2 to -1"),
    "no numbers": (lambda: tiff((SLOPE * np.nan).astype("<f4").tobytes(), (32,), 3), "floats from nan to nan"),
    "signed and negative": (
        lambda: tiff((SLOPE - 1).astype("<i2").tobytes(), (16,), 2),
        "16-bit integers from -1 to 0",
    ),
    "32 bits of 12": (lambda: tiff((SLOPE * 4095).astype("<u4").tobytes(), (32,)), "32-bit integers from 0 to 4095"),
    "floats of three colours": (
        lambda: tiff(np.repeat(SLOPE, 3, 1).astype("<f4").tobytes(), (32,) * 3, 3, 2),
        "no known",
    ),
    "doubles": (lambda: tiff(SLOPE.astype("<f8").tobytes(), (64,), 3), "no known"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_values_that_do_not_say_what_is_white_are_refused_with_a_sentence(kind: str) -> None:
    made, reason = REFUSED[kind]
    with pytest.raises(BadData, match=f"not an image that can be read: .*{reason}"):
        load_image(made(), 64)


def test_a_transparent_grey_of_16_bits_is_white() -> None:
    values = np.where(SLOPE < 0.5, 1000, 40_000).astype(np.uint16)
    found = load_image(saved(values, "PNG", transparency=1000), 64)
    assert found[:30].min() == 255
    assert found[-30:].max() == 40_000 >> 8


def test_cielab_is_black_to_white() -> None:
    pixels = np.stack([SLOPE * 255, SLOPE * 0, SLOPE * 0], axis=-1).astype(np.uint8)
    found = load_image(tiff(pixels.tobytes(), (8, 8, 8), 1, 8), 64)
    assert found[0].max() < 5
    assert found[-1].min() > 250
