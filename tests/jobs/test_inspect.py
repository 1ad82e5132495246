"""`ringworld inspect` says what a folder holds; `--verify` finds every byte that is not as it was committed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from testing.miniature import ringworld

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
