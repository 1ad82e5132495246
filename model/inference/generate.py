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

from model.attention.p2p import Group
from model.inference.kv_decoder import Decoder, choose, guided
from model.inference.scaled_numbers import CacheFormat
from model.llama.llama import inference
from tokenization.vocabulary import JointVocabulary

ASK_EVERY = 16
"""Tokens between two looks at which rows have ended, where a look makes the host wait for the device."""


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
    group: Group = None,
    cache: CacheFormat | None = None,
) -> list[np.ndarray]:
    """Continue each prompt in text; greedy unless a temperature is given.

    prompts: integer arrays [L_b] of joint ids, with frames for image and video understanding. Returns int32 arrays of
    at most max_new_tokens text ids each, cut before EOS (eos_id: the vocabulary's unless given; -1 for none). Rows that
    have ended are dropped. group: the ranks that share the cache and call this alike; None for one. cache: keeps keys
    and values in 8 bits, None in the model's dtype.
    """
    eos = vocabulary.eos_id if eos_id is None else eos_id
    with inference(model):
        decoder = Decoder(model, prompts, room=max_new_tokens, group=group, cache=cache)
        drawn = torch.full((len(prompts), max_new_tokens), eos, device=decoder.device)
        going = torch.arange(len(prompts), device=decoder.device)
        finished = torch.zeros(len(prompts), dtype=torch.bool, device=decoder.device)
        for step in range(max_new_tokens):
            ids = decoder.agreed(choose(decoder.logits(0, vocabulary.text_size), top_k, temperature, generator))
            drawn[going, step] = ids
            finished |= ids == eos
            if step == max_new_tokens - 1:
                break
            if decoder.device.type == "cpu" or step % ASK_EVERY == ASK_EVERY - 1:
                left = (~finished).nonzero().flatten().tolist()
                if not left:
                    break
                if len(left) < len(going):
                    decoder.keep(left)
                    going, finished, ids = going[left], finished[left], ids[left]
            decoder.append(ids)
    rows = drawn.cpu().numpy().astype(np.int32)
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
    group: Group = None,
    cache: CacheFormat | None = None,
) -> Iterator[np.ndarray]:
    """Yield n_frames frames as they are finished, each int32 [codes_per_frame] of VQGAN codes.

    prompt_ids: joint ids [L] up to where the first frame begins: `..<vision>` for text to image or video, then
    `codes <eof> codes <eof>` for a continuation. unconditional_ids: the prompt that guidance pushes away from, in LWM
    `<s><vision>` (plus the given frames, in a continuation); needed where a guidance is not 1, and dropped from the
    batch as soon as no guidance is left. first, rest: settings of the first frame and of the others. group: the ranks
    that share the cache and call this alike; None for one. cache: see `generate_text`. Raises ValueError when guidance
    has no unconditional prompt or the prompt's frames were ended with `<eov>`.
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
                    prompts = [prompt_ids, unconditional_ids] if is_guided else [prompt_ids]
                    room = n_frames * (codes_per_frame + 1)
                    decoder = Decoder(model, prompts, room=room, group=group, cache=cache)  # type: ignore[arg-type]
                elif len(decoder) == 2 and not is_guided:
                    decoder.keep([0])
                for _ in range(codes_per_frame):
                    logits = decoder.logits(vision.start, vision.start + vision.n_codes)
                    logits = guided(logits, setting.guidance) if len(logits) == 2 else logits
                    code = decoder.agreed(choose(logits, setting.top_k, setting.temperature, generator))
                    codes.append(code)
                    decoder.append((code + vision.start).expand(len(decoder)))
                if index < len(settings) - 1:
                    decoder.append(torch.full((len(decoder),), vocabulary.eof_id, device=decoder.device))
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
    group: Group = None,
) -> np.ndarray:
    """`stream_frames` with one setting for all frames, at once: int32 codes [n_frames, codes_per_frame]."""
    setting = Sampling(guidance, top_k, temperature)
    frames = stream_frames(
        model, vocabulary, prompt_ids, n_frames, codes_per_frame, setting, setting, unconditional_ids, generator, group
    )
    return np.stack([np.zeros(codes_per_frame, np.int32), *frames])[1:]
