"""Text, images and video out of a trained model: text continues in text ids, frames are filled with VQGAN codes.

A frame is `codes_per_frame` codes and one marker: `<eof>` after every frame but the last, `<eov>` after the last. The
markers are placed, never drawn, and only codes are drawn inside a frame, so every frame decodes to pixels; text is
drawn from text ids alone, and EOS ends text alone. Guidance as in LWM (arXiv 2402.08268): a doubled batch of
conditional and unconditional prompts, both extended by the codes drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaForCausalLM

from model.inference.kv_decoder import Decoder, choose, guided
from model.llama.llama import inference
from tokenization.vocabulary import JointVocabulary


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn: guidance scale (1 = none), size of the top-k cut (None = none), temperature (0 = greedy)."""

    guidance: float = 1.0
    top_k: int | None = None
    temperature: float = 1.0


IMAGE = Sampling(guidance=5.0, top_k=8192)
"""LWM's setting for an image and for a video's first frame."""
VIDEO = Sampling(guidance=1.0, top_k=1000)
"""LWM's setting for the frames after the first."""


def generate_text(
    model: LlamaForCausalLM,
    vocabulary: JointVocabulary,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    top_k: int | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    eos_id: int | None = None,
) -> list[np.ndarray]:
    """Continue each prompt in text; greedy unless a temperature is given.

    prompts: integer arrays [L_b] of joint ids, with frames for image and video understanding. Returns int32 arrays of
    at most max_new_tokens text ids each, cut before EOS (eos_id: the vocabulary's unless given; -1 for none).
    """
    eos = vocabulary.eos_id if eos_id is None else eos_id
    drawn: list[torch.Tensor] = []
    with inference(model):
        decoder = Decoder(model, prompts)
        finished = torch.zeros(len(prompts), dtype=torch.bool, device=decoder.device)
        for step in range(max_new_tokens):
            ids = choose(decoder.logits(0, vocabulary.text_size), top_k, temperature, generator)
            ids = ids.masked_fill(finished, eos)
            finished |= ids == eos
            drawn.append(ids)
            if finished.all() or step == max_new_tokens - 1:
                break
            decoder.append(ids)
    rows = torch.stack(drawn, dim=1).cpu().numpy().astype(np.int32) if drawn else np.zeros((len(prompts), 0), np.int32)
    return [row[: int(np.argmax(row == eos))] if (row == eos).any() else row for row in rows]


def stream_frames(
    model: LlamaForCausalLM,
    vocabulary: JointVocabulary,
    prompt_ids: np.ndarray,
    n_frames: int,
    codes_per_frame: int,
    first: Sampling = IMAGE,
    rest: Sampling = VIDEO,
    unconditional_ids: np.ndarray | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[np.ndarray]:
    """Yield n_frames frames as they are finished, each int32 [codes_per_frame] of VQGAN codes.

    prompt_ids: joint ids [L] up to where the first frame begins: `..<vision>` for text to image or video, then
    `codes <eof> codes <eof>` for a continuation. unconditional_ids: the prompt that guidance pushes away from, in LWM
    `<s><vision>` (plus the given frames, in a continuation); needed where a guidance is not 1, and dropped from the
    batch as soon as no guidance is left. first, rest: settings of the first frame and of the others. Raises ValueError
    when guidance has no unconditional prompt or the prompt's frames were ended with `<eov>`.
    """
    settings = ([first] + [rest] * (n_frames - 1))[:n_frames]
    if any(s.guidance != 1 for s in settings) and unconditional_ids is None:
        raise ValueError("guidance other than 1 needs unconditional_ids, for example those of '<s><vision>'")
    if len(prompt_ids) and prompt_ids[-1] == vocabulary.eov_id:
        raise ValueError("the prompt's last frame ends with <eov>; a continuation goes on from <eof>")
    vision = vocabulary["vision"]

    def frames() -> Iterator[np.ndarray]:
        decoder: Decoder | None = None
        for index, setting in enumerate(settings):
            codes = []
            is_guided = any(s.guidance != 1 for s in settings[index:])
            # Entered anew for each frame: a consumer that pauses the stream gets the model back as it was.
            with inference(model):
                if decoder is None:
                    decoder = Decoder(model, [prompt_ids, unconditional_ids] if is_guided else [prompt_ids])  # type: ignore[list-item]
                elif len(decoder.mask) == 2 and not is_guided:
                    decoder.keep(torch.zeros(1, dtype=torch.long, device=decoder.device))
                for _ in range(codes_per_frame):
                    logits = decoder.logits(vision.start, vision.start + vision.n_codes)
                    logits = guided(logits, setting.guidance) if len(logits) == 2 else logits
                    code = choose(logits, setting.top_k, setting.temperature, generator)
                    codes.append(code)
                    decoder.append((code + vision.start).expand(len(decoder.mask)))
                if index < len(settings) - 1:
                    decoder.append(torch.full((len(decoder.mask),), vocabulary.eof_id, device=decoder.device))
            yield torch.cat(codes).cpu().numpy().astype(np.int32)

    return frames()


def generate_frames(
    model: LlamaForCausalLM,
    vocabulary: JointVocabulary,
    prompt_ids: np.ndarray,
    n_frames: int,
    codes_per_frame: int,
    guidance: float = 1.0,
    top_k: int | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    unconditional_ids: np.ndarray | None = None,
) -> np.ndarray:
    """`stream_frames` with one setting for all frames, at once: int32 codes [n_frames, codes_per_frame]."""
    setting = Sampling(guidance, top_k, temperature)
    frames = stream_frames(
        model, vocabulary, prompt_ids, n_frames, codes_per_frame, setting, setting, unconditional_ids, generator
    )
    return np.stack([np.zeros(codes_per_frame, np.int32), *frames])[1:]
