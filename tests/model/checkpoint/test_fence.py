"""A run whose lease was taken over: of a checkpoint, its retention and an export, nothing appears from then on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from model import checkpoint
from model.convert.export_hf import export_hf
from model.training.engine import TrainingEngine
from model.training.mesh import build_mesh
from storage.errors import UserError
from storage.lease import LEASE, Fence
from storage.store import Store
from testing.law_batch import rank_batches, tiny_engine
from tests.model.attention_groups import failure, run_in_processes
from tests.model.checkpoint.saving import save_checkpoint

pytestmark = pytest.mark.slow


@dataclass
class TakenOver:
    """The fence of a driver whose lease another takes just before its n-th change; what was there then."""

    store: Store
    at_change: int
    changes: int = 0
    there: dict[str, str] | None = None
    fence: Fence = field(init=False)

    def __post_init__(self) -> None:
        self._take("the first", 1, "here")
        self.fence = Fence(self.store, "the first", max_age=0.0)

    def __call__(self) -> None:
        self.changes += 1
        if self.changes == self.at_change:
            self._take("the second", 2, "there")
            self.there = contents(self.store)
        self.fence()

    def _take(self, owner: str, pid: int, host: str) -> None:
        lease = {"owner": owner, "pid": pid, "host": host, "started": 0.0, "beat": time.time()}
        self.store.write_json(LEASE, lease)


def contents(store: Store) -> dict[str, str]:
    return store.hashes("")


@dataclass
class Outcome:
    changes: int
    error: Exception | None
    before: dict[str, str] | None
    after: dict[str, str]


def each_change(url: str, prepare: Callable[[Store], object], act: Callable[[Store], object]) -> list[Outcome]:
    """What becomes of `act` when the lease is lost at its first change, its second, and so on up to none."""
    outcomes: list[Outcome] = []
    while not outcomes or outcomes[-1].before is not None:
        store = Store(f"{url}/{len(outcomes)}")
        prepare(store)
        fence = TakenOver(store, len(outcomes) + 1)
        error = failure(lambda: act(replace(store, fence=fence)))  # noqa: B023
        outcomes.append(Outcome(fence.changes, error, fence.there, contents(store)))
    return outcomes


def observe(group: Any, url: str) -> dict[str, list[Outcome]]:
    mesh = build_mesh()
    engine = tiny_engine(mesh, zero_stage=2)
    batch, n_examples = rank_batches(mesh)
    engine.train_step(batch, n_examples)

    def save(store: Store, step: int = 1) -> None:
        engine.step = step
        save_checkpoint(engine, store.at("checkpoints"), {"position": step}, keep=1)

    def roll_back(store: Store) -> None:
        """As after a bad step: the last checkpoint again, and at once a save of the same step."""
        rolled_back: TrainingEngine = engine
        checkpoint.load_latest(rolled_back, store.at("checkpoints"))
        save(store)

    return {
        "save": each_change(f"{url}/save", save, lambda store: save(store, 2)),
        "rollback": each_change(f"{url}/rollback", save, roll_back),
        "export": each_change(
            f"{url}/export",
            lambda store: export_hf(engine, store.at("model")),
            lambda store: export_hf(engine, store.at("model")),
        ),
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    folder: Path = tmp_path_factory.mktemp("fence")
    return run_in_processes(observe, 1, str(folder))[0]


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        # what is left of others swept, this step's folder cleared; two files; COMMIT; the checkpoint before removed
        ("save", 1 + 2 + 2 + 1 + 2),
        # swept; two files under new names; COMMIT; the two files that it named before
        ("rollback", 1 + 2 + 1 + 2),
        # swept; what made the one before whole removed; weights, the generation's settings, config.json
        ("export", 1 + 2 + 3),
    ],
)
def test_wherever_the_lease_is_lost_nothing_changes_from_there_on(
    outcomes: dict[str, list[Outcome]], what: str, changes: int
) -> None:
    *lost, kept = outcomes[what]
    assert kept.error is None
    assert kept.changes == changes
    assert len(lost) == changes
    for outcome in lost:
        assert isinstance(outcome.error, UserError)
        assert "the lease is now that of pid 2 on there; this one writes nothing more and ends" in str(outcome.error)
        assert outcome.after == outcome.before
