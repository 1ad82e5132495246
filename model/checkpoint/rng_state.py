"""A rank's random state: restored on the same number of ranks, derived on another."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save


def random_state() -> bytes:
    """This rank's, as the bytes of a safetensors file: torch's own, and the device's where there is one."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return save(states)


def set_random_state(path: Path) -> None:
    """Restore the state from a file of `random_state`."""
    states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def derive_random_state(origin: str, rank: int, world_size: int) -> None:
    """A state that depends only on `origin` (a hash of the state before), the rank and the number of ranks."""
    digest = hashlib.sha256(f"{origin} {rank} of {world_size}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8]) >> 1)
