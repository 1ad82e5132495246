"""Frames of which several codes are drafted at once: greedy ones are the same, others have the same distribution."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats

from model.inference import frames_ahead, generate
from model.inference.generate import stream_frame_batches
from model.inference.kv_decoder import Decoder
from model.inference.sampling import Sampling, guided, probabilities
from model.llama.llama import inference
from testing.thread_ranks import run_in_threads
from tests.model.inference.stock import VOCABULARY, decoded_alone, small_llama, stock
from tests.model.inference.test_sharded import LOGITS, PROMPTS
from tokenization.vocabulary import JointVocabulary

V = JointVocabulary.for_codebook(48, 40, VOCABULARY - 48)
CONDITIONAL = [np.array([1, 17, 40, 4]), np.array([1, 4]), np.arange(3, 40)]
UNCONDITIONAL = [np.array([1, 4])] * 3
GREEDY, GUIDED = Sampling(temperature=0.0), Sampling(3.0, temperature=0.0)


def peeked(exchange: Any) -> tuple[torch.Tensor, list[int], list[int]]:
    """Logits of tokens that are peeked at, partly committed and followed by others; rows' lengths and shares."""
    model, generator = small_llama(), np.random.default_rng(0)
    with inference(model):
        decoder = Decoder(model, PROMPTS, prefill_chunk=40, group=exchange)
        logits = []
        for round_ in range(4):
            counts = [3, 0, 5, 1, 4] if round_ % 2 else [2, 6, 0, 4, 1]
            ids = torch.from_numpy(generator.integers(3, VOCABULARY, sum(counts)))
            peek = decoder.peek(ids, counts)
            decoder.commit(
                peek, [min(n, keep) for n, keep in zip(counts, ([2, 3, 9, 0, 1], [9, 9, 1, 9, 2])[round_ // 2])]
            )
            decoder.append(torch.from_numpy(generator.integers(3, VOCABULARY, 5)))
            logits.append(decoder.logits(0, VOCABULARY))
    return torch.stack(logits), decoder.lengths, [row.stored for row in decoder.cache.rows]


@pytest.mark.parametrize("ranks", [1, 3])
def test_tokens_that_were_committed_are_as_if_appended_and_the_others_leave_nothing(ranks):
    generator = np.random.default_rng(0)
    texts = [prompt.tolist() for prompt in PROMPTS]
    expected = []
    for round_ in range(4):
        counts = [3, 0, 5, 1, 4] if round_ % 2 else [2, 6, 0, 4, 1]
        ids = np.split(generator.integers(3, VOCABULARY, sum(counts)), np.cumsum(counts)[:-1])
        kept = ([2, 3, 9, 0, 1], [9, 9, 1, 9, 2])[round_ // 2]
        for text, new, n, last in zip(texts, ids, kept, generator.integers(3, VOCABULARY, 5)):
            text += [*new[:n].tolist(), int(last)]
        expected.append(torch.stack([decoded_alone(stock(small_llama()), np.array(t), 1)[0][0] for t in texts]))
    results = run_in_threads(peeked, ranks)[0]
    for logits, lengths, _ in results:
        torch.testing.assert_close(logits, torch.stack(expected), rtol=0, atol=LOGITS)
        assert lengths == list(map(len, texts))
    assert np.sum([stored for *_, stored in results], axis=0).tolist() == list(map(len, texts))


def test_a_peek_cannot_be_committed_behind_other_tokens():
    model = small_llama()
    with inference(model):
        decoder = Decoder(model, PROMPTS[:2])
        peek = decoder.peek(torch.tensor([5, 6, 7]), [2, 1])
        with pytest.raises(ValueError, match="does not follow"):
            decoder.commit(peek, [2, 2])
        decoder.append(torch.tensor([5, 6]))
        with pytest.raises(ValueError, match="does not follow"):
            decoder.commit(peek, [1, 1])


@pytest.mark.parametrize("window", [1, 2, 5, 30])
@pytest.mark.parametrize("first", [GREEDY, GUIDED])
def test_greedy_frames_are_those_code_by_code(window, first):
    def draw(**options: Any) -> np.ndarray:
        return np.stack(
            list(stream_frame_batches(small_llama(), V, CONDITIONAL, 3, 12, first, GREEDY, UNCONDITIONAL, **options))
        )

    np.testing.assert_array_equal(draw(ahead=window), draw())


def test_a_continuation_drafts_from_the_frame_that_is_given(monkeypatch):
    """A model that repeats the frame before takes a forward a window."""
    forwards = []
    peek = Decoder.peek
    monkeypatch.setattr(Decoder, "peek", lambda self, *given: forwards.append(1) or peek(self, *given))
    frame = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    prompt = np.array([1, *V["vision"].codes_to_ids(frame), V.eof_id])
    monkeypatch.setattr(frames_ahead, "probabilities", lambda logits, setting: repeated(logits))
    places = iter(np.tile(frame, 9))

    def repeated(logits: torch.Tensor) -> torch.Tensor:
        wanted = [next(places) for _ in range(len(logits))]
        return torch.nn.functional.one_hot(torch.tensor(wanted), 40).float()

    frames = list(stream_frame_batches(small_llama(), V, [prompt], 2, 8, GREEDY, GREEDY, ahead=4))
    np.testing.assert_array_equal(np.stack(frames)[:, 0], [frame, frame])
    assert len(forwards) == 2 + 2  # the first code is known without, and the other 7 are two windows


def test_ranks_that_share_the_cache_draft_alike():
    def draw(exchange: Any) -> list[np.ndarray]:
        generator = torch.Generator().manual_seed(exchange.rank)
        settings = (Sampling(3.0, 10), Sampling(1.0, 20))
        return list(
            stream_frame_batches(
                small_llama(), V, CONDITIONAL, 2, 9, *settings, UNCONDITIONAL, generator, exchange, ahead=4
            )
        )

    alone = run_in_threads(draw, 1)[0][0]
    for frames in run_in_threads(draw, 3)[0]:
        np.testing.assert_array_equal(np.stack(frames), np.stack(alone))


# The distribution: two frames of three codes out of three, all 729 of them counted.

TINY = JointVocabulary.for_codebook(8, 3, 5)
START, EMPTY = np.array([1]), np.array([2])
DRAWS = 20_000
LOGITS_OF = torch.randn(5**8, 3, generator=torch.Generator().manual_seed(0)) * 1.5
"""By all that a row holds, in base 5: its prompt's id, then codes as 0..2 and <eof> as 3."""


class TableDecoder:
    """Stands in for the decoder and a model, so that many rows take no time: what follows is anything of the past."""

    device = torch.device("cpu")

    def __init__(self, model: Any, prompts: list[np.ndarray], **options: Any) -> None:
        self.hidden = torch.tensor([int(prompt[0]) for prompt in prompts])

    def __len__(self) -> int:
        return len(self.hidden)

    def keep(self, rows: Any) -> None:
        self.hidden = self.hidden[list(rows)]

    def logits_of(self, hidden: torch.Tensor, first: int, last: int) -> torch.Tensor:
        return LOGITS_OF[hidden]

    def agreed(self, ids: torch.Tensor) -> torch.Tensor:
        return ids

    def peek(self, ids: torch.Tensor, counts: list[int]) -> Peeked:
        sizes, ends = torch.tensor(counts), torch.tensor(counts).cumsum(0)
        starts, now, hidden = ends - sizes, self.hidden.clone(), torch.zeros_like(ids)
        for place in range(max(counts)):
            has = sizes > place
            at = starts[has] + place
            hidden[at] = now[has] = now[has] * 5 + ids[at] - TINY["vision"].start
        return Peeked(hidden, starts)

    def commit(self, peek: Any, counts: list[int]) -> None:
        sizes = torch.tensor(counts)
        self.hidden = torch.where(sizes > 0, peek.hidden[(peek.starts + sizes - 1).clamp_min(0)], self.hidden)


class Peeked(NamedTuple):
    hidden: torch.Tensor
    starts: torch.Tensor


def exact(first: Sampling, rest: Sampling) -> np.ndarray:
    """Probabilities [729] of all pairs of frames."""
    codes = torch.cartesian_prod(*[torch.arange(3)] * 6)
    total = torch.ones(len(codes))
    pasts = [torch.full((len(codes),), int(prompt[0])) for prompt in (START, EMPTY)]
    for place in range(6):
        setting = first if place < 3 else rest
        logits = torch.cat([LOGITS_OF[past] for past in (pasts if setting.guidance != 1 else pasts[:1])])
        p = probabilities(guided(logits, setting.guidance) if setting.guidance != 1 else logits, setting)
        total *= p.gather(1, codes[:, place : place + 1]).squeeze(1)
        pasts = [past * 5 + codes[:, place] for past in pasts]
        if place == 2:
            pasts = [past * 5 + TINY.eof_id - TINY["vision"].start for past in pasts]
    return total.double().numpy()


def p_value(first: Sampling, rest: Sampling, window: int) -> float:
    """Of a chi-square test of DRAWS pairs of frames."""
    generator = torch.Generator().manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "Decoder", TableDecoder)
        frames = stream_frame_batches(
            small_llama(), TINY, [START] * DRAWS, 2, 3, first, rest, [EMPTY] * DRAWS, generator, ahead=window
        )
        drawn = np.concatenate(list(frames), axis=1)
    counts = np.bincount(drawn @ 3 ** np.arange(5, -1, -1), minlength=729)
    expected = exact(first, rest)
    assert counts[expected == 0].sum() == 0
    expected *= counts.sum() / expected.sum()
    order = np.argsort(expected)  # outcomes of which fewer than 50 in all are expected count as one
    n_rare = int(np.searchsorted(expected[order].cumsum(), 50)) + 1
    observed, expected = (np.add.reduceat(x[order], [0, *range(n_rare, 729)]) for x in (counts, expected))
    return stats.chisquare(observed, expected).pvalue


@pytest.mark.parametrize(
    ("first", "rest", "window"),
    [
        (Sampling(), Sampling(), 2),
        (Sampling(3.0), Sampling(), 3),
        (Sampling(2.0, 2), Sampling(1.0, 2, 1.5), 2),
        (Sampling(temperature=0.7, top_p=0.9), Sampling(2.0, None, 0.8), 3),
    ],
)
def test_drafts_leave_the_distribution_as_it_is(first, rest, window):
    assert p_value(first, rest, window) > 1e-3


@pytest.mark.parametrize("wrong", ["residual", "acceptance", "old q"])
def test_the_distribution_test_tells_a_wrong_rule(wrong, monkeypatch):
    if wrong == "residual":  # rejected drafts are drawn from p
        monkeypatch.setattr(frames_ahead, "residual", lambda p, q: p)
    elif wrong == "acceptance":
        verified = frames_ahead.FramesAhead._verified
        monkeypatch.setattr(frames_ahead.FramesAhead, "_verified", lambda self, p, q, x: verified(self, p, q * 0.8, x))
    else:  # drafts from the frame before, taken for draws from something broader
        take = frames_ahead.FramesAhead._take_before

        def broader(self: Any, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
            drafts, q = take(self, *given)
            return drafts, q * 0.5 + 0.5 / 3

        monkeypatch.setattr(frames_ahead.FramesAhead, "_take_before", broader)
    assert p_value(Sampling(), Sampling(), 2) < 1e-6
