"""A trained model that is ready to be asked: text, pictures and films out of words, pictures and films.

In: the folder of an exported or imported model. Out: `LoadedModel`, on top of which are `ringworld.load` and the
commands. Its calls do not change it; draws depend on their seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.export.folder import ModelFolder, open_model
from pipelines.inference.media import Film, Medium, as_list, frames_of, last_frames
from pipelines.inference.prompt import Part, open_frames, prompt_ids
from storage.errors import UserError
from tokenization.text.tokenizer import TextTokenizer
from tokenization.vocabulary import JointVocabulary

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import LlamaForCausalLM

    from model.inference.sampling import Sampling
    from tokenization.codecs.vqgan.model import VQGAN

MOST_FRAMES = 8
"""Frames of a film that a model is shown, unless more are asked for."""


class LoadedModel:
    """A model in a folder, loaded when it is first asked.

    device: "cpu", "cuda" or another of torch's; None: a GPU where there is one. dtype: in which it computes, "fp32" or
    "bf16"; None: bf16 on a GPU, whose attention kernels want it, and fp32 else.
    """

    def __init__(self, folder: ModelFolder, device: str | None = None, dtype: str | None = None) -> None:
        import torch

        if dtype not in (None, "fp32", "bf16"):
            raise UserError(f"dtype {dtype}: neither fp32 nor bf16; choose one of the two")
        self.folder = folder
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        is_half = dtype == "bf16" or (dtype is None and self.device.startswith("cuda"))
        self._dtype = torch.bfloat16 if is_half else torch.float32

    @property
    def vocabulary(self) -> JointVocabulary:
        """The ranges of ids of all modalities."""
        return self.folder.vocabulary

    @property
    def tokenizer(self) -> TextTokenizer:
        """The text tokenizer."""
        return self.folder.tokenizer

    @property
    def context(self) -> int:
        """Tokens that the model was trained to attend to."""
        return int(self.folder.config.max_position_embeddings)

    @cached_property
    def llama(self) -> LlamaForCausalLM:
        """The language model on its device."""
        return self.folder.llama(dtype=self._dtype).to(self.device).eval()  # type: ignore[arg-type]

    @cached_property
    def codec(self) -> VQGAN:
        """What turns frames into codes and back. Raises UserError where the model has none."""
        return self.folder.codec(device=self.device)

    @property
    def fps(self) -> float:
        """Frames a second at which films were sampled in training."""
        return self.folder.description.codecs["vision"].fps

    def look(self, medium: Medium, frames: int = MOST_FRAMES) -> np.ndarray:
        """Codes int32 [n, codes_per_frame] of at most so many frames of a medium, evenly spaced."""
        codec = self.codec
        return codec.encode(frames_of(medium, codec.config.resolution, _at_least_one("frames", frames), self.fps))

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        media: Medium | Sequence[Medium] | None = None,
        frames: int = MOST_FRAMES,
    ) -> str | list[str]:
        """Continue a text, or several at once. Greedy unless a temperature is given.

        media: pictures and films that stand before each text, of each film at most so many `frames`. Raises UserError
        where prompt and answer together are longer than the model's context.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        shown: list[Part] = [self.look(medium, frames) for medium in as_list(media)]
        prompts = [prompt_ids([*shown, text], self.tokenizer, self.vocabulary) for text in texts]
        answers = self.continue_text(prompts, max_new_tokens, temperature, top_k, top_p, seed)
        return answers[0] if isinstance(prompt, str) else answers

    def continue_text(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[str]:
        """As `generate`, of prompts that are laid out already: integer arrays [L_b] of joint ids."""
        from model.inference.generate import generate_text
        from model.inference.sampling import GREEDY

        self._check_length(prompts, _at_least_one("max_new_tokens", max_new_tokens))
        setting = _changed(GREEDY, temperature=temperature, top_k=top_k, top_p=top_p)
        rows = generate_text(
            self.llama,
            self.vocabulary,
            prompts,
            max_new_tokens,
            setting.top_k,
            setting.temperature,
            self._generator(seed),
            top_p=setting.top_p,
        )
        return [self.tokenizer.decode(row) for row in rows]

    def images(
        self,
        prompt: str,
        n: int = 1,
        guidance: float | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[Image.Image]:
        """So many pictures of a text; by default drawn as LWM draws them, with a guidance of 5."""
        from model.inference.sampling import IMAGE

        setting = _changed(IMAGE, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
        (codes,) = self._frames([prompt] * _at_least_one("n", n), 1, setting, setting, seed, None)
        return Film(self.codec.decode(codes), self.fps).images

    def video(
        self,
        prompt: str = "",
        frames: int = 16,
        continues: Medium | None = None,
        given: int = MOST_FRAMES,
        guidance: float | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        on_frame: Callable[[int], Any] = lambda number: None,
    ) -> Film:
        """A film of a text, or one that goes on where another ends, with what was given of that one at its beginning.

        guidance, top_k: by default LWM's, for the first frame those of an image. given: the last so many frames of the
        film that it continues. on_frame: called with the number of each frame as it is finished.
        """
        from model.inference.sampling import IMAGE, VIDEO

        before = None if continues is None else self._last_frames(continues, given)
        settings = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        first, rest = (_changed(setting, **settings) for setting in (IMAGE, VIDEO))
        if before is not None:
            first = rest
        made = [] if before is None else list(before)
        for number, codes in enumerate(self._frames([prompt], frames, first, rest, seed, before)):
            made.append(codes[0])
            on_frame(number)
        return Film(self.codec.decode(np.stack(made)), self.fps)

    def _frames(
        self,
        prompts: Sequence[str],
        frames: int,
        first: Sampling,
        rest: Sampling,
        seed: int,
        given: np.ndarray | None,
    ) -> Iterator[np.ndarray]:
        """Codes int32 [B, codes_per_frame] of one frame after the other."""
        from model.inference.generate import stream_frame_batches

        per_frame = self.codec.config.codes_per_frame
        rows = [open_frames([prompt] if prompt else [], given, self.tokenizer, self.vocabulary) for prompt in prompts]
        self._check_length(rows, _at_least_one("frames", frames) * (per_frame + 1))
        is_guided = first.guidance != 1 or (rest.guidance != 1 and frames > 1)
        nothing = open_frames([], given, self.tokenizer, self.vocabulary)
        unconditional = [nothing] * len(rows) if is_guided else None
        generator = self._generator(seed)
        return stream_frame_batches(
            self.llama, self.vocabulary, rows, frames, per_frame, first, rest, unconditional, generator
        )

    def _last_frames(self, medium: Medium, given: int) -> np.ndarray:
        """Codes of the last frames of a film, at the rate of training."""
        size = self.codec.config.resolution
        return self.codec.encode(last_frames(medium, size, _at_least_one("given", given), self.fps))

    def _check_length(self, prompts: Sequence[np.ndarray], new: int) -> None:
        longest = max(map(len, prompts))
        if longest + new > self.context:
            raise UserError(
                f"the prompt has {longest} tokens, and {new} more are asked for: the model's context is "
                f"{self.context}; shorten the prompt, show fewer frames or ask for less"
            )

    def _generator(self, seed: int) -> torch.Generator:
        import torch

        return torch.Generator(self.device).manual_seed(seed)


def load(url: str, device: str | None = None, dtype: str | None = None) -> LoadedModel:
    """The exported or imported model in a folder at any fsspec URL. See `LoadedModel`.

    Raises UserError where there is none, or it is not whole.
    """
    return LoadedModel(open_model(url), device, dtype)


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise UserError(f"{name} {value}: ask for 1 at least")
    return value


def _changed(setting: Sampling, **given: Any) -> Sampling:
    """A setting with what is not None in place of its own. Raises UserError on what cannot be drawn by."""
    from dataclasses import replace

    try:
        return replace(setting, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise UserError(f"sampling: {error}") from None
