"""`ringworld plan RECIPE`: print the DAG, what is done, what will run, and why; with --memory, what training takes."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from jobs.plan_memory import print_memory
from jobs.run import add_rebuild, add_recipe
from storage.errors import UserError

if TYPE_CHECKING:  # the command line starts without what the pipelines import
    from pipelines.dag.plan import PlannedStage

HELP = "print a recipe's stages: which are done, which will run and why; --memory: what training takes of a device"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's arguments, and --json."""
    add_recipe(parser)
    add_rebuild(parser)
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.add_argument(
        "--memory", action="store_true", help="instead: what each train stage takes of a device, by part"
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="with --memory: of a device; says which stages do not fit and the cheapest settings that do",
    )


def call(arguments: argparse.Namespace) -> int:
    """Print the plan; nothing is run or written."""
    from pipelines.recipe.load import load_recipe
    from pipelines.run import plan_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.gpu_memory is not None and not (arguments.memory and arguments.gpu_memory > 0):
        raise UserError("--gpu-memory is a positive number of GiB and goes with --memory")
    if arguments.memory:
        print_memory(recipe, arguments.gpu_memory, arguments.json)
        return 0
    stages = plan_recipe(recipe, arguments.rebuild)
    if arguments.json:
        print(json.dumps([_row(stage) for stage in stages], indent=1))
        return 0
    width = max(len(stage.name) for stage in stages)
    for stage in stages:
        inputs = f"<- {', '.join(stage.stage.inputs)}" if stage.stage.inputs else ""
        print(f"{stage.name:<{width}}  {stage.status:<6}  {stage.fingerprint[:16]}  {inputs}")
        for reason in stage.reasons + stage.notes:
            print(f"{'':<{width}}          {reason}")
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
