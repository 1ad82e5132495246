"""`ringworld plan --memory RECIPE`: what each train stage takes of a device and of the host, and which settings fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line starts without what the pipelines import
    from model.memory_estimate.plan import MemoryPlan
    from pipelines.recipe import Recipe
    from pipelines.train.memory_advice import StageMemory

GIB = 2**30


def print_memory(recipe: Recipe, gpu_memory: float | None, as_json: bool) -> None:
    """Print the memory of a recipe's train stages; gpu_memory: GiB of a device, None for no verdict."""
    from pipelines.train.memory_advice import recipe_memory

    stages = recipe_memory(recipe, None if gpu_memory is None else int(gpu_memory * GIB))
    if as_json:
        print(json.dumps([_row(stage) for stage in stages], indent=1))
        return
    for stage in stages:
        verdict = "" if gpu_memory is None else f"; {'fits' if stage.fits else 'more than'} {gpu_memory:g} GiB"
        print(
            f"{stage.name}: {_gib(stage.memory.peak)} a device on {stage.workers} worker(s), "
            f"most at: {stage.memory.moment}{verdict}"
        )
        _print_parts(stage.memory.device, "")
        print(f"  {_on_host(stage, stage.memory)}, most at: {stage.memory.host_moment}")
        for moment, parts in stage.memory.on_host.items():
            _print_parts(parts, f" of host memory, at: {moment}")
        if stage.advice is not None:
            changes, memory = stage.advice
            taken = f"{_gib(memory.peak)} a device and {_on_host(stage, memory)}"
            print(f"  cheapest that fits: {json.dumps(changes)}, {taken}")
        elif stage.fits is False:
            print("  no settings fit: take more workers, a larger device or a shorter context")


def _on_host(stage: StageMemory, memory: MemoryPlan) -> str:
    """Of each worker, with the device's where that is the host's own."""
    device = "" if stage.on_gpu else ", the device's with it"
    return f"{_gib(stage.host_bytes(memory))} of its node's memory a worker{device}"


def _print_parts(parts: Mapping[str, int], where: str) -> None:
    for part, size in sorted(parts.items(), key=lambda item: -item[1]):
        if size:
            print(f"  {_gib(size):>12}  {part}{where}")


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _row(stage: StageMemory) -> dict[str, Any]:
    row: dict[str, Any] = {
        "stage": stage.name,
        "workers": stage.workers,
        "peak": stage.memory.peak,
        "moment": stage.memory.moment,
        "device": dict(stage.memory.device),
        "moments": dict(stage.memory.moments),
        "host_peak": stage.host_bytes(stage.memory),
        "host_moment": stage.memory.host_moment,
        "host": stage.memory.on_host,
        "fits": stage.fits,
    }
    if stage.advice is not None:
        changes, memory = stage.advice
        host = {"host_peak": stage.host_bytes(memory), "host": memory.on_host}
        row["advice"] = {"settings": changes, "peak": memory.peak, **host}
    return row
