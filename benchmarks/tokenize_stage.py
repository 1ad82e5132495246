"""The whole tokenize stage on this machine's cores, from videos on S3 to committed documents.

In: a store, weights, how much video. Out: frames a second beside a bare encoder on the same cores, whose frames are in
memory and which has nothing else to do; and what each of the stage's processes holds in memory, over short clips with
LWM's VQGAN and over one long video with a small one.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.frames_alone import forks, write_vqgan
from benchmarks.looped_clip import FPS, SIZE, pictures, upload_looped
from pipelines.cluster.capacity import Capacity
from pipelines.cluster.progress import bar
from pipelines.cluster.ray_cluster import ray_instance
from pipelines.codecs.record import WEIGHTS
from pipelines.recipe import Recipe
from pipelines.sources.list_sources import list_sources
from pipelines.tokenize.codes.place import codes_place
from pipelines.tokenize.encode_media import vqgan_pool
from pipelines.tokenize.encoder_pool import wait_until_ready
from pipelines.tokenize.partition import Partitions
from pipelines.tokenize.run import TokenizePlace, encoding_of, tokenize_by
from storage.errors import UserError
from storage.store import Store
from testing.s3_server import ObjectStore
from tokenization.codecs.vqgan.config import VQGANConfig
from tokenization.codecs.vqgan.model import VQGAN

SMALL = VQGANConfig(
    resolution=SIZE,
    channels=(8, 8, 8, 8, 8),
    res_blocks=1,
    latent_channels=8,
    embed_dim=8,
    codebook_size=8192,
    norm_groups=4,
)
"""Of the same frames and as many codes as LWM's, and next to no work."""


def bench_cluster(store: ObjectStore) -> Any:
    """A Ray instance of our own, whose workers find the store's credentials where a user's would."""
    os.environ.update(store.environment, OMP_NUM_THREADS="1")
    return ray_instance(None, Capacity(cpus=2 * _cores()))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _recipe(store: ObjectStore, urls: str, sizes: VQGANConfig, **tokenize: Any) -> Recipe:
    stage = {"name": "none", "context": 1024, "rope_theta": 1e4, "steps": 1, "batch_tokens": 1024, "lr": 1e-3}
    cores = _cores()
    return Recipe.model_validate(
        {
            "name": "bench",
            "storage": {"root": f"{store.url}/run", "data": store.url},
            "sources": {"clips": {"urls": [urls], "fields": ["vision"]}},
            "vqgan": {"config": sizes.to_dict(), "weights": "none", "precision": "bf16"},
            "tokenize": {
                "fps": FPS,
                "max_frames": 10**6,
                "partition_bytes": 1,  # a task for each clip, as for those of a large corpus
                "decode": {"workers": 2 * cores, "cpus": 0.5},  # most of them wait for codes
                "encode": {"workers": cores, "min_workers": cores},
                **tokenize,
            },
            "train": {"stages": [{**stage, "mixture": {"clips": 1}, "objective": "vision-text"}]},
        }
    )


def pipeline_figures(
    weights: Path, sizes: VQGANConfig, store: ObjectStore, frames: int, clips: int, rounds: int
) -> dict[str, Any]:
    """Frames a second of the stage over `clips` videos of so many frames in all, and of the bare encoder on as many
    cores, by turns; and the memory of the stage's processes.
    """
    for number in range(clips):
        upload_looped(store, f"clips/{number}.mp4", frames // clips / FPS)
    recipe = _recipe(store, "clips/*.mp4", sizes, chunk_frames=2)
    rates: dict[str, list[float]] = {"ringworld": [], "bare": []}
    memory: dict[str, float] = {}
    for number in range(rounds):
        with _encoders(recipe, weights) as pool:
            # Once, for workers that are started and have their imports done, as the bare encoders do. With the same
            # encoders: new ones would take the idle workers, and others had to be started for decoding.
            _stage(pool, recipe, Store(f"{store.url}/first-{number}"), limit=recipe.tokenize.decode.workers)
            with _watched(memory):
                made, seconds = _stage(pool, recipe, Store(f"{store.url}/stage-{number}"))
        rates["ringworld"].append(made / seconds)
        rates["bare"].append(_bare(weights, made))
    best = {name: round(max(found), 3) for name, found in rates.items()}
    return {**best, "over_bare": round(best["ringworld"] / best["bare"], 3), "memory": memory}


@contextlib.contextmanager
def _encoders(recipe: Recipe, weights: Path) -> Iterator[Any]:
    """The recipe's pool of encoders, started and ready."""
    assert recipe.vqgan is not None
    with vqgan_pool(recipe.vqgan, Store(str(weights)), recipe.tokenize.encode) as pool:
        wait_until_ready(pool)
        yield pool


def _stage(pool: Any, recipe: Recipe, output: Store, limit: int | None = None) -> tuple[int, float]:
    """Frames and seconds of the tokenize stage by encoders that are ready, to its last commit; limit: of objects."""
    settings: dict[str, dict[str, Any]] = {name: {} for name in recipe.sources}
    partitions = Partitions(list_sources(recipe)[:limit], recipe.tokenize.partition_bytes, settings)
    place = TokenizePlace(output.at("stage", "0" * 16), output.at("stage"), output.at("codes"))
    assert recipe.vqgan is not None
    encoding = encoding_of(recipe.vqgan, "of the benchmark", recipe.tokenize.fps)
    started = time.perf_counter()
    with codes_place(place.codes, encoding) as codes, bar("tokenize", None, "part") as line:
        made = tokenize_by(pool, codes, recipe, partitions, {}, place, line)
    return made.record.figures.frames, time.perf_counter() - started


def _bare(weights: Path, frames: int) -> float:
    """Frames a second of one encoder a core, each a process of one thread that has its share of the frames."""
    cores = _cores()
    share = pictures(frames // cores)
    barrier = forks().Manager().Barrier(cores)
    with ProcessPoolExecutor(cores, mp_context=forks()) as pool:
        spans = list(pool.map(_encode_share, *zip(*[(weights, share, barrier)] * cores)))
    return len(share) * cores / (max(end for _, end in spans) - min(start for start, _ in spans))


def _encode_share(weights: Path, frames: np.ndarray, barrier: Any) -> tuple[float, float]:
    torch.set_num_threads(1)
    vqgan = VQGAN.load(weights / WEIGHTS, dtype=torch.bfloat16)
    barrier.wait()
    started = time.monotonic()
    vqgan.encode(frames)
    return started, time.monotonic()


def hour_figures(folder: Path, store: ObjectStore, seconds: int) -> dict[str, Any]:
    """Frames, seconds and memory of the stage over one video of so many seconds. folder: for the weights."""
    upload_looped(store, "hour.mp4", seconds)
    write_vqgan(folder, SMALL)
    recipe = _recipe(store, "hour.mp4", SMALL)
    memory: dict[str, float] = {}
    with _encoders(recipe, folder) as pool, _watched(memory):
        frames, took = _stage(pool, recipe, Store(f"{store.url}/stage-hour"))
    if abs(frames / FPS - seconds) > 6:
        raise UserError(f"the long video of {seconds} s gave {frames} frames, at {FPS} a second")
    return {"frames": frames, "seconds": round(took, 1), "memory": memory}


@contextlib.contextmanager
def _watched(peaks: dict[str, float]) -> Iterator[None]:
    """Note the most GiB that any of Ray's workers and their children ever had resident, by what they do.

    The kernel keeps the mark, so that a look now and then misses nothing of a process that lives on, and costs next to
    nothing of the cores that are measured.
    """
    stop = threading.Event()

    def watch() -> None:
        last_look, pause = False, 0.2
        while not last_look:
            last_look = stop.wait(pause)
            pause = min(5.0, 1.5 * pause)  # often at first: a short stage's tasks are over before long
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error, OSError):
                    if role := _role(process):
                        peaks[role] = max(peaks.get(role, 0.0), round(_high_water_mark(process.pid), 3))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _high_water_mark(pid: int) -> float:
    """GiB resident at most so far (VmHWM of proc_pid_status(5)); 0 of a process that has ended."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    kib = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")]
    return sum(kib) / 2**20


def _role(process: psutil.Process) -> str | None:
    """What a process does for the stage; None for Ray's own servers."""
    said = " ".join(process.cmdline())
    if said.startswith("ray::"):
        return said.removeprefix("ray::").split("(")[0].split(".")[0].split(":")[0].strip()
    return "decoder" if "pipelines.decoder" in said else None
