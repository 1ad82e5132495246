"""A checkpoint written at once, for tests that look at what is in it or load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.checkpoint import Writer
from model.training.engine import TrainingEngine
from storage.store import Store


def save_checkpoint(
    engine: TrainingEngine, root: Store, client_state: Mapping[str, Any], keep: int | None = None
) -> None:
    """Write and commit a checkpoint of the engine's current step. Collective."""
    with Writer(engine, root, keep) as writer:
        writer.save(client_state)
