"""One store of codes for several runs: at the same time, and while what fills it is killed."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipelines.dag.manifest import StageOutput, read_manifest
from pipelines.tokenize.record import TokenizeRecord, read_partitions
from storage.store import Store
from testing.miniature import ROOT, environment, recipe, write_recipe
from testing.tiny_run import write_clip
from tokenization.codecs.codes_file import CodesFile, MediumCodes
from tokenization.shards.document_parquet import read_documents

pytestmark = pytest.mark.faults

CLIPS, FRAMES = 40, 8


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(CLIPS):
        write_clip(folder / f"{number:02d}.mp4", 1 + number % 7, frames=16)
    return folder


def write(folder: Path, name: str, clips: Path, sources: Path, partition_bytes: int = 8_000) -> Path:
    made: dict[str, Any] = recipe(sources, folder / name)
    made["storage"] |= {"data": str(clips), "codes": str(folder / "codes")}
    made["sources"] = {"clips": {"urls": ["*.mp4"], "fields": ["vision"]}}
    made["tokenize"] = {"fps": 4, "chunk_frames": 4, "partition_bytes": partition_bytes, "decode": {"workers": 2}}
    made["train"]["stages"] = [made["train"]["stages"][1] | {"mixture": {"clips": 1}}]
    return write_recipe(folder / f"{name}.yaml", made)


def start(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.cli", "run", str(path), "--until", "tokenize"]
    return subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)


def ended(runs: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """The exit code of each and what it said, which is read while it runs."""
    said = [run.communicate(timeout=300)[1] for run in runs]
    return [(run.returncode, one) for run, one in zip(runs, said, strict=True)]


def output(folder: Path) -> StageOutput[TokenizeRecord]:
    (home,) = (path.parent for path in (folder / "stages/tokenize").glob("*/manifest.json"))
    manifest = read_manifest(Store(str(home)), TokenizeRecord)
    assert manifest is not None
    return StageOutput(Store(str(home)), manifest)


def tokens(folder: Path) -> dict[str, np.ndarray]:
    made, found = output(folder), {}
    for part in read_partitions(made):
        with made.shared.open(part.file) as file:
            found |= {one.key: one.tokens for one in read_documents(file)}
    return found


def kept(codes: Path) -> list[MediumCodes]:
    """Of all files, each of which is whole."""
    found: list[MediumCodes] = []
    for path in codes.glob("*/data/*"):
        assert path.suffix == ".parquet", f"{path.name} is half of a file"
        with path.open("rb") as file:
            found += CodesFile(file)
    return found


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_two_runs_fill_one_store_at_once_and_a_third_finds_all(clips: Path, sources: Path, tmp_path: Path) -> None:
    sizes = {"one": 8_000, "other": 8_000, "coarse": 30_000}
    for code, said in ended([start(write(tmp_path, name, clips, sources, size)) for name, size in sizes.items()]):
        assert code == 0, said
    first = tokens(tmp_path / "one")
    assert len(first) == CLIPS
    assert equal(first, tokens(tmp_path / "other"))
    assert equal(first, tokens(tmp_path / "coarse"))
    rows = kept(tmp_path / "codes")
    assert {len(row.codes) for row in rows} == {FRAMES}
    assert len({row.object for row in rows}) == CLIPS
    ((code, said),) = ended([start(write(tmp_path, "third", clips, sources, 12_000))])
    assert code == 0, said
    assert output(tmp_path / "third").record.figures.frames_encoded == 0
    assert equal(first, tokens(tmp_path / "third"))


def test_whoever_is_killed_leaves_nothing_half_and_nothing_twice(clips: Path, sources: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "killed", clips, sources)
    draw = random.Random(3)
    for kill in range(6):
        run = start(path)
        deadline, before = time.monotonic() + 120, len(list((tmp_path / "codes").glob("*/data/*.parquet")))
        while run.poll() is None and time.monotonic() < deadline:
            if len(list((tmp_path / "codes").glob("*/data/*.parquet"))) > before:
                break
            time.sleep(0.05)
        time.sleep(draw.random() / 2)
        for victim in psutil.Process(run.pid).children(recursive=True) if run.poll() is None else ():
            with contextlib.suppress(psutil.Error):
                if kill % 2 or "ray::tokenize" in " ".join(victim.cmdline()):
                    victim.kill()
        if kill % 2:
            run.kill()
            run.communicate()
        else:
            ended([run])
    ((code, said),) = ended([start(path)])
    assert code == 0, said
    rows = kept(tmp_path / "codes")
    assert sorted(row.object for row in rows) == sorted({row.object for row in rows})
    assert len(rows) == CLIPS
    assert len(tokens(tmp_path / "killed")) == CLIPS
