"""Attention over the runs of one block of keys, forward and backward, behind one interface for CPU and CUDA.

In: queries of this rank, the keys and values of one block, and the runs that pair them. Out: softmax results, into
which those over further blocks are merged in place. The backward takes the *global* output and log-sum-exp, with which
the blocks' gradients simply add up (FlashAttention-2, arXiv 2307.08691).

Accumulators are fp32, fp64 for fp64 inputs. Both devices use torch's own kernels. The CPU computes half precision
inputs in fp32, so a block's result is never rounded before it is merged; FlashAttention on CUDA returns half precision
blocks, and its backward is bitwise repeatable only under `torch.use_deterministic_algorithms(True)`
(`train.deterministic`).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl
from torch.nn.functional import pad

from model.attention.plan.runs import KernelCall, Range, RankPlan, Run, Runs, joined

logger = logging.getLogger(f"ringworld.{__name__}")

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda_forward = torch.ops.aten._flash_attention_forward
_cuda_backward = torch.ops.aten._flash_attention_backward


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which results over blocks are summed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run], scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The attention of q over one block of keys: out [T, H, D] and lse [T, H], in the accumulator dtype.

    q [T, H, D]; k, v [N, Hkv, D], all of one dtype, Hkv dividing H. runs: together they meet every query exactly once,
    as a rank's runs over its own keys do. scale: 1 / sqrt(D) where None. On CUDA fp32 has no flash kernel:
    it is computed by tiles of the matrix of scores, for inference alone.
    """
    dtype = accumulator_dtype(q.dtype)
    if _on_cpu(q) and len(runs) == 1:
        ((_, _, out, lse),) = _forward(q, k, v, runs, scale)
        return out, lse
    out, lse = torch.empty_like(q, dtype=dtype), q.new_empty(q.shape[:2], dtype=dtype)
    for a, b, block_out, block_lse in _forward(q, k, v, runs, scale):
        out[a:b].copy_(block_out)
        lse[a:b].copy_(block_lse)
    return out, lse


def attend_(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run], scale: float | None = None
) -> None:
    """Merge the attention of q over a further block of keys, any runs of it, into what `attend` returned."""
    for a, b, block_out, block_lse in _forward(q, k, v, runs, scale):
        merge_(out[a:b], lse[a:b], block_out, block_lse)


def attend_backward_(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    runs: Sequence[Run],
    scale: float | None = None,
) -> None:
    """Add the gradients that flow through one block of keys to dq [T, H, D] and dk, dv [N, Hkv, D] (accumulator dtype).

    out [T, H, D] (inputs' dtype) and lse [T, H] (accumulator dtype) are the finished results over *all* keys of a
    query; grad_out [T, H, D] is the gradient of out.
    """
    inputs = (grad_out, q, k, v, out)

    def add(gradients: Iterable[Tensor], queries: Sequence[Range], keys: Sequence[Range]) -> None:
        for total, gradient, ranges in zip((dq, dk, dv), gradients, (queries, keys, keys)):
            add_rows_(total, ranges, gradient)

    if _on_cpu(q):
        for run in runs:
            add(_backward_cpu(inputs, lse, run, scale), [run[:2]], [run[2:4]])
    else:
        for call in _calls(runs):
            add(_backward_cuda(inputs, lse, call, scale), call.queries, call.keys)


_Results = Iterator[tuple[int, int, Tensor, Tensor]]
"""Queries [a, b), and their out [b - a, H, D] and lse [b - a, H] over the keys of a run."""


def _forward(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run], scale: float | None) -> _Results:
    if _on_cpu(q):
        yield from _forward_cpu(q, k, v, runs, scale)
    elif _has_no_kernel(q):
        yield from _forward_dense(q, k, v, runs, scale)
    else:
        for call in _calls(runs):
            yield from _forward_cuda(q, k, v, call, scale)


def _on_cpu(q: Tensor) -> bool:
    return q.device.type == "cpu"


def _has_no_kernel(q: Tensor) -> bool:
    """FlashAttention on CUDA takes half precision alone."""
    return q.is_cuda and q.dtype.itemsize > 2


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Join the softmax result over further keys into another, in place.

    Dividing by a + b keeps the rounding of lse out of the output.
    """
    top = torch.maximum(lse, block_lse)
    a, b = (lse - top).exp_(), (block_lse - top).exp_()
    total = a + b
    out.mul_((a / total).unsqueeze(-1)).addcmul_(block_out, (b / total).unsqueeze(-1))
    lse.copy_(top.add_(total.log_()))


def rows_of(x: Tensor, ranges: Iterable[Range]) -> Tensor:
    """The rows of `ranges` one after another; a view where they are neighbours."""
    parts = [x[a:b] for a, b in joined(ranges)]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else x[:0]


def add_rows_(x: Tensor, ranges: Iterable[Range], rows: Tensor) -> None:
    """Add `rows`, which lie one range after another, to the rows of `ranges`."""
    start = 0
    for a, b in joined(ranges):
        x[a:b].add_(rows[start : start + b - a])
        start += b - a


# --- CPU: one kernel call a run. Its layout is [B, H, T, D] with any strides, so [T, H, D] is passed as a view. ---


def _batched(x: Tensor) -> Tensor:
    """[T, H, D] as [1, H, T, D]."""
    return x.transpose(0, 1).unsqueeze(0)


def _unbatched(x: Tensor) -> Tensor:
    """[1, H, T, D] as [T, H, D]."""
    return x.squeeze(0).transpose(0, 1)


def _forward_cpu(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run], scale: float | None) -> _Results:
    dtype = accumulator_dtype(q.dtype)
    for q0, q1, k0, k1, causal in runs:
        query, key, value = (_batched(x.to(dtype)) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        block_out, block_lse = _cpu_forward(query, key, value, 0.0, causal, scale=scale)
        yield q0, q1, _unbatched(block_out), block_lse[0].t()


def _backward_cpu(inputs: Sequence[Tensor], lse: Tensor, run: Run, scale: float | None) -> Iterator[Tensor]:
    queries, keys = slice(*run[:2]), slice(*run[2:4])
    rows = (x[part] for x, part in zip(inputs, (queries, queries, keys, keys, queries)))
    batched = [_batched(x.to(lse.dtype)) for x in rows]
    gradients = _cpu_backward(*batched, lse[queries].t().unsqueeze(0), 0.0, run.causal, scale=scale)
    return map(_unbatched, gradients)


DENSE_SCORES = 2**24
"""Scores of one tile."""


def _forward_dense(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run], scale: float | None) -> _Results:
    """Tile after tile of queries, by products and a softmax: on any device and in any dtype, slower than a kernel."""
    kv_heads = k.shape[1]
    for q0, q1, k0, k1, causal in runs:
        keys, values = (x[k0:k1].transpose(0, 1) for x in (k, v))  # [Hkv, N, D]
        tile = max(1, DENSE_SCORES // (q.shape[1] * (k1 - k0)))
        for a in range(q0, q1, tile):
            b = min(q1, a + tile)
            n = b - q0 if causal else k1 - k0
            queries = q[a:b].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [Hkv, G, T, D]
            scores = (queries * _scale(q, scale)) @ keys[:, None, :n].transpose(2, 3)
            if causal:
                later = torch.ones(b - a, n, dtype=torch.bool, device=q.device).triu_(a - q0 + 1)
                scores.masked_fill_(later, -torch.inf)
            lse = scores.logsumexp(-1)
            out = (scores - lse.unsqueeze(-1)).exp_() @ values[:, None, :n]
            yield a, b, out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)


# --- CUDA: all runs of one kind in one variable-length call, whose sequences are the runs. ---


def kernel_name(device: torch.device) -> str:
    """What computes attention on a device, for the log."""
    return f"FlashAttention-{cuda_kernel()[2:]}" if device.type == "cuda" else "torch's flash attention for CPUs"


@functools.cache
def cuda_kernel() -> str:
    """The FlashAttention behind torch's operators: "FA3" where its package is installed and the GPU is a Hopper, else
    torch's own "FA2". Chosen at the first call, for the process. FA3 is about 1.7 times as fast on an H100
    (FlashAttention-3, arXiv 2407.08608).
    """
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    if hopper and importlib.util.find_spec("flash_attn_interface") is not None:
        try:
            activate_flash_attention_impl("FA3")
            return "FA3"
        except Exception as error:  # a build for another torch or another CUDA: training goes on, slower
            logger.warning("FlashAttention 3 is installed but cannot be used (%s); using FlashAttention 2", error)
    return "FA2"


class CallBounds:
    """The cu_seqlens of all kernel calls of a rank's plan in one tensor on the host, made in a loader's thread."""

    def __init__(self, plan: RankPlan) -> None:
        self._calls = plan.calls
        self._joined = pinned(torch.from_numpy(np.concatenate([call.cu_seqlens.ravel() for call in self._calls])))

    def to(self, device: torch.device | str) -> None:
        """Copy them to the device at once, during its work, for the calls to use."""
        there = self._joined.to(device, non_blocking=self._joined.is_pinned())
        parts = there.split([call.cu_seqlens.size for call in self._calls])
        for call, part in zip(self._calls, parts, strict=True):
            call.on_device[there.device] = part.view(2, -1)


def pinned(x: Tensor) -> Tensor:
    """x in pinned memory where this process uses a GPU, so that copies overlap the GPU's work."""
    return x.pin_memory() if torch.cuda.is_initialized() else x


def _calls(runs: Sequence[Run]) -> tuple[KernelCall, ...]:
    return (runs if isinstance(runs, Runs) else Runs(runs)).calls


def _bounds(call: KernelCall, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """cu_seqlens of queries and of keys, int32 [runs + 1] on the device, and the longest of each."""
    if device not in call.on_device:
        call.on_device[device] = torch.from_numpy(call.cu_seqlens).to(device)
    return *call.on_device[device], *call.longest


def _forward_cuda(q: Tensor, k: Tensor, v: Tensor, call: KernelCall, scale: float | None) -> _Results:
    cuda_kernel()
    inputs = (_padded_rows(x, ranges) for x, ranges in ((q, call.queries), (k, call.keys), (v, call.keys)))
    settings = (*_bounds(call, q.device), 0.0, call.causal, False)
    block_out, block_lse, *_ = _cuda_forward(*inputs, *settings, scale=_scale(q, scale))
    start = 0
    for a, b in joined(call.queries):
        rows = slice(start, start + b - a)
        yield a, b, block_out[rows, :, : q.shape[-1]], block_lse[:, rows].t()
        start = rows.stop


def _backward_cuda(inputs: Sequence[Tensor], lse: Tensor, call: KernelCall, scale: float | None) -> Iterator[Tensor]:
    q = inputs[1]
    gradients = _cuda_backward(
        *map(_padded_rows, inputs, (call.queries, call.queries, call.keys, call.keys, call.queries)),
        rows_of(lse, call.queries).t().contiguous(),
        *_bounds(call, q.device),
        0.0,
        call.causal,
        torch.zeros(2, dtype=torch.uint64, device=q.device),  # the dropout's random state, of which there is none
        torch.empty(0, device=q.device),
        scale=_scale(q, scale),
    )
    return (gradient[..., : q.shape[-1]] for gradient in gradients)


def _scale(q: Tensor, scale: float | None) -> float:
    """The scale spelled out: the kernel would take it from the padded head size."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def _padded_rows(x: Tensor, ranges: Iterable[Range]) -> Tensor:
    """The rows of `ranges`, with zeros up to a head size that is a multiple of 8, as FlashAttention requires.

    Where it is one already they are not copied, which padding by nothing would do.
    """
    rows, missing = rows_of(x, ranges), -x.shape[-1] % 8
    if missing:
        return pad(rows, (0, missing))
    return rows if rows.stride(-1) == 1 else rows.contiguous()
