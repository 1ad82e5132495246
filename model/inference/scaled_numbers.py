"""Keys and values in 8 bits: each head's vector of each token with a scale of its own.

In: vectors in a floating dtype. Out: numbers in int8 or fp8 (e4m3, as arXiv 2209.05433 defines it) and fp32 scales, and
back. The largest number of a vector becomes the format's largest. int8 then errs by half a step of amax / 127 at most,
fp8 by a sixteenth of each number. A token takes D + 4 bytes a head, key and value each, where bf16 takes 2 D.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

CacheFormat = Literal["int8", "fp8"]
"""How a cache keeps numbers, where not in the model's dtype."""
DTYPES: dict[CacheFormat, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max}
"""By dtype; those of no scale are not here."""
SCALE_BYTES = 4


def scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., D] as numbers of `dtype` and scales fp32 [..., 1], whose product it is."""
    exact = x.float()
    scales = exact.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny).div_(LARGEST[dtype])
    numbers = exact / scales
    return (numbers.round_() if dtype == torch.int8 else numbers).to(dtype), scales


def unscaled(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., D] in `dtype`, rounded once."""
    return numbers.float().mul_(scales).to(dtype)
