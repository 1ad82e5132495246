"""Groups of ranks for the attention tests: as threads of one process (cheap, exhaustive) or as real gloo processes."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from model.attention.plan.sequence_plan import SequencePlan
from model.attention.ring import packed_ring_attention
from testing.reorder import dispatch, in_order

TIMEOUT = 60
# As in a group's processes: a kernel adds up in another order on several threads.
torch.set_num_threads(1)


class Mailbox:
    """Messages from one rank to another: the i-th receive posted gets the i-th tensor sent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: list[Future[Tensor]] = []
        self.sent = self.received = 0

    def slot(self, number: int) -> Future[Tensor]:
        with self._lock:
            while len(self._slots) <= number:
                self._slots.append(Future())
            return self._slots[number]


class ThreadExchange:
    """An exchange between threads. A send posts a copy, so no order of ranks is hidden by luck."""

    def __init__(self, rank: int, size: int, boxes: Mapping[tuple[int, int], Mailbox], log: list) -> None:
        self.rank, self.size, self._boxes, self._log = rank, size, boxes, log

    def start(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> _ThreadTransfer:
        for peer, tensor in sends.items():
            assert peer != self.rank
            assert tensor.is_contiguous()
            assert tensor.numel()
            self._log.append((self.rank, peer, tensor.shape[0]))
            box = self._boxes[self.rank, peer]
            box.slot(box.sent).set_result(tensor.clone())
            box.sent += 1
        waits = []
        for peer, tensor in receives.items():
            box = self._boxes[peer, self.rank]
            waits.append((box.slot(box.received), tensor))
            box.received += 1
        return _ThreadTransfer(waits)


class _ThreadTransfer:
    def __init__(self, waits: list[tuple[Future[Tensor], Tensor]]) -> None:
        self._waits = waits

    def wait(self) -> None:
        for sent, target in self._waits:
            tensor = sent.result(timeout=TIMEOUT)
            assert tensor.shape == target.shape
            target.copy_(tensor)
        self._waits = []


def run_in_threads(fn: Callable[[ThreadExchange], Any], size: int) -> tuple[list[Any], list[tuple[int, int, int]]]:
    """`fn(exchange)` on every rank at once: the results by rank, and all messages as (from, to, keys)."""
    boxes = {(a, b): Mailbox() for a in range(size) for b in range(size)}
    log: list[tuple[int, int, int]] = []
    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(lambda rank: fn(ThreadExchange(rank, size, boxes, log)), range(size)))
    assert all(box.sent == box.received for box in boxes.values()), "a message was sent that nobody took"
    return results, log


def run_in_processes(fn: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """`fn(group, *args)` in `size` gloo processes, fn at a module's top level: the results by rank."""
    # A server forked from before any thread was started, with the slow imports done once for all groups.
    mp.set_forkserver_preload(["tests.model.preloaded"])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, args=(fn, size, folder, args), nprocs=size, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(size)]


def _process(rank: int, fn: Callable[..., Any], size: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.save(fn(dist.group.WORLD, *args), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def forward_backward(tensors: list[Tensor], plan: SequencePlan, group: Any, rank: int) -> list[Tensor]:
    """This rank's rows of [out, dq, dk, dv] from the whole sequence's [q, k, v, grad_out]."""
    q, k, v, grad = (dispatch(x, plan, rank) for x in tensors)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = packed_ring_attention(q, k, v, plan, group)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def packed_results(tensors: list[Tensor], plan: SequencePlan) -> list[Tensor]:
    """[out, dq, dk, dv] of the whole sequence, in packed order, from a group of threads."""
    parts, _ = run_in_threads(lambda exchange: forward_backward(tensors, plan, exchange, exchange.rank), plan.sp)
    return packed_order(parts, plan)


def packed_order(parts: list[list[Tensor]], plan: SequencePlan) -> list[Tensor]:
    """Results by rank back to packed order."""
    return [in_order([part[i].cpu() for part in parts], plan) for i in range(len(parts[0]))]


def dense_results(tensors: list[Tensor], cu_seqlens: np.ndarray, scale: float | None = None) -> list[Tensor]:
    """[out, dq, dk, dv] in fp64 by a softmax over the whole masked S x S matrix, written from the definition."""
    q, k, v, grad = (x.double() for x in tensors)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    repeat = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(repeat, 1)) * (scale or q.shape[-1] ** -0.5)
    scores = scores.masked_fill(~torch.from_numpy(allowed_pairs(cu_seqlens)), -torch.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(repeat, 1))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def allowed_pairs(cu_seqlens: np.ndarray) -> np.ndarray:
    """bool [S, S]: query i may see key j."""
    document = np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens))
    return (document[:, None] == document[None, :]) & np.tri(len(document), dtype=bool)


def random_tensors(
    n_tokens: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    """[q, k, v, grad_out] of a packed sequence."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n_tokens, h, size) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def relative_error(x: Tensor, reference: Tensor) -> float:
    """Norm of the difference over norm of the reference."""
    return float((x.detach().double() - reference.detach()).norm() / reference.detach().norm())


def failure(action: Callable[[], Any]) -> Exception | None:
    """What an action raises on this rank, to be looked at elsewhere."""
    try:
        action()
    except Exception as error:
        return error
    return None
