"""Where the files of `package://NAME/path` URLs are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from urllib.parse import urlsplit

from storage.errors import UserError


def package_folder(url: str) -> Path:
    """The folder of the installed package that a URL names. Raises UserError where there is none."""
    name = urlsplit(url).netloc
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{url}: the Python package {name!r} is not installed; pip install 'ringworld[samples]'")
    return Path(next(iter(spec.submodule_search_locations)))
