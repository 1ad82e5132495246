"""pipelines/pulse.py: who hangs, from what each worker last said."""

from __future__ import annotations

from typing import Any

from pipelines.pulse import Beat, Standing, Watch, find_hang

LIMIT = 10.0


def standing(rank: int, step: int = 7, part: str = "train", silent: float = 0.5, still: float = 0.5) -> Standing:
    return Standing(Beat(1, rank, 100 + rank, 0.0, "a1b2c3d4e5", step, part), silent, still)


def ranks_of(*standings: Standing) -> list[int] | None:
    hang = find_hang(standings, LIMIT)
    return None if hang is None else [worker.rank for worker in hang.workers]


def test_nobody_hangs_while_someone_gets_on() -> None:
    assert ranks_of() is None
    assert ranks_of(standing(0), standing(1)) is None
    assert ranks_of(standing(0, still=99), standing(1)) is None


def test_whoever_is_silent_hangs_whatever_the_others_do() -> None:
    assert ranks_of(standing(0, still=11), standing(1, silent=11, still=11), standing(2, still=11)) == [1]
    assert ranks_of(standing(0), standing(1, part="save", silent=11)) == [1]


def test_where_all_stand_still_the_one_furthest_behind_is_waited_for() -> None:
    waiting = standing(0, still=11)
    assert ranks_of(waiting, standing(1, part="load", still=11), standing(2, still=11)) == [1]
    assert ranks_of(waiting, standing(1, step=6, still=11)) == [1]
    assert ranks_of(waiting, standing(1, still=11)) == [0, 1], "a network that hangs is everyone's"


def test_starting_saving_and_exporting_take_as_long_as_they_take() -> None:
    for part in ("start", "save", "export"):
        assert ranks_of(standing(0, part=part, still=99), standing(1, still=99)) is None


def test_a_hang_is_told_by_rank_process_node_and_place() -> None:
    hang = find_hang([standing(0, still=12.4), standing(3, part="load", still=11.9)], LIMIT)
    assert hang is not None
    assert hang.reason == "rank 3 (process 103 on node a1b2c3d4) has not got on for 12 s, amid step 7: load"


def test_a_watch_counts_from_the_last_change_and_forgets_groups_before(monkeypatch: Any) -> None:
    now = [100.0]
    monkeypatch.setattr("pipelines.pulse.time.monotonic", lambda: now[0])
    watch = Watch()
    watch.begin(1)
    watch.beat(standing(0).beat)
    now[0] = 103.0
    watch.beat(standing(0).beat)
    now[0] = 105.0
    (seen,) = watch.standings()
    assert (seen.silent, seen.still) == (2.0, 5.0)
    watch.beat(standing(0, step=8).beat)
    (seen,) = watch.standings()
    assert (seen.silent, seen.still) == (0.0, 0.0)
    watch.begin(2)
    watch.beat(standing(0).beat)
    assert watch.standings() == []
