"""How a card trains in fp32 here: by the definition of the operators that its attention calls.

FlashAttention on CUDA takes half precision alone, so `train.precision: fp32` has no attention on a card, and bf16 is
too coarse to hold a gradient to 1e-5. Within `exact_attention` torch's two operators are replaced by
`testing.varlen_attention`; all around them stays: the runs, the rows that are gathered and scattered, the padding of
heads, the merge of blocks. The operators themselves are held against fp64 by the part `kernels`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from model.attention import flash_kernels
from testing.varlen_attention import varlen_backward, varlen_forward


@contextlib.contextmanager
def exact_attention() -> Iterator[None]:
    """Within it attention takes the way of a card, on any device and in any dtype, by the operators' definition."""
    with mock.patch.multiple(
        flash_kernels,
        _cuda_forward=varlen_forward,
        _cuda_backward=varlen_backward,
        _on_cpu=lambda q: False,
        _has_no_kernel=lambda q: False,
    ):
        yield
