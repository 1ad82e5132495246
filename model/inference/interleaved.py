"""Text and frames of any modalities out of one decode, in the order in which the model draws them.

In: prompts, which modalities it may open and how they are framed, how each is sampled. Out: pieces of each row as they
are finished: text, and whole frames. `modality_states.py` decides what may be drawn, so every row decodes.

Guidance as in LWM (arXiv 2402.08268): while a row is in a span that is guided it has a twin, an unconditional row that
holds BOS, the span's opening and its codes. Twins join the batch where a span opens and leave it behind its last guided
frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from model.attention.p2p import Group
from model.inference.framing import Framing
from model.inference.kv_decoder import Decoder
from model.inference.modality_states import ModalityStates, Rows
from model.inference.sampling import GREEDY, IMAGE, VIDEO, Sampling, SamplingTable
from model.inference.state_graph import CODES, MARKER, TEXT
from model.llama.llama import inference
from tokenization.vocabulary import JointVocabulary

ASK_EVERY = 16
"""Tokens between two looks at what was drawn, where a look makes the host wait for the device."""


class Piece(NamedTuple):
    """What a row, by the number of its prompt, has finished: int32 text ids without EOS, or the codes of one frame."""

    row: int
    modality: str
    values: np.ndarray


def generate_interleaved(
    model: LlamaForCausalLM,
    vocabulary: JointVocabulary,
    prompts: Sequence[np.ndarray],
    framings: Sequence[Framing],
    max_new_tokens: int,
    sampling: Mapping[str, Sequence[Sampling]] | None = None,
    generator: torch.Generator | None = None,
    eos_id: int | None = None,
    group: Group = None,
) -> Iterator[Piece]:
    """Continue each prompt in text and in the modalities of `framings`, and yield pieces as they are finished.

    prompts: integer arrays [L_b] of joint ids that end anywhere: in text, behind an opening, inside a frame, whose
    codes then begin the first frame yielded. A row ends with EOS in text (eos_id: the vocabulary's unless given; -1 for
    none) or after max_new_tokens, markers included, by which any span is closed. sampling: by modality, the settings of
    a span's first frame, the second and so on, the last one for all further; by default text is greedy and frames are
    drawn by LWM's settings. A marker that is drawn is drawn like the next frame's codes. group: the ranks that share
    the cache and call this alike. Raises ValueError on guidance of text or of a modality without an opening, on
    settings for a modality without framing, and on what `ModalityStates` refuses.
    """
    machine = ModalityStates(vocabulary, framings, eos_id)
    settings = _settings(machine, sampling or {})
    starts = machine.start(prompts, max_new_tokens)

    def pieces() -> Iterator[Piece]:
        decoding: _Decoding | None = None
        while decoding is None or decoding.live:
            # Entered anew each time: a consumer that pauses gets the model back as it was.
            with inference(model):
                if decoding is None:
                    decoding = _Decoding(model, machine, settings, prompts, starts, max_new_tokens, generator, group)
                finished = decoding.advance()
            yield from finished

    return pieces()


def looks_are_free(device: torch.device) -> bool:
    """Whether the host knows what a step has drawn without waiting."""
    return device.type == "cpu"


def _settings(machine: ModalityStates, given: Mapping[str, Sequence[Sampling]]) -> list[tuple[Sampling, ...]]:
    """The settings of text, then of each framing. Raises ValueError on those that cannot be."""
    names = ["text", *(one.modality.name for one in machine.framings)]
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"settings for {', '.join(unknown)}, of which no framing was given")
    found = [tuple(given.get(name, (IMAGE, VIDEO) if name != "text" else (GREEDY,))) for name in names]
    for number, (name, settings) in enumerate(zip(names, found)):
        if not settings:
            raise ValueError(f"no settings for {name}")
        if any(one.guidance != 1 for one in settings):
            if name == "text":
                raise ValueError("text has no unconditional prompt; its guidance can only be 1")
            if not machine.framings[number - 1].opening:
                raise ValueError(f"guidance of {name} needs an opening, with which its unconditional prompt begins")
    return found


class _Decoding:
    """The rows that are still decoded, with their states, and the twins of those that are guided now."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        machine: ModalityStates,
        settings: Sequence[tuple[Sampling, ...]],
        prompts: Sequence[np.ndarray],
        starts: Rows,
        max_new_tokens: int,
        generator: torch.Generator | None,
        group: Group,
    ) -> None:
        self.model, self.machine, self.settings, self.group = model, machine, settings, group
        self.generator, self.left = generator, max_new_tokens
        self.decoder = Decoder(model, prompts, room=max_new_tokens, group=group)
        device = self.decoder.device
        self.rows = Rows(*(x.to(device) for x in (starts.state, starts.codes, starts.frames, starts.most)))
        self.live, self.twins = list(range(len(prompts))), list[int]()  # twins: the places of their rows among the live
        self.states = starts.state.tolist()
        self.assemblers = [Assembler(machine, *row) for row in enumerate(prompts)]
        self.table = SamplingTable([one for several in settings for one in several], device)
        counts = np.array(list(map(len, settings)))
        kinds = np.array(machine.graph.framing_of) + 1
        self._base = torch.tensor((np.cumsum(counts) - counts)[kinds], device=device)
        self._most = torch.tensor(counts[kinds] - 1, device=device)
        guided = [number for number, several in enumerate(settings[1:]) if any(s.guidance != 1 for s in several)]
        self._steps_to_open = machine.graph.steps_to_open(guided)
        self._unconditional: dict[int, Decoder] = {}
        if not max_new_tokens:
            self.live = []
        self._join_twins(starts.frames.tolist(), prompts)

    def advance(self) -> list[Piece]:
        """Decode up to the next look at what was drawn; the pieces that this finished."""
        ids, states = [], [self.rows.state]
        for _ in range(self._steps()):
            ids.append(self._step())
            states.append(self.rows.state)
        seen = torch.stack([*ids, *states, self.rows.frames]).tolist()
        drawn, before, frames = seen[: len(ids)], seen[len(ids) : -1], seen[-1]
        pieces: list[Piece] = []
        for place, row in enumerate(self.live):
            for now, one, following in zip(before, drawn, before[1:]):
                pieces += self.assemblers[row].take(now[place], one[place], following[place])
        self.states = before[-1]
        going = [place for place, state in enumerate(self.states) if self.left and state != self.machine.graph.end]
        for place in sorted(set(range(len(self.live))) - set(going)):
            pieces += self.assemblers[self.live[place]].finish()
        self._keep(going, frames)
        return pieces

    def _steps(self) -> int:
        """Until the next look: each step where that is free, otherwise no later than where a twin may have to join."""
        if looks_are_free(self.decoder.device):
            return 1
        return min(ASK_EVERY, self.left, *(self._steps_to_open[state] for state in self.states))

    def _step(self) -> Tensor:
        decoder, n = self.decoder, len(self.live)
        whole = (0, self.machine.vocabulary.size)
        first, last = self.machine.graph.bounds(self.states) if looks_are_free(decoder.device) else whole
        logits = decoder.logits(first, last)
        numbers = self._base[self.rows.state] + torch.minimum(self.rows.frames, self._most[self.rows.state])
        twins = self._twin_places
        if self.twins:
            logits, unconditional = logits[:n], logits[n:]
            scale = self.table.guidance[numbers[twins]].unsqueeze(1)
            logits[twins] = unconditional + scale * (logits[twins] - unconditional)
        logits.masked_fill_(~self.machine.allowed(self.rows.state, self.left, first, last), -torch.inf)
        ids = decoder.agreed(self.table.choose(logits, numbers, self.generator) + first)
        self.rows = self.machine.step(self.rows, ids, self.left)
        self.left -= 1
        if self.left:
            decoder.append(torch.cat((ids, ids[twins])))
        return ids

    def _keep(self, going: list[int], frames: list[int]) -> None:
        """Go on with these of the live rows, and the twins that they still need; let new twins join."""
        guided = [place for place in self.twins if place in going and self._is_guided(place, frames)]
        if (going, guided) != (list(range(len(self.live))), self.twins):
            n = len(self.live)
            self.decoder.keep([*going, *(n + self.twins.index(place) for place in guided)])
            self.rows = self.rows[going]
        self.live = [self.live[place] for place in going]
        self.states, frames = [self.states[place] for place in going], [frames[place] for place in going]
        self.twins = [going.index(place) for place in guided]
        self._join_twins(frames)

    def _join_twins(self, frames: list[int], prompts: Sequence[np.ndarray] | None = None) -> None:
        """Twins for rows that are guided and have none: at a span's start, or in what of it the prompts hold."""
        for place in range(len(self.live)):
            if place not in self.twins and self._is_guided(place, frames):
                number = self.machine.graph.framing_of[self.states[place]]
                given = self._given(prompts[place]) if prompts is not None else ()
                self.decoder.join(self._twin(number, given))
                self.twins.append(place)
        self._twin_places = torch.tensor(self.twins, dtype=torch.long, device=self.decoder.device)

    def _is_guided(self, place: int, frames: list[int]) -> bool:
        """Whether the row needs a twin, for this frame of its span or for a later one."""
        state = self.states[place]
        if self.machine.graph.kinds[state] not in (CODES, MARKER):
            return False
        several = self.settings[1 + self.machine.graph.framing_of[state]]
        return any(one.guidance != 1 for one in several[min(frames[place], len(several) - 1) :])

    def _given(self, prompt: np.ndarray) -> Sequence[int]:
        """The codes and markers at a prompt's end."""
        is_text = np.asarray(prompt) < self.machine.vocabulary.text_size
        return list(map(int, prompt[len(prompt) - int(np.argmax(is_text[::-1])) :] if is_text.any() else prompt))

    def _twin(self, number: int, given: Sequence[int]) -> Decoder:
        ids = np.array([self.machine.vocabulary.bos_id, *self.machine.framings[number].opening, *given])
        if given:
            return Decoder(self.model, [ids], room=self.left, group=self.group)
        if number not in self._unconditional:
            self._unconditional[number] = Decoder(self.model, [ids], group=self.group)
        return self._unconditional[number].fork([0])


class Assembler:
    """The pieces of one row, from its ids one by one."""

    def __init__(self, machine: ModalityStates, row: int, prompt: np.ndarray) -> None:
        self.machine, self.row = machine, row
        self._text: list[int] = []
        self._codes: list[int] = []
        for framing in machine.framings:
            first, last = framing.code_ids
            is_code = (np.asarray(prompt) >= first) & (np.asarray(prompt) < last)
            n = len(prompt) if is_code.all() else int(np.argmin(is_code[::-1]))
            if n % framing.codes:  # whole frames of the prompt are not given back
                self._codes = (np.asarray(prompt)[len(prompt) - n % framing.codes :] - first).tolist()

    def take(self, before: int, drawn: int, after: int) -> Iterator[Piece]:
        """One id, and the states before and after it; what it finishes."""
        machine = self.machine
        kind, number = machine.graph.kinds[before], machine.graph.framing_of[before]
        if kind == TEXT and after != machine.graph.end:
            self._text.append(drawn)
            if machine.graph.kinds[after] == CODES:
                opening = machine.framings[machine.graph.framing_of[after]].opening
                self._text = self._text[: max(0, len(self._text) - len(opening))]
                yield from self.finish()
        elif kind in (CODES, MARKER):
            framing = machine.framings[number]
            if framing.code_ids[0] <= drawn < framing.code_ids[1]:
                self._codes.append(drawn - framing.code_ids[0])
                if len(self._codes) == framing.codes:
                    yield Piece(self.row, framing.modality.name, np.array(self._codes, np.int32))
                    self._codes = []

    def finish(self) -> Iterator[Piece]:
        """The text so far, if there is any."""
        if self._text:
            yield Piece(self.row, "text", np.array(self._text, np.int32))
        self._text = []
