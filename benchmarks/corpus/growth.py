"""What one more object costs a corpus of real clips on a real S3 server, and another field spec.

In: how many clips. Out: a report of what the tokenize stage made anew and the CPU seconds that the machine spent on it,
this process and all that it started: at first, with one clip more, and when the field spec is another.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import machine
from pipelines.dag.manifest import read_manifest
from pipelines.recipe import Recipe
from pipelines.run import plan_recipe, run_stages
from pipelines.tokenize.record import TokenizeRecord
from storage.store import Store
from testing.miniature import recipe
from testing.s3_server import object_store
from testing.tiny_run import write_clip
from tokenization.codecs.vqgan.config import VQGANConfig
from tokenization.codecs.vqgan.model import VQGAN, build_vqgan

CLIPS, FPS = 10_000, 4
SHARE = 0.05


def growth_report(clips: int = CLIPS) -> dict[str, Any]:
    """Three rows, and the targets."""
    with object_store() as store, tempfile.TemporaryDirectory(prefix="ringworld-bench-") as scratch:
        folder = Path(scratch)
        write_clip(folder / "clip.mp4", 2, frames=16)
        clip = (folder / "clip.mp4").read_bytes()
        bucket = Store(f"{store.url}/data", store.options)
        for number in range(clips):
            _put(bucket, number, clip)
        VQGAN(build_vqgan(VQGANConfig.small(), seed=5)).save(folder / "vqgan")
        tree = _tree(folder, store.url, store.options)
        rows = [_row("first", tree)]
        _put(bucket, clips, clip)
        rows.append(_row("one more", tree))
        tree["sources"]["clips"]["fields"] = ["[vision],vision"]
        rows.append(_row("another field spec", tree))
    return {"benchmark": "growth", "machine": machine(), "claims": claims(rows), "rows": rows}


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One clip's frames are encoded for one clip more, none for another field spec; the rest costs next to nothing."""
    first, more, other = rows
    of_a_clip = more["frames"] - first["frames"]
    found = [
        ("one clip more: frames encoded besides its own", 0, more["frames_encoded"] - of_a_clip),
        ("one clip more: share of the first CPU seconds", SHARE, round(more["cpu_s"] / first["cpu_s"], 4)),
        ("another field spec: frames encoded", 0, other["frames_encoded"]),
    ]
    return [
        {"claim": f"{claim} at most", "target": target, "measured": measured, "met": measured <= target}
        for claim, target, measured in found
    ]


def _put(bucket: Store, number: int, clip: bytes) -> None:
    with bucket.writing(f"{number // 1000:03d}/{number:06d}.mp4") as file:
        file.write(clip)


def _tree(folder: Path, url: str, options: dict[str, Any]) -> dict[str, Any]:
    made = recipe(url, f"{url}/run", text_tokenizer={})
    made["storage"] = {"root": f"{url}/run", "data": f"{url}/data", "options": options}
    made["sources"] = {"clips": {"urls": ["*/*.mp4"], "fields": ["vision"]}}
    made["vqgan"] = {"config": "small", "weights": str(folder / "vqgan")}
    made["tokenize"] = {"fps": FPS, "decode": {"workers": 2}}
    made["train"]["stages"] = [made["train"]["stages"][1] | {"mixture": {"clips": 1}}]
    return made


def _row(state: str, tree: dict[str, Any]) -> dict[str, Any]:
    model = Recipe.model_validate(tree)
    stages = plan_recipe(model, until="tokenize")
    seconds = _cpu_of_all(lambda: run_stages(stages, Store(model.storage.root, model.storage.options)))
    manifest = read_manifest(stages[-1].store, TokenizeRecord)
    assert manifest is not None
    figures = manifest.record.figures
    return {
        "state": state,
        "documents": figures.documents,
        "frames": figures.frames,
        "frames_encoded": figures.frames_encoded,
        "partitions_made": figures.partitions_made,
        "cpu_s": round(seconds, 1),
    }


def _cpu_of_all(work: Callable[[], object]) -> float:
    """CPU seconds of the machine meanwhile, which is to have nothing else to do; the S3 server's are among them."""
    before = psutil.cpu_times()
    work()
    after = psutil.cpu_times()
    return (after.user + after.system + after.nice) - (before.user + before.system + before.nice)
