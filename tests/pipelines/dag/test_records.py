"""Records of partitions, in bulk and in footers: none is lost, none comes twice, and one without its file is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.dag import records as module
from pipelines.dag.records import RECORD_KEY, FooterRecords, JsonRecords, read_record
from storage.errors import UserError
from storage.store import Store
from tokenization.shards.shard import hash_file

FOLDER = "documents"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def commit(store: Store, partition: str, documents: int = 0) -> dict[str, Any]:
    """What the task of a partition does: its file, with the record in the footer; the record as a whole."""
    record = {"partition": partition, "documents": documents}
    with store.writing(f"{FOLDER}/{partition}.parquet") as file:
        table = pa.table({"tokens": range(documents)}).replace_schema_metadata({RECORD_KEY: json.dumps(record)})
        pq.write_table(table, file)
        sha256 = hash_file(file)
    return {**record, "file": f"{FOLDER}/{partition}.parquet", "sha256": sha256}


def names(count: int) -> list[str]:
    return [f"part-{number}" for number in range(count)]


def opened(store: Store) -> FooterRecords:
    """As a driver has them that begins."""
    return FooterRecords(store, FOLDER)


def loaded(records: FooterRecords | JsonRecords, partitions: list[str]) -> list[dict[str, Any]]:
    return sorted(records.load(partitions), key=lambda record: str(record["partition"]))


def in_bulk(store: Store) -> list[dict[str, Any]]:
    """What the bulk files hold, in their order."""
    return [
        json.loads(line) for name in store.names("records") for line in (store.read_bytes(name) or b"").splitlines()
    ]


@pytest.fixture
def footers_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files of which the footer is read."""
    read: list[str] = []
    whole = FooterRecords._read_footer

    def noted(self: FooterRecords, name: str) -> Any:
        read.append(name)
        return whole(self, name)

    monkeypatch.setattr(FooterRecords, "_read_footer", noted)
    return read


def test_a_record_is_in_the_footer_of_its_file(store: Store) -> None:
    record = commit(store, "part-0", 3)
    with store.open(record["file"]) as file:
        assert read_record(file) == {"partition": "part-0", "documents": 3}
        assert pq.read_table(file).num_rows == 3
    assert store.sha256(record["file"]) == record["sha256"]


def test_bulk_files_spare_reading_the_footers(store: Store, footers_read: list[str]) -> None:
    records = opened(store)
    assert list(records.load(names(5))) == []
    made = [commit(store, name, number) for number, name in enumerate(names(5))]
    for record in made:
        records.add(record)
    assert in_bulk(store) == [], "few wait for more"
    records.flush()
    records.flush()
    assert in_bulk(store) == made
    assert loaded(opened(store), names(5)) == made
    assert footers_read == []


def test_what_the_bulk_files_lack_is_read_from_the_footers_once(store: Store, footers_read: list[str]) -> None:
    """A driver that is killed has written nothing of what it noted last."""
    records = opened(store)
    list(records.load(names(5)))
    made = [commit(store, name, number) for number, name in enumerate(names(5))]
    for record in made[:2]:
        records.add(record)
    records.flush()
    for record in made[2:]:
        records.add(record)  # and is killed
    again = opened(store)
    assert loaded(again, names(5)) == made
    assert sorted(footers_read) == [record["file"] for record in made[2:]]
    assert in_bulk(store) == made[:2], "a reading that is killed has written nothing either"
    again.flush()
    assert sorted(in_bulk(store), key=lambda record: str(record["partition"])) == made
    assert loaded(opened(store), names(5)) == made
    assert len(footers_read) == 3


def test_only_what_is_asked_for_is_loaded(store: Store, footers_read: list[str]) -> None:
    made = [commit(store, name) for name in names(4)]
    records = opened(store)
    for record in made[:2]:
        records.add(record)
    records.flush()
    assert loaded(opened(store), ["part-0", "part-2", "part-9"]) == [made[0], made[2]]
    assert footers_read == [made[2]["file"]]


def test_a_record_whose_file_is_gone_is_not_loaded_and_its_partition_can_be_made_again(store: Store) -> None:
    records = opened(store)
    made = [commit(store, name, 1) for name in names(3)]
    for record in made:
        records.add(record)
    records.flush()
    store.delete(made[1]["file"])
    again = opened(store)
    assert loaded(again, names(3)) == [made[0], made[2]]
    remade = commit(store, "part-1", 2)
    assert remade["sha256"] != made[1]["sha256"]
    again.add(remade)
    again.flush()
    assert loaded(opened(store), names(3)) == [made[0], remade, made[2]], "of two records the later is of the file"


def test_a_record_that_is_there_twice_is_loaded_once(store: Store) -> None:
    made = [commit(store, name) for name in names(3)]
    for number in range(2):
        with store.writing(f"records/{number:08d}.jsonl") as file:
            file.writelines(json.dumps(record).encode() + b"\n" for record in [*made, *made])
    assert loaded(opened(store), names(3)) == made


def test_bulk_files_are_larger_where_there_are_more_and_never_replaced(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PENDING", 4)
    monkeypatch.setattr(module, "_SHARE", 4)
    records = opened(store)
    list(records.load([]))
    for number in range(100):
        records.add({"partition": str(number), "file": f"{FOLDER}/{number}.parquet"})
    records.flush()
    lengths = [len((store.read_bytes(name) or b"").splitlines()) for name in store.names("records")]
    assert sum(lengths) == 100
    assert lengths[0] == 4
    assert max(lengths) > 10
    assert [record["partition"] for record in in_bulk(store)] == [str(number) for number in range(100)]
    more = opened(store)
    list(more.load([]))
    more.add({"partition": "100", "file": f"{FOLDER}/100.parquet"})
    more.flush()
    assert [record["partition"] for record in in_bulk(store)] == [str(number) for number in range(101)]


def written_one_by_one(store: Store, count: int) -> list[dict[str, Any]]:
    """Records with a bulk file each."""
    records = opened(store)
    list(records.load([]))
    made = [commit(store, name, number) for number, name in enumerate(names(count))]
    for record in made:
        records.add(record)
        records.flush()
    assert len(store.names("records")) == count
    return made


def test_many_bulk_files_become_one(store: Store, monkeypatch: pytest.MonkeyPatch, footers_read: list[str]) -> None:
    monkeypatch.setattr(module, "_MANY", 5)
    made = written_one_by_one(store, 6)
    records = opened(store)
    assert loaded(records, names(6)) == made
    assert len(store.names("records")) == 1
    assert in_bulk(store) == made
    records.add(more := commit(store, "part-6"))
    records.flush()
    assert loaded(opened(store), names(7)) == [*made, more]
    assert len(store.names("records")) == 2
    assert footers_read == []


@pytest.mark.parametrize("deleted", [0, 3])
def test_a_driver_that_is_killed_while_it_joins_them_loses_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, footers_read: list[str], deleted: int
) -> None:
    monkeypatch.setattr(module, "_MANY", 5)
    made = written_one_by_one(store, 6)
    left = iter(range(deleted))

    class Killed(BaseException): ...

    plain = Store.delete

    def delete(self: Store, name: str) -> None:
        if next(left, None) is None:
            raise Killed
        plain(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "delete", delete)
        with pytest.raises(Killed):
            loaded(opened(store), names(6))
    assert len(store.names("records")) == 7 - deleted
    for _ in range(2):
        assert loaded(opened(store), names(6)) == made
    if not deleted:
        assert len(store.names("records")) == 1
        assert in_bulk(store) == made, "what is there twice is joined once"
    assert footers_read == []


def test_a_damaged_bulk_file_costs_reading_footers(
    store: Store, footers_read: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    made = written_one_by_one(store, 3)
    path = Path(store.path("records/00000001.jsonl"))
    path.write_bytes(path.read_bytes()[:-20])
    assert loaded(opened(store), names(3)) == made
    assert footers_read == [made[1]["file"]]
    assert f"{path} is damaged; its records are read from the footers" in caplog.text


@pytest.mark.parametrize("spoil", [lambda content: content[:-9], lambda content: b""])
def test_a_damaged_file_without_a_bulk_record_is_named_with_the_remedy(store: Store, spoil: Any) -> None:
    path = Path(store.path(commit(store, "part-0", 100)["file"]))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(
        UserError, match=r"part-0\.parquet: this is not the Parquet file that was written .*; delete it"
    ):
        loaded(opened(store), names(1))


def test_a_small_stage_has_a_file_a_record(store: Store) -> None:
    records = JsonRecords(store)
    assert list(records.load(names(3))) == []
    for name in ("part-0", "part-2", "part-9"):
        store.write_json(records.name(name), {"partition": name})
    assert loaded(records, names(3)) == [{"partition": "part-0"}, {"partition": "part-2"}]
    assert list(records.load([])) == []


def test_the_hash_is_of_the_whole_file_wherever_it_was_read_to(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 100)
    with (tmp_path / "x").open("rb") as file:
        plain: BinaryIO = file
        plain.read(50)
        assert hash_file(plain) == Store(str(tmp_path)).sha256("x")
