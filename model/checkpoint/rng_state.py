"""The state of a rank's random numbers: kept where the ranks stay the same in number, derived where they do not."""

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
    """Carry on with the numbers from the file of `random_state`."""
    states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def derive_random_state(origin: str, rank: int, world_size: int) -> None:
    """Numbers that depend on nothing but `origin` (a hash of the state before), the rank and their number."""
    digest = hashlib.sha256(f"{origin} {rank} of {world_size}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8]) >> 1)
