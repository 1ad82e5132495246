"""The states of a sequence of text and framed codes, and what follows on what: a graph on the host, without rows.

In: the vocabulary and framings. Out: by state, the ids that may be drawn and the state after each. Text is in as many
states as openings and closings have beginnings, since they are followed as Aho and Corasick match several words at
once; each framing has a state inside a frame, one behind a frame after which the span may go on, one behind a frame
after which it may not, and one for each id of its closing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property

import numpy as np

from model.inference.framing import UNLIMITED, Framing
from tokenization.vocabulary import JointVocabulary

TEXT, END, CODES, MARKER, LAST, CLOSING = "text", "end", "codes", "marker", "last", "closing"
"""Kinds of states. MARKER: a frame is whole, and the span may go on. LAST: it is whole, and the span has to end."""


class StateGraph:
    """The states, by number. end: the one after EOS. framing_of: by state, the number of its framing, -1 for text.

    kinds: by state. eos_id: None for none. Raises ValueError where an opening or a closing has other than text ids, or
    one is part of another.
    """

    def __init__(self, vocabulary: JointVocabulary, framings: Sequence[Framing], eos_id: int | None) -> None:
        self.vocabulary, self.framings, self.eos_id = vocabulary, tuple(framings), eos_id
        self._words = [word for one in self.framings for word in (one.opening, one.closing) if word]
        self._check_words()
        self._beginnings = sorted({word[:n] for word in self._words for n in range(len(word))} | {()}, key=len)
        self._numbers = {text: number for number, text in enumerate(self._beginnings)}
        self.end = len(self._beginnings)
        states = [(-1, TEXT)] * self.end + [(-1, END)]
        self._first = []
        for number, one in enumerate(self.framings):
            self._first.append(len(states))
            states += [(number, kind) for kind in (CODES, MARKER, LAST, *[CLOSING] * len(one.closing))]
        self.framing_of, self.kinds = [number for number, _ in states], [kind for _, kind in states]

    def __len__(self) -> int:
        """The number of states."""
        return len(self.kinds)

    @property
    def longest_word(self) -> int:
        """Ids of the longest opening or closing; at least 1."""
        return max(map(len, self._words), default=1)

    def allowed(self, shut: Sequence[bool]) -> np.ndarray:
        """bool [states, V]: the ids that may be drawn. shut: by framing, whether no span of it may open."""
        table = np.zeros((len(self), self.vocabulary.size), dtype=bool)
        openings = [one.opening for one, is_shut in zip(self.framings, shut) if is_shut]
        unwanted = [word for word in (*openings, *(one.closing for one in self.framings)) if word]
        for state, (kind, number) in enumerate(zip(self.kinds, self.framing_of)):
            if kind == TEXT:
                table[state, : self.vocabulary.text_size] = True
                text = self._beginnings[state]
                for word in unwanted:  # text may not complete it
                    if text[max(0, len(text) - len(word) + 1) :] == word[:-1]:
                        table[state, word[-1]] = False
            elif kind == END:
                table[state, self.eos_id or 0] = True
            else:
                table[state, self._framed(state, kind, self.framings[number])] = True
        return table

    def _framed(self, state: int, kind: str, one: Framing) -> list[int]:
        """What may be drawn in a state of a framing. Without markers a frame has no states of its own behind it."""
        if kind == CLOSING:
            return [one.closing[state - self.codes_state(self.framing_of[state]) - 3]]
        markers = [marker for marker in (one.between, one.last) if marker is not None]
        if kind == LAST and markers:
            return markers[-1:]
        if kind == MARKER and len(markers) == 2:
            return markers
        return [*range(*one.code_ids), *(markers if kind == MARKER else [])]

    def codes_state(self, framing: int) -> int:
        """The state inside a frame."""
        return self._first[framing]

    def ending(self, framing: int, place: int = 0) -> int:
        """The state before the closing's id number `place`; behind the last, that of text."""
        closing = self.framings[framing].closing
        return self._first[framing] + 3 + place if place < len(closing) else self._node(closing)

    def after_frame(self, framing: int, is_last: bool) -> int:
        """The state behind a whole frame. is_last: the span may have no further one."""
        one = self.framings[framing]
        if one.last is None:
            return self.ending(framing) if is_last else self._first[framing]
        return self._first[framing] + (2 if is_last else 1)

    def _node(self, text: tuple[int, ...]) -> int:
        """The state of text: the longest end of it that begins a word."""
        numbers = self._numbers
        return next(numbers[text[i:]] for i in range(len(text) + 1) if text[i:] in numbers)

    def after_text(self, text: tuple[int, ...]) -> int:
        """The state after text that may have completed an opening."""
        for number, one in enumerate(self.framings):
            if one.opening and text[-len(one.opening) :] == one.opening:
                return self.codes_state(number)
        return self._node(text)

    def following(self, state: int, symbol: int) -> int:
        """The state after a special id (or -1, any other), where frames do not decide it."""
        kind, number = self.kinds[state], self.framing_of[state]
        if kind == TEXT:
            return self.end if symbol == self.eos_id else self.after_text((*self._beginnings[state], symbol))
        if kind == END:
            return state
        one = self.framings[number]
        if kind == CLOSING:
            return self.ending(number, state - self._first[number] - 2)
        if kind != CODES and symbol == one.last:
            return self.ending(number)
        return self.codes_state(number)

    @cached_property
    def symbols(self) -> list[int]:
        """Ids on which states depend; any other has the symbol 0."""
        markers = [marker for one in self.framings for marker in (one.between, one.last) if marker is not None]
        ends = [] if self.eos_id is None else [self.eos_id]
        return [-1, *sorted({*ends, *markers, *(one for word in self._words for one in word)})]

    def bounds(self, states: Sequence[int]) -> tuple[int, int]:
        """The narrowest range of ids with all that may be drawn in any of these states."""
        ranges = [self._bounds[state] for state in states]
        return min(first for first, _ in ranges), max(last for _, last in ranges)

    def steps_to_open(self, framings: Collection[int]) -> list[int]:
        """By state, the fewest steps after which a row can be in a new span of one of these framings."""
        steps = [UNLIMITED] * len(self)
        reached = [{self.following(state, symbol) for symbol in self.symbols} for state in range(len(self))]
        for state, number in enumerate(self.framing_of):
            if self.kinds[state] in (CODES, MARKER):
                reached[state] |= {self.after_frame(number, False), self.after_frame(number, True)}
        opened = {self.codes_state(number) for number in framings}
        for _ in steps:  # at most as many rounds as there are states
            for state, others in enumerate(reached):
                if self.kinds[state] == TEXT and others & opened:
                    steps[state] = 1
                else:
                    steps[state] = min(steps[state], 1 + min(steps[other] for other in others))
        return steps

    @cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        ids = [np.flatnonzero(row) for row in self.allowed([False] * len(self.framings))]
        return [(int(some[0]), int(some[-1]) + 1) for some in ids]

    def _check_words(self) -> None:
        for number, word in enumerate(self._words):
            if not all(0 <= one < self.vocabulary.text_size and one != self.eos_id for one in word):
                raise ValueError(f"the opening or closing {word} has other ids than those of text")
            for other in self._words[:number] + self._words[number + 1 :]:
                if any(other[i : i + len(word)] == word for i in range(len(other))):
                    raise ValueError(f"the opening or closing {word} is part of another, {other}")
