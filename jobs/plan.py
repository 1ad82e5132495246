"""`ringworld plan RECIPE`: print the DAG, what is done, what will run, and why; with --memory, what that takes."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jobs.run import add_recipe_arguments
from storage.errors import UserError
from storage.printable import printable

if TYPE_CHECKING:  # the command line starts without what the pipelines import
    from model.memory_estimate.plan import MemoryPlan
    from pipelines.dag.plan import PlannedStage
    from pipelines.evaluate.memory import Answering, CellMemory
    from pipelines.recipe import Recipe
    from pipelines.train.memory_advice import StageMemory

_GIB = 2**30
HELP = "print a recipe's stages: which are done, which will run and why; --memory: what they take of a device"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    add_recipe_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="instead: what each train stage and the evaluation take of a device, by part",
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="with --memory: of a device; says what does not fit, the cheapest settings that do, and how many devices "
        "answer a context",
    )


def call(arguments: argparse.Namespace) -> int:
    """Print the plan. Nothing is run or written."""
    from pipelines.recipe.load import load_recipe
    from pipelines.run import plan_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.gpu_memory is not None and not (arguments.memory and 0 < arguments.gpu_memory < math.inf):
        raise UserError("--gpu-memory is a positive number of GiB and goes with --memory")
    if arguments.memory:
        _print_memory(recipe, arguments.gpu_memory, arguments.json)
        return 0
    stages = plan_recipe(recipe, arguments.rebuild, arguments.until)
    if arguments.json:
        print(json.dumps([_row(stage) for stage in stages], indent=1))
        return 0
    width = max(len(stage.name) for stage in stages)
    for stage in stages:
        inputs = f"<- {', '.join(stage.stage.inputs)}" if stage.stage.inputs else ""
        print(f"{stage.name:<{width}}  {stage.status:<6}  {stage.fingerprint[:16]}  {inputs}")
        for reason in stage.reasons + stage.notes:
            print(f"{'':<{width}}          {printable(reason)}")
    return 0


def _row(stage: PlannedStage) -> dict[str, object]:
    return {
        "stage": stage.name,
        "status": stage.status,
        "fingerprint": stage.fingerprint,
        "inputs": list(stage.stage.inputs),
        "reasons": list(stage.reasons),
        "notes": list(stage.notes),
        "folder": stage.store.path(),
    }


def _print_memory(recipe: Recipe, gpu_memory: float | None, as_json: bool) -> None:
    """Print what each train stage takes of a device and of the host; gpu_memory: GiB of a device, None: no verdict."""
    from pipelines.evaluate.memory import answering, evaluation_memory
    from pipelines.train.memory_advice import recipe_memory

    if recipe.train is None:
        raise UserError("--memory: the recipe has no train, so there is no memory to plan; leave the option out")
    device = None if gpu_memory is None else int(gpu_memory * _GIB)
    stages, cells = recipe_memory(recipe, device), evaluation_memory(recipe, device)
    answers = [] if device is None else answering(recipe, device)
    if as_json:
        rows = [_memory_row(stage) for stage in stages] + [_cell_row(cell) for cell in cells]
        print(json.dumps(rows + [{"stage": "answering", **asdict(answer)} for answer in answers], indent=1))
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
    _print_evaluation(cells, answers)


def _print_evaluation(cells: Sequence[CellMemory], answers: Sequence[Answering]) -> None:
    for cell in cells:
        needs = f"evaluate.sp {cell.needs} fits" if cell.needs else "no number of workers fits"
        verdict = {None: "", True: "; fits", False: f"; does not fit: {needs}"}[cell.fits]
        peak = _gib(cell.memory.peak)
        print(f"evaluate, {cell.task} at {cell.context}: {peak} a device on {cell.workers} worker(s){verdict}")
        _print_parts(cell.memory.parts, "")
    for context, ways in itertools.groupby(answers, lambda answer: answer.context):
        print(f"a context of {context} is answered by: {'; '.join(map(_way, ways))}")


def _way(answer: Answering) -> str:
    devices = f"{answer.least[0]} x {_gib(answer.least[1])}" if answer.least else "no number of devices"
    return f"{devices} ({answer.cache or 'bf16'} cache, {'split' if answer.split else 'whole'} weights)"


def _on_host(stage: StageMemory, memory: MemoryPlan) -> str:
    """Host memory of each worker; it includes the device's where the device is the host itself."""
    device = "" if stage.on_gpu else ", the device's with it"
    return f"{_gib(stage.host_bytes(memory))} of its node's memory a worker{device}"


def _print_parts(parts: Mapping[str, int], where: str) -> None:
    for part, size in sorted(parts.items(), key=lambda item: -item[1]):
        if size:
            print(f"  {_gib(size):>12}  {part}{where}")


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 10 else f"{size / 2**20:.1f} MiB"


def _cell_row(cell: CellMemory) -> dict[str, Any]:
    row = {"stage": "evaluate", "task": cell.task, "context": cell.context, "workers": cell.workers}
    return {**row, "peak": cell.memory.peak, "device": dict(cell.memory.parts), "fits": cell.fits, "needs": cell.needs}


def _memory_row(stage: StageMemory) -> dict[str, Any]:
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
