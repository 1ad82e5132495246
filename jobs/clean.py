"""`ringworld clean RUN [RUN ...]`: list what no recipe of the runs needs any more; `--yes` removes it."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jobs.run import add_overrides
from storage.printable import printable

if TYPE_CHECKING:  # the command line starts without what the pipelines import
    from pipelines.clean.find import Found
    from pipelines.clean.remove import Removed

HELP = "list what no recipe of a run needs any more, old outputs and codes, with sizes; --yes: remove it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's root, any fsspec URL; codes go only where all runs are given"
    )
    parser.add_argument(
        "--recipe",
        dest="recipes",
        action="append",
        default=[],
        metavar="FILE",
        help="a recipe whose outputs stay, although others are later; may be given several times",
    )
    add_overrides(parser, "the recipes")
    parser.add_argument("--yes", action="store_true", help="remove what is listed")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")


def call(arguments: argparse.Namespace) -> int:
    """Print what is not needed, and remove it with --yes."""
    from pipelines.clean.find import find_runs, find_unneeded
    from pipelines.clean.remove import leases, remove
    from pipelines.recipe.load import load_recipe

    recipes = [load_recipe(path, arguments.overrides) for path in arguments.recipes]
    roots = find_runs(arguments.runs, recipes)
    with leases(roots) if arguments.yes else contextlib.nullcontext(roots) as held:
        found = find_unneeded(held, recipes)
        if not arguments.json:
            for line in _lines(found):
                print(printable(line))
        removed = remove(found, held) if arguments.yes else None
    print(json.dumps(_tree(found, removed), indent=1) if arguments.json else _summary(found, removed))
    return 0


def _lines(found: Found) -> Iterator[str]:
    rows = [
        (group.store.path(group.folder), f"{len(group.sizes):,}", _size(group.bytes), group.why)
        for group in found.unneeded
    ]
    if rows:
        rows.insert(0, ("folder", "files", "size", "why it is not needed"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)] if rows else []
    for what, files, size, why in rows:
        yield f"{what:<{widths[0]}}  {files:>{widths[1]}}  {size:>{widths[2]}}  {why}"
    yield from found.notes


def _summary(found: Found, removed: Removed | None) -> str:
    if removed is None:
        files, size = sum(len(group.sizes) for group in found.unneeded), sum(group.bytes for group in found.unneeded)
        if not files:
            return "nothing here that is not needed"
        return f"in all {files:,} files, {_size(size)}; nothing is removed without --yes"
    swept = f", and {removed.temporaries:,} half-written files of dead writers" if removed.temporaries else ""
    return f"removed {removed.files:,} files, {_size(removed.bytes)}{swept}"


def _tree(found: Found, removed: Removed | None) -> dict[str, Any]:
    return {
        "unneeded": [
            {
                "folder": group.store.path(group.folder),
                "files": len(group.sizes),
                "bytes": group.bytes,
                "why": group.why,
            }
            for group in found.unneeded
        ],
        "notes": list(found.notes),
        "removed": removed and asdict(removed),
    }


def _size(size: int) -> str:
    """Bytes with the prefix that leaves one to four digits before the point."""
    for unit, power in (("TiB", 4), ("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if size >= 1024**power:
            return f"{size / 1024**power:.1f} {unit}"
    return f"{size} B"
