"""A task runs as its driver would: it refuses other code than the driver's, and logs at the driver's level."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import ray

from pipelines.cluster.ray_cluster import own_errors
from pipelines.cluster.same_code import as_driver, check_nodes
from storage.errors import UserError

pytestmark = pytest.mark.slow

SENTENCE = r"^node \S+ imports Ringworld from \S+, which is other code than this run's, from \S+; install"


def work(mark: str) -> str:
    with Path(mark).open("a") as file:
        file.write("worked\n")
    return mark


@pytest.mark.usefixtures("local_ray")
def test_a_task_runs_where_the_code_is_the_same(tmp_path: Path) -> None:
    mark = str(tmp_path / "mark")
    assert ray.get(ray.remote(as_driver(work)).remote(mark)) == mark
    assert Path(mark).read_text() == "worked\n"


@pytest.mark.usefixtures("local_ray")
def test_a_task_of_other_code_is_refused_with_one_sentence_and_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    with monkeypatch.context() as other:
        other.setattr("pipelines.cluster.same_code.code_version", lambda: "other")
        task = ray.remote(max_retries=-1)(as_driver(work))
    with pytest.raises(UserError, match=SENTENCE), own_errors():
        ray.get(task.remote(str(mark)), timeout=60)
    assert not mark.exists()


@pytest.mark.usefixtures("local_ray")
def test_nodes_are_asked_what_code_they_import(monkeypatch: pytest.MonkeyPatch) -> None:
    check_nodes()
    monkeypatch.setattr("pipelines.cluster.same_code.code_version", lambda: "other")
    with pytest.raises(UserError, match=SENTENCE):
        check_nodes()


@pytest.mark.usefixtures("local_ray")
def test_a_task_logs_at_the_drivers_level(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> list[bool]:
        log = logging.getLogger("ringworld.model.checkpoint.loader")
        return [log.isEnabledFor(level) for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)]

    log = logging.getLogger("ringworld")
    monkeypatch.setattr(log, "level", log.level)
    for level, expected in ((logging.ERROR, [False, False, False, True]), (logging.DEBUG, [True] * 4)):
        log.setLevel(level)
        assert ray.get(ray.remote(as_driver(shown)).remote()) == expected
