"""Pictures and films from files, bytes, images and arrays, and back to files that others read."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipelines.inference.media import Film, frames_of, last_frames, numbered
from storage.errors import UserError


def test_a_picture_is_the_same_frame_as_file_bytes_image_and_array(picture: str) -> None:
    (by_name,) = frames_of(picture, 16, 8, 4.0)
    assert by_name.shape == (16, 16, 3)
    image = Image.open(picture)
    for other in (Path(picture), Path(picture).read_bytes(), image, np.asarray(image)):
        np.testing.assert_array_equal(frames_of(other, 16, 8, 4.0), by_name[None])


@pytest.mark.parametrize("most", [1, 3, 16, 100])
def test_frames_of_a_film_are_spread_evenly_over_it(film: str, most: int) -> None:
    frames = frames_of(film, 16, most, 8.0)
    greys = frames.mean(axis=(1, 2, 3))
    assert len(frames) == min(most, 16)
    assert (np.diff(greys) > 0).all()
    if most == 16:
        np.testing.assert_allclose(greys, np.arange(16) * 16, atol=6)
    if most == 3:
        assert greys[0] < 60
        assert greys[-1] > 150


@pytest.mark.parametrize("most", [1, 3, 100])
def test_the_last_frames_of_a_film_are_those_at_its_end(film: str, most: int) -> None:
    every = frames_of(film, 16, 100, 8.0)
    for medium in (film, Path(film).read_bytes(), every):
        np.testing.assert_array_equal(last_frames(medium, 16, most, 8.0), every[-most:])


def test_frames_that_are_there_already_are_sampled_and_made_square() -> None:
    frames = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((10, 20, 30, 3), np.uint8)
    found = frames_of(frames, 8, 4, 4.0)
    assert found.shape == (4, 8, 8, 3)
    assert found[:, 0, 0, 0].tolist() == sorted(set(found[:, 0, 0, 0].tolist()))


@pytest.mark.parametrize(
    ("medium", "said"),
    [
        ("/nowhere/a.png", "/nowhere/a.png: no such file or object; name a picture or a film"),
        (b"no picture", "the medium: "),
        (np.zeros((4, 4, 3), np.float32), "frames float32 [1, 4, 4, 3]: give uint8 [n, H, W, 3]"),
        (np.zeros((0, 4, 4, 3), np.uint8), "frames uint8 [0, 4, 4, 3]: give uint8"),
    ],
)
def test_what_is_no_medium_is_a_users_mistake(medium: object, said: str) -> None:
    with pytest.raises(UserError) as error:
        frames_of(medium, 16, 8, 4.0)  # type: ignore[arg-type]
    assert str(error.value).startswith(said)


def test_a_film_is_written_as_film_moving_picture_and_strip(tmp_path: Path) -> None:
    frames = np.repeat(np.arange(0, 250, 50, dtype=np.uint8), 32 * 32 * 3).reshape(5, 32, 32, 3)
    film = Film(frames, 5.0)
    film.save(tmp_path / "film.mp4")
    with av.open(str(tmp_path / "film.mp4")) as file:
        back = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
        assert file.streams.video[0].average_rate == 5
    np.testing.assert_allclose(back.mean(axis=(1, 2, 3)), frames.mean(axis=(1, 2, 3)), atol=4)
    film.save(tmp_path / "film.gif")
    assert Image.open(tmp_path / "film.gif").n_frames == 5
    film.save(tmp_path / "film.png")
    strip = np.asarray(Image.open(io.BytesIO((tmp_path / "film.png").read_bytes())))
    np.testing.assert_array_equal(strip, np.concatenate(list(frames), axis=1))
    with pytest.raises(UserError, match=r"film\.avi: films are written as \.mp4"):
        film.save(tmp_path / "film.avi")
    with pytest.raises(UserError, match="cannot be written"):
        film.save(tmp_path / "nowhere" / "film.png")


def test_several_pictures_have_numbered_files() -> None:
    assert numbered("x/a.png", 1) == ["x/a.png"]
    assert numbered("x/a.png", 2) == ["x/a-1.png", "x/a-2.png"]
    for path, count in (("a.txt", 1), ("a", 2), ("a.png", 0)):
        with pytest.raises(UserError):
            numbered(path, count)
