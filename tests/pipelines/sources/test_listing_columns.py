"""A listing is a sequence of objects that lies in columns: what goes in comes out, in memory, in a file and pickled."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.sources.listing import Listing, SourceObject, listing_digest, read_objects, write_objects
from storage.store import Store

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
NAMES = st.lists(TEXT, max_size=2).map(tuple)
OBJECTS = st.builds(
    SourceObject,
    key=TEXT,
    source=st.sampled_from(["a", "b"]),
    url=TEXT,
    size=st.integers(0, 2**50),
    etag=TEXT,
    kind=st.sampled_from(["video", "text", "records"]),
    heldout=st.booleans(),
    side=st.dictionaries(TEXT, st.one_of(TEXT, st.integers(), st.none()), max_size=2),
    part=st.sampled_from([(0.0, 1.0), (0.0, 0.7), (0.7, 1.0)]),
    media=st.none() | TEXT.filter(bool),
    inner_heldout=NAMES,
    media_from=NAMES,
    opens=st.none() | TEXT.filter(bool),
    heldout_by=NAMES,
)
ONE = SourceObject("a/x.tar", "a", "/d/x.tar", 7, "e", "webdataset", False, {"caption": "c"})


def rows(objects: Any) -> list[dict[str, Any]]:
    """All fields, also those that do not count when two objects are compared."""
    return [dataclasses.asdict(one) for one in objects]


@settings(max_examples=25)
@given(st.lists(OBJECTS, max_size=6), st.integers(-7, 7), st.integers(-7, 7), st.sampled_from([1, 2, -1]))
def test_a_listing_is_the_sequence_that_it_was_made_of(
    objects: list[SourceObject], start: int, stop: int, step: int
) -> None:
    listing = Listing.of(objects)
    assert (len(listing), rows(listing)) == (len(objects), rows(objects))
    assert rows(listing[start:stop:step]) == rows(objects[start:stop:step])
    assert rows(pickle.loads(pickle.dumps(listing[start:stop]))) == rows(objects[start:stop])
    assert rows(listing[number] for number in range(-len(objects), len(objects))) == rows(objects + objects)
    with pytest.raises(IndexError):
        listing[len(objects)]


@settings(max_examples=25)
@given(st.lists(OBJECTS, max_size=6))
def test_a_source_or_a_split_of_a_listing_is_its_objects(objects: list[SourceObject]) -> None:
    listing = Listing.of(objects)
    assert rows(listing.of_source("a")) == rows(one for one in objects if one.source == "a")
    assert rows(listing.of_split(True, {"video", "text"})) == rows(
        one for one in objects if one.heldout and one.kind != "records"
    )
    assert listing.identities.shape == (len(objects), 16)


def test_the_file_holds_all_but_what_is_in_memory_only_and_equal_listings_have_equal_bytes(tmp_path: Path) -> None:
    other = dataclasses.replace(ONE, key="b/y.mp4", source="b", kind="video", opens="s3://hush@b/y", heldout_by=("y",))
    store = Store(str(tmp_path))
    write_objects(store, [ONE, other])
    first = store.read_bytes("objects.parquet")
    again = read_objects(store)
    assert rows(again) == rows([ONE, dataclasses.replace(other, opens=None, heldout_by=())])
    write_objects(store, Listing.of([other, ONE, other])[1:])
    assert store.read_bytes("objects.parquet") == first


def test_a_pickled_slice_holds_its_own_rows_alone() -> None:
    many = Listing.of(dataclasses.replace(ONE, key=f"a/{number}") for number in range(5000))
    assert len(pickle.dumps(many[10:12])) < len(pickle.dumps(many)) / 20


@pytest.mark.parametrize(
    ("changed", "counts"),
    [
        ({"key": "a/y.tar"}, True),
        ({"url": "/d/y.tar"}, True),
        ({"size": 8}, True),
        ({"etag": "f"}, True),
        ({"kind": "video"}, True),
        ({"heldout": True}, True),
        ({"side": {}}, True),
        ({"side": {"caption": "d"}}, True),
        ({"part": (0.0, 0.5)}, True),
        ({"media": "m"}, True),
        ({"inner_heldout": ("x",)}, True),
        ({"media_from": ("x",)}, True),
        ({"opens": "https://hush@h/x.tar"}, False),
        ({"heldout_by": ("x",)}, False),
    ],
)
def test_an_objects_identity_is_that_of_all_that_a_manifest_has_of_it(changed: dict[str, Any], counts: bool) -> None:
    one, other = Listing.of([ONE]), Listing.of([dataclasses.replace(ONE, **changed)])
    assert (one.identities.tobytes() != other.identities.tobytes()) == counts
    assert (one != other) == counts
    assert (listing_digest(one) != listing_digest(other)) == counts
