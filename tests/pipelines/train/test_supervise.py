"""pipelines/train/supervise.py goes on watching, whatever Ray answers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayError

from pipelines.cluster.heartbeat import Heartbeat, Stop, WorkerStatus
from pipelines.train import supervise as supervisor
from pipelines.train.job import TrainJob
from pipelines.train.supervise import Supervisor
from storage.store import Store
from testing.tiny_run import VOCABULARY, tiny_recipe


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Supervisor]:
    """A supervisor of one worker that takes its statuses from a function, without Ray and without waiting."""
    monkeypatch.setattr(supervisor, "_LOOK", 0.0)
    monkeypatch.setattr(supervisor, "_AGAIN", 0.0)
    monkeypatch.setattr(ray, "get", lambda answer, timeout=None: answer())
    recipe, store = tiny_recipe(tmp_path), Store(str(tmp_path))
    job = TrainJob(recipe, recipe.train.stages[0], VOCABULARY, store, {}, None, store)

    def of(statuses: Callable[[], list[WorkerStatus]]) -> Supervisor:
        return Supervisor(job, SimpleNamespace(statuses=SimpleNamespace(remote=lambda: statuses)), 1)

    return of


def silent(seconds: float) -> list[WorkerStatus]:
    return [WorkerStatus(Heartbeat(1, 0, 100, 0.0, "a1b2c3d4e5"), silent=seconds, still=seconds)]


def test_an_answer_that_fails_is_logged_once_and_ends_no_watch(
    watched: Callable[..., Supervisor], caplog: pytest.LogCaptureFixture
) -> None:
    failures, again = ["no answer", "no answer", "no node"], threading.Event()

    def statuses() -> list[WorkerStatus]:
        if failures:
            raise RayError(failures.pop(0))
        again.set()
        return []

    with caplog.at_level(logging.WARNING, "ringworld"), watched(statuses):
        assert again.wait(60)
    assert [record.message for record in caplog.records] == [
        f"train-text: the workers cannot be watched: {why}; trying again" for why in ("no answer", "no node")
    ]


def test_whoever_could_not_be_ended_is_ended_again_and_whoever_was_is_not(
    watched: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[bool] = []
    looks, ended = iter(range(1801, 10_000)), threading.Event()

    def kill() -> None:
        tried.append(len(tried) == 1)
        if not tried[-1]:
            raise RayError("the node does not answer")
        ended.set()

    monkeypatch.setattr(supervisor, "end_worker", lambda worker: kill)
    with watched(lambda: silent(next(looks))) as seen:
        assert ended.wait(60)
    seen._look()
    assert tried == [False, True]
    assert seen.hang is not None
    assert "not answered for 1801 s" in seen.hang, "the first time counts"


def test_a_watch_that_fails_to_answer_after_sigterm_is_asked_again_before_the_deadline(
    watched: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, asked, interrupts = [RayError("not now"), 1.0], [], []

    def first_report() -> float:
        answer = answers.pop(0)
        if isinstance(answer, RayError):
            raise answer
        return answer

    supervised = watched(list)
    supervised._watch.first_report = SimpleNamespace(remote=lambda: first_report)
    supervised._watch.ask_to_stop = SimpleNamespace(remote=asked.append)
    monkeypatch.setattr(supervisor.stop_signals, "interrupt", lambda: interrupts.append(1))
    with pytest.raises(RayError):
        supervised._end_run(100.0)
    for now in (101.0, 102.0):
        supervised._end_run(now)
    assert (asked, interrupts) == ([Stop.AFTER_STEP], [])
    supervised._end_run(100.0 + supervised._train.grace_seconds)
    assert interrupts == [1]


def test_a_watch_that_never_answers_delays_the_end_no_longer_than_the_grace(
    watched: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def silence() -> None:
        raise RayError("gone")

    interrupts: list[int] = []
    supervised = watched(list)
    supervised._watch.first_report = SimpleNamespace(remote=lambda: silence)
    monkeypatch.setattr(supervisor.stop_signals, "interrupt", lambda: interrupts.append(1))
    for now in (100.0, 101.0):
        with pytest.raises(RayError):
            supervised._end_run(now)
    supervised._end_run(100.0 + supervised._train.grace_seconds)
    assert interrupts == [1]
