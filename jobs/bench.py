"""`ringworld bench BENCHMARK`: the benchmarks of a checkout; an installed package has none."""

from __future__ import annotations

import argparse

from storage.errors import UserError

try:
    from benchmarks import command as benchmarks
except ModuleNotFoundError as error:
    if error.name not in ("benchmarks", "testing"):
        raise
    benchmarks = None  # type: ignore[assignment]

HELP = "measure this machine and this code, each figure beside a peer's"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand a benchmark; where there are none, any arguments, for `call` to refuse."""
    if benchmarks is not None:
        benchmarks.add_arguments(parser)
    else:
        parser.add_argument("benchmark", nargs=argparse.REMAINDER)


def call(arguments: argparse.Namespace) -> int:
    """Run the benchmark. UserError where there are none."""
    if benchmarks is None:
        raise UserError("the benchmarks are not part of the package; run `python -m jobs.cli bench` in a checkout")
    return benchmarks.call(arguments)
