"""ZeRO-3 over groups: neighbouring ranks that hold all weights among them, beside their shards of the world's.

In: a mesh and a number of ranks. Out: the process group of this rank, which DeepSpeed uses while an engine is made. It
is ZeRO++'s hpZ (arXiv 2306.10209): after an update the first forward pass gathers each weight from all ranks, and what
a rank then keeps of it for its group serves every pass up to the next update. Masters, moments, gradients and their
reduction stay as they are, over the world, so neither a gradient nor a checkpoint knows of groups. (MiCS, arXiv
2205.00119, which keeps the moments by group too, is no longer in DeepSpeed 0.19.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from model.training.mesh import Mesh
from model.training.settings import EngineSettings
from storage.errors import UserError


def open_group(mesh: Mesh, settings: EngineSettings) -> dist.ProcessGroup | None:
    """A group of its own for an engine; None where weights are shared by the world alone, as in a group of all ranks.

    Collective. Raises UserError where `zero_group` does not divide the world.
    """
    if wrong := settings.unfit_group(mesh.world_size):
        raise UserError(wrong)
    if settings.zero_group in (None, mesh.world_size):
        return None
    return mesh.neighbours(settings.zero_group)


@contextmanager
def known_to_deepspeed(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Within it DeepSpeed makes engines whose weights this group holds.

    By itself it would make a group for the first engine of a process, for ever, and could not make another.
    """
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = group
    try:
        yield
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
