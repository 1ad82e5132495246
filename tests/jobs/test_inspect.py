"""`ringworld inspect` says what a folder or file holds; `--verify` finds every byte that is not as it was committed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from testing.made_tars import tar
from testing.miniature import ringworld
from testing.tiny_run import VOCABULARY
from tokenization.document import Document
from tokenization.packing.pack import pack
from tokenization.shards.document_parquet import write_documents
from tokenization.shards.shard import write_shard

Inspect = Callable[..., tuple[int, Any]]


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Inspect:
    def call(path: Path, *flags: str) -> tuple[int, Any]:
        code = main(["inspect", str(path), "--json", *flags])
        return code, json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def copy(undisturbed: Path, tmp_path: Path) -> Path:
    """A run to do harm to."""
    return Path(shutil.copytree(undisturbed, tmp_path / "run"))


def one(root: Path, pattern: str) -> Path:
    return sorted(root.glob(f"stages/{pattern}"))[0]


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


@pytest.mark.slow
def test_a_run_lists_its_stages_with_their_figures(undisturbed: Path, inspect: Inspect) -> None:
    code, run = inspect(undisturbed)
    assert (code, run["kind"]) == (0, "run")
    stages = {stage["stage"]: stage for stage in run["stages"].values()}
    assert stages["tokenize"]["figures"]["documents"] > 20
    assert stages["train-text"]["figures"]["steps"] == 12
    assert all(stage["status"] == "done" for stage in stages.values())


@pytest.mark.slow
def test_a_shard_set_a_checkpoint_and_a_model_say_what_they_hold(undisturbed: Path, inspect: Inspect) -> None:
    _, shards = inspect(one(undisturbed, "pack-video/*"))
    assert shards["kind"] == "stage"
    assert set(shards["sets"]) == {"acts", "clips"}
    assert shards["sets"]["clips"]["train"]["targets"]["vision"] > 0
    _, checkpoint = inspect(one(undisturbed, "train-text/*/checkpoints/step-00000012"))
    assert (checkpoint["kind"], checkpoint["step"], checkpoint["world_size"]) == ("checkpoint", 12, 2)
    assert checkpoint["loader"]["position"] > 0
    _, model = inspect(one(undisturbed, "train-video/*/model"))
    assert (model["kind"], model["max_position_embeddings"], model["rope_theta"]) == ("model", 256, 5e4)
    assert (model["modality_sizes"], model["vocab_size"]) == ([["text", 512], ["vision", 256]], 768)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern", ["", "pack-text/*", "train-text/*", "train-text/*/checkpoints/step-00000012", "train-text/*/model"]
)
def test_an_intact_folder_verifies(undisturbed: Path, inspect: Inspect, pattern: str) -> None:
    assert inspect(one(undisturbed, pattern) if pattern else undisturbed, "--verify") == (
        0,
        inspect(one(undisturbed, pattern) if pattern else undisturbed)[1] | {"problems": []},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    [
        "pack-text/shards/*.tar",
        "pack-text/*/sets/*.json",
        "tokenize/*/partitions.parquet",
        "tokenize/documents/*.parquet",
        "train-text/*/model/*.safetensors",
        "train-text/*/checkpoints/*/rank-00001-0000.safetensors",
        "vqgan/*/weights/*.safetensors",
        "sources/*/objects.parquet",
    ],
)
def test_one_flipped_byte_or_a_missing_file_is_found_by_name(copy: Path, inspect: Inspect, pattern: str) -> None:
    damaged = one(copy, pattern)
    flip(damaged, damaged.stat().st_size // 2)
    code, run = inspect(copy, "--verify")
    assert code == 1
    assert run["problems"]
    assert all(damaged.name in problem for problem in run["problems"])
    damaged.unlink()
    code, run = inspect(copy, "--verify")
    assert code == 1
    assert damaged.name in run["problems"][0]


@pytest.mark.slow
def test_a_reader_is_told_in_words(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = one(copy, "pack-text/*")
    assert main(["inspect", str(stage), "--verify"]) == 0
    assert "verified: every file is as it was committed" in capsys.readouterr().out
    shard = one(copy, "pack-text/shards/*.tar")
    flip(shard, 700)
    assert main(["inspect", str(stage), "--verify"]) == 1
    assert f"PROBLEM shards/{shard.name}: " in capsys.readouterr().out


def test_no_thread_at_all_is_the_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path), "--verify", "--threads", "0"]) == 2
    assert capsys.readouterr().err == "ringworld: --threads 0 is less than 1\n"


def test_a_folder_of_something_else_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing of ours")
    done = ringworld("inspect", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"ringworld: {tmp_path}: neither a run, a stage's folder, a checkpoint nor a model; "
        "give the path of one of these\n"
    )


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Of six documents in contexts of 64 tokens, of which one is split."""
    tokens = np.arange(3, 33, dtype=np.int32)
    sizes = (30, 30, 30, 30, 30, 20)
    made = [Document(f"d{n}", f"s{n % 2}", np.resize(tokens, size), ((1, size),)) for n, size in enumerate(sizes)]
    made[0] = Document("long", "s0", np.resize(tokens, 100), ((1, 100),))
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        write_shard(file, pack(made, 64, VOCABULARY, "text", key_prefix="k"), VOCABULARY)
    return path


def test_a_shard_alone_says_what_it_holds(shard: Path, inspect: Inspect) -> None:
    code, found = inspect(shard)
    assert code == 0
    assert found == {
        "path": str(shard),
        "kind": "shard",
        "sequences": 4,
        "context": 64,
        "filled": f"{240 / 256:.2%}",
        "documents": 6,
        "examples": 7,
        "examples_by_source": {"s0": 4, "s1": 3},
        "keys": "k00000000 to k00000003",
        "tensors": {"cu_seqlens": "I32", "loss_weight": "F32", "tokens": "I32"},
        "bytes": shard.stat().st_size,
    }


def test_a_file_of_documents_alone_says_what_it_holds(tmp_path: Path, inspect: Inspect) -> None:
    path = tmp_path / "a.parquet"
    made = [Document(f"d{n}", f"s{n % 2}", np.arange(n, dtype=np.int32), ()) for n in range(1, 6)]
    with path.open("wb") as file:
        write_documents(file, made, row_group_tokens=6)
    code, found = inspect(path)
    assert code == 0
    assert found == {
        "path": str(path),
        "kind": "documents",
        "documents": 5,
        "tokens": 15,
        "documents_by_source": {"s0": 2, "s1": 3},
        "keys": "d1 to d5",
        "row_groups": 3,
        "bytes": path.stat().st_size,
    }


def test_a_file_of_another_kind_or_none_is_the_users_mistake(
    shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "texts.parquet")
    (tmp_path / "media.tar").write_bytes(tar([("a.jpg", b"x")]))
    (tmp_path / "cut.tar").write_bytes(shard.read_bytes()[:1000])
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "texts.parquet").read_bytes()[:-9])
    for name, said in [
        (
            "texts.parquet",
            "not a whole shard of packed sequences, nor a file of documents or codes (its columns are text)",
        ),
        ("cut.parquet", "not a whole shard of packed sequences, nor a file of documents or codes ("),
        ("media.tar", "documents or codes (the tar has the member a.jpg)"),
        ("cut.tar", "nor a file of documents or codes (unexpected end of data)"),
        ("empty.tar", "not a whole shard of packed sequences, nor a file of documents or codes (empty file)"),
        ("none.tar", "no such file; give the path of a file or folder of a run"),
    ]:
        assert main(["inspect", str(tmp_path / name)]) == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert sentence.startswith(f"ringworld: {tmp_path / name}: ")
        assert said in sentence
    assert main(["inspect", str(shard), "--verify"]) == 2
    assert "a file alone does not say what was committed; leave out --verify" in capsys.readouterr().err
