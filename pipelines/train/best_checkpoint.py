"""Which of a train stage's checkpoints has the least held-out loss (`train.heldout`), as the last of them says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model import checkpoint
from storage.store import Store


def best_checkpoint(checkpoints: Store) -> Mapping[str, Any] | None:
    """Its `step`, its `loss` and the `targets` that this is a loss of; None where none was measured, or it is gone.

    checkpoints: the stage's folder of them. Raises ValueError where the last one has changed.
    """
    steps = checkpoint.committed_steps(checkpoints)
    if not steps:
        return None
    best: Mapping[str, Any] | None = checkpoint.read_manifest(checkpoints, steps[-1]).client_state.get("best")
    return best if best is not None and best["step"] in steps else None
