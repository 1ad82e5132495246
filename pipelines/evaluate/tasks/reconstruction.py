"""How well the VQGAN brings frames back: PSNR of clips and images, held out or trained on, and pairs to look at."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.pictures import run_vqgan, save_png, strip
from pipelines.sources.listing import MEDIA
from pipelines.sources.media import object_frames
from storage.errors import BadData
from tokenization.codecs.vqgan.metrics import psnr
from tokenization.media.frame_sampling import FrameRequest, uniform_sample

OBJECTS = 16
"""Videos and images of each split that are measured, evenly spread over the listing."""
FRAMES = 16
"""Frames of each, evenly spaced."""


def reconstruct_part(job: EvaluateJob, name: str, heldout: bool) -> dict[str, Any]:
    """PSNR in dB of each object over its frames, and of all frames; held-out objects also give the pairs to show."""
    vqgan, recipe = run_vqgan(job), job.recipe
    assert recipe.vqgan is not None
    objects = job.objects(MEDIA, heldout)
    request = FrameRequest(fps=recipe.tokenize.fps, size=recipe.vqgan.sizes.resolution, chunk=FRAMES, max_frames=FRAMES)
    wanted = max(0, recipe.evaluate.reconstructions) if heldout else 0
    clips: list[dict[str, Any]] = []
    every: list[tuple[np.ndarray, np.ndarray]] = []
    for found in (objects[number] for number in uniform_sample(len(objects), OBJECTS)):
        try:
            chunks = object_frames(found, recipe.storage.options, request, recipe.tokenize.decoder_limits)
            parts = [chunk.frames for chunk in chunks]
        except BadData:  # the tokenize stage has it in quarantine
            continue
        if not parts:  # its part of a short video has none
            continue
        frames = np.concatenate(parts)
        back = vqgan.decode(vqgan.encode(frames))
        clips.append({"key": found.key, "frames": len(frames), "psnr": psnr(frames, back)})
        every.append((frames, back))
    if not every:
        return {"heldout": heldout, "objects": [], "psnr": None, "pairs": []}
    frames, back = (np.concatenate(side) for side in zip(*every))
    names = [clip["key"] for clip in clips for _ in range(clip["frames"])]
    pairs = []
    for place in uniform_sample(len(frames), wanted):
        file = save_png(job.store, f"pictures/{name}-{place:05d}.png", strip([frames[[place]], back[[place]]]))
        pairs.append({"file": file, "key": names[place], "psnr": psnr(frames[[place]], back[[place]])})
    return {"heldout": heldout, "objects": clips, "psnr": psnr(frames, back), "pairs": pairs}
