"""Which ids may come next in a sequence of text and framed codes: a state machine over the joint vocabulary's ranges.

In: the framing of each modality, and how many tokens there is room for. Out: for every state the ids that may be drawn,
and the state after each. Whatever is drawn of them is a sequence that decodes:

    sequence = (text | opening frames closing)* [EOS]      text has no opening and no closing inside
    frames   = (codes between)* codes last                 as far as the modality has these markers

Openings and closings (`<vision>`, `</vision>`) are ordinary text ids, one or several. A model opens a span by drawing
the opening's ids one after another among text, which the machine follows as Aho and Corasick match several words at
once. Inside a frame there are codes alone. After a frame comes a marker, drawn where the span may go on or end
(`<eof>` or `<eov>`) and placed where it has to end. The closing is placed. A choice is always among ids of one
modality, since a joint model learns each modality by a softmax of its own and logits of two are not comparable.

Nothing is left unfinished where the room ends: an opening cannot be completed that has no room for a frame, and a span
ends while there is room for its end. The states of a batch are tensors, and a step is some operators on them; nothing
waits for the device.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tokenization.vocabulary import JointVocabulary, Modality

UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Framing:
    """How the codes of a modality lie in a sequence.

    codes: of one frame. opening, closing: text ids around a span; without an opening, a span begins only where a prompt
    does it. most_frames: that a span may have. Of the modality's markers the first stands between frames and the last
    after the last one; with one marker alone, a frame follows a frame directly, and with none, a span ends after
    `most_frames`. Raises ValueError on a frame without codes and on a span without frames or end.
    """

    modality: Modality
    codes: int
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    most_frames: int = UNLIMITED

    def __post_init__(self) -> None:
        if self.codes < 1 or self.most_frames < 1:
            raise ValueError(f"a span of {self.modality.name} needs at least one frame of at least one code")
        if not self.modality.markers and self.most_frames == UNLIMITED:
            raise ValueError(f"{self.modality.name} has no marker that ends a span; give most_frames")

    @property
    def between(self) -> int | None:
        """The joint id between two frames."""
        return self.modality.marker(self.modality.markers[0]) if len(self.modality.markers) > 1 else None

    @property
    def last(self) -> int | None:
        """The joint id after the last frame."""
        return self.modality.marker(self.modality.markers[-1]) if self.modality.markers else None

    @property
    def is_code(self) -> tuple[int, int]:
        """The joint ids of codes, as a half-open range."""
        return self.modality.start, self.modality.start + self.modality.n_codes

    def frames_in(self, tokens: int) -> int:
        """The frames for which there is room in so many tokens, the closing included."""
        tokens -= len(self.closing)
        if self.between is None:
            return (tokens - (self.last is not None)) // self.codes
        return tokens // (self.codes + 1)


@dataclass(frozen=True)
class Rows:
    """The states of B rows, int64 [B] each: the state's number, codes that a frame still needs, whole frames of the
    span so far, and how many it may have."""

    state: Tensor
    codes: Tensor
    frames: Tensor
    most: Tensor

    def __getitem__(self, rows: Sequence[int]) -> Rows:
        """Some of the rows, in this order."""
        return Rows(*(getattr(self, field.name)[list(rows)] for field in fields(self)))


class ModalityStates:
    """The machine of a vocabulary and the framings of some of its modalities.

    eos_id: ends a sequence where it is drawn among text; the vocabulary's unless given, -1 for none. Raises ValueError
    where an opening or a closing has other than text ids, or one is part of another.
    """

    def __init__(self, vocabulary: JointVocabulary, framings: Sequence[Framing], eos_id: int | None = None) -> None:
        self.vocabulary, self.framings = vocabulary, tuple(framings)
        eos_id = vocabulary.eos_id if eos_id is None else eos_id
        self.eos_id = eos_id if eos_id >= 0 else None
        self._words = [word for one in self.framings for word in (one.opening, one.closing) if word]
        self._check_words()
        self._build()

    def __len__(self) -> int:
        """The number of states."""
        return len(self.framing_of)

    def start(self, prompts: Sequence[np.ndarray], room: int) -> Rows:
        """The states after prompts, joint ids [L_b], with room for so many tokens more.

        Raises ValueError where a prompt ends in the midst of what there is no room for, or with codes that cannot be.
        """
        return Rows(*(torch.tensor(column) for column in zip(*(self._after(np.asarray(p), room) for p in prompts))))

    def allowed(self, state: Tensor, room: int, first: int = 0, last: int | None = None) -> Tensor:
        """Whether each of the ids first..last-1 may be drawn next: bool [B, ids], for states int64 [B].

        room: tokens that there is room for, the next included.
        """
        shut = tuple(one.frames_in(room - 1) < 1 for one in self.framings)
        if shut not in self._tables:
            self._tables[shut] = torch.from_numpy(self._allowed(shut))
        table = self._tables[shut] = self._tables[shut].to(state.device)
        return table[:, first:last][state]

    def step(self, rows: Rows, ids: Tensor, room: int) -> Rows:
        """The states after the next ids, int64 [B], which were allowed. room: as it was for them."""
        table = self._columns(ids.device)
        now, n_codes = rows.state, rows.codes
        following = table["goto"].view(-1)[now * self._n_symbols + table["symbol"][ids]]
        is_code = (ids >= table["first_code"][now]) & (ids < table["last_code"][now])
        n_codes = n_codes - is_code.long()
        is_whole = is_code & (n_codes == 0)
        frames = rows.frames + is_whole.long()
        ended = torch.where(frames < rows.most, table["after"][now], table["after_last"][now])
        following = torch.where(is_whole, ended, following)
        is_opened = table["is_text"][now] & table["has_codes"][following]
        framed = table["framing"][following]
        fits = (room - 1 - table["ending"][framed]) // table["unit"][framed]
        return Rows(
            following,
            torch.where(is_whole | is_opened, table["codes"][framed], n_codes),
            frames.masked_fill(is_opened, 0),
            torch.where(is_opened, torch.minimum(fits, table["most"][framed]), rows.most),
        )

    def bounds(self, states: Sequence[int]) -> tuple[int, int]:
        """The narrowest range of ids with all that may be drawn in any of these states."""
        ranges = [self._bounds[state] for state in states]
        return min(first for first, _ in ranges), max(last for _, last in ranges)

    def steps_to_open(self, framings: Collection[int]) -> list[int]:
        """By state, the fewest steps after which a row can be in a new span of one of these framings."""
        steps = [UNLIMITED] * len(self)
        following = [{self._next(state, symbol) for symbol in self._symbols} for state in range(len(self))]
        for state, number in enumerate(self.framing_of):
            if self.kind(state) in ("codes", "marker"):
                following[state] |= {self._after_frame(number, False), self._after_frame(number, True)}
        opened = {self.codes_state(number) for number in framings}
        for _ in steps:  # at most as many rounds as there are states
            for state, others in enumerate(following):
                if self.kind(state) == "text" and others & opened:
                    steps[state] = 1
                else:
                    steps[state] = min(steps[state], 1 + min(steps[other] for other in others))
        return steps

    def _check_words(self) -> None:
        for number, word in enumerate(self._words):
            if not all(0 <= one < self.vocabulary.text_size and one != self.eos_id for one in word):
                raise ValueError(f"the opening or closing {word} has other ids than those of text")
            for other in self._words[:number] + self._words[number + 1 :]:
                if any(other[i : i + len(word)] == word for i in range(len(other))):
                    raise ValueError(f"the opening or closing {word} is part of another, {other}")

    def _build(self) -> None:
        """Number the states: text by what it has of a word, the end, then each framing's."""
        self._nodes = sorted({word[:n] for word in self._words for n in range(len(word))} | {()}, key=len)
        self.end = len(self._nodes)
        kinds: list[tuple[int, str]] = [(-1, "text")] * self.end + [(-1, "end")]
        self._first = []
        for number, one in enumerate(self.framings):
            self._first.append(len(kinds))
            kinds += [(number, "codes"), (number, "marker"), (number, "last")]
            kinds += [(number, "closing")] * len(one.closing)
        self._kinds = [kind for _, kind in kinds]
        self.framing_of = [number for number, _ in kinds]
        """By state, the number of its framing, -1 for text."""
        self._tables: dict[tuple[bool, ...], Tensor] = {}
        self._on: dict[torch.device, dict[str, Tensor]] = {}
        first_table = self._allowed((False,) * len(self.framings))
        self._bounds = [(int(np.flatnonzero(row)[0]), int(np.flatnonzero(row)[-1]) + 1) for row in first_table]

    def kind(self, state: int) -> str:
        """text, end, codes, marker (a frame is whole and the span may go on), last (it may not), or closing."""
        return self._kinds[state]

    def codes_state(self, framing: int) -> int:
        """The state inside a frame."""
        return self._first[framing]

    def _ending(self, framing: int, place: int = 0) -> int:
        """The state before the closing's id number `place`; behind the last, that of text."""
        closing = self.framings[framing].closing
        return self._first[framing] + 3 + place if place < len(closing) else self._node(closing)

    def _after_frame(self, framing: int, is_last: bool) -> int:
        one = self.framings[framing]
        if one.last is None:
            return self._ending(framing) if is_last else self._first[framing]
        return self._first[framing] + (2 if is_last else 1)

    def _node(self, text: tuple[int, ...]) -> int:
        """The state of text: the longest end of it that begins a word."""
        nodes = self._node_numbers
        return next(nodes[text[i:]] for i in range(len(text) + 1) if text[i:] in nodes)

    @cached_property
    def _node_numbers(self) -> dict[tuple[int, ...], int]:
        return {node: number for number, node in enumerate(self._nodes)}

    def _next_of_text(self, text: tuple[int, ...]) -> int:
        """The state after text that may have completed an opening."""
        for number, one in enumerate(self.framings):
            if one.opening and text[-len(one.opening) :] == one.opening:
                return self.codes_state(number)
        return self._node(text)

    def _next(self, state: int, symbol: int) -> int:
        """The state after a special id (or -1, any other), where frames do not decide it."""
        kind, number = self._kinds[state], self.framing_of[state]
        if kind == "text":
            return self.end if symbol == self.eos_id else self._next_of_text((*self._nodes[state], symbol))
        if kind == "end":
            return state
        one = self.framings[number]
        if kind == "closing":
            return self._ending(number, state - self._first[number] - 2)
        if kind != "codes" and symbol == one.last:
            return self._ending(number)
        return self.codes_state(number)

    @cached_property
    def _symbols(self) -> list[int]:
        """Ids on which states depend; any other has the symbol 0."""
        markers = [marker for one in self.framings for marker in (one.between, one.last) if marker is not None]
        ends = [] if self.eos_id is None else [self.eos_id]
        return [-1, *sorted({*ends, *markers, *(one for word in self._words for one in word)})]

    @property
    def _n_symbols(self) -> int:
        return len(self._symbols)

    def _allowed(self, shut: tuple[bool, ...]) -> np.ndarray:
        """bool [states, V]: the ids that may be drawn. shut: by framing, whether no span of it may open."""
        table = np.zeros((len(self), self.vocabulary.size), dtype=bool)
        for state, (kind, number) in enumerate(zip(self._kinds, self.framing_of)):
            if kind == "text":
                table[state, : self.vocabulary.text_size] = True
                for word in self._completed(shut):
                    if self._ends_with(self._nodes[state], word[:-1]):
                        table[state, word[-1]] = False
            elif kind == "end":
                table[state, self.eos_id or 0] = True
            else:
                one = self.framings[number]
                if kind == "codes" or (kind == "marker" and one.between is None):
                    table[state, slice(*one.is_code)] = True
                if kind == "marker" and one.between is not None:
                    table[state, one.between] = True
                if kind in ("marker", "last") and one.last is not None:
                    table[state, one.last] = True
                if kind == "closing":
                    table[state, one.closing[state - self._first[number] - 3]] = True
                if one.last is None and kind in ("marker", "last"):  # never reached
                    table[state, one.modality.start] = True
        return table

    def _completed(self, shut: tuple[bool, ...]) -> list[tuple[int, ...]]:
        """The words that text may not complete."""
        openings = [one.opening for one, is_shut in zip(self.framings, shut) if is_shut]
        return [word for word in (*openings, *(one.closing for one in self.framings)) if word]

    @staticmethod
    def _ends_with(text: tuple[int, ...], end: tuple[int, ...]) -> bool:
        return not end or text[-len(end) :] == end

    def _columns(self, device: torch.device) -> dict[str, Tensor]:
        """The tables of `step` on a device; what has no framing has the last one's, which is of no account."""
        if device not in self._on:
            states, framings = range(len(self)), self.framings
            symbol = np.zeros(self.vocabulary.size, dtype=np.int64)
            symbol[self._symbols[1:]] = np.arange(1, self._n_symbols)
            has_codes = [self._kinds[s] in ("codes", "marker") for s in states]
            first, last = zip(*(framings[f].is_code if h else (0, 0) for f, h in zip(self.framing_of, has_codes)))
            after = [
                (state, state) if number < 0 else (self._after_frame(number, False), self._after_frame(number, True))
                for state, number in enumerate(self.framing_of)
            ]
            columns = {
                "goto": [[self._next(s, symbol) for symbol in self._symbols] for s in states],
                "symbol": symbol,
                "first_code": first,
                "last_code": last,
                "has_codes": has_codes,
                "is_text": [kind == "text" for kind in self._kinds],
                "framing": self.framing_of,
                "after": [going_on for going_on, _ in after],
                "after_last": [ending for _, ending in after],
                "codes": [one.codes for one in framings] or [1],
                "most": [one.most_frames for one in framings] or [1],
                "unit": [one.codes + (one.between is not None) for one in framings] or [1],
                "ending": [len(one.closing) + (one.between is None and one.last is not None) for one in framings]
                or [0],
            }
            self._on[device] = {name: torch.tensor(np.asarray(x), device=device) for name, x in columns.items()}
        return self._on[device]

    def _after(self, prompt: np.ndarray, room: int) -> tuple[int, int, int, int]:
        """Of one prompt, a row's state, codes, frames and most."""
        is_text = prompt < self.vocabulary.text_size
        text_from = len(prompt) - int(np.argmin(is_text[::-1])) if not is_text.all() else 0
        text = tuple(prompt[max(text_from, len(prompt) - max(map(len, self._words), default=1)) :].tolist())
        before = int(prompt[text_from - 1]) if text_from else -1
        number = next((n for n, one in enumerate(self.framings) if one.modality.contains(before)), None)
        if number is not None:
            one = self.framings[number]
            n_text = len(prompt) - text_from
            if n_text == 0 and before != one.last:
                return self._inside(number, prompt, room)
            if before == one.last and n_text < len(one.closing) and text == one.closing[:n_text]:
                self._check_end(one, room, len(one.closing) - n_text)
                return self._ending(number, n_text), 0, 0, 0
        state = self._next_of_text(text)
        if self._kinds[state] != "codes":
            return state, 0, 0, 0
        return self._opened(self.framing_of[state], 0, room)

    def _inside(self, number: int, prompt: np.ndarray, room: int) -> tuple[int, int, int, int]:
        """After a prompt that ends with codes, or with the marker between two frames."""
        one = self.framings[number]
        first, last = one.is_code
        is_code = (prompt >= first) & (prompt < last)
        given = len(prompt) if is_code.all() else int(np.argmin(is_code[::-1]))
        if one.between is not None and given > one.codes:
            raise ValueError(f"the prompt ends with {given} codes of {one.modality.name} in a frame of {one.codes}")
        if given == 0 or given % one.codes:
            return self._opened(number, given % one.codes, room)
        self._check_end(one, room, (one.last is not None) + len(one.closing))
        most = 1 + min(one.frames_in(room - (one.between is not None)), one.most_frames)
        return self._after_frame(number, is_last=most <= 1), one.codes, 1, most

    @staticmethod
    def _check_end(one: Framing, room: int, needed: int) -> None:
        if room < needed:
            raise ValueError(f"{room} tokens have no room for the end of the prompt's span of {one.modality.name}")

    def _opened(self, number: int, given: int, room: int) -> tuple[int, int, int, int]:
        one = self.framings[number]
        most = min(one.frames_in(room + given), one.most_frames)
        if most < 1:
            raise ValueError(f"{room} tokens have no room for a frame of {one.modality.name} and the end of its span")
        return self.codes_state(number), one.codes - given, 0, most
