"""Sources and output on object storage: the same run against a real S3 server, and no credential in what it writes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from drivers import Driver
from miniature import ringworld, text_recipe, write_recipe

from jobs.bench.object_store import KEY, SECRET, ObjectStore
from pipelines.lease import LEASE, lease
from pipelines.storage import Store
from pipelines.urls import list_objects
from tokenization.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def options(object_store: ObjectStore) -> dict[str, Any]:
    """The recipe's storage.options, with the credentials that a careless user would write there."""
    return {"endpoint_url": object_store.endpoint, "key": KEY, "secret": SECRET}


@dataclass
class Finished:
    """A text run with sources and output in the bucket. said: its log and standard output. commands: see `Driver`."""

    recipe: Path
    said: str
    commands: set[str]


@pytest.fixture(scope="module")
def finished(
    object_store: ObjectStore, options: dict[str, Any], sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    for path in [*sources.glob("acts/*"), sources / "tokenizer.json"]:
        object_store.fs.put_file(str(path), f"data/in/{path.relative_to(sources)}")
    tree = text_recipe("s3://data/in", "s3://data/run")
    tree["storage"]["options"] = options
    driver = Driver.start(write_recipe(tmp_path_factory.mktemp("s3run") / "recipe.yaml", tree), "finished")
    try:
        assert driver.end() == (0, "report: s3://data/run/report.html"), driver.log.read_text()
    finally:
        driver.kill()
    return Finished(driver.log.with_name("recipe.yaml"), driver.log.read_text(), driver.commands)


def test_shards_are_those_of_a_local_run_but_for_the_addresses_in_their_lineage(
    finished: Finished, options: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    (folder,) = (undisturbed / "stages" / "pack-text").iterdir()
    root = Store("s3://data/run/stages/pack-text", options)
    remote = root.at(*root.folders())
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("shards/*.tar"))
    assert remote.names("shards") == names
    for name in names:
        with remote.open(name) as file:
            assert members(file) == members((folder / name).open("rb"))


def members(file: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    with file, tarfile.open(fileobj=file) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            made[member.name] = content.read()
            if member.name.endswith(".json"):
                made[member.name] = json.loads(made[member.name])
                for entry in made[member.name]["lineage"]:
                    assert entry["provenance"].pop("url").endswith(entry["key"].split("#")[0].removeprefix("acts"))
                    assert entry["provenance"].pop("etag")
    return made


def test_everything_in_the_bucket_is_as_committed(finished: Finished, object_store: ObjectStore) -> None:
    verified = ringworld("inspect", "s3://data/run", "--verify", **object_store.environment)
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_a_second_run_is_cached_though_the_credentials_come_from_elsewhere(
    finished: Finished, object_store: ObjectStore
) -> None:
    endpoint = f"storage.options={{endpoint_url: {object_store.endpoint}}}"
    again = ringworld("run", finished.recipe, "--set", endpoint, **object_store.environment)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count(" done ") == 6


def test_no_credential_is_written_anywhere(finished: Finished, options: dict[str, Any]) -> None:
    store = Store("s3://data/run", options)
    names = store.names()
    assert {"report.html", "report.json"} < set(names)
    assert LEASE not in names
    assert len([name for name in names if name.endswith("manifest.json")]) >= 6
    for name in names:
        with store.open(name) as file:
            content = file.read()
        if name.endswith(".parquet"):  # whose columns are compressed
            table = pq.read_table(io.BytesIO(content))
            content += f"{table.schema} {table.to_pydict()}".encode()
        assert SECRET.encode() not in content, name
        assert KEY.encode() not in content, name


def test_no_credential_is_said_in_the_log_or_in_a_process_list(finished: Finished) -> None:
    assert "ray started" in finished.said
    assert any("raylet" in command for command in finished.commands)
    assert any("ray::" in command for command in finished.commands)
    for said in (finished.said, *finished.commands):
        assert SECRET not in said
        assert KEY not in said


def test_one_driver_holds_a_folder_in_the_bucket(options: dict[str, Any]) -> None:
    store = Store("s3://data/held", options)
    with lease(store):
        with pytest.raises(UserError, match="another driver"), lease(store):
            pass
        assert store.exists(LEASE)
    assert not store.exists(LEASE)
    dead = {"owner": "x", "host": "elsewhere", "pid": 1, "started": 0.0, "beat": 0.0}
    assert store.create_json(LEASE, dead)
    with lease(store):
        assert store.read_json(LEASE)["owner"] != "x"


def test_a_write_is_whole_or_absent_and_a_name_is_taken_once(options: dict[str, Any]) -> None:
    store = Store("s3://data/writes", options)
    with contextlib.suppress(RuntimeError), store.writing("a/b") as file:
        file.write(b"half")
        raise RuntimeError
    assert store.names() == []
    with store.writing("a/b") as file:
        file.write(bytes(6 * 2**20))
    assert store.sha256("a/b") == hashlib.sha256(bytes(6 * 2**20)).hexdigest()
    assert store.names() == ["a/b"]
    assert store.folders() == ["a"]
    assert store.create_json("lock", 1)
    assert not store.create_json("lock", 2)
    assert store.read_json("lock") == 1


@pytest.mark.parametrize(
    ("pattern", "changes", "said"),
    [
        ("s3://no-such-bucket/*.md", {}, r"s3://no-such-bucket/\*\.md: no such file or object"),
        ("s3://no-such-bucket/a.md", {}, r"s3://no-such-bucket/a\.md: no such file or object"),
        ("s3://data/none/*.md", {}, r"s3://data/none/\*\.md: no such file or object"),
        ("s3://data/*", {"secret": "wrong"}, r"s3://data/\*: cannot be used .*; check the path or bucket"),
        ("s3://data/*", {"endpoint_url": "http://127.0.0.1:9"}, r"s3://data/\*: cannot be used .*; check the path"),
    ],
)
def test_a_bucket_that_is_not_there_or_does_not_open_is_named(
    options: dict[str, Any], pattern: str, changes: dict[str, str], said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        list_objects(pattern, {**options, **changes, "config_kwargs": {"retries": {"max_attempts": 1}}})
    assert "\n" not in str(caught.value)


def test_an_output_that_cannot_be_written_is_named(options: dict[str, Any]) -> None:
    with (
        pytest.raises(UserError, match=r"^s3://data/x: cannot be used"),
        lease(Store("s3://data/x", {**options, "secret": "wrong"})),
    ):
        pass
