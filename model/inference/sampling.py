"""How a token is drawn from logits: temperature, then the top k, then the nucleus, in the order of transformers.

In: fp32 logits of the ids that may come next. Out: places among them. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens of a modality are drawn.

    guidance: scale of classifier-free guidance (1 = none). top_k: likeliest ids that are drawn among (None = all).
    temperature: divides the logits (0 = greedy). top_p: of those, the fewest whose probability is at least this much
    (None = all), as in nucleus sampling (arXiv 1904.09751). Raises ValueError on settings out of range.
    """

    guidance: float = 1.0
    top_k: int | None = None
    temperature: float = 1.0
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is negative; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} leaves no id to draw; use 1 or more, or None for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is no share; use more than 0 and at most 1, or None for all")


GREEDY = Sampling(temperature=0.0)
IMAGE = Sampling(guidance=5.0, top_k=8192)
"""LWM's setting for an image and for a video's first frame."""
VIDEO = Sampling(guidance=1.0, top_k=1000)
"""LWM's setting for the frames after the first."""


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: [2B, n], conditional rows then unconditional -> uncond + guidance * (cond - uncond)."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def choose(
    logits: Tensor,
    top_k: int | None,
    temperature: float,
    generator: torch.Generator | None,
    top_p: float | None = None,
) -> Tensor:
    """One index a row, int64 [B], of fp32 logits [B, n]: the likeliest at temperature 0, else drawn as `Sampling` says.

    The draw depends on the generator alone, which lives on the logits' device. Raises ValueError as `Sampling` does.
    """
    setting = Sampling(1.0, top_k, temperature, top_p)
    if setting.temperature == 0:
        return logits.argmax(dim=-1)
    weights, ids = _candidates(logits, setting)
    drawn = torch.multinomial(weights, 1, generator=generator)
    return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)


def probabilities(logits: Tensor, setting: Sampling) -> Tensor:
    """What `choose` draws each index with: fp32 [B, n] for logits [B, n], rows that sum to 1. Guidance is left out."""
    if setting.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(dim=-1, keepdim=True), 1.0)
    weights, ids = _candidates(logits, setting)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights if ids is None else torch.zeros_like(logits).scatter_(1, ids, weights)


def _candidates(logits: Tensor, setting: Sampling) -> tuple[Tensor, Tensor | None]:
    """Weights [B, m] of what may be drawn, and its indices [B, m], likeliest first; None where it is all in order."""
    logits = logits / setting.temperature
    n = logits.shape[-1]
    is_cut = setting.top_k is not None and setting.top_k < n
    if not is_cut and setting.top_p is None:
        return logits.softmax(dim=-1), None
    kept, ids = logits.topk(min(setting.top_k or n, n), dim=-1)
    weights = kept.softmax(dim=-1)
    if setting.top_p is not None:
        weights = weights * (weights.cumsum(dim=-1) - weights < setting.top_p)
    return weights, ids


class SamplingTable:
    """Settings that rows choose from by number, so that rows of a batch are drawn differently at once."""

    def __init__(self, settings: Sequence[Sampling], device: torch.device) -> None:
        self.settings = tuple(settings)
        self._device = device

    @cached_property
    def guidance(self) -> Tensor:
        """fp32 [settings]."""
        return self._column([one.guidance for one in self.settings])

    def choose(self, logits: Tensor, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """One index a row, int64 [B], of logits [B, n], row b by the setting of number rows[b], int64 [B].

        An index whose logit is -inf is never drawn.
        """
        if all(one.temperature == 0 for one in self.settings):
            return logits.argmax(dim=-1)
        n = logits.shape[-1]
        warm = logits / self._temperature[rows].unsqueeze(1)
        ids: Tensor | None = None
        if self._most < n or self._is_nucleus:
            warm, ids = warm.topk(min(self._most, n), dim=-1)
            ranks = torch.arange(warm.shape[-1], device=warm.device)
            warm = warm.masked_fill(ranks >= self._top_k[rows].unsqueeze(1), -torch.inf)
        weights = warm.softmax(dim=-1)
        if self._is_nucleus:
            weights = weights * (weights.cumsum(dim=-1) - weights < self._top_p[rows].unsqueeze(1))
        drawn = torch.multinomial(weights, 1, generator=generator)
        drawn = (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)
        return torch.where(self._is_greedy[rows], logits.argmax(dim=-1), drawn)

    @cached_property
    def _temperature(self) -> Tensor:
        return self._column([one.temperature or 1.0 for one in self.settings])

    @cached_property
    def _is_greedy(self) -> Tensor:
        return self._column([one.temperature == 0 for one in self.settings])

    @cached_property
    def _top_k(self) -> Tensor:
        return self._column([one.top_k or 1 << 40 for one in self.settings])

    @cached_property
    def _top_p(self) -> Tensor:
        return self._column([2.0 if one.top_p is None else one.top_p for one in self.settings])

    @cached_property
    def _is_nucleus(self) -> bool:
        return any(one.top_p is not None for one in self.settings)

    @cached_property
    def _most(self) -> int:
        """Ids that the widest setting draws among; greedy ones need none."""
        return max(one.top_k or 1 << 40 for one in self.settings if one.temperature)

    def _column(self, values: list) -> Tensor:
        return torch.tensor(values, device=self._device)
