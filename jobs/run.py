"""`ringworld run RECIPE`: run the whole DAG. `python -m jobs.run RECIPE` does the same, as the entry point of a job."""

from __future__ import annotations

import argparse
import os
import sys

from jobs.guard import run_command

HELP = "run a recipe to the end; what is done is passed over, what was interrupted carries on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    add_recipe_arguments(parser)
    parser.add_argument(
        "--profile",
        metavar="STEPS",
        help="write a torch profiler's trace of steps A:B of each train stage, or of so many after its first, into "
        "the stage's folder; changes nothing else",
    )
    parser.add_argument("--profile-all-ranks", action="store_true", help="of every worker instead of the first")


def add_overrides(parser: argparse.ArgumentParser, what: str) -> None:
    """What to change of recipes. what: which, for the help."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"override a key of {what}, e.g. --set train.stages.0.lr=3e-4; may be given several times",
    )


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, what to change of it, the stages to make again, and how far to go."""
    parser.add_argument("recipe", help="a YAML recipe, e.g. recipes/quickstart.yaml")
    add_overrides(parser, "the recipe")
    parser.add_argument(
        "--rebuild",
        action="append",
        default=[],
        metavar="STAGE",
        help="make a stage again although it is done, and what depends on it; may be given several times",
    )
    parser.add_argument(
        "--until",
        metavar="STAGE",
        help="no further than this stage and what it needs; `pack` and `train` stand for all that pack or train",
    )


def call(arguments: argparse.Namespace) -> int:
    """Run the recipe on the cluster that RAY_ADDRESS names, or on a Ray instance of its own."""
    from pipelines.recipe.load import load_recipe
    from pipelines.report.stage import ReportStage
    from pipelines.run import root_store, run_recipe
    from pipelines.train.profiled_steps import ProfiledSteps

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    profile = arguments.profile and ProfiledSteps.parse(arguments.profile, arguments.profile_all_ranks)
    done = run_recipe(recipe, os.environ.get("RAY_ADDRESS"), profile, arguments.rebuild, arguments.until)
    if ReportStage.kind in done:
        print(f"report: {root_store(recipe).path('report.html')}")
    else:
        print(f"done: {', '.join(done)}, in {root_store(recipe).path('stages')}; without --until the run carries on")
    return 0


def main() -> int:
    """Parse and run this command on its own."""
    parser = argparse.ArgumentParser(prog="python -m jobs.run", description=HELP)
    add_arguments(parser)
    parser.set_defaults(call=call)
    return run_command(parser)


if __name__ == "__main__":
    sys.exit(main())
