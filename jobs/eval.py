"""`ringworld eval TASK [TASK ..] MODEL`: measure an exported model, print the figures and write them as JSON."""

from __future__ import annotations

import argparse
import json
import os

from storage.errors import UserError
from storage.printable import printable

HELP = "measure an exported model: needles, held-out loss, generated frames and what else there is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="what to measure, e.g. needle")
    parser.add_argument("model", metavar="MODEL", help="a folder that `ringworld export` wrote; any fsspec URL")
    parser.add_argument("--recipe", help="whose `evaluate` has the settings, and whose sources hold out data")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of `evaluate`, such as needle.contexts=[1024] or text=books/*.txt; may be given several times",
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the results; any fsspec URL (default: MODEL-eval)")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")


def call(arguments: argparse.Namespace) -> int:
    """Measure, print, and say where the figures lie. Called again, it carries on with what is left."""
    from pipelines.evaluate.exported import evaluate_exported
    from pipelines.evaluate.plain_table import table_lines
    from pipelines.recipe.load import load_evaluate, load_recipe

    recipe = load_recipe(arguments.recipe) if arguments.recipe is not None else None
    if recipe is not None and recipe.train is None:
        raise UserError(f"{arguments.recipe}: it trains no model, so it says nothing of evaluation; leave out --recipe")
    settings = load_evaluate(arguments.overrides, recipe.evaluate if recipe else None)
    address = os.environ.get("RAY_ADDRESS")
    done = evaluate_exported(arguments.tasks, arguments.model, settings, recipe, arguments.out, address)
    if arguments.json:
        print(json.dumps({one.task: one.rows for one in done}, indent=1))
        return 0
    for one in done:
        print(printable(f"{one.task}: {one.file}"))
        for line in table_lines(one.rows):
            print(f"  {printable(line)}")
        for hole in one.holes:
            print(printable(f"  hole {hole.cell}: {hole.reason}"))
    return 0
