"""Frames from the trained model: continuations of held-out clips, and pictures of text prompts.

A continuation is compared with the true frames, by the codes that agree and the PSNR of the pixels, each beside the
guess that the last given frame stays. What a model samples is one of many futures, so its PSNR is expected to be below
that of the still frame; that of a model that has learnt nothing is far below.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np
import torch

from model.inference.generate import generate_frames
from pipelines.evaluate.job import CONTINUATIONS, EvaluateJob
from pipelines.evaluate.models import trained_model
from pipelines.evaluate.pictures import run_vqgan, save_png, strip
from pipelines.sources.listing import SourceObject
from pipelines.sources.media import object_frames
from storage.errors import BadData
from tokenization.codecs.vqgan.metrics import psnr
from tokenization.field_spec import FieldSpec
from tokenization.fields import build_tokens
from tokenization.media.frame_sampling import FrameRequest


def continue_part(job: EvaluateJob, name: str, index: int) -> dict[str, Any]:
    """Continue the index-th window of the held-out clips."""
    settings = job.recipe.evaluate.generation
    assert settings is not None
    given, wanted = settings.prompt_frames, settings.frames
    window = _window(job, given + wanted, index)
    if window is None:
        reason = f"the held-out clips have no window {index} of {given + wanted} frames"
        return {"kind": "continuation", "skipped": reason}
    key, source, side, frames = window
    vqgan = run_vqgan(job)
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
        "file": save_png(job.store, f"pictures/{name}.png", strip([frames, shown], given)),
    }


def prompt_part(job: EvaluateJob, name: str, index: int) -> dict[str, Any]:
    """Frames from the index-th text prompt of the recipe."""
    settings = job.recipe.evaluate.generation
    assert settings is not None
    text = settings.prompts[index]
    tokenizer = job.tokenizer()
    bos, begin = [job.vocabulary.bos_id], tokenizer.encode("<vision>")
    prompt = np.concatenate([bos, tokenizer.encode(text), begin]).astype(np.int32)
    codes = _generate(job, prompt, np.concatenate([bos, begin]).astype(np.int32), CONTINUATIONS + index)
    picture = strip([run_vqgan(job).decode(codes)])
    return {
        "kind": "prompt",
        "prompt": text,
        "frames": settings.frames,
        "distinct_codes": len(np.unique(codes)),
        "file": save_png(job.store, f"pictures/{name}.png", picture),
    }


def _generate(job: EvaluateJob, prompt: np.ndarray, unconditional: np.ndarray, number: int) -> np.ndarray:
    """Codes int32 [frames, codes_per_frame] of the last stage's model, as the recipe says. number: of the seed."""
    settings = job.recipe.evaluate.generation
    assert settings is not None
    assert job.recipe.vqgan is not None
    return generate_frames(
        trained_model(job, job.last),
        job.vocabulary,
        prompt,
        settings.frames,
        job.recipe.vqgan.sizes.codes_per_frame,
        guidance=settings.guidance,
        top_k=settings.top_k,
        temperature=settings.temperature,
        generator=torch.Generator(job.device).manual_seed(job.recipe.seed * 1000 + number),
        unconditional_ids=unconditional,
    )


def continuation_prompt(
    job: EvaluateJob, source: str, side: dict[str, Any], codes: np.ndarray, spec: str | None = None
) -> np.ndarray:
    """Ids int32 up to where the frame after `codes` begins, as the tokenize stage lays such a record out.

    codes: [n, codes_per_frame]. spec: by default the source's first that has frames and whose fields `side` holds.
    """
    record = {**side, "vision": codes}
    specs = [FieldSpec.parse(one) for one in ([spec] if spec else job.recipe.sources[source].fields)]
    fitting = (one for one in specs if "vision" in one.names and all(name in record for name in one.names))
    chosen = next(fitting, FieldSpec.parse("vision"))
    tokens, _ = build_tokens(record, chosen, job.tokenizer(), job.vocabulary, add_eos=False)
    prompt = tokens[: int(np.argmax(tokens == job.vocabulary.eov_id)) + 1].copy()
    prompt[-1] = job.vocabulary.eof_id
    return prompt


def _window(job: EvaluateJob, length: int, index: int) -> tuple[str, str, dict[str, Any], np.ndarray] | None:
    """The index-th window of all held-out clips: first windows of all clips, then second ones, and so on.

    Its name, source and side data, and its frames uint8 [length, size, size, 3]; None where there are fewer windows.
    """
    recipe = job.recipe
    assert recipe.vqgan is not None
    request = FrameRequest(fps=recipe.tokenize.fps, size=recipe.vqgan.sizes.resolution, chunk=length)
    clips = job.objects(("video",), heldout=True)[:CONTINUATIONS]
    most = -(-CONTINUATIONS // max(1, len(clips)))
    windows: list[tuple[int, SourceObject, np.ndarray]] = []
    for clip in clips:
        with contextlib.suppress(BadData):  # the tokenize stage has it in quarantine
            chunks = object_frames(clip, recipe.storage.options, request, recipe.tokenize.decoder_limits)
            first = list(itertools.islice(chunks, most))
            windows += [(turn, clip, chunk.frames) for turn, chunk in enumerate(first) if len(chunk) == length]
    windows.sort(key=lambda window: window[0])
    if index >= len(windows):
        return None
    turn, clip, frames = windows[index]
    return f"{clip.key} from {turn * length / recipe.tokenize.fps:.2f} s", clip.source, clip.side, frames
