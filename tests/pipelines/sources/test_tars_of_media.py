"""The samples of tars are media, shared out over the splits."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.sources.listing import read_objects, write_objects
from pipelines.sources.media import Medium, media_of, object_frames
from storage.errors import BadData, UserError
from storage.store import Store
from testing.made_tars import write_tar
from tests.pipelines.sources.media_listings import IMAGES, VIDEO, listing, media
from tokenization.media.frame_sampling import FrameRequest


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    members = {"held/0.jpg": IMAGES[0].read_bytes(), "1.jpg": IMAGES[1].read_bytes(), "1.txt": b"a lion", "2.txt": b"?"}
    return write_tar(tmp_path / "tars/a.tar", members)


def test_a_tars_samples_are_media_with_their_side_data(archive: Path) -> None:
    (found,) = listing(archive.parent, urls=["*.tar"])
    assert (found.kind, found.key, found.heldout) == ("webdataset", "a/a.tar", False)
    assert media([found]) == [
        (False, "a/a.tar/held/0", {}),
        (False, "a/a.tar/1", {"caption": "a lion"}),
        (False, "a/a.tar/2", "no video or image in it, only .txt"),
    ]


def test_a_glob_over_keys_holds_samples_out_and_each_sample_is_in_one_split(archive: Path, tmp_path: Path) -> None:
    found = listing(archive.parent, urls=["*.tar"], heldout=["*/held/*"])
    assert [(one.key, one.heldout) for one in found] == [("a/a.tar", False), ("a/a.tar", True)]
    assert [one[:2] for one in media(found)] == [
        (False, "a/a.tar/1"),
        (False, "a/a.tar/2"),
        (True, "a/a.tar/held/0"),
    ]
    store = Store(str(tmp_path / "stage"))
    write_objects(store, found)
    assert read_objects(store) == found


def test_each_medium_has_an_identity_of_its_own_that_changes_with_the_tar(archive: Path) -> None:
    def identities() -> list[tuple[str, str, str] | None]:
        (found,) = listing(archive.parent, urls=["*.tar"])
        made = [one.identity for one in media_of(found, {}) if isinstance(one, Medium)]
        assert all(identity and identity[:2] == (found.url, found.etag) for identity in made)
        return made

    first = identities()
    assert len(set(first)) == len(first) > 1
    assert identities() == first
    archive.write_bytes(archive.read_bytes() + bytes(10240))
    assert not set(identities()) & set(first)


def test_a_glob_over_tars_holds_them_out_whole(archive: Path) -> None:
    write_tar(archive.with_name("b.tar"), {"x.jpg": b"?"})
    found = listing(archive.parent, urls=["*.tar"], heldout=["*/b.tar"])
    assert [(one.key, one.heldout) for one in found] == [("a/a.tar", False), ("a/b.tar", True)]
    assert [one[:2] for one in media(found)] == [
        (False, "a/a.tar/held/0"),
        (False, "a/a.tar/1"),
        (False, "a/a.tar/2"),
        (True, "a/b.tar/x"),
    ]


def test_damage_of_a_tar_is_told_in_one_split_only(archive: Path) -> None:
    content = archive.read_bytes()
    archive.write_bytes(content[: content.index(b"2.txt") + 512])
    found = listing(archive.parent, urls=["*.tar"], heldout=["*/held/*"])
    told = [(split, key) for split, key, said in media(found) if isinstance(said, str)]
    assert told == [(False, "a/a.tar")]


def test_a_tail_of_what_is_inside_cannot_be_held_out(archive: Path) -> None:
    with pytest.raises(UserError, match=r"sources\.a\.heldout_tail: the tails of videos in .*a\.tar cannot be"):
        listing(archive.parent, urls=["*.tar"], heldout_tail=0.2)


def test_the_frames_of_a_tar_are_those_of_many_of_its_media(tmp_path: Path) -> None:
    clip = VIDEO.read_bytes()
    write_tar(tmp_path / "a.tar", {"bad.jpg": b"?", **{f"{number}.mp4": clip for number in range(4)}})
    (found,) = listing(tmp_path, urls=["*.tar"])

    def count(most: int | None) -> list[int]:
        request = FrameRequest(fps=4, size=16, chunk=64, max_frames=most)
        return [len(chunk) for chunk in object_frames(found, {}, request)]

    assert count(None) == [17, 17, 17, 17]
    assert count(3) == [1, 1, 1]
    assert count(128) == [2, 2, 2, 2]
    write_tar(tmp_path / "a.tar", {"bad.jpg": b"?"})
    (found,) = listing(tmp_path, urls=["*.tar"])
    with pytest.raises(BadData, match="no video or image in it can be decoded"):
        count(3)
