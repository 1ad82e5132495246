"""How well the VQGAN brings frames back: PSNR, SSIM and a Fréchet distance, held out or trained on; pairs to show."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.evaluate.cell import Cell
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.pictures import keep_picture, strip
from pipelines.sources.listing import MEDIA
from pipelines.sources.media import object_frames
from storage.errors import BadData
from tokenization.media.frame_sampling import FrameRequest, uniform_sample

OBJECTS = 16
"""Videos and images of each split that are measured, evenly spread over the listing."""
FRAMES = 16
"""Frames of each, evenly spaced."""

TITLE = "Reconstruction"


def lacks(job: EvaluateJob) -> str | None:
    """See `task_table`."""
    if not job.subject.has_codec:
        return "the model has no codec of frames; evaluate one that was trained on videos"
    return "the frames are those of a recipe's sources; give it by --recipe" if job.run is None else None


def cells(job: EvaluateJob) -> list[Cell]:
    """One for each split."""
    splits = {"heldout": True, "train": False}
    return [Cell(f"reconstruction-{name}", "reconstruction", {"heldout": held}) for name, held in splits.items()]


def measure(job: EvaluateJob, cell: Cell) -> dict[str, Any]:
    """PSNR in dB and SSIM of each object over its frames and of all frames, and the Fréchet distance of all; held-out
    objects also give the pairs to show. `frechet` is None of a single frame.
    """
    from tokenization.codecs.vqgan.metrics import frechet_distance, psnr, ssim  # with torch

    assert job.run is not None
    assert job.subject.fps is not None
    vqgan, heldout = job.subject.codec(), cell.arguments["heldout"]
    objects = job.run.objects(MEDIA, heldout)
    request = FrameRequest(fps=job.subject.fps, size=vqgan.config.resolution, chunk=FRAMES, max_frames=FRAMES)
    wanted = job.settings.reconstructions if heldout else 0
    clips: list[dict[str, Any]] = []
    every: list[tuple[np.ndarray, np.ndarray]] = []
    for found in (objects[number] for number in uniform_sample(len(objects), OBJECTS)):
        try:
            chunks = object_frames(found, job.storage.options, request, job.limits)
            parts = [chunk.frames for chunk in chunks]
        except BadData:  # the tokenize stage has it in quarantine
            continue
        if not parts:  # its part of a short video has none
            continue
        frames = np.concatenate(parts)
        back = vqgan.decode(vqgan.encode(frames))
        clips.append({"key": found.key, "frames": len(frames), "psnr": psnr(frames, back), "ssim": ssim(frames, back)})
        every.append((frames, back))
    if not every:
        return {"heldout": heldout, "objects": [], "psnr": None, "ssim": None, "frechet": None, "pairs": []}
    frames, back = (np.concatenate(side) for side in zip(*every))
    names = [clip["key"] for clip in clips for _ in range(clip["frames"])]
    pairs = []
    for place in uniform_sample(len(frames), wanted):
        file = keep_picture(job, f"pictures/{cell.name}-{place:05d}.png", strip([frames[[place]], back[[place]]]))
        pairs.append({"file": file, "key": names[place], "psnr": psnr(frames[[place]], back[[place]])})
    figures = {"psnr": psnr(frames, back), "ssim": ssim(frames, back), "frechet": frechet_distance(frames, back)}
    return {"heldout": heldout, "objects": clips, **figures, "pairs": pairs}
