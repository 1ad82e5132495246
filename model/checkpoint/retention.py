"""Which checkpoints stay: the newest committed ones up to now. All others are in the way of a resume, or of space."""

from __future__ import annotations

from collections.abc import Collection

from model.checkpoint.manifest import COMMIT, committed_steps, step_name, steps
from storage.store import Store


def retain(root: Store, step: int, keep: int | None, files: Collection[str]) -> None:
    """Of a folder in which `step` has just been committed with these files, and nothing else is being written.

    keep: how many committed checkpoints to leave, the newest; None leaves all. Those of later steps go in any case: the
    run has gone back behind them, as they were damaged or have led astray. So do torn ones.
    """
    committed = [one for one in committed_steps(root) if one <= step]
    kept = committed if keep is None else committed[-max(1, keep) :]
    for one in steps(root):
        if one not in kept:
            forget(root, one)
    for name in root.sizes(step_name(step)):
        if name != COMMIT and name not in files:  # of a commit of the same step before
            root.delete(f"{step_name(step)}/{name}")


def forget(root: Store, step: int) -> None:
    """Delete a checkpoint. Its `COMMIT` goes first, so that a half-deleted one does not count."""
    root.delete(f"{step_name(step)}/{COMMIT}")
    root.delete_folder(step_name(step))
