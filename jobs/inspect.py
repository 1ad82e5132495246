"""`ringworld inspect PATH`: print what a folder or a file of a run holds; `--verify` re-hashes a folder."""

from __future__ import annotations

import argparse
import json

from storage.errors import UserError
from storage.printable import printable

HELP = "print what a run, a stage's folder, a checkpoint, a shard or a file of documents holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("path", help="a folder, or a shard or a file of documents; any fsspec URL")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.add_argument("--verify", action="store_true", help="re-hash every file and compare with what was committed")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="files that --verify reads at a time (default: by cores)"
    )


def call(arguments: argparse.Namespace) -> int:
    """Print the contents; with --verify the exit code is 1 when something is not as it was committed."""
    from pipelines.inspect.describe import describe
    from pipelines.inspect.verify import THREADS, verify

    if arguments.threads is not None and arguments.threads < 1:
        raise UserError(f"--threads {arguments.threads} is less than 1")
    contents = describe(arguments.path)
    problems = verify(arguments.path, arguments.threads or THREADS) if arguments.verify else None
    if arguments.json:
        print(json.dumps(contents if problems is None else {**contents, "problems": problems}, indent=1))
    else:
        _print_tree(contents)
        for problem in problems or []:
            print(f"PROBLEM {printable(problem)}")
        if problems == []:
            print("verified: every file is as it was committed")
    return 1 if problems else 0


def _print_tree(tree: dict[str, object], prefix: str = "") -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _print_tree(value, f"{prefix}{key}.")
        else:
            print(printable(f"{prefix + key:<40} {value}"))
