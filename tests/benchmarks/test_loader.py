"""`ringworld bench loader`: every system reads the same sequences, and the report says what was measured on what."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.loader import Settings, _joined, _ours, _systems, _theirs, _write, claims
from jobs.cli import main
from jobs.guard import USER_MISTAKE

SMALL = Settings(context=2048, sequences=24, per_shard=10, batch=4)


def test_ours_and_webdatasets_batches_hold_the_same_sequences(tmp_path: Path) -> None:
    shards = _write(tmp_path, SMALL)
    assert len(shards.names) == 3
    ours = {}
    for batch, _ in _ours(tmp_path, shards, SMALL, prefetch=0):
        ours |= {micro_batch.keys[0]: micro_batch for micro_batch in batch.micro_batches}
    theirs = [micro_batch for samples in _theirs(tmp_path, shards, SMALL) for micro_batch in _joined(samples)]
    assert len(ours) == len(theirs) == SMALL.sequences
    for micro_batch in theirs:
        for name in ("tokens", "labels", "loss_weight", "cu_seqlens"):
            np.testing.assert_array_equal(getattr(micro_batch, name), getattr(ours[micro_batch.keys[0]], name))
    for read in _systems(tmp_path, shards, SMALL).values():
        assert sum(1 for _ in read()) in (SMALL.sequences, SMALL.sequences // SMALL.batch)


def test_the_report_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "loader.json"
    small = ["--context", "2048", "--sequences", "16", "--rounds", "1"]
    assert main(["bench", "loader", *small, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["settings"]["context"] == 2048
    assert {"date", "processor", "cores", "webdataset"} <= set(report["machine"])
    assert all(figures["per_cpu_second"] > 0 for figures in report["systems"].values())
    assert "webdataset, arrays" in capsys.readouterr().out


def test_the_first_target_is_of_32k_sequences_alone() -> None:
    systems = {"ringworld": {"per_cpu_second": 9000}, "webdataset, batches": {"per_cpu_second": 5000}}
    found = claims(systems, Settings())
    assert [(claim["measured"], claim["met"]) for claim in found] == [(9000, True), (1.8, False)]
    assert claims(systems, SMALL)[0]["measured"] == 1.8


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (["--rounds", "0"], "--rounds 0 is less than 1"),
        (["--batch", "7"], "--batch 7 does not divide --sequences 1024"),
        (["--context", "16"], "--context 16 is less than 1024"),
    ],
)
def test_a_mistake_is_one_sentence(argument: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "loader", *argument]) == USER_MISTAKE
    assert said in capsys.readouterr().err
