"""What planning costs of 10,000, 100,000 and a million objects: CPU seconds, memory, and how the time grows.

In: a bucket that answers real listings over HTTP from a process of its own (`testing.listed_bucket`), so that nothing
but the objects themselves is made up: a thousand videos to a folder, and twenty patterns of `heldout`. Out: a report.

    cold        `ringworld plan` in a run of which nothing is committed.
    unchanged   the same when the listing is committed and nothing has changed.
    grown       the same when three objects are new, of which the plan says so.
    delayed     listing alone, each request answered after 25 ms, and what one request after the other would wait.
    local       listing local files, whose content is hashed once, and again, when nothing has changed.

Every measurement of a plan runs in a process of its own, which has planned for ten objects before, so that imports are
over. CPU seconds are those of the process: with imports in `cpu_s`, without in `plan_s`, over which the exponent is
fitted.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from pipelines.dag.stage import StageContext
from pipelines.recipe import Recipe
from pipelines.run import plan_recipe, run_stage
from storage.urls import list_objects
from testing.listed_bucket import ListedBucket, listed_bucket
from testing.miniature import text_recipe

SIZES = (10_000, 100_000, 1_000_000)
LATENCY = 0.025
GROWN_BY = 3
COLD_CPU_S, UNCHANGED_CPU_S, RSS_GIB, EXPONENT = 120.0, 30.0, 2.0, 1.05
_PAGE = 1000  # objects that a store lists a request
_PER_FOLDER = 1000
_SETTLED_SECONDS = 2.5  # after which the hash of a file is kept


def planning_report(sizes: Sequence[int] = SIZES, local_files: int = 20_000) -> dict[str, Any]:
    """The rows of each size, the largest of the listing that is delayed, and of local files."""
    rows = [row for size in sizes for row in _plan_rows(size)]
    rows += [_delayed_row(max(sizes)), *_local_rows(local_files)]
    return {
        "benchmark": "planning",
        "settings": {"sizes": list(sizes), "objects_per_folder": _PER_FOLDER, "heldout_patterns": len(_heldout())},
        "machine": machine(),
        "claims": claims(rows),
        "rows": rows,
    }


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets at the largest size, which are those of a million objects, and how the time grows with the size."""
    plans = [row for row in rows if "plan_s" in row]
    largest = max(row["objects"] for row in plans)
    by_state = {row["state"]: row for row in plans if row["objects"] == largest}
    delayed = next(row for row in rows if row["state"] == "delayed")
    share = largest / 1_000_000
    found = [
        ("plan of a million objects, cold: CPU seconds", COLD_CPU_S, by_state["cold"]["cpu_s"] / share),
        ("plan of a million objects, unchanged: CPU seconds", UNCHANGED_CPU_S, by_state["unchanged"]["cpu_s"] / share),
        ("plan of a million objects: GiB of memory", RSS_GIB, max(row["rss_gib"] for row in plans)),
        ("listing at 25 ms a request: share of the seconds of one after the other", 1.0, delayed["share_of_serial"]),
    ]
    for state in by_state:
        sizes, seconds = zip(*((row["objects"], row["plan_s"]) for row in plans if row["state"] == state))
        if len(sizes) > 1:
            exponent = round(float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0]), 3)
            found.append((f"time of a plan, {state}, over objects: exponent", EXPONENT, exponent))
    return [
        {"claim": f"{claim} at most", "target": target, "measured": round(measured, 3), "met": measured <= target}
        for claim, target, measured in found
    ]


def _plan_rows(size: int) -> list[dict[str, Any]]:
    """Cold, unchanged and grown, each in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="ringworld-planning-") as root:
        bucket = ListedBucket(size, _PER_FOLDER if size >= 10 * _PER_FOLDER else size // 2)
        grown = replace(bucket, objects=size + GROWN_BY)
        for state, shown in {"cold": bucket, "unchanged": bucket, "grown": grown}.items():
            with listed_bucket(shown) as options:
                rows.append({"state": state, "objects": size, **_apart(root, options, commit=state == "cold")})
        assert rows[1]["notes"] == [note for note in rows[1]["notes"] if "objects new" not in note]
        assert rows[2]["notes"][0].startswith(f"{GROWN_BY} of {size + GROWN_BY:,} objects new, 0 changed, 0 gone")
    for row in rows:
        del row["notes"]
    return rows


def _apart(root: str, options: dict[str, Any], commit: bool) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, root, options, commit).result()


def _measured(root: str, options: dict[str, Any], commit: bool) -> dict[str, Any]:
    """What a plan costs this process, and what it says of the sources. commit: the listing, afterwards."""
    plan_recipe(_recipe(f"{root}/small", options, "clips/000000/clip-0000000*.mp4", []))
    imported = time.process_time()
    recipe = _recipe(root, options, "clips/**/*.mp4", _heldout())
    sources, *_ = plan_recipe(recipe)
    done = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if commit:
        run_stage(sources, StageContext(sources.store, {}))
    return {
        "plan_s": round(done - imported, 3),
        "cpu_s": round(done, 3),
        "rss_gib": round(peak / 2**20, 3),
        "notes": list(sources.notes),
    }


def _recipe(root: str, options: dict[str, Any], pattern: str, heldout: list[str]) -> Recipe:
    tree = text_recipe("s3://data", root, text_tokenizer={})
    tree["vqgan"] = {"config": "small", "train": {"steps": 1}}
    tree["storage"]["options"] = options
    tree["sources"] = {"clips": {"urls": [pattern], "fields": ["vision"], "heldout": heldout}}
    tree["train"]["stages"][0] |= {"mixture": {"clips": 1}, "objective": "vision-text"}
    return Recipe.model_validate(tree)


def _heldout() -> list[str]:
    """Twenty patterns of all kinds: names, folders, globs of one name and over whole URLs."""
    names = [f"clips/000000/clip-{number:08d}.mp4" for number in range(5)]
    return [
        *names,
        "clips/000001/",
        *(f"*/clip-*{n}7.mp4" for n in range(7)),
        *(f"clips/*/*{n}8.mp4" for n in range(7)),
    ]


def _delayed_row(size: int) -> dict[str, Any]:
    """Wall seconds of listing a bucket that takes its time, beside what its pages would take one after the other."""
    with listed_bucket(ListedBucket(size, latency=LATENCY)) as options:
        started = time.monotonic()
        count = len(list_objects("s3://data/clips/**/*.mp4", options))
        seconds = time.monotonic() - started
    serial = -(-size // _PAGE) * LATENCY
    return {
        "state": "delayed",
        "objects": count,
        "wall_s": round(seconds, 2),
        "serial_wait_s": round(serial, 2),
        "share_of_serial": round(seconds / serial, 3),
    }


def _local_rows(count: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="ringworld-planning-") as name:
        folder = Path(name)
        for number in range(count):
            place = folder / "data" / f"{number // _PER_FOLDER:04d}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:08d}.mp4").write_text(f"clip {number}")
        time.sleep(_SETTLED_SECONDS)
        given = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = name
        try:
            return [_local_row(state, f"{folder}/data/**/*.mp4") for state in ("local, hashed", "local, unchanged")]
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            os.environ.update({"XDG_CACHE_HOME": given} if given is not None else {})


def _local_row(state: str, pattern: str) -> dict[str, Any]:
    started = time.process_time()
    count = len(list_objects(pattern))
    return {"state": state, "objects": count, "us_per_object": round((time.process_time() - started) / count * 1e6, 1)}


def print_planning(report: dict[str, Any]) -> None:
    """One line a row, then the claims."""
    for row in report["rows"]:
        figures = "  ".join(f"{name} {value:g}" for name, value in row.items() if name not in ("state", "objects"))
        print(f"{row['state']:>16} {row['objects']:>9,} objects  {figures}")
    for claim in report["claims"]:
        verdict = "met" if claim["met"] else "MISSED"
        print(f"{claim['claim']} {claim['target']:g}: {claim['measured']:g}, {verdict}")
