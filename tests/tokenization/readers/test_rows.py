"""Records and samples come out of an Arrow batch as they went in, and a batch that nobody packed is refused."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import BadData
from tokenization.readers.record import BadRecord, NotText
from tokenization.readers.rows import pack_records, pack_samples, unpack_records, unpack_samples
from tokenization.readers.webdataset_tar import BadSample, Sample

COLUMNS = ["text", "vision", "more"]
CODES = st.lists(st.lists(st.integers(0, 8191), max_size=3), max_size=3)
VALUES = st.one_of(st.text(st.characters(exclude_categories=())), st.binary(max_size=9), st.none(), st.integers())
RECORDS = st.lists(
    st.one_of(
        st.fixed_dictionaries({}, optional={"text": VALUES, "vision": CODES, "more": VALUES, "other": VALUES}),
        st.text(st.characters(exclude_categories=("Cs",))),
    ),
    max_size=20,
)


def unpacked(records: list[Any]) -> list[Any]:
    return [one for batch in pack_records(records, COLUMNS) for one in unpack_records(batch, COLUMNS)]


@given(RECORDS)
def test_records_come_out_as_they_went_in_but_for_what_is_no_text(found: list[Any]) -> None:
    records = [BadRecord(n, one) if isinstance(one, str) else (n, one) for n, one in enumerate(found)]
    expected: list[Any] = []
    for record in records:
        if isinstance(record, BadRecord):
            expected.append(record)
            continue
        fields = {name: value for name, value in record[1].items() if name in COLUMNS}
        for name, value in fields.items():
            if value is None or isinstance(value, int):
                fields[name] = NotText(type(value).__name__, None if value is None else str(value))
        expected.append((record[0], fields))
    assert unpacked(records) == expected


def test_many_and_large_records_come_in_batches_and_those_before_bad_data_come_first() -> None:
    def records() -> Any:
        yield from ((n, {"text": "x" * (1 << 18)}) for n in range(9))
        raise BadData("the rest")

    sizes: list[int] = []
    with pytest.raises(BadData, match="the rest"):
        sizes.extend(len(unpack_records(batch, COLUMNS)) for batch in pack_records(records(), COLUMNS))
    assert sizes == [4, 4, 1]
    assert [len(unpack_records(b, ["a"])) for b in pack_records(((n, {}) for n in range(2000)), ["a"])] == [1024, 976]


def test_samples_come_out_as_they_went_in_and_no_further_apart_than_can_be_read_at_once() -> None:
    samples: list[Sample | BadSample] = [
        Sample(0, "a/0", "a/0.jpg", "image", 512, 100, {"text": "one", "n": 3}),
        BadSample(1, "a/1", "no video or image in it"),
        Sample(2, "a/2", "a/2.mp4", "video", 5000, 9 << 20, {}),
        BadSample(3, None, "the tar is damaged"),
    ]
    batches = list(pack_samples(samples, ["text", "n"]))
    assert [len(unpack_samples(batch, ["text", "n"])) for batch in batches] == [3, 1]
    found = [one for batch in batches for one in unpack_samples(batch, ["text", "n"])]
    assert found[1:] == samples[1:]
    assert isinstance(found[0], Sample)
    assert found[0].side == {"text": "one", "n": NotText("int", "3")}


def test_what_nobody_packed_is_refused_and_crashes_nothing() -> None:
    (whole,) = pack_records([(n, {"text": f"text {n}", "more": b"x"}) for n in range(50)], COLUMNS)
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        broken = bytearray(whole)
        for _ in range(draw.choice([1, 3, 30])):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        try:
            unpack_records(broken, COLUMNS)
        except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, StopIteration):
            refused += 1
    assert refused > 100
    other = pa.BufferOutputStream()
    batch = pa.record_batch({"index": pa.array(["0"]), "reason": pa.array([None], pa.utf8())})
    with pa.ipc.new_stream(other, batch.schema) as stream:
        stream.write_batch(batch)
    with pytest.raises(ValueError, match="a column index of string"):
        unpack_records(other.getvalue(), COLUMNS)
