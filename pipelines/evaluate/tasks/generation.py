"""Frames from the trained model: continuations of held-out clips, and pictures of text prompts.

A continuation is compared with the true frames, by the codes that agree and the PSNR of the pixels, each beside the
guess that the last given frame stays. What a model samples at a temperature is one of many futures, so its PSNR is
expected to be below that of the still frame; that of a model that has learnt nothing is far below. Which windows are
continued hangs on the recipe and the clips alone.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np

from pipelines.evaluate.cell import Cell
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.pictures import keep_picture, strip
from pipelines.sources.listing import SourceObject
from pipelines.sources.media import object_frames
from storage.errors import BadData
from tokenization.field_spec import FieldSpec
from tokenization.fields import build_tokens
from tokenization.media.frame_sampling import FrameRequest

TITLE = "Generated frames"
CONTINUATIONS = 4
"""Windows of held-out clips that are continued where the settings give no number."""


def lacks(job: EvaluateJob) -> str | None:
    """See `task_table`."""
    if not job.subject.has_codec:
        return "the model has no codec of frames; evaluate one that was trained on videos"
    if job.settings.generation is None:
        return "evaluate.generation is not there; set generation.frames"
    if not job.settings.generation.prompts and not _clips(job):
        return "there is no held-out video to continue; set generation.prompts, or give a recipe that has some"
    return None


def cells(job: EvaluateJob) -> list[Cell]:
    """A continued window, or a text prompt, each."""
    assert job.settings.generation is not None
    found = [Cell(f"continuation-{n}", "generation", {"window": n}) for n in range(_most(job)) if _clips(job)]
    prompts = range(len(job.settings.generation.prompts))
    return found + [Cell(f"prompt-{n}", "generation", {"prompt": n}) for n in prompts]


def measure(job: EvaluateJob, cell: Cell) -> dict[str, Any]:
    """Continue a window of the held-out clips, or make frames from a text prompt."""
    if "window" in cell.arguments:
        return continue_window(job, cell.name, cell.arguments["window"])
    return frames_of_prompt(job, cell.name, cell.arguments["prompt"])


def continue_window(job: EvaluateJob, name: str, index: int) -> dict[str, Any]:
    """Continue the index-th window of the held-out clips."""
    from tokenization.codecs.vqgan.metrics import psnr  # with torch

    settings = job.settings.generation
    assert settings is not None
    given, wanted = settings.prompt_frames, settings.frames
    window = _window(job, given + wanted, index)
    if window is None:
        reason = f"the held-out clips have no window {index} of {given + wanted} frames"
        return {"kind": "continuation", "skipped": reason}
    key, source, side, frames = window
    vqgan = job.subject.codec()
    codes = vqgan.encode(frames)
    prompt = continuation_prompt(job, source, side, codes[:given])
    generated = _generate(job, prompt, continuation_prompt(job, source, {}, codes[:given], spec="vision"), index)
    repeated, truth = np.repeat(codes[given - 1 : given], wanted, axis=0), codes[given:]
    shown = vqgan.decode(np.concatenate([codes[:given], generated]))
    return {
        "kind": "continuation",
        "key": key,
        "given": given,
        "frames": wanted,
        "code_agreement": float((generated == truth).mean()),
        "code_agreement_still": float((repeated == truth).mean()),
        "psnr": psnr(frames[given:], shown[given:]),
        "psnr_still": psnr(frames[given:], vqgan.decode(repeated)),
        "psnr_reconstruction": psnr(frames[given:], vqgan.decode(truth)),
        "file": keep_picture(job, f"pictures/{name}.png", strip([frames, shown], given)),
    }


def frames_of_prompt(job: EvaluateJob, name: str, index: int) -> dict[str, Any]:
    """Frames from the index-th text prompt of the recipe."""
    settings = job.settings.generation
    assert settings is not None
    text = settings.prompts[index]
    tokenizer = job.subject.tokenizer()
    bos, begin = [job.vocabulary.bos_id], tokenizer.encode("<vision>")
    prompt = np.concatenate([bos, tokenizer.encode(text), begin]).astype(np.int32)
    codes = _generate(job, prompt, np.concatenate([bos, begin]).astype(np.int32), _most(job) + index)
    picture = strip([job.subject.codec().decode(codes)])
    return {
        "kind": "prompt",
        "prompt": text,
        "frames": settings.frames,
        "distinct_codes": len(np.unique(codes)),
        "file": keep_picture(job, f"pictures/{name}.png", picture),
    }


def _generate(job: EvaluateJob, prompt: np.ndarray, unconditional: np.ndarray, number: int) -> np.ndarray:
    """Codes int32 [frames, codes_per_frame] as the settings say. number: of the seed."""
    import torch

    from model.inference.generate import generate_frames

    settings = job.settings.generation
    assert settings is not None
    return generate_frames(
        job.subject.model(job.group),
        job.vocabulary,
        prompt,
        settings.frames,
        job.subject.codec().config.codes_per_frame,
        guidance=settings.guidance,
        top_k=settings.top_k,
        temperature=settings.temperature,
        generator=torch.Generator(job.device).manual_seed(job.seed * 1000 + number),
        unconditional_ids=unconditional,
        group=job.group,
    )


def continuation_prompt(
    job: EvaluateJob, source: str, side: dict[str, Any], codes: np.ndarray, spec: str | None = None
) -> np.ndarray:
    """Ids int32 up to where the frame after `codes` begins, as the tokenize stage lays such a record out.

    codes: [n, codes_per_frame]. spec: by default the source's first that has frames and whose fields `side` holds.
    """
    record = {**side, "vision": codes}
    of_source = job.run.recipe.sources[source].fields if job.run else ["vision"]
    specs = [FieldSpec.parse(one) for one in ([spec] if spec else of_source)]
    fitting = (one for one in specs if "vision" in one.names and all(name in record for name in one.names))
    chosen = next(fitting, FieldSpec.parse("vision"))
    tokens, _ = build_tokens(record, chosen, job.subject.tokenizer(), job.vocabulary, add_eos=False)
    prompt = tokens[: int(np.argmax(tokens == job.vocabulary.eov_id)) + 1].copy()
    prompt[-1] = job.vocabulary.eof_id
    return prompt


def _window(job: EvaluateJob, length: int, index: int) -> tuple[str, str, dict[str, Any], np.ndarray] | None:
    """The index-th window of all held-out clips: first windows of all clips, then second ones, and so on.

    Its name, source and side data, and its frames uint8 [length, size, size, 3]; None where there are fewer windows.
    """
    assert job.subject.fps is not None
    size = job.subject.codec().config.resolution
    request = FrameRequest(fps=job.subject.fps, size=size, chunk=length)
    clips = _clips(job)
    most = -(-_most(job) // max(1, len(clips)))
    windows: list[tuple[int, SourceObject, np.ndarray]] = []
    for clip in clips:
        with contextlib.suppress(BadData):  # the tokenize stage has it in quarantine
            chunks = object_frames(clip, job.storage.options, request, job.limits)
            first = list(itertools.islice(chunks, most))
            windows += [(turn, clip, chunk.frames) for turn, chunk in enumerate(first) if len(chunk) == length]
    windows.sort(key=lambda window: window[0])
    if index >= len(windows):
        return None
    turn, clip, frames = windows[index]
    return f"{clip.key} from {turn * length / job.subject.fps:.2f} s", clip.source, clip.side, frames


def _clips(job: EvaluateJob) -> list[SourceObject]:
    """The held-out clips whose windows are continued."""
    return list(job.run.objects(("video",), heldout=True)[: _most(job)]) if job.run else []


def _most(job: EvaluateJob) -> int:
    """Windows that are continued, at most."""
    assert job.settings.generation is not None
    return job.settings.generation.windows or CONTINUATIONS
