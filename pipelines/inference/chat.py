"""A conversation about pictures and films: turns of user and model as one growing prompt.

The words around the turns are LWM's (arXiv 2402.08268): a system message, then `USER: ... ASSISTANT:` again and again,
each answer ended by EOS. Media stand in the user's turn, before its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipelines.inference.loaded import MOST_FRAMES, LoadedModel
from pipelines.inference.media import Medium, as_list
from pipelines.inference.prompt import Part, prompt_ids

SYSTEM = "You are a helpful assistant."


@dataclass
class Conversation:
    """With a model. max_new_tokens: of an answer. temperature, top_k, top_p: greedy unless a temperature is given."""

    model: LoadedModel
    system: str = SYSTEM
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    _ids: np.ndarray | None = field(default=None, repr=False)

    def say(self, text: str, media: Medium | Sequence[Medium] | None = None, frames: int = MOST_FRAMES) -> str:
        """The model's answer to a turn. media: shown with it, of each film at most so many `frames`.

        Raises UserError where the conversation grows longer than the model's context; the turn is then not part of it.
        """
        model = self.model
        turn = self._turn(text, [model.look(medium, frames) for medium in as_list(media)])
        ids = turn if self._ids is None else np.concatenate([self._ids, turn[1:]])  # without a second BOS
        limit = min(self.max_new_tokens, max(1, model.context - len(ids)))
        (answer,) = model.continue_text([ids], limit, self.temperature, self.top_k, self.top_p, self.seed)
        ending = np.array([model.vocabulary.eos_id], np.int32)
        self._ids = np.concatenate([ids, model.tokenizer.encode(answer), ending])
        return answer.strip()

    def _turn(self, text: str, shown: Sequence[np.ndarray]) -> np.ndarray:
        before = f"{self.system} USER: " if self._ids is None else "USER: "
        parts: list[Part] = [f"{before}{text}\nASSISTANT:"] if not shown else [before, *shown, f"{text}\nASSISTANT:"]
        return prompt_ids(parts, self.model.tokenizer, self.model.vocabulary)
