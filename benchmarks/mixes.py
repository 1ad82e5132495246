"""Document mixes to measure on: packed sequences of a context S as `cu_seqlens`, the same for the same seed everywhere.

LWM (arXiv 2402.08268) codes a frame as 256 tokens and an end token, packs image-text pairs and 30-frame clips for its
short stages, and gives each long stage of chat a quarter each of text-to-image, image understanding, text-to-video and
video understanding, with 16% of pure text mixed into its 1K and 8K stages. So of the tokens of `lwm` 42% are in
image-text pairs (two kinds, 84% / 4 each), 21% in 30-frame clips, 21% in videos to understand and 16% in text. How long
captions, videos and texts are is not published: captions here have 16 to 128 tokens, videos 30 to 720 frames
(log-uniform: a clip of the training data up to three minutes at 4 frames a second), texts 1K to 100K tokens
(log-uniform: up to the books of the 32K stage). `images` and `clips` are the short stages' bulk; `one` is one document
as long as the context, as the books of the long text stages are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from storage.errors import UserError

FRAME = 257
"""256 codes and the token that ends a frame."""
CLIP_FRAMES = 30


@dataclass(frozen=True)
class Kind:
    """One kind of document. share: of a mix's tokens. length: draws one; mean: of what it draws."""

    share: float
    length: Callable[[np.random.Generator], int]
    mean: float


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    return int(math.exp(rng.uniform(math.log(low), math.log(high))))


def _mean_log_uniform(low: int, high: int) -> float:
    """Mean of the whole part of a number that is log-uniform between two integers."""
    n = np.arange(low, high)
    return float((n * np.log1p(1 / n)).sum() / math.log(high / low))


def _image_pair(rng: np.random.Generator) -> int:
    return FRAME + 1 + int(rng.integers(16, 129))


def _clip(rng: np.random.Generator) -> int:
    return CLIP_FRAMES * FRAME + 1 + int(rng.integers(16, 129))


def _video(rng: np.random.Generator) -> int:
    return _log_uniform(rng, 30, 720) * FRAME + int(rng.integers(16, 257))


def _text(rng: np.random.Generator) -> int:
    return _log_uniform(rng, 1_000, 100_000)


_MEAN_IMAGE_PAIR = FRAME + 1 + 72.0
_MEAN_CLIP = CLIP_FRAMES * FRAME + 1 + 72.0

MIXES: dict[str, tuple[Kind, ...]] = {
    "images": (Kind(1.0, _image_pair, _MEAN_IMAGE_PAIR),),
    "clips": (Kind(1.0, _clip, _MEAN_CLIP),),
    "lwm": (
        Kind(0.42, _image_pair, _MEAN_IMAGE_PAIR),
        Kind(0.21, _clip, _MEAN_CLIP),
        Kind(0.21, _video, _mean_log_uniform(30, 720) * FRAME + 136.0),
        Kind(0.16, _text, _mean_log_uniform(1_000, 100_000)),
    ),
    "one": (),
}


def kinds_of(mix: str) -> tuple[Kind, ...]:
    """The kinds of documents of a mix, none for one document. Raises UserError on a mix that is not in `MIXES`."""
    if mix not in MIXES:
        raise UserError(f"there is no mix {mix!r}, only {', '.join(MIXES)}")
    return MIXES[mix]


def document_mix(mix: str, context: int, seed: int = 0) -> np.ndarray:
    """cu_seqlens, int64 [n_documents + 1], of one packed sequence of `context` tokens.

    Documents are drawn independently, a kind as often as gives it its share of the tokens; the last is cut at the end
    of the context. `one` knows no chance. Raises UserError on a mix that is not in `MIXES`.
    """
    kinds = kinds_of(mix)
    if not kinds:
        return np.array([0, context])
    often = np.array([kind.share / kind.mean for kind in kinds])
    often /= often.sum()
    rng = np.random.default_rng(seed)
    cuts = [0]
    while cuts[-1] < context:
        kind = kinds[int(rng.choice(len(kinds), p=often))]
        cuts.append(min(context, cuts[-1] + kind.length(rng)))
    return np.array(cuts)


def useful_pairs(cu_seqlens: np.ndarray) -> int:
    """Pairs of a query and a key that a packed sequence asks for, per head."""
    lengths = np.diff(cu_seqlens)
    return int((lengths * (lengths + 1) // 2).sum())
