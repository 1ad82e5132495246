"""The pool of encoders grows while calls wait, shrinks when none come, and answers every call though encoders die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from pipelines.cluster.placement import PlacementWait
from pipelines.cluster.ray_cluster import own_errors
from pipelines.recipe import EncoderResources, Resources
from pipelines.tokenize import encoder_pool as encoder_pools
from pipelines.tokenize.encoder_pool import encoder_pool, wait_until_ready
from storage.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

PATIENCE = 60.0
KILLER = 666
"""Frames with which every encoder dies."""


@ray.remote(num_cpus=0)
class Doubler:
    """Takes its time; leaves its process id in a folder, and on its way out of `frames` also when it began."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds

    def load(self) -> None:
        if (hangs := self.folder / "hangs").exists():
            hangs.unlink()
            time.sleep(1000)
        if (self.folder / "no-weights").exists():
            raise UserError("no weights here; write them again")
        (self.folder / f"{os.getpid()}.pid").touch()

    def encode(self, frames: np.ndarray) -> np.ndarray:
        if frames[0] == KILLER:
            os.kill(os.getpid(), signal.SIGKILL)
        if frames[0] < 0:
            raise ValueError("a negative frame")
        time.sleep(self.seconds)
        return 2 * frames


def pids(folder: Path) -> set[int]:
    """Of the encoders that were started and live."""
    found = {int(path.stem) for path in folder.glob("*.pid")}
    return {pid for pid in found if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE}


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def size(least: int, most: int, **more: float) -> EncoderResources:
    return EncoderResources(min_workers=least, workers=most, **more)


def call(pool: Any, *numbers: int) -> list[ray.ObjectRef]:
    return [pool.encode.remote([ray.put(np.array([number]))], f"clip-{number}.mp4") for number in numbers]


def test_it_starts_with_the_least_grows_to_the_most_and_shrinks_again(tmp_path: Path) -> None:
    with encoder_pool(Doubler, (tmp_path, 0.3), size(1, 3, idle_seconds=0.1)) as pool:
        assert wait_until_ready(pool) == 1
        assert len(pids(tmp_path)) == 1
        answers = call(pool, *range(60))
        wait_for(lambda: len(pids(tmp_path)) == 3)
        assert [int(answer[0]) for answer in ray.get(answers)] == [2 * number for number in range(60)]
        assert len(list(tmp_path.iterdir())) == 3, "never more than the most"
        wait_for(lambda: len(pids(tmp_path)) == 1)
        assert int(ray.get(call(pool, 4))[0][0]) == 8
        last = pids(tmp_path)
    wait_for(lambda: not pids(tmp_path) & last)


@pytest.mark.faults
def test_killed_encoders_are_replaced_and_their_calls_made_again(tmp_path: Path) -> None:
    with encoder_pool(Doubler, (tmp_path, 0.2), size(2, 2)) as pool:
        wait_until_ready(pool)
        answers: list[ray.ObjectRef] = []
        for begin in (0, 20, 40):  # enough that none is idle, whose end is noticed only when it is called
            answers += call(pool, *range(begin, begin + 20))
            ray.wait(answers[begin:], num_returns=2)
            victim = next(iter(pids(tmp_path)))
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda: victim not in pids(tmp_path) and len(pids(tmp_path)) == 2)  # noqa: B023
        assert [int(answer[0]) for answer in ray.get(answers)] == [2 * number for number in range(60)]
        assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.faults
def test_the_pools_own_death_costs_a_repetition(tmp_path: Path) -> None:
    with encoder_pool(Doubler, (tmp_path, 0.2), size(1, 1)) as pool:
        answers = call(pool, *range(6))
        ray.get(answers[0])
        before = pids(tmp_path)
        ray.kill(pool, no_restart=False)
        assert [int(answer[0]) for answer in ray.get(answers)] == [2 * number for number in range(6)]
        wait_for(lambda: not pids(tmp_path) & before)


def test_what_encoding_raises_reaches_its_caller_alone(tmp_path: Path) -> None:
    with encoder_pool(Doubler, (tmp_path, 0.0), size(1, 1)) as pool:
        good, bad, after = call(pool, 1, -1, 2)
        assert [int(ray.get(answer)[0]) for answer in (good, after)] == [2, 4]
        with pytest.raises(ValueError, match="a negative frame"):
            ray.get(bad)


def test_a_users_mistake_in_the_weights_fails_every_call_with_its_sentence(tmp_path: Path) -> None:
    (tmp_path / "no-weights").touch()
    with encoder_pool(Doubler, (tmp_path, 0.0), size(2, 4)) as pool:
        for answer in call(pool, 1, 2, 3):
            with pytest.raises(UserError, match=r"^no weights here; write them again$"), own_errors():
                ray.get(answer)
        with pytest.raises(UserError, match=r"^no weights here"), own_errors():
            ray.get(call(pool, 4))


@pytest.mark.faults
def test_an_encoder_that_never_gets_ready_is_replaced_though_calls_wait(tmp_path: Path) -> None:
    (tmp_path / "hangs").touch()
    with encoder_pool(Doubler, (tmp_path, 0.0), size(1, 1), start_seconds=5) as pool:
        assert int(ray.get(call(pool, 4))[0][0]) == 8


@pytest.mark.faults
def test_encoders_that_cannot_start_fail_no_call_while_another_works(tmp_path: Path) -> None:
    with encoder_pool(Doubler, (tmp_path, 0.3), size(1, 2)) as pool:
        wait_until_ready(pool)
        (tmp_path / "no-weights").touch()
        answers = call(pool, *range(20))  # long enough that the pool tries to grow
        assert [int(answer[0]) for answer in ray.get(answers)] == [2 * number for number in range(20)]


@pytest.mark.faults
def test_frames_that_kill_every_encoder_fail_their_own_call_with_their_names(tmp_path: Path) -> None:
    with encoder_pool(Doubler, (tmp_path, 0.1), size(1, 1)) as pool:
        before, killer, after = call(pool, 1, KILLER, 2)
        with pytest.raises(UserError, match=r"^tokenize: 5 encoders died .* frames of clip-666.mp4 "), own_errors():
            ray.get(killer)
        assert [int(ray.get(answer)[0]) for answer in (before, after)] == [2, 4]
        assert len(list(tmp_path.iterdir())) >= 5


def test_a_pool_whose_encoders_have_no_place_says_so_and_ends(tmp_path: Path) -> None:
    needs = Resources(custom={"encode": 1})
    wait = PlacementWait("tokenize.encode", needs, seconds=0.0)
    with encoder_pool(Doubler.options(**needs.ray_options), (tmp_path, 0.0), size(1, 1), wait) as pool:
        (answer,) = call(pool, 1)
        with (
            pytest.raises(UserError, match=r"^tokenize.encode: the cluster has had no nodes for .*'encode'"),
            own_errors(),
        ):
            ray.get(answer)


@pytest.mark.faults
def test_a_pool_that_dies_again_and_again_ends_the_stage_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_pools, "_POOL_RESTARTS", 1)

    def encode_with_a_pool_that_dies() -> None:
        with encoder_pool(Doubler, (tmp_path, 60.0), size(1, 1)) as pool:
            (answer,) = call(pool, 1)
            for deaths in (1, 2):
                wait_for(lambda: len(list(tmp_path.iterdir())) == deaths)  # noqa: B023
                ray.kill(pool, no_restart=False)
            ray.get(answer)

    with pytest.raises(UserError, match=r"^tokenize: the pool of encoders on the driver's node died more than 1 times"):
        encode_with_a_pool_that_dies()
