"""Who this process is among the ranks: a data-parallel x sequence-parallel mesh over the whole world.

The world's ranks are laid out row by row, rank = dp_rank * sp + sp_rank, so that the ranks which share one sequence are
neighbours (on one node where they fit). ZeRO partitions over the whole world and knows nothing of this mesh: a
gradient is a sum over tokens, wherever they are held.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tokenization.errors import UserError


@dataclass(frozen=True)
class Mesh:
    """This rank's place. `sp_group`: the ranks that hold the same sequence, None when sp is 1 (nobody to talk to)."""

    dp: int
    sp: int
    rank: int
    device: torch.device
    sp_group: dist.ProcessGroup | None

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


def build_mesh(sp: int = 1) -> Mesh:
    """Lay the world out as (world / sp) x sp. Collective: every rank calls it.

    Uses the process group that the launcher started (Ray Train, torchrun); a lone process gets a group of one, without
    a port. Raises UserError when sp does not divide the world.
    """
    on_cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("nccl" if on_cuda else "gloo", store=store, rank=0, world_size=1)
    world, rank = dist.get_world_size(), dist.get_rank()
    if sp < 1 or world % sp:
        raise UserError(f"sp = {sp} does not divide the {world} training workers; choose a divisor of {world}")
    group = None
    if sp > 1:
        mesh = init_device_mesh("cuda" if on_cuda else "cpu", (world // sp, sp), mesh_dim_names=("dp", "sp"))
        group = mesh.get_group("sp")
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    return Mesh(world // sp, sp, rank, device, group)
