"""How well the VQGAN brings frames back: PSNR of clips and images, held out or trained on, and pairs to look at."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.evaluate.job import EvaluateJob, spread
from pipelines.evaluate.pictures import run_vqgan, sampled_frames, save_png, strip
from storage.errors import BadData
from tokenization.codecs.vqgan.metrics import psnr

OBJECTS = 16
"""Videos and images of each split that are measured, evenly spread over the listing."""
FRAMES = 16
"""Frames of each, evenly spaced."""


def reconstruct_part(job: EvaluateJob, name: str, heldout: bool) -> dict[str, Any]:
    """PSNR in dB of each object over its frames, and of all frames; held-out objects also give the pairs to show."""
    vqgan = run_vqgan(job)
    chosen = list(spread(job.objects(("video", "image", "webdataset", "records"), heldout), OBJECTS))
    wanted = job.recipe.evaluate.reconstructions if heldout else 0
    clips: list[dict[str, Any]] = []
    every: list[tuple[np.ndarray, np.ndarray]] = []
    for found in chosen:
        try:
            frames = sampled_frames(found, job.recipe, job.recipe.vqgan.sizes.resolution, FRAMES)  # type: ignore[union-attr]
        except BadData:  # the tokenize stage has it in quarantine
            continue
        back = vqgan.decode(vqgan.encode(frames))
        clips.append({"key": found.key, "frames": len(frames), "psnr": psnr(frames, back)})
        every.append((frames, back))
    if not every:
        return {"heldout": heldout, "objects": [], "psnr": None, "pairs": []}
    frames, back = (np.concatenate(side) for side in zip(*every))
    names = [clip["key"] for clip in clips for _ in range(clip["frames"])]
    pairs = []
    for place in spread(list(range(len(frames))), wanted):
        file = save_png(job.store, f"pictures/{name}-{place:05d}.png", strip([frames[[place]], back[[place]]]))
        pairs.append({"file": file, "key": names[place], "psnr": psnr(frames[[place]], back[[place]])})
    return {"heldout": heldout, "objects": clips, "psnr": psnr(frames, back), "pairs": pairs}
