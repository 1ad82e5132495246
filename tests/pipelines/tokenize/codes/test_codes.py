"""What a task finds in a store of codes, what it adds, and who wins where two add the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipelines.tokenize.codes.codes import Codes, Identity, OvertakenError
from pipelines.tokenize.codes.index import DATA, INDEX, CodesIndex, write_index
from pipelines.tokenize.codes.place import CodesPlace, Encoding, codes_place
from storage.store import Store
from tokenization.codecs.codes_file import object_id

CLIP: Identity = ("s3://b/clip.mp4", "1", "")
TOTAL = 8


@pytest.fixture
def place(local_ray: None, tmp_path: Path) -> Iterator[CodesPlace]:
    with codes_place(Store(str(tmp_path)), Encoding("weights", "fp32", 64, 4.0)) as made:
        yield made


def add(codes: Codes, identity: Identity, numbers: list[int], value: int, encoder: str = "cpu") -> None:
    """Frames whose codes are all of one value."""
    of_frames = np.full((len(numbers), 4), value, np.int32)
    codes.add(identity, TOTAL, np.array(numbers), np.array(numbers) / 4, of_frames, encoder)


def found(place: CodesPlace, identity: Identity, wanted: list[int]) -> list[int] | None:
    """The value of each frame."""
    codes = Codes(place).find(identity, lambda total: np.array(wanted))
    return None if codes is None else codes.codes[:, 0].tolist()


def committed(place: CodesPlace, identity: Identity, numbers: list[int], value: int, encoder: str = "cpu") -> None:
    codes = Codes(place)
    add(codes, identity, numbers, value, encoder)
    codes.commit()


def test_frames_are_found_by_their_numbers_in_one_version_of_one_medium(place: CodesPlace) -> None:
    committed(place, CLIP, [0, 2, 4, 6], 7)
    assert found(place, CLIP, [2, 6]) == [7, 7]
    assert found(place, CLIP, [2, 3]) is None
    assert found(place, CLIP, [6, 7]) is None
    url, _, _ = CLIP
    assert found(place, (url, "2", ""), [2]) is None
    assert found(place, (url, "1", "a.jpg@512"), [2]) is None


def test_frames_of_several_files_are_joined_and_those_of_another_encoder_never(place: CodesPlace) -> None:
    committed(place, CLIP, [0, 1], 1)
    committed(place, CLIP, [2, 3], 2)
    committed(place, CLIP, [4], 3, "gpu")
    assert found(place, CLIP, [1, 2]) == [1, 2]
    assert found(place, CLIP, [3, 4]) is None
    assert found(place, CLIP, [4]) == [3]


def test_of_two_that_encode_the_same_the_first_wins_and_the_other_is_told(place: CodesPlace) -> None:
    late = Codes(place)
    add(late, CLIP, [0, 1], 2, "gpu")
    committed(place, CLIP, [0, 1], 1)
    with pytest.raises(OvertakenError):
        late.commit()
    assert found(place, CLIP, [0, 1]) == [1, 1]
    assert len(place.store.names(DATA)) == 1


def test_a_damaged_file_keeps_no_place_from_a_whole_one(place: CodesPlace) -> None:
    committed(place, CLIP, [0, 1], 1)
    (name,) = place.store.names(DATA)
    path = Path(place.store.path(name))
    path.write_bytes(path.read_bytes()[:-20])
    assert found(place, CLIP, [0, 1]) is None
    committed(place, CLIP, [0, 1], 2)
    assert found(place, CLIP, [0, 1]) == [2, 2]


def test_what_is_not_committed_is_not_there(place: CodesPlace) -> None:
    add(Codes(place), CLIP, [0], 1)
    assert found(place, CLIP, [0]) is None
    assert place.store.names(DATA) == []


@pytest.mark.parametrize("damaged", [False, True])
def test_the_index_finds_what_its_files_and_the_footers_name(
    place: CodesPlace, damaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.tokenize.codes.index._UNINDEXED", 2)
    media: list[Identity] = [(f"s3://b/{number}.mp4", "1", "") for number in range(6)]
    for medium in media[:4]:
        committed(place, medium, [0], 1)
    write_index(place.store)
    (name,) = place.store.names(INDEX)
    if damaged:
        Path(place.store.path(name)).write_bytes(b"PAR1")
    committed(place, media[4], [0], 1)
    index = CodesIndex(place.store)
    index.load()
    sought = [object_id(url, etag) for url, etag, _ in media]
    files = index.find(sought)
    assert [len(one) for one in files] == [1, 1, 1, 1, 1, 0]
    assert sorted(one[0] for one in files[:5]) == place.store.names(DATA)


def test_objects_are_found_before_and_after_they_are_sorted_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.tokenize.codes.index._UNSORTED", 5)
    index = CodesIndex(Store(str(tmp_path)))
    objects = [object_id(f"s3://b/{number}.mp4", "1") for number in range(40)]
    for number, one in enumerate(objects):
        index.add(f"data/{number}", [one, objects[0]])
        assert index.find([one]) != [[]]
    assert index.find(objects[1:]) == [[f"data/{number}"] for number in range(1, 40)]
    assert index.find(objects[:1]) == [sorted(f"data/{number}" for number in range(40))]
