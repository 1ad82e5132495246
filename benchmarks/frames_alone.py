"""The two halves of tokenizing video on their own: decoding, and encoding, each beside what one would write by hand.

In: a video; weights and frames. Out: frames a CPU second of each system. Systems take turns, each round in a process of
its own that is ready before the clock starts, and the fastest round of each counts. CPU seconds are those of a process
and its children. All must make the same pictures and, in one precision, the same codes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import torch
from diffusers import VQModel

from benchmarks.looped_clip import FPS, SIZE, pictures
from pipelines.codecs.record import WEIGHTS
from pipelines.sources.listing import SourceObject
from pipelines.sources.media import Medium, media_of, medium_frames
from storage.errors import UserError
from storage.urls import object_info, open_url
from tokenization.codecs.vqgan.config import VQGANConfig
from tokenization.codecs.vqgan.model import VQGAN, build_vqgan
from tokenization.media.frame_sampling import FrameRequest


def decode_figures(url: str, options: dict[str, Any], rounds: int) -> dict[str, float]:
    """Sampled frames a CPU second of each system, each round in a process of its own."""
    systems: dict[str, Callable[[], tuple[int, float, float]]] = {
        "ringworld": partial(_alone, _decoded, url, options),
        "plain": partial(_alone, _plainly_decoded, url, options),
    }
    best: dict[str, float] = {}
    for _ in range(rounds):
        shades = {}
        for name, run in systems.items():
            count, seconds, shades[name] = run()
            best[name] = max(best.get(name, 0.0), round(count / seconds, 2))
        if abs(shades["ringworld"] - shades["plain"]) > 2:
            raise UserError(f"the systems decode different pictures: mean shades {shades}")
    return best


def forks() -> Any:
    """Where processes come from that have this module imported: its libraries take longer than short measurements."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=forks()) as pool:
        return pool.submit(work, *arguments).result()


def _decoded(url: str, options: dict[str, Any]) -> tuple[int, float, float]:
    (medium,) = media_of(_listed(url, options), options)
    assert isinstance(medium, Medium)
    frames = partial(medium_frames, medium, FrameRequest(fps=FPS, size=SIZE, chunk=32))
    next(frames(), None)  # the decoder's process is started, and all is imported
    return _counted(chunk.frames for chunk in frames())


def _plainly_decoded(url: str, options: dict[str, Any]) -> tuple[int, float, float]:
    def frames() -> Iterator[np.ndarray]:
        with open_url(url, options) as file, av.open(file, "r") as container:
            wanted = 0
            for frame in container.decode(video=0):
                if frame.time is None or frame.time < wanted / FPS:
                    continue
                wanted += 1
                image = frame.to_image()
                left = (image.width - image.height) // 2
                square = image.crop((left, 0, left + image.height, image.height))
                yield np.asarray(square.resize((SIZE, SIZE)))[None]

    next(frames())
    return _counted(frames())


def _counted(frames: Iterator[np.ndarray]) -> tuple[int, float, float]:
    """How many frames there are, CPU seconds of this process and its children, and the mean shade."""
    count, shade, before = 0, 0.0, _cpu()
    for chunk in frames:
        count += len(chunk)
        shade += float(chunk[:, ::16, ::16].mean()) * len(chunk)
    return count, _cpu() - before, shade / max(1, count)


def _cpu() -> float:
    """CPU seconds of this process and its living children; no child ends between two looks."""
    me = psutil.Process()
    return sum(times.user + times.system for times in (process.cpu_times() for process in (me, *me.children(True))))


def _listed(url: str, options: dict[str, Any]) -> SourceObject:
    info = object_info(url, options)
    return SourceObject("bench/minute.mp4", "bench", url, info.size, info.etag, "video", False, {})


def encode_figures(weights: Path, frames: int, rounds: int) -> dict[str, float]:
    """Frames a CPU second of each system, one thread each, each round in a process of its own."""
    best: dict[str, float] = {}
    codes: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        for name, work in _ENCODERS.items():
            seconds, codes[name] = _alone(work, weights, pictures(frames))
            best[name] = max(best.get(name, 0.0), round(frames / seconds, 4))
    if (codes["ringworld, fp32"] != codes["diffusers"]).mean() > 0.01:
        raise UserError("the systems give different codes of the same frames and weights")
    return best


def _by_ringworld(weights: Path, frames: np.ndarray, dtype: torch.dtype) -> tuple[float, np.ndarray]:
    torch.set_num_threads(1)
    vqgan = VQGAN.load(weights / WEIGHTS, dtype=dtype)
    vqgan.encode(frames[:1])
    before = time.process_time()
    codes = vqgan.encode(frames)
    return time.process_time() - before, codes


def _by_diffusers(weights: Path, frames: np.ndarray) -> tuple[float, np.ndarray]:
    torch.set_num_threads(1)
    model: Any = VQModel.from_pretrained(weights / WEIGHTS, local_files_only=True, low_cpu_mem_usage=False).eval()

    @torch.no_grad()
    def encode(frame: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 127.5 - 1
        return model.quantize(model.encode(pixels).latents)[2][2].numpy()

    encode(frames[0])
    before = time.process_time()
    codes = [encode(frame) for frame in frames]
    return time.process_time() - before, np.stack(codes).reshape(len(frames), -1)


_ENCODERS: dict[str, Callable[[Path, np.ndarray], tuple[float, np.ndarray]]] = {
    "ringworld": partial(_by_ringworld, dtype=torch.bfloat16),
    "ringworld, fp32": partial(_by_ringworld, dtype=torch.float32),
    "diffusers": _by_diffusers,
}


def write_vqgan(folder: Path, sizes: VQGANConfig) -> None:
    """Random weights of these sizes, where a finished vqgan stage has them."""
    VQGAN(build_vqgan(sizes, seed=0)).save(folder / WEIGHTS)
