"""This process's place in a data-parallel x sequence-parallel mesh over the whole world.

The world's ranks are laid out row by row, rank = dp_rank * sp + sp_rank, so that the ranks which share one sequence are
neighbours (on one node where they fit). ZeRO partitions over the whole world, whatever the mesh: a gradient is a sum
over tokens, on whichever rank they are.

On GPUs each process group is an NCCL communicator of its own: the world's, that of the ranks which share a sequence,
and that of the ranks which hold all weights (`zero_group`). Their operations overlap, and have to be launched in one
order on all ranks; docs/training.md says why they are.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from model.training.error_transport import decode_error, encode_error
from storage.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """This rank's place. `sp_group`: the ranks that share a sequence, None when sp is 1.

    timeout: of operations of the groups made here, torch's own where None. on_progress: called, in any thread, as this
    rank makes progress in a collective operation: with True where its own part is done and it waits for the other
    ranks, with False where it goes on working.
    """

    dp: int
    sp: int
    rank: int
    sp_group: dist.ProcessGroup | None
    timeout: timedelta | None = field(default=None, repr=False, compare=False)
    on_progress: Callable[[bool], object] = field(default=lambda waits: None, repr=False, compare=False)

    @property
    def world_size(self) -> int:
        """All ranks, dp * sp."""
        return self.dp * self.sp

    @property
    def dp_rank(self) -> int:
        """Which share of the global batch this rank reads, 0 <= dp_rank < dp."""
        return self.rank // self.sp

    @property
    def sp_rank(self) -> int:
        """Which share of each sequence this rank holds, 0 <= sp_rank < sp."""
        return self.rank % self.sp

    def neighbours(self, size: int) -> dist.ProcessGroup:
        """The group of this rank among the world's ranks taken by `size`, which divides it. Collective."""
        return _neighbours(size, self.timeout)

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over all ranks, by one small collective."""
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def on_all_ranks(self, action: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
        """Run `action` on every rank and gather its results, plain JSON, by rank.

        Where it fails on one rank, every rank raises its error, so that none waits for a failed rank; a full disk
        becomes a UserError. Collective, over `group`: one of all ranks, None for the training's own.
        """
        own, error = self._run(action)
        sent = [""] * self.world_size
        dist.all_gather_object(sent, own, group=group)
        return [_result(outcome, error) for outcome in sent]

    def on_rank_zero(self, action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """Run `action` on rank 0 alone, and return its result, plain JSON, on every rank.

        If it fails every rank raises its error. Collective, over `group` as in `on_all_ranks`.
        """
        own, error = self._run(action) if self.rank == 0 else ("", None)
        sent = [own]
        dist.broadcast_object_list(sent, src=0, group=group)
        return cast(T, _result(sent[0], error))

    def _run(self, action: Callable[[], Any]) -> tuple[str, Exception | None]:
        """The action's result or error as JSON, which can always be sent, and the error itself."""
        self.on_progress(False)
        try:
            return json.dumps({"result": action()}), None
        except Exception as error:
            failure = error
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                failure = UserError(f"{error.filename}: the disk is full; free space or write elsewhere")
            return json.dumps({"error": encode_error(failure)}), error
        finally:
            self.on_progress(True)


def _result(sent: str, own_error: Exception | None) -> Any:
    outcome = json.loads(sent)
    if "error" in outcome:
        raise decode_error(outcome["error"]) from own_error
    return outcome["result"]


def build_mesh(
    sp: int = 1,
    on_progress: Callable[[bool], object] = lambda waits: None,
    timeout: timedelta | None = None,
) -> Mesh:
    """Lay the world out as (world / sp) x sp. Collective: every rank calls it. on_progress, timeout: of `Mesh`.

    Uses the process group that the launcher started (Ray Train, torchrun); a lone process gets a group of one, without
    a port. Raises UserError when sp does not divide the world.
    """
    # NCCL, which reads it at its first operation, then runs those of all communicators in the order of their launch.
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", store=store, rank=0, world_size=1)
    world, rank = dist.get_world_size(), dist.get_rank()
    if sp < 1 or world % sp:
        raise UserError(f"sp = {sp} does not divide the {world} training workers; choose a divisor of {world}")
    group = None
    if sp > 1:
        group = _neighbours(sp, timeout)
        # NCCL wants every rank in the first operation of a group, and of a ring's exchanges some ranks may have none.
        dist.all_reduce(torch.zeros(1, device="cuda" if dist.get_backend(group) == "nccl" else "cpu"), group=group)
    return Mesh(world // sp, sp, rank, group, timeout, on_progress)


def _neighbours(size: int, timeout: timedelta | None) -> dist.ProcessGroup:
    """This rank's of the groups of `size` ranks, 0 to size - 1 and so on. Also where that is the whole world it is a
    group of its own, so that its messages and the world's do not wait for each other.
    """
    group, _ = dist.new_subgroups(size, timeout=timeout)
    return group
