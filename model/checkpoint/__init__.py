"""Checkpoints that are whole or do not count: a training engine's state to any fsspec URL and back, on any mesh.

`<url>/step-00000012/` holds each rank's part of the fp32 master weights and of Adam's moments, as safetensors by
Hugging Face name and offset in the flattened parameter; each rank's random state; and `COMMIT`, a JSON that names every
file with its size, sha256 and contents, and carries the caller's own state (the loader's position). Ranks publish their
own files; `COMMIT` comes last, by one atomic write. A folder without it is torn and never counts.

The format is independent of the mesh and the ZeRO stage: each rank reads the ranges that its own partition needs.
Nothing in it is a pickle.
"""

from model.checkpoint.loader import load, load_latest, load_weights
from model.checkpoint.manifest import COMMIT, DamagedError, committed_steps, latest_committed, read_manifest, verify
from model.checkpoint.writer import CommittedSave, SaveCost, Writer

__all__ = [
    "COMMIT",
    "CommittedSave",
    "DamagedError",
    "SaveCost",
    "Writer",
    "committed_steps",
    "latest_committed",
    "load",
    "load_latest",
    "load_weights",
    "read_manifest",
    "verify",
]
