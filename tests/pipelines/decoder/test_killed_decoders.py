"""Decoders that are killed while a stage runs leave no trace in what it makes."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipelines.decoder.client import MEDIA, TABLES
from pipelines.recipe import Recipe
from pipelines.run import _run_all, plan_recipe
from pipelines.tokenize.record import TokenizeRecord, read_partitions
from testing.finished_stages import only_output
from testing.miniature import recipe

_KILLS = 12


def kill_decoders(killed: set[int], stop: threading.Event) -> None:
    """Kill decoders of this process's Ray as they come, whatever they are at: starting, decoding, waiting.

    killed: those that were started meanwhile. Those that earlier tests have left waiting end too, and are not counted.
    """
    began, ended = time.time(), set[int]()
    while not stop.is_set() and len(killed) < _KILLS:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.pid not in ended and {MEDIA, TABLES} & set(process.cmdline()):
                    is_new = process.create_time() >= began
                    time.sleep(0.15 * (len(killed) % 4))
                    process.kill()
                    ended.add(process.pid)
                    if is_new:
                        killed.add(process.pid)
        time.sleep(0.01)


@pytest.mark.faults
@pytest.mark.usefixtures("local_ray")
def test_a_stage_whose_decoders_are_killed_makes_the_same_bytes(
    undisturbed: Path, sources: Path, tmp_path: Path
) -> None:
    stages = plan_recipe(Recipe.model_validate(recipe(sources, tmp_path / "run")))[:3]  # which reads side data, too
    killed: set[int] = set()
    stop = threading.Event()
    killer = threading.Thread(target=kill_decoders, args=(killed, stop))
    killer.start()
    try:
        _run_all(stages)
    finally:
        stop.set()
        killer.join()
    assert len(killed) >= 4
    ours, theirs = (only_output(root, "tokenize", TokenizeRecord) for root in (tmp_path / "run", undisturbed))
    assert read_partitions(ours) == read_partitions(theirs) != []
    assert ours.shared.hashes("documents") == theirs.shared.hashes("documents")
