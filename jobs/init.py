"""`ringworld init [NAME] [FOLDER]`: write a recipe that comes with Ringworld into a folder."""

from __future__ import annotations

import argparse
from itertools import takewhile
from pathlib import Path

from storage.errors import UserError

RECIPES = Path(__file__).parents[1] / "recipes"
HELP = "write a recipe that comes with Ringworld into a folder, as a start for your own"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    names = ", ".join(_recipes())
    parser.add_argument("name", nargs="?", default="quickstart", help=f"one of {names} (default: quickstart)")
    parser.add_argument("folder", nargs="?", default=".", help="where to write it (default: here)")


def call(arguments: argparse.Namespace) -> int:
    """Write the recipe and print what to set next. UserError where there is no such recipe or the file exists."""
    recipes = _recipes()
    if arguments.name not in recipes:
        raise UserError(f"init: no recipe is called {arguments.name!r}; choose one of {', '.join(recipes)}")
    path = Path(arguments.folder) / f"{arguments.name}.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(recipes[arguments.name])
    except FileExistsError:
        raise UserError(f"init: {path} exists already and is left as it is; name another folder") from None
    except OSError as error:
        raise UserError(f"init: {path} cannot be written ({error}); name another folder") from None
    print(f"wrote {path}")
    for line in takewhile(lambda line: line.startswith("#"), recipes[arguments.name].splitlines()):
        print(line.removeprefix("#").strip())
    print(f"`ringworld plan {path}` says what it will do, `ringworld run {path}` does it.")
    return 0


def _recipes() -> dict[str, str]:
    """The text of each recipe by its name."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(RECIPES.glob("*.yaml"))}
