"""Text and frames in one decode: each row as text alone and frames alone give it, and always something that decodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from model.inference import interleaved
from model.inference.framing import Framing
from model.inference.generate import generate_text, stream_frame_batches, stream_frames
from model.inference.interleaved import Piece, generate_interleaved
from model.inference.kv_decoder import Decoder
from model.inference.sampling import GREEDY, Sampling
from testing.thread_ranks import run_in_threads
from tests.model.inference.stock import VOCABULARY, small_llama
from tokenization.vocabulary import JointVocabulary

TEXT, CODES = 48, 5
V = JointVocabulary.for_codebook(TEXT, 30, 36).extended("audio", 8, ("end",), VOCABULARY - 84)
PROMPT = np.array([1, 17, 40, 4, 9])
GUIDED, PLAIN = Sampling(5.0, temperature=0.0), Sampling(1.0, temperature=0.0)
VISION = Framing(V["vision"], CODES, (7,), (8, 11))
AUDIO = Framing(V["audio"], 2, (13,), (14,), most_frames=3)


def greedy(prompts: Sequence[np.ndarray], framings: Sequence[Framing], room: int, **options: Any) -> list[Piece]:
    settings = {"text": (GREEDY,), "vision": (GUIDED, PLAIN), "audio": (PLAIN,)}
    settings = {name: one for name, one in settings.items() if name in ("text", *(f.modality.name for f in framings))}
    return list(generate_interleaved(small_llama(), V, prompts, framings, room, settings, **options))


def of_row(pieces: Sequence[Piece], row: int) -> list[tuple[str, list[int]]]:
    return [(piece.modality, piece.values.tolist()) for piece in pieces if piece.row == row]


def framed(codes: np.ndarray, marker: int) -> list[int]:
    return [*V["vision"].codes_to_ids(codes).tolist(), marker]


def opened_by_the_model() -> Framing:
    """A framing whose opening is what the model writes as the fifth and sixth token after PROMPT."""
    (text,) = generate_text(small_llama(), V, [PROMPT], 6, eos_id=-1)
    opening = tuple(text[4:].tolist())
    assert opening not in zip(text[:4].tolist(), text[1:5].tolist())
    return Framing(V["vision"], CODES, opening, (8, 11))


def test_a_span_that_the_model_opens_is_what_frames_alone_and_text_alone_give():
    framing = opened_by_the_model()
    pieces = of_row(greedy([PROMPT], [framing], 60, eos_id=-1), 0)
    n_frames = next(i for i, (modality, _) in enumerate(pieces[1:]) if modality == "text")
    (before,) = generate_text(small_llama(), V, [PROMPT], 4, eos_id=-1)
    assert pieces[0] == ("text", before.tolist())
    start = np.concatenate((PROMPT, before, framing.opening))
    unconditional = np.array([V.bos_id, *framing.opening])
    frames = list(stream_frames(small_llama(), V, start, n_frames, CODES, GUIDED, PLAIN, unconditional))
    assert n_frames >= 1
    assert pieces[1 : 1 + n_frames] == [("vision", frame.tolist()) for frame in frames]
    ends = [V.eof_id] * (n_frames - 1) + [V.eov_id]
    span = [one for frame, end in zip(frames, ends) for one in framed(frame, end)]
    whole = np.concatenate((start, span, framing.closing))
    rest = 60 - (len(whole) - len(PROMPT))
    after = generate_text(small_llama(), V, [whole], rest, eos_id=-1)[0].tolist()
    found = pieces[1 + n_frames][1]
    assert found == after[: len(found)]
    assert len(found) >= min(4, rest)


def starting_anywhere() -> list[np.ndarray]:
    """Prompts that end in text, behind an opening, inside a frame, between frames, and before a closing."""
    codes = V["vision"].codes_to_ids(np.arange(CODES)).tolist()
    given = [[], [7], [7, *codes[:3]], [7, *codes, V.eof_id], [7, *codes, V.eov_id], [7, *codes, V.eov_id, 8], [13]]
    return [np.concatenate((PROMPT[number % 2 :], one)).astype(np.int64) for number, one in enumerate(given)]


@pytest.mark.parametrize("are_free", [True, False])
def test_rows_in_different_states_give_what_each_gives_alone(are_free, monkeypatch):
    """Also where the host looks at what was drawn every so many tokens only, and twins have to join in time."""
    monkeypatch.setattr(interleaved, "looks_are_free", lambda device: are_free)
    prompts, framings = starting_anywhere(), [VISION, AUDIO]
    together = greedy(prompts, framings, 40)
    monkeypatch.undo()
    for row, prompt in enumerate(prompts):
        assert of_row(together, row) == of_row(greedy([prompt], framings, 40), 0)
    assert {piece.modality for piece in together} == {"text", "vision", "audio"}


def test_a_frame_that_a_prompt_begins_is_given_back_whole_and_guided_by_its_codes():
    codes = np.arange(CODES)[:3]
    ids = V["vision"].codes_to_ids(codes)
    pieces = of_row(greedy([np.concatenate((PROMPT, [7], ids))], [VISION], 12), 0)
    first = pieces[0][1]
    assert first[:3] == codes.tolist()
    # The fourth code, from both prompts with what is given of the frame.
    model = small_llama()
    with torch.inference_mode():
        rows = [model(torch.tensor([[*start, 7, *ids]])).logits[0, -1, TEXT : TEXT + 30] for start in (PROMPT, [1])]
    assert first[3] == int((rows[1] + 5.0 * (rows[0] - rows[1])).argmax())


def test_a_twin_joins_in_time_where_the_model_opens_the_span_between_two_looks(monkeypatch):
    framing = opened_by_the_model()
    every_step = greedy([PROMPT, PROMPT[:2]], [framing], 60, eos_id=-1)
    monkeypatch.setattr(interleaved, "looks_are_free", lambda device: False)
    seldom = greedy([PROMPT, PROMPT[:2]], [framing], 60, eos_id=-1)
    for row in (0, 1):
        assert of_row(seldom, row) == of_row(every_step, row)
    assert any(piece.modality == "vision" for piece in every_step)


@pytest.mark.parametrize("forced", [2, 7, 8, 13, V.eof_id, V.eov_id, V["audio"].marker("end"), TEXT, VOCABULARY - 1])
def test_logits_that_insist_on_one_id_break_no_frame(forced, monkeypatch):
    logits = Decoder.logits

    def insisting(self: Decoder, first: int, last: int) -> torch.Tensor:
        found = logits(self, first, last).clone()
        if first <= forced < last:
            found[:, forced - first] = 1e4
        return found

    monkeypatch.setattr(Decoder, "logits", insisting)
    pieces = greedy(starting_anywhere(), [VISION, AUDIO], 60, eos_id=2)
    for piece in pieces:
        if piece.modality == "text":
            assert 0 <= piece.values.min() <= piece.values.max() < TEXT
            assert 2 not in piece.values
        else:
            assert len(piece.values) == {"vision": CODES, "audio": 2}[piece.modality]
            assert 0 <= piece.values.min() <= piece.values.max() < V[piece.modality].n_codes
    if forced == 7:  # the row opens one span after the other
        assert sum(modality == "vision" for modality, _ in of_row(pieces, 0)) > 2
    if forced == V.eof_id:  # one span, as long as the room
        assert [modality for modality, _ in of_row(pieces, 1)][:9] == ["vision"] * 9


def test_ranks_that_share_the_cache_draw_alike():
    def draw(exchange: Any) -> list[Piece]:
        generator = torch.Generator().manual_seed(exchange.rank)
        warm = {
            "text": (Sampling(temperature=2.0, top_p=0.95),),
            "vision": (Sampling(3.0, 20), Sampling(1.0, None, 2.0)),
        }
        return list(
            generate_interleaved(
                small_llama(), V, starting_anywhere(), [VISION, AUDIO], 30, warm, generator, group=exchange
            )
        )

    alone = run_in_threads(draw, 1)[0][0]
    assert {piece.modality for piece in alone} == {"text", "vision", "audio"}
    for pieces in run_in_threads(draw, 3)[0]:
        assert [(p.row, p.modality, p.values.tolist()) for p in pieces] == [
            (p.row, p.modality, p.values.tolist()) for p in alone
        ]


def test_frames_for_many_prompts_are_those_of_each():
    prompts = [PROMPT, PROMPT[1:], np.array([3, 7])]
    unconditional = [np.array([1, 7]), np.array([1, 2, 7]), np.array([7])]
    many = list(stream_frame_batches(small_llama(), V, prompts, 3, CODES, GUIDED, PLAIN, unconditional))
    assert [batch.shape for batch in many] == [(3, CODES)] * 3
    for row, (prompt, start) in enumerate(zip(prompts, unconditional)):
        alone = list(stream_frames(small_llama(), V, prompt, 3, CODES, GUIDED, PLAIN, start))
        np.testing.assert_array_equal(np.stack(many)[:, row], np.stack(alone))
    with pytest.raises(ValueError, match="2 unconditional prompts for 3"):
        stream_frame_batches(small_llama(), V, prompts, 3, CODES, unconditional=unconditional[:2])


def test_settings_that_cannot_be_are_refused():
    def refuse(reason: str, framings: Sequence[Framing], **settings: Any) -> None:
        with pytest.raises(ValueError, match=reason):
            generate_interleaved(small_llama(), V, [PROMPT], framings, 20, settings)

    refuse("settings for audio", [VISION], audio=(PLAIN,))
    refuse("guidance can only be 1", [VISION], text=(GUIDED,))
    refuse("guidance of vision needs an opening", [Framing(V["vision"], CODES)], vision=(GUIDED,))
    refuse("no settings for vision", [VISION], vision=())
