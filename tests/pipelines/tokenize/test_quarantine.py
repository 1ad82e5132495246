"""Too much bad data ends the stage as soon as that is certain or clear, and the log says each reason once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.sources.listing import Listing, SourceObject
from pipelines.tokenize.partition import Held, Partitions
from pipelines.tokenize.quarantine import FEWEST, KINDS, Quarantine
from pipelines.tokenize.quarantine_list import LISTED, QUARANTINE
from storage.errors import UserError
from storage.store import Store


def held(count: int, name: str, kind: Any = "text", windows: bool = False) -> dict[str, Held]:
    """Of one object each, in the order of their numbers."""
    found = [SourceObject(f"s/{n}{name}", "s", f"/x/{n}{name}", 1000, "e", kind, False, {}) for n in range(count)]
    parts = Partitions(Listing.of(found), 1, {"s": {}})
    number = {part: int(parts[part].objects[0].key[2:].removesuffix(name)) for part in parts}
    return {f"p{number[part]}": one for part, one in parts.held(windows).items()}


def record(number: int, units: int, bad: int, whole: bool = False) -> dict[str, Any]:
    entries = [
        {"url": f"/x/{number}", "key": "k", "record": None if whole else one, "reason": f"line {one}: not UTF-8"}
        for one in range(bad)
    ]
    return {"partition": f"p{number}", "units": units, "quarantine": entries}


def ends_at(quarantine: Quarantine, records: list[dict[str, Any]]) -> int | None:
    """The number of the record at which the stage ended."""
    for number, one in enumerate(records):
        try:
            quarantine.add(one)
        except UserError:
            return number
    return None


def test_where_each_object_is_one_the_stage_ends_with_the_first_too_many() -> None:
    every_third = [record(n, 1, n % 3 == 0, whole=True) for n in range(100)]
    assert ends_at(Quarantine(0.1, held(100, ".txt")), every_third) == 30  # the 11th bad one of 100
    assert ends_at(Quarantine(0.1, held(100, ".mp4", "video")), every_third) == 30
    assert ends_at(Quarantine(0.34, held(100, ".txt")), every_third) is None


def test_the_number_of_records_still_to_come_is_estimated_by_bytes() -> None:
    fifth = [record(n, 100, 20) for n in range(100)]
    assert ends_at(Quarantine(0.01, held(100, ".jsonl")), fifth) == 9  # 200 bad of 10,000, times almost 2
    first_bad = [record(n, 100, 100 if n == 0 else 0) for n in range(100)]
    assert ends_at(Quarantine(0.01, held(100, ".jsonl")), first_bad) is None
    few = [record(n, 3, FEWEST // 10 if n == 0 else 0) for n in range(10)]
    assert ends_at(Quarantine(0.1, held(10, ".jsonl")), few) is None


def test_files_that_cannot_be_read_say_nothing_of_what_the_others_hold() -> None:
    files = [record(n, 1, 1, whole=True) for n in range(30)] + [record(n, 1000, 0) for n in range(30, 100)]
    assert ends_at(Quarantine(0.01, held(100, ".parquet")), files) is None


def test_windows_of_videos_are_estimated_too() -> None:
    assert ends_at(Quarantine(0.1, held(4, ".mp4", "video", windows=True)), [record(0, 1, 1, whole=True)]) is None


def test_no_bad_data_at_all_is_allowed_at_a_share_of_0() -> None:
    assert ends_at(Quarantine(0.0, held(100, ".jsonl")), [record(0, 9, 0), record(1, 9, 1)]) == 1


def test_the_final_count_decides_at_the_end() -> None:
    quarantine = Quarantine(0.1, held(1, ".jsonl"))
    with pytest.raises(UserError):
        quarantine.add(record(0, 9, 1))
    assert str(quarantine.error(" so far")).startswith("1 of 9 objects and records so far are bad, over tokenize.max_")
    with pytest.raises(UserError, match=r"^1 of 9 objects and records are bad, over tokenize\.max_bad_fraction 0\.1"):
        quarantine.check()


def test_each_kind_of_reason_is_one_line_with_a_count_and_an_example(caplog: pytest.LogCaptureFixture) -> None:
    quarantine = Quarantine(1.0, held(40, ".jsonl"))
    for number in range(32):
        quarantine.add(record(number, 2, 1))
    reasons = ["s3://b/1.jpg: no such object", "s3://b/2.jpg: no such object", 'the record lacks the field "caption"']
    entries = [{"url": "/x/y", "key": "k", "record": 1, "reason": reason} for reason in reasons]
    quarantine.add({"partition": "p32", "units": 3, "quarantine": entries})
    with caplog.at_level(logging.WARNING, logger="ringworld"):
        quarantine.report()
    assert [line.getMessage() for line in caplog.records] == [
        "tokenize: quarantined 32 for one kind of reason, such as /x/0: line 0: not UTF-8",
        "tokenize: quarantined 2 for one kind of reason, such as /x/y: s3://b/1.jpg: no such object",
        'tokenize: quarantined /x/y: the record lacks the field "caption"',
    ]


def test_reasons_without_end_are_counted_together(caplog: pytest.LogCaptureFixture) -> None:
    quarantine = Quarantine(1.0, held(1, ".jsonl"))
    entries = [{"url": "/x/0", "key": "k", "record": n, "reason": "column " + "a" * (n + 1)} for n in range(KINDS + 7)]
    quarantine.add({"partition": "p0", "units": len(entries), "quarantine": entries})
    with caplog.at_level(logging.WARNING, logger="ringworld"):
        quarantine.report()
    told = [line.getMessage() for line in caplog.records]
    assert len(told) == KINDS + 1
    assert told[0].startswith("tokenize: quarantined 7 for other reasons, such as /x/0: column ")


def test_of_many_entries_the_manifest_lists_the_first_and_a_file_has_all(tmp_path: Path) -> None:
    partitions = [record(number, 400, 400) for number in range(6)]
    for order in (partitions, partitions[::-1]):
        quarantine = Quarantine(1.0, held(6, ".jsonl"))
        for one in order:
            quarantine.add(one)
        store = Store(str(tmp_path / order[0]["partition"]))
        assert quarantine.entries.write(store) == {QUARANTINE: store.sha256(QUARANTINE)}
        with store.open(QUARANTINE) as file:
            rows = pq.read_table(file).to_pylist()
        # By the names of partitions, whichever was done first.
        assert rows == [entry for name in held(6, ".jsonl") for entry in partitions[int(name[1:])]["quarantine"]]
        assert quarantine.entries.count == len(rows) == 2400
        listed = quarantine.entries.listed()
        assert len(listed) == LISTED
        assert sorted(map(str, listed)) == sorted(map(str, rows[:LISTED]))


def test_few_entries_are_in_the_manifest_alone(tmp_path: Path) -> None:
    quarantine = Quarantine(1.0, held(2, ".jsonl"))
    quarantine.add(record(1, 9, 2))
    quarantine.add(record(0, 9, 1))
    assert quarantine.entries.write(Store(str(tmp_path))) == {}
    assert not list(tmp_path.iterdir())
    assert [entry["url"] for entry in quarantine.entries.listed()] == ["/x/0", "/x/1", "/x/1"]
