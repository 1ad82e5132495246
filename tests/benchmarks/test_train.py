"""`ringworld bench train`: the same loss and gradient by every system, in real processes that take turns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.plain_training import PlainDocument, budgeted_rows, packed_rows, padded_rows
from benchmarks.train import SYSTEMS, Settings, _differences, claims, model_size, print_train, train_report
from jobs.cli import main


def documents(*lengths: int) -> list[PlainDocument]:
    return [PlainDocument(np.arange(1, n + 1), np.full(n, 0.5, np.float32)) for n in lengths]


def test_rows_hold_each_document_once() -> None:
    batch = [documents(6, 2), documents(3, 3, 2)]
    packed = [(tokens.tolist(), positions.tolist()) for tokens, positions, _, _ in packed_rows(batch)]
    assert packed[0] == ([[1, 2, 3, 4, 5, 6, 1, 2]], [[0, 1, 2, 3, 4, 5, 0, 1]])
    assert [tuple(tokens.shape) for tokens, *_ in padded_rows(batch)] == [(3, 6), (2, 3)], "as many micro-batches"
    assert [tuple(tokens.shape) for tokens, *_ in budgeted_rows(batch)] == [(1, 6), (2, 3), (2, 3)], "8 tokens at most"
    for made in (padded_rows, budgeted_rows):
        rows = [row for *_, attended, _ in made(batch) for row in attended.sum(1).tolist()]
        assert rows == [6, 2, 3, 3, 2]
        assert sum(float(weight.sum()) for *_, weight in made(batch)) == 0.5 * 16


def test_a_system_that_computes_something_else_is_no_measurement() -> None:
    right = {"loss": 2.0, "gradient": {"w": np.ones(4, np.float32)}}
    near = {"loss": 2.0, "gradient": {"w": np.full(4, 1 + 1e-6, np.float32)}}
    assert _differences({"ours": near, "padded": right})["ours"] == (0.0, pytest.approx(1e-6, rel=0.1))
    for wrong in ({**right, "loss": 2.01}, {**right, "gradient": {"w": np.array([1, 1, 1, 1.01])}}):
        with pytest.raises(ValueError, match="ours and padded rows differ"):
            _differences({"ours": wrong, "padded": right})


def test_targets_are_ratios_by_the_wall_and_by_the_processor() -> None:
    speeds = {
        "ours": (100, 50),
        "ours_compiled": (120, 40),
        "ours_saving": (95, 25),
        "packed": (80, 60),
        "padded": (60, 20),
        "padded_budget": (90, 45),
        "ours_sp2": (90, 40),
    }
    figures = {
        name: {"tokens_per_second_and_core": wall, "tokens_per_cpu_second": cpu} for name, (wall, cpu) in speeds.items()
    }
    rows = claims(figures, "here")
    assert [(row["measured"], row["met"]) for row in rows] == [
        *((1.25, True), (1.667, False), (1.2, True), (0.95, True), (0.9, True)),
        *((0.833, False), (2.5, True), (0.8, False), (0.5, False), (0.8, False)),
    ]
    assert {row["where"] for row in rows} == {"here, wall", "here, processor"}


def test_documents_fill_the_context_and_are_the_same_everywhere() -> None:
    settings = Settings(context=1024, sequences=2)
    first, again = settings.batch(), settings.batch()
    for sequence, same in zip(first, again, strict=True):
        assert sum(len(document.tokens) for document in sequence) == 1024
        assert all((a.tokens == b.tokens).all() for a, b in zip(sequence, same, strict=True))
        assert all(document.weight.sum() == pytest.approx(1) and not document.weight[0] for document in sequence)


def test_a_model_is_as_wide_as_asked_for() -> None:
    assert Settings().size == model_size(256)
    wide = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}
    assert model_size(512) == wide


def test_a_width_that_is_no_multiple_of_a_heads_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", "--hidden", "100"]) == 2
    assert "--hidden 100: give a multiple of 64" in capsys.readouterr().err


def test_a_context_too_short_for_the_mix_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", "--context", "512"]) == 2
    assert "--context 512: give an even number of 1024 or more" in capsys.readouterr().err


@pytest.mark.faults
def test_the_benchmark_runs_in_processes_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    report = json.loads(json.dumps(train_report(Settings(1024, 2, 1, size=size))))
    assert list(report["systems"]) == list(SYSTEMS)
    for figures in report["systems"].values():
        assert figures["tokens_per_cpu_second"] > 0
        assert figures["difference_of_gradient"] < 1e-4
    assert len(report["claims"]) == 10
    print_train(report)
    assert "padded_budget" in capsys.readouterr().out


def test_a_report_goes_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"tokens": 2, "documents": 1, "systems": {}, "claims": []}
    monkeypatch.setattr("benchmarks.train.train_report", lambda settings: {**made, "context": settings.context})
    assert main(["bench", "train", "--context", "2048", "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["context"] == 2048
