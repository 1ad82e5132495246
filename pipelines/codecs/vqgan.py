"""The weights of a VQGAN: imported from where the recipe says, or trained on its frames, and then loaded.

Training saves its state every `checkpoint_steps`, so one that is killed ends with the same weights.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.cluster.progress import Meter
from pipelines.codecs.record import WEIGHTS, CodecOutputs, CodecRecord
from pipelines.recipe import Recipe, VisualTokenizer
from pipelines.sources.listing import SourceObject
from pipelines.sources.media import object_frames
from storage.errors import BadData, UserError
from storage.printable import printable
from storage.store import Store
from storage.urls import fetch_file
from tokenization.codecs.vqgan.config import TrainSettings, VQGANConfig, VQGANTraining
from tokenization.codecs.vqgan.import_lwm import load_lwm_vqgan
from tokenization.codecs.vqgan.model import VQGAN
from tokenization.codecs.vqgan.train import train_vqgan
from tokenization.media.frame_sampling import FrameRequest
from tokenization.permutation import derive_key, permute

log = logging.getLogger("ringworld")

_STATE = "training-state.pt"


def load_vqgan(store: Store, recipe: VisualTokenizer, **compute: Any) -> VQGAN:
    """The weights that a finished stage committed."""
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    return VQGAN.load(store.fetch_folder(WEIGHTS), recipe.sizes, dtype=dtype, **compute)


def make_vqgan(recipe: Recipe, objects: Sequence[SourceObject], store: Store, watch: Any) -> CodecRecord:
    """Commit the weights of the recipe's VQGAN to the stage's folder. objects: what it is trained on, if it is."""
    assert recipe.vqgan is not None
    is_imported = recipe.vqgan.weights is not None
    vqgan, figures = _import(recipe.vqgan, store.options) if is_imported else _train(recipe, objects, store, watch)
    with tempfile.TemporaryDirectory() as folder:
        vqgan.save(folder)
        for path in sorted(Path(folder).iterdir()):
            with store.writing(f"{WEIGHTS}/{path.name}") as file:
                file.write(path.read_bytes())
    store.delete(_STATE)
    return CodecRecord(CodecOutputs(WEIGHTS, vqgan.fingerprint, store.hashes(WEIGHTS)), figures)


def _import(recipe: VisualTokenizer, options: dict[str, Any]) -> tuple[VQGAN, dict[str, Any]]:
    assert recipe.weights is not None
    if recipe.weights.endswith((".pkl", ".pickle")) or Path(recipe.weights).is_file():
        vqgan = load_lwm_vqgan(fetch_file(recipe.weights, options), recipe.sizes.resolution)
        vqgan.require(recipe.sizes, recipe.weights)
        return vqgan, {}
    return VQGAN.load(Store(recipe.weights, options).fetch_folder(), recipe.sizes), {}


def _train(recipe: Recipe, objects: Sequence[SourceObject], store: Store, watch: Any) -> tuple[VQGAN, dict[str, Any]]:
    sizes, settings = _training(recipe)
    meter = Meter("vqgan")
    last: dict[str, float] = {}

    def report(step: int, figures: dict[str, float]) -> None:
        last.update(figures)
        meter.set(**figures)
        if step % 5 == 0 or step == settings.steps:
            watch.report.remote(step, {key: figures[key] for key in ("loss", "psnr", "live_codes")})

    def save(state: dict[str, Any]) -> None:
        with store.writing(_STATE) as file:
            torch.save(state, file)

    state = None
    if store.exists(_STATE):
        with store.open(_STATE) as file:
            state = torch.load(file, weights_only=True)
        log.info("vqgan: carries on at step %d", state["step"])
    with tempfile.TemporaryFile() as scratch:
        frames, weights = _gather(recipe, objects, scratch)
        full = TrainSettings(**vars(settings), seed=recipe.seed)
        vqgan = train_vqgan(frames, sizes, full, weights=weights, progress=report, state=state, save=save)
    return vqgan, {"frames": len(frames), "steps": settings.steps, **last}


def _training(recipe: Recipe) -> tuple[VQGANConfig, VQGANTraining]:
    """The sizes of the recipe's VQGAN, and how it is trained."""
    assert recipe.vqgan is not None
    assert recipe.vqgan.train is not None
    return recipe.vqgan.sizes, recipe.vqgan.train


def _gather(recipe: Recipe, objects: Sequence[SourceObject], scratch: Any) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 [n, H, W, 3] of the objects, memory-mapped from `scratch`, and weights float [n].

    Each object gives its share of `max_frames` at most, and weighs the same however many it gives; of more objects than
    `max_frames` as many are drawn and opened. What cannot be read is left out here; the tokenize stage puts it in
    quarantine.
    """
    sizes, settings = _training(recipe)
    size, options, limits = sizes.resolution, recipe.storage.options, recipe.tokenize.decoder_limits
    if not objects:
        raise UserError(
            "vqgan.train: no video or image to train on that is not held out; add sources or name vqgan.weights"
        )
    objects = _drawn(objects, settings.max_frames, recipe.seed)
    request = FrameRequest(fps=settings.fps, size=size, max_frames=math.ceil(settings.max_frames / len(objects)))
    weights: list[float] = []
    for found in objects:
        start = scratch.tell()
        try:
            for chunk in object_frames(found, options, request, limits):
                scratch.write(chunk.frames.tobytes())
        except BadData as error:
            log.warning("vqgan: left out %s", printable(f"{found.url}: {error}"))
            scratch.truncate(start)
            scratch.seek(start)
            continue
        count = (scratch.tell() - start) // (size * size * 3)
        weights += [1 / max(1, count)] * count  # none in its part of a short video
    scratch.flush()
    if not weights:
        raise UserError("vqgan.train: none of the videos and images can be read; see the warnings above")
    frames = np.memmap(scratch, dtype=np.uint8, mode="r", shape=(len(weights), size, size, 3))
    return frames, np.array(weights)


def _drawn(objects: Sequence[SourceObject], most: int, seed: int) -> Sequence[SourceObject]:
    """`most` of the objects in their order, drawn by the seed, or all where they are no more."""
    if len(objects) <= most:
        return objects
    chosen = permute(np.arange(most), len(objects), derive_key(seed))
    return [objects[number] for number in np.sort(chosen).tolist()]
