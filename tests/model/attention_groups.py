"""Groups of ranks as real gloo processes; `testing.thread_ranks` has them as threads, cheap and exhaustive."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# As in a group's processes: a kernel adds up in another order on several threads.
torch.set_num_threads(1)


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


def failure(action: Callable[[], Any]) -> Exception | None:
    """What an action raises on this rank, to be looked at elsewhere."""
    try:
        action()
    except Exception as error:
        return error
    return None
