"""`ringworld show RUN STAGE`: print a sample of what a stage made, as text, and write it with its frames as files."""

from __future__ import annotations

import argparse
import tempfile

from storage.errors import UserError
from storage.printable import printable

HELP = "print a sample of what a stage of a run made: objects, documents or packed sequences, with their frames as PNG"

_SHOWN = 300  # characters of a line; the file has all of it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("run", help="the run's root, as storage.root names it; any fsspec URL")
    parser.add_argument("stage", help="sources, tokenize, or a stage that packs")
    parser.add_argument("-n", "--number", type=int, default=8, help="how many (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws others (default: 0)")
    parser.add_argument("--out", metavar="FOLDER", help="where to write them as .txt and .png (default: a new folder)")


def call(arguments: argparse.Namespace) -> int:
    """Print each and write its files."""
    from pipelines.inspect.show import show
    from storage.store import Store

    for name in ("number", "seed"):
        if (value := getattr(arguments, name)) < (least := {"number": 1, "seed": 0}[name]):
            raise UserError(f"--{name} {value} is less than {least}")
    folder = ""
    for shown in show(arguments.run, arguments.stage, arguments.number, arguments.seed):
        folder = folder or arguments.out or tempfile.mkdtemp(prefix="ringworld-show-")
        for line in shown.lines:
            rest = f"... ({len(line):,} characters)" if len(line) > _SHOWN else ""
            print(printable(line[:_SHOWN]) + rest)
        print("".join(f"-> {path}\n" for path in shown.save(Store(folder))))
    if not folder:
        print("nothing is there to be shown")
    return 0
