"""The plan: what is done stays done, and what changed says why it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.dag.code_versions import code_hashes
from pipelines.dag.stage import MANIFEST, STARTED, PlannedStage, Stage, plan
from storage.store import Store


def stages(fps: float = 4.0, context: int = 1024) -> list[Stage]:
    def never(_: Any) -> dict[str, Any]:
        raise AssertionError("planning runs nothing")

    return [
        Stage("tokenize", {"fps": fps}, "tokenization.fields", (), never),
        Stage("pack", {"context": context}, "tokenization.packing.pack", ("tokenize",), never),
        Stage("train", {}, "model.training.micro_batch_loss", ("pack",), never),
    ]


def finish(planned: list[PlannedStage]) -> None:
    for stage in planned:
        stage.store.write_json(STARTED, dict(stage.declaration))
        stage.store.write_json(MANIFEST, {})


def statuses(planned: list[PlannedStage]) -> dict[str, str]:
    return {stage.name: stage.status for stage in planned}


def test_what_is_committed_is_done_and_what_is_only_started_resumes(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first = plan(stages(), store)
    assert statuses(first) == {"tokenize": "run", "pack": "run", "train": "run"}
    assert all(stage.reasons == ("never run",) for stage in first)
    finish(first[:1])
    first[1].store.write_json(STARTED, dict(first[1].declaration))
    assert statuses(plan(stages(), store)) == {"tokenize": "done", "pack": "resume", "train": "run"}


def test_a_changed_setting_runs_what_depends_on_it_and_nothing_else(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    finish(plan(stages(), store))
    changed = {stage.name: stage for stage in plan(stages(context=2048), store)}
    assert changed["tokenize"].status == "done"
    assert changed["pack"].reasons == ("setting context: 1024 -> 2048",)
    assert changed["train"].reasons == ("input pack changed",)
    assert statuses(plan(stages(), store)) == {"tokenize": "done", "pack": "done", "train": "done"}


def test_code_is_followed_through_imports_and_prose_is_not_code(tmp_path: Path, monkeypatch: Any) -> None:
    hashes = code_hashes("tokenization.packing.pack")
    assert {"tokenization.packing.pack", "tokenization.packing.best_fit", "tokenization.packing.loss_weights"} <= set(
        hashes
    )
    assert not any(name.startswith(("pipelines", "numpy")) for name in hashes)

    source = tmp_path / "sample_module.py"
    monkeypatch.syspath_prepend(tmp_path)

    def hash_of(text: str) -> str:
        source.write_text(text)
        code_hashes.cache_clear()
        return code_hashes("sample_module")["sample_module"]

    plain = hash_of('"""Doc."""\ndef f(x):\n    return x + 1\n')
    assert hash_of('"""Other."""\ndef f(x):\n    """Says."""\n    return x + 1  # why\n') == plain
    assert hash_of('"""Doc."""\ndef f(x):\n    return x + 2\n') != plain
    code_hashes.cache_clear()


def test_planning_imports_nothing_that_it_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "room").mkdir()
    for name in ("room/__init__.py", "room/light.py"):
        (tmp_path / name).touch()
    (tmp_path / "room/light.py").write_text("from room.heavy import weigh\n")
    (tmp_path / "room/heavy.py").write_text("raise RuntimeError\ndef weigh(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("pipelines.dag.code_versions._FOLLOWED", ("room",))
    assert set(code_hashes("room.light")) == {"room.light", "room.heavy"}
