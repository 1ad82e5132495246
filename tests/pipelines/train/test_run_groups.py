"""pipelines/train/run_groups.py: what each group of workers is started with, and after what another one is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train import TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from pipelines.cluster.heartbeat import start_watch
from pipelines.train import run_groups as groups
from pipelines.train.run_groups import _Trainer, train_in_groups
from storage.errors import UserError
from storage.object_store.errors import Request
from storage.retry import Backoff
from storage.store import Store
from tests.pipelines.train.test_stage import job_of


def test_no_dashboard_is_asked_whether_a_group_is_to_live() -> None:
    def callbacks(kind: type[TorchTrainer]) -> list[str]:
        trainer: Any = kind(lambda: None)
        return [type(one).__name__ for one in trainer._create_default_callbacks()]

    assert set(callbacks(TorchTrainer)) - set(callbacks(_Trainer)) == {
        "DatasetsCallback",
        "PlacementGroupCleanerCallback",
    }


PREEMPTED = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a1b2c3": [0]}))


@pytest.mark.parametrize(
    "error",
    [
        PREEMPTED,
        WorkerGroupError("", {0: ActorDiedError()}),
        ControllerError(WorkerGroupStartupTimeoutError(2)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_ray_itself_retries_no_failure_of_a_group(error: TrainingFailedError) -> None:
    assert DefaultFailurePolicy(groups._NO_RETRIES).make_decision(error) == FailureDecision.RAISE


@pytest.mark.slow
def test_preemptions_without_a_checkpoint_between_them_end_the_stage(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    attempts = []

    def fit(job: Any, watch: Any, attempt: int, size: int) -> None:
        attempts.append(attempt)
        raise PREEMPTED

    monkeypatch.setattr(groups, "_fit", fit)
    monkeypatch.setattr(groups, "wait_for_room", lambda train, stage: 1)
    gave_up = r"^train-text: PreemptionError: .*; gave up at step 0 after 3 failure\(s\) .*train\.max_restarts 2.*again"
    with pytest.raises(UserError, match=gave_up) as raised:
        train_in_groups(job_of(tmp_path, max_restarts=2), start_watch())
    assert raised.value.__cause__ is PREEMPTED
    assert attempts == [1, 2, 3]


@pytest.mark.slow
def test_a_dead_watch_ends_the_stage_with_one_sentence(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(groups, "_fit", lambda job, watch, attempt, size: ray.kill(watch))
    monkeypatch.setattr(groups, "wait_for_room", lambda train, stage: 1)
    sentence = r"^train-text: the actor .* watches the workers does not answer \(ActorDiedError.*run the same command"
    with pytest.raises(UserError, match=sentence):
        train_in_groups(job_of(tmp_path), start_watch())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "starts"), [("transient", 2), ("denied", 1)])
def test_a_store_that_does_not_answer_ends_a_group_and_not_the_run(
    local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: Any, starts: int
) -> None:
    attempts = []

    def fit(job: Any, watch: Any, attempt: int, size: int) -> None:
        attempts.append(attempt)
        if attempt == 1:
            raise Request("s3://data/run", "written").failure("503 SlowDown", kind)
        ray.get(watch.finish.remote())

    def committed(store: Store) -> int:
        asked.append(store)
        if attempts and len(asked) < 5:
            raise Request(store.path(), "listed").failure("no answer", "transient")
        return 0

    asked: list[Store] = []
    monkeypatch.setattr(groups, "_fit", fit)
    monkeypatch.setattr(groups.checkpoint, "latest_committed", committed)
    monkeypatch.setattr(groups, "STORE_AWAY", Backoff(attempts=20, pause=0.0))
    monkeypatch.setattr(groups, "wait_for_room", lambda train, stage: 1)
    if kind == "transient":
        (interruption,) = train_in_groups(job_of(tmp_path), start_watch())
        assert interruption.reason.startswith("StoreError: s3://data/run: cannot be written")
    else:
        with pytest.raises(UserError):
            train_in_groups(job_of(tmp_path), start_watch())
    assert len(attempts) == starts
