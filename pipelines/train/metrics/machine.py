"""What a step took of the machine: speed, model FLOPs utilisation, stalls, seconds by part, memory.

In: the step's totals, seconds by part, this process's memory. Out: flat figures. Pure but for reading the memory.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping

import psutil
import torch
from transformers import LlamaConfig

from model.llama.flops import peak_flops, step_flops
from model.training.engine import StepMetrics

PARTS = ("load", "communication", "forward", "backward", "update")
"""`load` waits for the next batch. `communication` waits for other ranks' keys, within forward and backward."""


def memory() -> dict[str, float]:
    """Bytes that this process has in memory, and the most that it ever had; on a GPU, the most that torch took."""
    used = {
        "memory_resident_bytes": float(psutil.Process().memory_info().rss),
        "memory_peak_bytes": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    if torch.cuda.is_available():
        used["gpu_allocated_peak_bytes"] = float(torch.cuda.max_memory_allocated())
        used["gpu_reserved_peak_bytes"] = float(torch.cuda.max_memory_reserved())
    return used


def device_peak(recipes: float | None) -> float | None:
    """Operations a second of this rank's device at most: the recipe's, or else those known of its GPU."""
    is_asked = recipes is None and torch.cuda.is_available()
    return peak_flops(torch.cuda.get_device_name()) if is_asked else recipes


def speed(metrics: StepMetrics, seconds: float, config: LlamaConfig, peak: float | None) -> dict[str, float]:
    """Seconds of a step, tokens a second over all ranks, all and those of documents, and MFU where the `peak` of all
    ranks is known. seconds: of the whole step, with waiting for its batch.
    """
    seconds = max(seconds, 1e-9)
    figures = {"step_seconds": seconds, "tokens_per_second": metrics.tokens / seconds}
    figures["useful_tokens_per_second"] = metrics.useful_tokens / seconds
    if peak is not None:
        targets = {name: one.targets for name, one in metrics.modalities.items()}
        flops = step_flops(config, metrics.useful_tokens, metrics.useful_pairs, targets)
        figures["mfu"] = flops / (seconds * peak)
    return figures


def part_figures(seconds: Mapping[str, float]) -> dict[str, float]:
    """Figures by part, `load` under the name `loader_stall_seconds`."""
    named = {"loader_stall" if part == "load" else part: spent for part, spent in seconds.items()}
    return {f"{name}_seconds": spent for name, spent in named.items()}
