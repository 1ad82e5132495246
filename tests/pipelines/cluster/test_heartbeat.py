"""pipelines/cluster/heartbeat.py: who hangs, from each worker's last heartbeat."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipelines.cluster.heartbeat import START_SECONDS, Heartbeat, Watch, WorkerStatus, find_hang

LIMIT = 10.0


def status(
    rank: int, step: int = 7, part: str = "train", silent: float = 0.5, still: float = 0.5, waits: bool = False
) -> WorkerStatus:
    return WorkerStatus(Heartbeat(1, rank, 100 + rank, 0.0, "a1b2c3d4e5", step, part, waits=waits), silent, still)


def ranks_of(*statuses: WorkerStatus) -> list[int] | None:
    hang = find_hang(statuses, LIMIT, len(statuses))
    return None if hang is None else [worker.rank for worker in hang.workers]


def test_nobody_hangs_while_someone_gets_on() -> None:
    assert ranks_of() is None
    assert ranks_of(status(0), status(1)) is None
    assert ranks_of(status(0, still=99), status(1)) is None


def test_whoever_is_silent_hangs_whatever_the_others_do() -> None:
    assert ranks_of(status(0, still=11), status(1, silent=11, still=11), status(2, still=11)) == [1]
    assert ranks_of(status(0), status(1, part="save", silent=11)) == [1]


def test_where_all_stand_still_the_one_furthest_behind_is_waited_for() -> None:
    waiting = status(0, still=11)
    assert ranks_of(waiting, status(1, part="load", still=11), status(2, still=11)) == [1]
    assert ranks_of(waiting, status(1, step=6, still=11)) == [1]
    assert ranks_of(waiting, status(1, still=11)) == [0, 1], "a network that hangs is everyone's"


@pytest.mark.parametrize("part", ["start", "save", "export"])
def test_whoever_is_silent_while_it_starts_saves_or_exports_hangs(part: str) -> None:
    assert ranks_of(status(0, part=part), status(1, part=part, silent=11)) == [1]


@pytest.mark.parametrize(("part", "limit"), [("start", START_SECONDS), ("save", LIMIT), ("export", LIMIT)])
def test_whoever_all_others_wait_for_while_they_start_save_or_export_hangs(part: str, limit: float) -> None:
    def ranks(still: float, still_of_last: float, waits: bool = False) -> list[int] | None:
        others = [status(rank, part=part, still=still, waits=True) for rank in (0, 1)]
        return ranks_of(*others, status(2, part=part, still=still_of_last, waits=waits))

    assert ranks(limit + 1, limit + 1) == [2]
    assert ranks(limit - 1, limit - 1) is None
    assert ranks(limit + 1, 1) is None, "it has done another piece"
    assert ranks(limit + 1, limit + 1, waits=True) == [0, 1, 2], "a network that hangs is everyone's"


def test_a_checkpoint_is_saved_before_the_next_batch_is_loaded() -> None:
    assert ranks_of(status(0, part="save", still=11), status(1, part="load", still=11)) == [0]
    assert ranks_of(status(0, part="save", still=11), status(1, part="export", still=11)) == [0]
    assert ranks_of(status(0, part="save", still=11), status(1, step=6, still=11)) == [1]


def test_that_a_checkpoint_was_written_excuses_nobody_within_a_step() -> None:
    written, behind = status(0, still=11, waits=True), status(1, still=11)
    assert ranks_of(written, behind) == [0, 1]


def test_whoever_is_never_heard_of_ends_the_group_that_waits_for_it() -> None:
    hang = find_hang([status(0, step=0, part="start", still=START_SECONDS + 1)], LIMIT, size=2)
    assert hang is not None
    assert [worker.rank for worker in hang.workers] == [0]
    assert hang.reason == "rank 1 not heard of while rank 0 (process 100 on node a1b2c3d4) has waited for 301 s"
    assert find_hang([status(0, step=0, part="start", still=LIMIT + 1)], LIMIT, size=2) is None


def test_a_hang_is_named_by_rank_process_node_and_place() -> None:
    hang = find_hang([status(0, still=12.4), status(1, part="load", still=11.9)], LIMIT, 2)
    assert hang is not None
    assert hang.reason == "rank 1 (process 101 on node a1b2c3d4) has not got on for 12 s, amid step 7: load"


def test_a_watch_counts_from_the_last_change_and_forgets_groups_before(monkeypatch: Any) -> None:
    now = [100.0]
    monkeypatch.setattr("pipelines.cluster.heartbeat.time.monotonic", lambda: now[0])
    watch = Watch()
    watch.begin(1)
    watch.beat(status(0).beat)
    now[0] = 103.0
    watch.beat(status(0).beat)
    now[0] = 105.0
    (seen,) = watch.statuses()
    assert (seen.silent, seen.still) == (2.0, 5.0)
    watch.beat(status(0, step=8).beat)
    (seen,) = watch.statuses()
    assert (seen.silent, seen.still) == (0.0, 0.0)
    for part, still in (("train", 2.0), ("save", 0.0)):
        watch.beat(status(0, step=8, part=part).beat)
        now[0] += 2.0
        watch.beat(replace(status(0, step=8, part=part).beat, pieces=1))
        (seen,) = watch.statuses()
        assert seen.still == still, "pieces count where a part is made of them"
    watch.begin(2)
    watch.beat(status(0).beat)
    assert watch.statuses() == []
