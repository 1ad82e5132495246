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

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from model.inference.framing import Framing
from model.inference.state_graph import CODES, MARKER, TEXT, StateGraph
from tokenization.vocabulary import JointVocabulary


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
    """The machine of a vocabulary and the framings of some of its modalities; its states' numbers are the graph's.

    eos_id: ends a sequence where it is drawn among text; the vocabulary's unless given, -1 for none. Raises ValueError
    as `StateGraph` does.
    """

    def __init__(self, vocabulary: JointVocabulary, framings: Sequence[Framing], eos_id: int | None = None) -> None:
        self.vocabulary, self.framings = vocabulary, tuple(framings)
        eos_id = vocabulary.eos_id if eos_id is None else eos_id
        self.graph = StateGraph(vocabulary, framings, eos_id if eos_id >= 0 else None)
        self._tables: dict[tuple[bool, ...], Tensor] = {}
        self._on: dict[torch.device, dict[str, Tensor]] = {}

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
            self._tables[shut] = torch.from_numpy(self.graph.allowed(shut))
        table = self._tables[shut] = self._tables[shut].to(state.device)
        return table[:, first:last][state]

    def step(self, rows: Rows, ids: Tensor, room: int) -> Rows:
        """The states after the next ids, int64 [B], which were allowed. room: as it was for them."""
        table = self._columns(ids.device)
        now, n_codes = rows.state, rows.codes
        following = table["goto"].view(-1)[now * len(self.graph.symbols) + table["symbol"][ids]]
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

    def _columns(self, device: torch.device) -> dict[str, Tensor]:
        """The tables of `step` on a device; what has no framing has the last one's, which is of no account."""
        if device not in self._on:
            graph, framings = self.graph, self.framings
            states = range(len(graph))
            symbol = np.zeros(self.vocabulary.size, dtype=np.int64)
            symbol[graph.symbols[1:]] = np.arange(1, len(graph.symbols))
            has_codes = [graph.kinds[s] in (CODES, MARKER) for s in states]
            first, last = zip(*(framings[f].code_ids if h else (0, 0) for f, h in zip(graph.framing_of, has_codes)))
            after = [
                (state, state) if number < 0 else (graph.after_frame(number, False), graph.after_frame(number, True))
                for state, number in enumerate(graph.framing_of)
            ]
            columns = {
                "goto": [[graph.following(s, symbol) for symbol in graph.symbols] for s in states],
                "symbol": symbol,
                "first_code": first,
                "last_code": last,
                "has_codes": has_codes,
                "is_text": [kind == TEXT for kind in graph.kinds],
                "framing": graph.framing_of,
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
        text = tuple(prompt[max(text_from, len(prompt) - self.graph.longest_word) :].tolist())
        before = int(prompt[text_from - 1]) if text_from else -1
        number = next((n for n, one in enumerate(self.framings) if one.modality.contains(before)), None)
        if number is not None:
            one = self.framings[number]
            n_text = len(prompt) - text_from
            if n_text == 0 and before != one.last:
                return self._inside(number, prompt, room)
            if before == one.last and n_text < len(one.closing) and text == one.closing[:n_text]:
                self._check_end(one, room, len(one.closing) - n_text)
                return self.graph.ending(number, n_text), 0, 0, 0
        state = self.graph.after_text(text)
        if self.graph.kinds[state] != CODES:
            return state, 0, 0, 0
        return self._opened(self.graph.framing_of[state], 0, room)

    def _inside(self, number: int, prompt: np.ndarray, room: int) -> tuple[int, int, int, int]:
        """After a prompt that ends with codes, or with the marker between two frames."""
        one = self.framings[number]
        first, last = one.code_ids
        is_code = (prompt >= first) & (prompt < last)
        given = len(prompt) if is_code.all() else int(np.argmin(is_code[::-1]))
        if one.between is not None and given > one.codes:
            raise ValueError(f"the prompt ends with {given} codes of {one.modality.name} in a frame of {one.codes}")
        if given == 0 or given % one.codes:
            return self._opened(number, given % one.codes, room)
        self._check_end(one, room, (one.last is not None) + len(one.closing))
        most = 1 + min(one.frames_in(room - (one.between is not None)), one.most_frames)
        return self.graph.after_frame(number, is_last=most <= 1), one.codes, 1, most

    @staticmethod
    def _check_end(one: Framing, room: int, needed: int) -> None:
        if room < needed:
            raise ValueError(f"{room} tokens have no room for the end of the prompt's span of {one.modality.name}")

    def _opened(self, number: int, given: int, room: int) -> tuple[int, int, int, int]:
        one = self.framings[number]
        most = min(one.frames_in(room + given), one.most_frames)
        if most < 1:
            raise ValueError(f"{room} tokens have no room for a frame of {one.modality.name} and the end of its span")
        return self.graph.codes_state(number), one.codes - given, 0, most
