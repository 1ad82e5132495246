"""What the codec stage commits: weights that turn frames into codes and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WEIGHTS = "weights"
"""The folder of the weights in that of the stage."""


@dataclass(frozen=True)
class CodecOutputs:
    """weights: folder of a diffusers `VQModel`. fingerprint: sha256 over all its weights. files: sha256 by name."""

    weights: str
    fingerprint: str = ""
    files: Mapping[str, str] | None = None


@dataclass(frozen=True)
class CodecRecord:
    """figures: nothing where the weights were imported; else frames trained on, steps, and the last step's figures."""

    outputs: CodecOutputs
    figures: Mapping[str, float]
