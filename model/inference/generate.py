"""Text alone or frames alone out of a trained model: text continues in text ids, frames are filled with VQGAN codes.

A frame is `codes_per_frame` codes and one marker: `<eof>` after every frame but the last, `<eov>` after the last. The
markers are placed, never drawn, and only codes are drawn inside a frame, so every frame decodes to pixels; text is
drawn from text ids alone, and EOS ends text alone. `interleaved.py` switches between text and frames in one decode.
Guidance as in LWM (arXiv 2402.08268): a doubled batch of conditional and unconditional prompts, both extended by the
codes drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from model.attention.p2p import Group
from model.inference.frames_ahead import FramesAhead, last_frames
from model.inference.kv_decoder import Decoder
from model.inference.sampling import IMAGE, VIDEO, Sampling, choose, guided
from model.inference.scaled_numbers import CacheFormat
from model.llama.llama import inference
from tokenization.vocabulary import JointVocabulary

ASK_EVERY = 16
"""Tokens between two looks at which rows have ended, where a look makes the host wait for the device."""


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
    top_p: float | None = None,
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
            ids = decoder.agreed(choose(decoder.logits(0, vocabulary.text_size), top_k, temperature, generator, top_p))
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
    unconditional = None if unconditional_ids is None else [unconditional_ids]
    batches = stream_frame_batches(
        model, vocabulary, [prompt_ids], n_frames, codes_per_frame, first, rest, unconditional, generator, group, cache
    )
    return (batch[0] for batch in batches)


def stream_frame_batches(
    model: LlamaForCausalLM,
    vocabulary: JointVocabulary,
    prompts: Sequence[np.ndarray],
    n_frames: int,
    codes_per_frame: int,
    first: Sampling = IMAGE,
    rest: Sampling = VIDEO,
    unconditional: Sequence[np.ndarray] | None = None,
    generator: torch.Generator | None = None,
    group: Group = None,
    cache: CacheFormat | None = None,
    ahead: int = 0,
) -> Iterator[np.ndarray]:
    """`stream_frames` for B prompts at once, of any lengths: yield int32 [B, codes_per_frame], n_frames times.

    unconditional: the prompt that guidance pushes away from, for each prompt. ahead: codes that are drafted at once and
    verified by one forward (`frames_ahead.py`: other draws of the same distribution); 0 for none.
    """
    settings = ([first] + [rest] * (n_frames - 1))[:n_frames]
    if any(s.guidance != 1 for s in settings) and unconditional is None:
        raise ValueError("guidance other than 1 needs unconditional_ids, for example those of '<s><vision>'")
    if unconditional is not None and len(unconditional) != len(prompts):
        raise ValueError(f"{len(unconditional)} unconditional prompts for {len(prompts)} prompts")
    if any(len(prompt) and prompt[-1] == vocabulary.eov_id for prompt in prompts):
        raise ValueError("the prompt's last frame ends with <eov>; a continuation goes on from <eof>")
    vision, n_rows = vocabulary["vision"], len(prompts)

    def drawn_one_by_one(decoder: Decoder, setting: Sampling) -> Tensor:
        codes: list[Tensor] = []
        for _ in range(codes_per_frame):
            logits = decoder.logits(vision.start, vision.start + vision.n_codes)
            logits = guided(logits, setting.guidance) if len(decoder) > n_rows else logits
            code = choose(logits, setting.top_k, setting.temperature, generator, setting.top_p)
            codes.append(decoder.agreed(code))
            decoder.append((codes[-1] + vision.start).repeat(len(decoder) // n_rows))
        return torch.stack(codes, dim=1)

    def frames() -> Iterator[np.ndarray]:
        decoder: Decoder | None = None
        drafting: FramesAhead | None = None
        for index, setting in enumerate(settings):
            is_guided = any(s.guidance != 1 for s in settings[index:])
            # Entered anew for each frame: a consumer that pauses the stream gets the model back as it was.
            with inference(model):
                if decoder is None:
                    both = [*prompts, *(unconditional or [])] if is_guided else prompts
                    room = n_frames * (codes_per_frame + 1)
                    decoder = Decoder(model, both, room=room, group=group, cache=cache)
                    if ahead:
                        before = last_frames(prompts, vocabulary, codes_per_frame, decoder.device)
                        drafting = FramesAhead(
                            decoder, vision.start, vision.n_codes, codes_per_frame, ahead, generator, before
                        )
                elif len(decoder) > n_rows and not is_guided:
                    decoder.keep(range(n_rows))
                codes = drafting.frame(setting, n_rows) if drafting else drawn_one_by_one(decoder, setting)
                if index < len(settings) - 1:
                    if drafting:
                        drafting.place(vocabulary.eof_id)
                    else:
                        decoder.append(torch.full((len(decoder),), vocabulary.eof_id, device=decoder.device))
            yield codes.cpu().numpy().astype(np.int32)

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
