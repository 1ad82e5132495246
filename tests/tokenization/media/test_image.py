"""Images of every usual kind come out as one upright square; whatever is broken has a reason."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage.errors import BadData
from testing.made_media import corners, png_bomb, quadrants
from tokenization.media.image import load_image


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def two_halves(width: int = 40, height: int = 60) -> Image.Image:
    """Upper half white, lower half black."""
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[: height // 2] = 255
    return Image.fromarray(picture)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_usual_formats(kind: str) -> None:
    square = load_image(saved(two_halves(), kind), 32)
    assert (square.shape, square.dtype) == ((32, 32, 3), np.uint8)
    assert square[:12].min() > 240
    assert square[20:].max() < 15


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I"])
def test_usual_modes(mode: str) -> None:
    grey = np.asarray(two_halves().convert("L"))
    if mode.startswith("I"):
        deep = grey.astype(np.uint16) * 257
        image = Image.fromarray(deep if mode == "I;16" else deep.astype(np.int32))
    else:
        image = two_halves().convert(mode)
    square = load_image(saved(image, "TIFF"), 32)
    assert square[:12].min() > 250
    assert square[20:].max() < 5


def test_the_central_square_is_kept_whatever_the_size() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("lime", (100, 0, 200, 100))
    for kind in ("PNG", "JPEG"):  # JPEG is decoded at a fraction of its size
        square = load_image(saved(wide.resize((3000, 1000)), kind, quality=95) if kind == "JPEG" else saved(wide), 16)
        assert square[:, 1:-1, 1].min() > 220
        assert square[:, 1:-1, 0].max() < 30
    assert load_image(saved(Image.new("RGB", (1, 500), "white")), 16).min() == 255


def test_resizing_is_pillows_bicubic() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8))
    np.testing.assert_array_equal(
        load_image(saved(noise), 32), np.asarray(noise.resize((32, 32), Image.Resampling.BICUBIC))
    )


def test_a_turned_camera_is_set_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn the picture by 90 degrees clockwise
    square = load_image(saved(two_halves().transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif), 32)
    assert square[:12].min() > 240
    assert square[20:].max() < 15


def test_transparency_lies_on_white() -> None:
    assert load_image(saved(Image.new("RGBA", (20, 20), (0, 0, 0, 0))), 8).min() == 255
    half = load_image(saved(Image.new("LA", (20, 20), (0, 128))), 8)
    assert np.abs(half.astype(int) - 127).max() <= 1


def test_a_path_is_read_and_a_missing_one_is_not_bad_data(tmp_path: Path) -> None:
    two_halves().save(tmp_path / "picture.png")
    assert load_image(tmp_path / "picture.png", 8).shape == (8, 8, 3)
    assert load_image(str(tmp_path / "picture.png"), 8).shape == (8, 8, 3)
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "absent.png", 8)


def test_a_small_file_of_too_many_pixels_is_bad_data() -> None:
    assert load_image(png_bomb(800), 8).shape == (8, 8, 3)
    for side in (10_000, 40_000):  # over Pillow's limit, and over twice the limit
        with pytest.raises(BadData, match="pixels"):
            load_image(png_bomb(side), 8)


def test_what_is_no_image_is_bad_data() -> None:
    whole = saved(two_halves(400, 400), "JPEG").getvalue()
    for content in (b"", b"text", np.random.default_rng(0).bytes(5000), whole[: len(whole) // 2], whole[50:]):
        with pytest.raises(BadData, match="not an image"):
            load_image(io.BytesIO(content), 8)


def test_formats_that_are_programs_are_not_run() -> None:
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(program)).format == "EPS"
    with pytest.raises(BadData):
        load_image(io.BytesIO(program), 8)


def test_damage_raises_nothing_else() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        content = saved(two_halves(), kind).getvalue()
        for seed in range(30):
            generator = np.random.default_rng(seed)
            piece = bytearray(content)
            for place in generator.integers(0, len(piece), 8):
                piece[place] = int(generator.integers(256))
            try:
                square = load_image(io.BytesIO(bytes(piece)), 8)
            except BadData:
                continue
            assert square.shape == (8, 8, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_each_of_the_eight_orientations_stands_upright(kind: str, orientation: int) -> None:
    upright = Image.fromarray(quadrants(64, 96))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # Image.Transpose
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    assert corners(load_image(saved(stored, kind, exif=exif, quality=95), 32)) == ["red", "green", "blue", "white"]


def with_chunk(name: bytes, body: bytes, whole: bytes) -> bytes:
    """A PNG with one more chunk, before its pixels."""
    place = whole.index(b"IDAT") - 4
    chunk = len(body).to_bytes(4) + name + body + zlib.crc32(name + body).to_bytes(4)
    return whole[:place] + chunk + whole[place:]


LONG = zlib.compress(bytes(2 << 20))
UNNEEDED = {
    "a long compressed text": (b"zTXt", b"notes\0\0" + LONG),
    "a long international text": (b"iTXt", b"notes\0\1\0\0\0" + LONG),
    "a long profile": (b"iCCP", b"profile\0\0" + LONG),
    "a broken text": (b"zTXt", b"notes\0\7" + b"nonsense"),
    "a broken camera's note": (b"eXIf", b"nonsense" * 9),
}


@pytest.mark.parametrize("kind", UNNEEDED)
def test_what_is_not_the_picture_does_not_cost_it(kind: str) -> None:
    whole = saved(Image.fromarray(quadrants(64, 64))).getvalue()
    large = with_chunk(*UNNEEDED[kind], whole)
    np.testing.assert_array_equal(load_image(io.BytesIO(large), 32), load_image(io.BytesIO(whole), 32))
    with pytest.raises(BadData, match="not an image"):
        load_image(io.BytesIO(large[:-60]), 32)


def test_texts_of_any_number_and_an_orientation_among_them() -> None:
    whole = saved(two_halves().transpose(Image.Transpose.ROTATE_90)).getvalue()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    noted = with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp, whole)
    for _ in range(70):  # 70 MiB
        noted = with_chunk(b"zTXt", b"notes\0\0" + zlib.compress(bytes(1 << 20)), noted)
    square = load_image(io.BytesIO(noted), 32)
    assert square[:12].min() > 240
    assert square[20:].max() < 15


@pytest.mark.parametrize("note", [b"nonsense", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b""])
def test_a_cameras_note_that_is_damaged_costs_nothing(note: bytes) -> None:
    for kind in ("JPEG", "WEBP"):
        found = load_image(saved(two_halves(), kind, exif=b"Exif\0\0" + note), 32)
        assert np.abs(found.astype(int) - load_image(saved(two_halves(), kind), 32)).max() == 0


def test_a_jpeg_may_be_followed_by_anything_and_be_the_first_of_several_but_not_be_cut() -> None:
    lion = saved(Image.fromarray(quadrants(64, 64)), "JPEG", quality=95).getvalue()
    expected = load_image(io.BytesIO(lion), 32)
    several = saved(Image.fromarray(quadrants(64, 64)), "MPO", quality=95, save_all=True, append_images=[two_halves()])
    assert several.getvalue().count(b"\xff\xd8\xff") == 2
    for content in (lion + b"anything" * 999, several.read()):
        np.testing.assert_array_equal(load_image(io.BytesIO(content), 32), expected)
    for kept in (len(lion) - 40, len(lion) // 2):
        with pytest.raises(BadData, match="not an image"):
            load_image(io.BytesIO(lion[:kept]), 32)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_picture_is_taken(kind: str) -> None:
    pictures = [Image.fromarray(quadrants(64, 64)), two_halves(64, 64)]
    film = saved(pictures[0], kind, save_all=True, append_images=pictures[1:], duration=100)
    assert corners(load_image(film, 32)) == ["red", "green", "blue", "white"]
