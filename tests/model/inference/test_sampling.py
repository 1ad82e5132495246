"""What is drawn, beside the processors of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.inference.sampling import Sampling, SamplingTable, choose, probabilities

LOGITS = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 2
SETTINGS = [
    Sampling(),
    Sampling(top_p=0.7),
    Sampling(top_p=1.0, temperature=0.5),
    Sampling(top_k=8, top_p=0.7),
    Sampling(top_k=8, temperature=2.0),
    Sampling(top_k=1000, top_p=0.01, temperature=3.0),
]


def expected(logits: torch.Tensor, setting: Sampling) -> torch.Tensor:
    """Probabilities by the processors that `transformers.generate` applies, in its order."""
    logits = TemperatureLogitsWarper(setting.temperature)(None, logits)
    if setting.top_k is not None:
        logits = TopKLogitsWarper(setting.top_k)(None, logits)
    if setting.top_p is not None and setting.top_p < 1:
        logits = TopPLogitsWarper(setting.top_p)(None, logits)
    return logits.softmax(-1)


def frequencies(drawn: torch.Tensor, n: int) -> torch.Tensor:
    return torch.bincount(drawn, minlength=n) / len(drawn)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_probabilities_are_those_of_transformers(setting):
    torch.testing.assert_close(probabilities(LOGITS, setting), expected(LOGITS, setting))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_have_these_probabilities(setting):
    row, generator = LOGITS[0], torch.Generator().manual_seed(1)
    drawn = choose(row.expand(20_000, -1), setting.top_k, setting.temperature, generator, setting.top_p)
    torch.testing.assert_close(frequencies(drawn, 50), expected(row[None], setting)[0], rtol=0, atol=0.015)


def test_rows_of_one_batch_are_drawn_each_by_its_own_setting():
    table = SamplingTable([*SETTINGS, Sampling(temperature=0.0)], torch.device("cpu"))
    times, n = 20_000, len(SETTINGS) + 1
    rows = torch.arange(n).repeat_interleave(times)
    drawn = table.choose(LOGITS[:n][rows], rows, torch.Generator().manual_seed(2)).view(n, times)
    for number, setting in enumerate(SETTINGS):
        wanted = expected(LOGITS[number][None], setting)[0]
        torch.testing.assert_close(frequencies(drawn[number], 50), wanted, rtol=0, atol=0.015)
    assert (drawn[-1] == LOGITS[n - 1].argmax()).all()


@pytest.mark.parametrize("settings", [SETTINGS, [Sampling()], [Sampling(temperature=0.0)], SETTINGS[4:5]])
def test_what_is_masked_is_never_drawn(settings):
    """Even where fewer ids are left than the cut keeps, and all that is left is far less likely than what is masked."""
    logits = torch.tensor([[9.0, 9.0, -80.0, 9.0], [-90.0, 9.0, 9.0, 9.0]]).repeat(500, 1)
    allowed = torch.tensor([[False, False, True, False], [True, False, False, False]]).repeat(500, 1)
    rows = torch.arange(1000) % len(settings)
    drawn = SamplingTable(settings, torch.device("cpu")).choose(logits.masked_fill(~allowed, -torch.inf), rows, None)
    assert drawn.tolist() == [2, 0] * 500


def test_the_nucleus_is_the_smallest_set_that_reaches_the_share():
    weights = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    for share, kept in ((0.4, 1), (0.5, 1), (0.6, 2), (0.79, 2), (0.9, 3), (0.96, 4)):
        assert int((probabilities(weights.log(), Sampling(top_p=share)) > 0).sum()) == kept


def test_settings_out_of_range_are_refused():
    for wrong in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sampling(**wrong)
