"""Frames of codes, several codes a forward: speculative Jacobi decoding, exact in distribution.

In: a decoder behind which a frame begins. Out: its codes, with the distribution that code by code has.

A window of the next codes is drafted. One forward gives the distribution p of each, given the drafts before it. A draft
x was drawn from a distribution q; it stays with probability min(1, p(x) / q(x)) and is drawn from the normalised
max(0, p - q) otherwise (arXiv 2211.17192), whereby it has the distribution p. Codes up to the first that was drawn
anew are final, since all before them stayed; those behind it are the next drafts, whose q is the p by which they were
last drawn (speculative Jacobi decoding, arXiv 2410.01699; that the rule keeps drafts behind it too wherever it can is
the maximal coupling of arXiv 2510.24211). A draft is independent of the drafts before it given its q, which is all that
exactness needs. New drafts at the window's end: the code at this place of the frame before, where there is one, which
is a q of one code; otherwise draws from the p of the window's last code.

At temperature 0 all distributions are one code, and the frame is the greedy one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from model.inference.kv_decoder import Decoder, Peek
from model.inference.sampling import Sampling, guided, probabilities
from tokenization.vocabulary import JointVocabulary


class FramesAhead:
    """Draws frames for the B first rows of a decoder; where there are as many more, those are the unconditional ones.

    The decoder's rows end where a frame begins. first_id: the joint id of code 0. n_codes: of the codebook.
    per_frame: codes of a frame. window: codes that are drafted at once. before: codes int64 [B, per_frame] of the frame
    before the first, where there is one.
    """

    def __init__(
        self,
        decoder: Decoder,
        first_id: int,
        n_codes: int,
        per_frame: int,
        window: int,
        generator: torch.Generator | None,
        before: Tensor | None = None,
    ) -> None:
        self.decoder, self.first_id, self.n_codes, self.per_frame = decoder, first_id, n_codes, per_frame
        self.window, self.generator, self.before = window, generator, before
        self._unfed: Tensor | None = None  # ids [B, n] that are final and not in the cache

    def frame(self, setting: Sampling, n_rows: int) -> Tensor:
        """The codes of the next frame, int64 [B, per_frame]."""
        device = self.decoder.device
        codes = torch.zeros(n_rows, self.per_frame, dtype=torch.long, device=device)
        done = [0] * n_rows
        if self._unfed is None:
            p = self._distribution(self.decoder.hidden, n_rows, setting)
            drawn = self._draw(p, 1 + self.window)
            first, more = drawn[:, :1], drawn[:, 1:]
            codes[:, :1], done, self._unfed = first, [1] * n_rows, first + self.first_id
            drafts, q = more, p.unsqueeze(1).expand(-1, self.window, -1)
        else:
            drafts = torch.zeros(n_rows, self.window, dtype=torch.long, device=device)
            q = torch.zeros(n_rows, self.window, self.n_codes, device=device)
        drafts, q = self._take_before(drafts, q, done, [0] * n_rows)
        while min(done) < self.per_frame:
            drafts, q, done = self._advance(setting, codes, drafts, q, done)
        self.before, self._unfed = codes, codes[:, -1:] + self.first_id
        return codes

    def place(self, marker: int) -> None:
        """Let a marker's id follow the frame."""
        assert self._unfed is not None
        self._unfed = torch.cat((self._unfed, torch.full_like(self._unfed, marker)), dim=1)

    def _advance(
        self, setting: Sampling, codes: Tensor, drafts: Tensor, q: Tensor, done: list[int]
    ) -> tuple[Tensor, Tensor, list[int]]:
        """One forward. codes are filled in; the next drafts [B, window], their distributions, and codes done."""
        n_rows, device = len(done), codes.device
        widths = [min(self.window, self.per_frame - n) for n in done]
        peek, p = self._look(setting, drafts, widths)
        window = _ragged(widths, device)
        is_kept, drawn = self._verified(p, q[window], drafts[window])
        ends = np.cumsum([0, *widths])
        starts, lasts = ends[:-1], np.maximum(ends[1:] - 1, 0)
        new = self._draw(p[torch.from_numpy(lasts).to(device)], self.window, agree=False)
        agreed = self.decoder.agreed(torch.cat((is_kept.long(), drawn, new.flatten())))
        is_kept, drawn, new = agreed.split([len(drawn), len(drawn), new.numel()])

        kept = is_kept.tolist()  # the one wait for the device
        final = [_final(kept[a:b]) for a, b in pairwise(ends.tolist())]
        unfed = self._unfed
        assert unfed is not None
        self._commit(peek, [unfed.shape[1] + n - 1 if n else 0 for n in final])
        at = starts[:, None] + np.array(final)[:, None] + np.arange(self.window)
        rows, places = _ragged(final, device)
        before = torch.tensor(done, device=device)
        codes[rows, places + before[rows]] = drawn[torch.from_numpy(starts).to(device)[rows] + places]
        done = [n + more for n, more in zip(done, final)]
        last = torch.tensor(done, device=device).unsqueeze(1) - 1
        self._unfed = codes.gather(1, last) + self.first_id

        # What is behind the final codes goes on as a draft; behind that come new ones.
        is_old = torch.from_numpy(at < ends[1:, None]).to(device)
        sources = torch.from_numpy(np.minimum(at, lasts[:, None])).to(device)
        drafts = torch.where(is_old, drawn[sources], new.view(n_rows, -1))
        left = [width - n for width, n in zip(widths, final)]
        return *self._take_before(drafts, p[sources], done, left), done

    def _look(self, setting: Sampling, drafts: Tensor, widths: Sequence[int]) -> tuple[Peek, Tensor]:
        """Feed what is final and all drafts but the last; p [sum of widths, n_codes] of the drafts, row after row."""
        unfed, copies = self._unfed, len(self.decoder) // len(widths)
        assert unfed is not None
        more = unfed.shape[1] - 1
        counts = [more + width if width else 0 for width in widths]
        ids = torch.cat((unfed, drafts[:, :-1] + self.first_id), dim=1)[_ragged(counts, unfed.device)]
        peek = self.decoder.peek(ids.repeat(copies), counts * copies)
        starts = np.cumsum([0, *counts])
        ranges = [np.arange(width) + start + more for start, width in zip(starts, widths)]
        at = np.concatenate([one + copy * starts[-1] for copy in range(copies) for one in ranges])
        hidden = peek.hidden[torch.from_numpy(at).to(unfed.device)]
        return peek, self._distribution(hidden, sum(widths), setting)

    def _commit(self, peek: Peek, counts: list[int]) -> None:
        self.decoder.commit(peek, counts * (len(self.decoder) // len(counts)))

    def _distribution(self, hidden: Tensor, n: int, setting: Sampling) -> Tensor:
        """Of the codes, fp32 [n, n_codes], from hidden states [n, D], or those and as many unconditional ones."""
        logits = self.decoder.logits_of(hidden, self.first_id, self.first_id + self.n_codes)
        return probabilities(guided(logits, setting.guidance) if len(hidden) > n else logits, setting)

    def _verified(self, p: Tensor, q: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
        """Which drafts [n] stay, bool [n], and what each is now."""
        chance = torch.rand(len(drafts), device=p.device, generator=self.generator)
        mine = drafts.unsqueeze(1)
        is_kept = chance * q.gather(1, mine).squeeze(1) < p.gather(1, mine).squeeze(1)
        left = residual(p, q)
        # Nothing is left where p and q are the same but for rounding; no draft is rejected there.
        anew = torch.multinomial(torch.where(left.sum(1, keepdim=True) > 0, left, p), 1, generator=self.generator)
        return is_kept, torch.where(is_kept, drafts, anew.squeeze(1))

    def _draw(self, p: Tensor, n: int, agree: bool = True) -> Tensor:
        """n draws from each row of p [B, n_codes], int64 [B, n]."""
        drawn = torch.multinomial(p, n, replacement=True, generator=self.generator)
        return self.decoder.agreed(drawn.flatten()).view_as(drawn) if agree else drawn

    def _take_before(self, drafts: Tensor, q: Tensor, done: Sequence[int], old: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Drafts from the frame before in the places of the window behind the first `old` ones."""
        if self.before is None:
            return drafts, q
        places = np.arange(self.window)
        at = torch.from_numpy(np.minimum(np.array(done)[:, None] + places, self.per_frame - 1)).to(drafts.device)
        is_new = torch.from_numpy(places >= np.array(old)[:, None]).to(drafts.device)
        drafts = torch.where(is_new, self.before.gather(1, at), drafts)
        certain = torch.zeros_like(q).scatter_(2, drafts.unsqueeze(2), 1.0)
        return drafts, torch.where(is_new.unsqueeze(2), certain, q)


def last_frames(
    prompts: Sequence[np.ndarray], vocabulary: JointVocabulary, per_frame: int, device: torch.device
) -> Tensor | None:
    """Codes int64 [B, per_frame] of the frames with which prompts end, behind which comes `<eof>`; None without."""
    vision = vocabulary["vision"]
    ends = [np.asarray(prompt)[-per_frame - 1 :] for prompt in prompts]
    if not all(len(end) > per_frame and end[-1] == vocabulary.eof_id for end in ends):
        return None
    codes = np.stack([end[:-1] for end in ends]).astype(np.int64) - vision.start
    return torch.from_numpy(codes).to(device) if ((codes >= 0) & (codes < vision.n_codes)).all() else None


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What a rejected draft is drawn anew from, unnormalised: max(0, p - q)."""
    return (p - q).clamp_min(0)


def _final(kept: Sequence[int]) -> int:
    """Codes that are final: those before the first that was drawn anew, and that one."""
    return kept.index(0) + 1 if 0 in kept else len(kept)


def _ragged(counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and places in them, int64 [sum of counts] each, of counts[b] places of row b."""
    rows, places = np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(n) for n in counts])
    return torch.from_numpy(rows).to(device), torch.from_numpy(places).to(device)
