"""Whatever is drawn of the ids that the states allow is a sequence that decodes.

The oracle is a regular expression over the ids as characters, which knows nothing of states.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.inference.framing import UNLIMITED, Framing
from model.inference.modality_states import ModalityStates
from tokenization.field_spec import FieldSpec
from tokenization.fields import build_tokens
from tokenization.text.tokenizer import load_text_tokenizer
from tokenization.vocabulary import JointVocabulary

DATA = Path(__file__).parents[2] / "data" / "fields"
TWO = JointVocabulary.for_codebook(20, 6, 9)
VOCABULARY = TWO.extended("audio", 4, ("end",), 6).extended("depth", 3, (), 4)
OPENING, CLOSING = (5, 6, 5, 7), (5, 6, 8)
"""Several ids each, which begin alike and whose beginning repeats in the opening."""
VISION = Framing(VOCABULARY["vision"], 3, OPENING, CLOSING)
AUDIO = Framing(VOCABULARY["audio"], 2, (9,), (10,))
DEPTH = Framing(VOCABULARY["depth"], 2, (11, 12), (), most_frames=2)
ALL = (VISION, AUDIO, DEPTH)


def characters(ids: Sequence[int]) -> str:
    return "".join(chr(0x100 + one) for one in ids)


def span_pattern(one: Framing) -> str:
    """A span, from its opening's end to its closing's end, as a regular expression."""
    first, last = one.code_ids
    code = f"[{characters([first])}-{characters([last - 1])}]"
    frame, closing = f"{code}{{{one.codes}}}", re.escape(characters(one.closing))
    if one.between is not None:
        return f"(?:{frame}{characters([one.between])})*{frame}{characters([one.last])}{closing}"
    return f"(?:{frame}){{1,{min(one.most_frames, 99)}}}{'' if one.last is None else characters([one.last])}{closing}"


def pattern(framings: Sequence[Framing], eos: int | None) -> re.Pattern:
    """Text without openings and closings, spans, and EOS at the end alone."""
    words = [word for one in framings for word in (one.opening, one.closing) if word]
    inside = "|".join(re.escape(characters(word)) for word in words)
    # A character of text that does not begin a word; spans begin with their openings.
    end = "" if eos is None else characters([eos])
    text = f"(?:(?!{inside}{end and f'|{end}'})[{characters([0])}-{characters([VOCABULARY.text_size - 1])}])"
    spans = "|".join(re.escape(characters(one.opening)) + span_pattern(one) for one in framings)
    return re.compile(f"(?:{text}|{spans})*{end and f'{end}?'}")


@st.composite
def drawing(draw) -> tuple[tuple[Framing, ...], int, int, float]:
    """Framings, room, a seed, and how much likelier ids are that openings and closings have."""
    framings = tuple(draw(st.permutations(ALL))[: draw(st.integers(1, 3))])
    return framings, draw(st.integers(1, 60)), draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([0.0, 2.0, 6.0]))


def drawn_rows(machine: ModalityStates, prompts: list, room: int, weight: float, seed: int) -> np.ndarray:
    """[B, room] of ids drawn by chance among those allowed."""
    words = {one for framing in machine.framings for word in (framing.opening, framing.closing) for one in word}
    logits = torch.zeros(machine.vocabulary.size)
    logits[list(words)] = weight
    generator = torch.Generator().manual_seed(seed)
    rows, drawn = machine.start(prompts, room), []
    for left in range(room, 0, -1):
        weights = (logits.exp() * machine.allowed(rows.state, left)).float()
        assert (weights.sum(1) > 0).all()
        drawn.append(torch.multinomial(weights, 1, generator=generator).squeeze(1))
        rows = machine.step(rows, drawn[-1], left)
    return torch.stack(drawn, 1).numpy()


@given(drawing())
@settings(max_examples=40)
def test_any_sequence_drawn_parses(case):
    framings, room, seed, weight = case
    machine, whole = ModalityStates(VOCABULARY, framings), pattern(framings, VOCABULARY.eos_id)
    for row in drawn_rows(machine, [np.array([1])] * 8, room, weight, seed):
        ended = np.flatnonzero(row == VOCABULARY.eos_id)
        row = row[: ended[0] + 1] if len(ended) else row
        assert whole.fullmatch(characters(row.tolist())), row


def test_the_oracle_refuses_what_does_not_parse_and_draws_reach_every_kind_of_frame():
    whole = pattern(ALL, VOCABULARY.eos_id)
    v, a, d = (VOCABULARY[name].start for name in ("vision", "audio", "depth"))
    eof, eov, end = VISION.between, VISION.last, AUDIO.last
    fine = [*OPENING, v, v, v, eof, v, v, v + 5, eov, *CLOSING, 3, 9, a, a, a, a, end, 10, 11, 12, d, d, d, d]
    assert whole.fullmatch(characters(fine))
    for wrong in (
        fine[:-1], fine[:6], fine[4:], [v], [*OPENING, 3], [*CLOSING], [*OPENING, v, v, v, eov, 3],
        [9, a, end, 10], [11, 12, d, d, d, d, d, d], [2, 3], [*fine[:4], v, v, v, eof, eov, *CLOSING],
    ):  # fmt: skip
        assert not whole.fullmatch(characters(wrong)), wrong
    text = ""
    for one in ALL:
        rows = drawn_rows(ModalityStates(VOCABULARY, [one], eos_id=-1), [np.array([1])] * 10, 200, 4.0, 0)
        text += "/".join(characters(row.tolist()) for row in rows)
    for reached in (characters([eof]), characters([eov]), characters([end])):
        assert reached in text
    for first, many in ((a, 4), (d, 4)):  # frames that follow each other directly
        assert re.search(f"[{characters([first])}-{characters([first + 2])}]{{{many}}}", text)


@given(st.integers(0, 2**32 - 1), st.integers(0, 45))
@settings(max_examples=25)
def test_a_sequence_cut_anywhere_goes_on_to_one_that_parses(seed, cut):
    machine = ModalityStates(VOCABULARY, ALL, eos_id=-1)
    (row,) = drawn_rows(machine, [np.array([1])], 45, 4.0, seed)
    (rest,) = drawn_rows(machine, [np.concatenate(([1], row[:cut]))], 30, 1.0, seed + 1)
    # A span that a prompt begins may have as many frames again: the prompt does not say how many there were to be.
    whole = pattern([VISION, AUDIO, replace(DEPTH, most_frames=4)], None)
    assert whole.fullmatch(characters([1, *row[:cut].tolist(), *rest.tolist()]))


@pytest.mark.parametrize("name", ["nobos", "vis_single"])
@given(parts=st.lists(st.tuples(st.integers(1, 3), st.text(max_size=6)), min_size=1, max_size=3))
@settings(max_examples=20)
def test_what_training_examples_are_made_of_is_allowed(name, parts):
    """The layout is that of `tokenization.fields`, with openings of several ids and of one."""
    tokenizer = load_text_tokenizer(str(DATA / f"tokenizer_{name}"))
    vocabulary = JointVocabulary.for_codebook(tokenizer.size, 8, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    opening, closing = (tuple(tokenizer.encode(text).tolist()) for text in ("<vision>", "</vision>"))
    assert (len(opening) == 1) == (name == "vis_single")
    names = [name for number in range(len(parts)) for name in (f"vision{number}", f"text{number}")]
    record = {f"vision{number}": np.arange(2 * frames).reshape(frames, 2) for number, (frames, _) in enumerate(parts)}
    record |= {f"text{number}": text for number, (_, text) in enumerate(parts)}
    tokens, _ = build_tokens(record, FieldSpec.parse(",".join(names)), tokenizer, vocabulary)
    machine = ModalityStates(vocabulary, [Framing(vocabulary["vision"], 2, opening, closing)])
    rows = machine.start([tokens[:1]], len(tokens) - 1)
    for number, one in enumerate(tokens[1:].tolist(), start=1):
        left = len(tokens) - number
        assert machine.allowed(rows.state, left)[0, one]
        rows = machine.step(rows, torch.tensor([one]), left)
        if number < len(tokens) - 1:  # a prompt that ends here is in the same state
            assert machine.start([tokens[: number + 1]], left - 1).state.tolist() == rows.state.tolist()
    assert rows.state.tolist() == [machine.graph.end]


def test_bounds_hold_all_that_is_allowed_and_no_more():
    machine = ModalityStates(VOCABULARY, ALL)
    states = list(range(len(machine.graph)))
    allowed = machine.allowed(torch.tensor(states), 1000)
    for state in states:
        first, last = machine.graph.bounds([state])
        ids = allowed[state].nonzero().flatten()
        assert (first, last) == (ids.min(), ids.max() + 1)
    assert machine.graph.bounds(states) == (0, DEPTH.code_ids[1])


def test_no_span_opens_or_goes_on_without_room_for_its_end():
    machine = ModalityStates(VOCABULARY, [VISION])  # a span of one frame: 3 codes, <eov>, 3 ids of the closing
    before = machine.start([np.array([1, *OPENING[:-1]])], 100)
    assert machine.allowed(before.state, 8)[0, OPENING[-1]]
    assert not machine.allowed(before.state, 7)[0, OPENING[-1]]
    for room, ends in ((14, True), (15, False)):
        rows = machine.start([np.array([1, *OPENING[:-1]])], 100)
        left = room - 3
        for one in (OPENING[-1], *[VOCABULARY["vision"].start] * 3):
            rows = machine.step(rows, torch.tensor([one]), left)
            left -= 1
        assert machine.allowed(rows.state, left)[0, VISION.last]
        assert machine.allowed(rows.state, left)[0, VISION.between] == (not ends)


def test_an_opening_is_as_far_as_its_missing_ids():
    machine = ModalityStates(VOCABULARY, [VISION, AUDIO])
    steps = machine.graph.steps_to_open([0])
    prompts = [[1], [*OPENING[:1]], [*OPENING[:3]], [*OPENING, *[VOCABULARY["vision"].start] * 3]]
    # From a whole frame: <eov>, the closing, and an opening; the closing leaves nothing of it.
    expected = [4, 3, 1, 1 + 3 + 4]
    starts = machine.start([np.array(prompt) for prompt in prompts], 100)
    assert [steps[state] for state in starts.state.tolist()] == expected
    assert min(machine.graph.steps_to_open([])) == UNLIMITED


def test_what_cannot_be_framed_is_refused():
    with pytest.raises(ValueError, match="part of another"):
        ModalityStates(VOCABULARY, [VISION, Framing(VOCABULARY["audio"], 2, OPENING[1:3])])
    with pytest.raises(ValueError, match="other ids than those of text"):
        ModalityStates(VOCABULARY, [Framing(VOCABULARY["audio"], 2, (25,))])
    with pytest.raises(ValueError, match="most_frames"):
        Framing(VOCABULARY["depth"], 2)
    with pytest.raises(ValueError, match="at least one code"):
        Framing(VOCABULARY["vision"], 0)
    machine = ModalityStates(VOCABULARY, ALL)
    v = VOCABULARY["vision"].start
    for prompt, room, reason in (
        ([*OPENING], 6, "no room for a frame of vision"),
        ([*OPENING, v], 5, "no room for a frame of vision"),
        ([*OPENING, v, v, v], 3, "no room for the end of the prompt's span of vision"),
        ([*OPENING, v, v, v, VISION.last], 2, "no room for the end of the prompt's span of vision"),
        ([*OPENING, v, v, v, v], 99, "4 codes of vision in a frame of 3"),
    ):
        with pytest.raises(ValueError, match=reason):
            machine.start([np.array(prompt)], room)
        if room < 99:
            machine.start([np.array(prompt)], room + 1)
