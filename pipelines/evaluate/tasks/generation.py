"""Frames out of the trained model: how held-out clips go on, and what text prompts look like.

A continuation is measured against what really came: the codes that agree, and the PSNR of the pixels, each beside the
plain guess that the last given frame stays. The guess of a sampling model is one of many futures, so staying
below the still frame in PSNR is expected of it; a model that has learnt nothing is far below.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from model.inference.generate import generate_frames
from pipelines.evaluate.job import CONTINUATIONS, EvaluateJob
from pipelines.evaluate.models import trained_model
from pipelines.evaluate.pictures import run_vqgan, save_png, strip, windows
from storage.errors import BadData
from tokenization.codecs.vqgan.metrics import psnr
from tokenization.fields import FieldSpec, build_tokens


def continue_part(job: EvaluateJob, name: str, index: int) -> dict[str, Any]:
    """Continue the index-th window of the held-out clips."""
    settings = job.recipe.evaluate.generation
    assert settings is not None
    assert job.recipe.vqgan is not None
    given, wanted = settings.prompt_frames, settings.frames
    window = _window(job, given + wanted, index)
    if window is None:
        return {
            "kind": "continuation",
            "skipped": f"the held-out clips have no window {index} of {given + wanted} frames",
        }
    key, source, side, frames = window
    vqgan, model = run_vqgan(job), trained_model(job, job.stages[-1])
    codes = vqgan.encode(frames)
    prompt = continuation_prompt(job, source, side, codes[:given])
    plain = continuation_prompt(job, source, {}, codes[:given], spec="vision")
    generated = generate_frames(
        model,
        job.vocabulary,
        prompt,
        wanted,
        job.recipe.vqgan.sizes.codes_per_frame,
        guidance=settings.guidance,
        top_k=settings.top_k,
        temperature=settings.temperature,
        generator=_generator(job, index),
        unconditional_ids=plain,
    )
    repeated = np.repeat(codes[given - 1 : given], wanted, axis=0)
    truth = codes[given:]
    shown = {"true": frames, "generated": vqgan.decode(np.concatenate([codes[:given], generated]))}
    still = vqgan.decode(repeated)
    best = vqgan.decode(truth)
    return {
        "kind": "continuation",
        "key": key,
        "given": given,
        "frames": wanted,
        "code_agreement": float((generated == truth).mean()),
        "code_agreement_still": float((repeated == truth).mean()),
        "psnr": psnr(frames[given:], shown["generated"][given:]),
        "psnr_still": psnr(frames[given:], still),
        "psnr_reconstruction": psnr(frames[given:], best),
        "file": save_png(job.store, f"pictures/{name}.png", strip([shown["true"], shown["generated"]], given)),
    }


def prompt_part(job: EvaluateJob, name: str, index: int) -> dict[str, Any]:
    """Frames from the index-th text prompt of the recipe."""
    settings = job.recipe.evaluate.generation
    assert settings is not None
    assert job.recipe.vqgan is not None
    text = settings.prompts[index]
    tokenizer = job.tokenizer()
    bos, begin = [job.vocabulary.bos_id], tokenizer.encode("<vision>")
    codes = generate_frames(
        trained_model(job, job.stages[-1]),
        job.vocabulary,
        np.concatenate([bos, tokenizer.encode(text), begin]).astype(np.int32),
        settings.frames,
        job.recipe.vqgan.sizes.codes_per_frame,
        guidance=settings.guidance,
        top_k=settings.top_k,
        temperature=settings.temperature,
        generator=_generator(job, CONTINUATIONS + index),
        unconditional_ids=np.concatenate([bos, begin]).astype(np.int32),
    )
    picture = strip([run_vqgan(job).decode(codes)])
    return {
        "kind": "prompt",
        "prompt": text,
        "frames": settings.frames,
        "distinct_codes": len(np.unique(codes)),
        "file": save_png(job.store, f"pictures/{name}.png", picture),
    }


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
    """The index-th window of all held-out clips: first windows of all clips, then second ones, and so on."""
    assert job.recipe.vqgan is not None
    size = job.recipe.vqgan.sizes.resolution
    clips = job.objects(("video",), heldout=True)[:CONTINUATIONS]
    rounds: list[tuple[int, int, Any, np.ndarray]] = []
    for number, found in enumerate(clips):
        most = -(-CONTINUATIONS // len(clips))
        try:
            cut = windows(found, job.recipe, size, length, most)
        except BadData:  # the tokenize stage has it in quarantine
            continue
        rounds += [(turn, number, found, frames) for turn, frames in enumerate(cut)]
    rounds.sort(key=lambda one: one[:2])
    if index >= len(rounds):
        return None
    turn, _, found, frames = rounds[index]
    return f"{found.key} from {turn * length / job.recipe.tokenize.fps:.2f} s", found.source, found.side, frames


def _generator(job: EvaluateJob, number: int) -> torch.Generator:
    return torch.Generator(job.device).manual_seed(job.recipe.seed * 1000 + number)
