"""Ring attention, side by side in one run: CPU seconds of every rank, forward plus backward, as JSON on stdout.

    python -m benchmarks.ring_attention [--ranks 8] [--tokens 16384] [--mix mixed|one] [--rounds 2] [--json FILE]

Every rank is a gloo process with one thread. Three systems see the same packed sequence in turn:
  ours_zigzag, ours_contiguous   packed ring attention with either layout;
  lwm_ring                       as the released LWM does it: contiguous chunks, keys passed once around the ring, every
                                 hop computed for every pair of ranks, causality and document borders applied as a mask
                                 only. Same kernel, 4 to 11% slower with a mask; building the masks is not counted.
Seconds are a process's CPU time, its share of the exchange included, so that more ranks than cores do no harm; the
fastest round counts, after one that warms up. Results are compared between systems: none may win by being wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from model.attention.exchange import GroupExchange
from model.attention.kernels import empty_result
from model.attention.plan import SequencePlan, dispatch, plan_sequence
from model.attention.ring import packed_ring_attention

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def document_mix(mix: str, n_tokens: int, seed: int) -> np.ndarray:
    """cu_seqlens: one document, or many whose lengths are log-uniform from 64 tokens to half the sequence."""
    cuts = [0]
    rng = np.random.default_rng(seed)
    while mix == "mixed" and cuts[-1] < n_tokens:
        cuts.append(cuts[-1] + int(np.exp(rng.uniform(np.log(64), np.log(n_tokens / 2)))))
    return np.array([*(cut for cut in cuts if cut < n_tokens), n_tokens])


class LwmRing:
    """Forward and backward of one rank of a ring that skips nothing. Tensors [1, H, T, D], keys and values stacked."""

    def __init__(self, exchange: GroupExchange, plan: SequencePlan) -> None:
        self.exchange = exchange
        rank, size = exchange.rank, exchange.size
        document = torch.from_numpy(np.repeat(np.arange(len(plan.cu_seqlens) - 1), np.diff(plan.cu_seqlens)))
        rows = torch.from_numpy(plan.indices(rank))
        self.masks = []  # float [T, T] by hop: the hop's keys come from rank - hop
        for hop in range(size):
            keys = torch.from_numpy(plan.indices((rank - hop) % size))
            seen = (document[rows, None] == document[None, keys]) & (rows[:, None] >= keys[None, :])
            self.masks.append(torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf))

    def _pass_on(self, x: Tensor) -> Tensor:
        received, rank, size = torch.empty_like(x), self.exchange.rank, self.exchange.size
        self.exchange.start({(rank + 1) % size: x}, {(rank - 1) % size: received}).finish()
        return received

    def forward_backward(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        """[out, dq, dk, dv] from [T, H, D] tensors."""
        q, k, v, grad = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v, grad))
        out, lse = empty_result(q[0])
        keys = torch.stack((k, v))
        for hop, mask in enumerate(self.masks):
            keys = self._pass_on(keys) if hop else keys
            block_out, block_lse = _forward(q, *keys, 0.0, False, attn_mask=mask[None, None])
            # A query that sees nothing of this block reports 0 where -inf is meant.
            block_lse = block_lse[0].masked_fill((mask == -torch.inf).all(dim=1), -torch.inf)
            total = torch.logaddexp(lse, block_lse)
            out = out * (lse - total).exp()[..., None] + block_out[0] * (block_lse - total).exp()[..., None]
            lse = total
        # Keys travel once more with their gradients, which come home after the last hop.
        keys, grads, dq = torch.stack((k, v)), torch.zeros_like(keys), torch.zeros_like(q)
        for hop, mask in enumerate(self.masks):
            if hop:
                keys, grads = self._pass_on(keys), self._pass_on(grads)
            parts = _backward(grad, q, *keys, out[None], lse[None], 0.0, False, attn_mask=mask[None, None])
            dq += parts[0]
            grads += torch.stack(parts[1:])
        grads = self._pass_on(grads)
        return [x.transpose(0, 1) for x in (out, dq[0], grads[0, 0], grads[1, 0])]


def ours(exchange: GroupExchange, plan: SequencePlan) -> Callable[..., list[Tensor]]:
    """Forward and backward of one rank of packed ring attention."""

    def forward_backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = packed_ring_attention(q, k, v, plan, exchange)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]

    return forward_backward


def measure_rank(rank: int, args: argparse.Namespace, folder: str) -> None:
    """One process: its CPU seconds and a digest of its results, by system, into `folder`."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=args.ranks)
    assert dist.group.WORLD is not None
    exchange = GroupExchange(dist.group.WORLD)
    cu_seqlens = document_mix(args.mix, args.tokens, args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    sequence = [torch.randn(args.tokens, args.heads, args.head_size, generator=generator) for _ in range(4)]
    contiguous, zigzag = (plan_sequence(cu_seqlens, args.ranks, layout) for layout in ("contiguous", "zigzag"))
    systems = {
        "ours_zigzag": (zigzag, ours(exchange, zigzag)),
        "ours_contiguous": (contiguous, ours(exchange, contiguous)),
        "lwm_ring": (contiguous, LwmRing(exchange, contiguous).forward_backward),
    }
    figures = {}
    for name, (plan, forward_backward) in systems.items():
        rows = [dispatch(x, plan, rank) for x in sequence]
        seconds = []
        for _ in range(1 + args.rounds):
            dist.barrier()
            started = time.process_time()
            results = forward_backward(*rows)
            seconds.append(time.process_time() - started)
        # A sum over the sequence does not depend on who holds what.
        digest = torch.stack([(x.double() * y.double()).sum() for x, y in zip(results, rows)])
        dist.all_reduce(digest)
        figures[name] = {"seconds": min(seconds[1:]), "digest": digest.tolist()}
    Path(folder, f"{rank}.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def report(args: argparse.Namespace, by_rank: list[dict[str, dict]]) -> dict:
    """The figures of all ranks, and ours against the others'. Raises ValueError where the systems' results differ."""
    systems: dict[str, dict] = {}
    for name in by_rank[0]:
        seconds = [figures[name]["seconds"] for figures in by_rank]
        systems[name] = {
            "cpu_seconds_by_rank": [round(x, 4) for x in seconds],
            "slowest": round(max(seconds), 4),
            "slowest_over_mean": round(max(seconds) * len(seconds) / sum(seconds), 3),
        }
        if not np.allclose(by_rank[0][name]["digest"], by_rank[0]["lwm_ring"]["digest"], rtol=1e-4):
            raise ValueError(f"{name} and lwm_ring computed different results")
    slowest = systems["ours_zigzag"]["slowest"]
    return {
        "benchmark": "ring_attention",
        "settings": {key: value for key, value in vars(args).items() if key != "json"},
        "documents": len(document_mix(args.mix, args.tokens, args.seed)) - 1,
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
        "systems": systems,
        "slowest_rank_over_ours": {name: round(figures["slowest"] / slowest, 3) for name, figures in systems.items()},
    }


def main() -> None:
    """Read the arguments, run the processes, print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16384, help="length of the packed sequence")
    parser.add_argument("--mix", choices=["mixed", "one"], default="mixed")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the report there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start_processes(measure_rank, args=(args, folder), nprocs=args.ranks, start_method="forkserver")
        by_rank = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(args.ranks)]
    text = json.dumps(report(args, by_rank), indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
