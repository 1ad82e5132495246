"""Which files a text tokenizer is, at any URL, and a local folder with all of them.

In: the URL of a model file or of a folder that holds one. Out: a sentencepiece `tokenizer.model` alone, or a
`tokenizer.json` with the first of `SPECIAL_TOKENS` that lies beside it, which names its BOS and EOS. A change of either
is a change of the tokenizer.
"""

from __future__ import annotations

import hashlib
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from storage.cache import cache_folder
from storage.errors import UserError
from storage.local_files import link_file
from storage.public_url import path_of, public_url
from storage.urls import ObjectInfo, fetch_file, first_contact, object_info

MODELS = ("tokenizer.model", "tokenizer.json")
"""The names of a model file in a folder; of both the sentencepiece model is preferred, as it is the original."""
SPECIAL_TOKENS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files that name the BOS and EOS of a `tokenizer.json` beside them; the first that is there decides."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of a tokenizer, as they were listed. special: the one of `SPECIAL_TOKENS` that decides, if any does."""

    model: ObjectInfo
    special: ObjectInfo | None = None


def find_tokenizer(url: str, options: dict[str, Any] | None = None) -> TokenizerFiles:
    """The files of the tokenizer at a URL. Raises UserError where there is none, or the place cannot be reached."""
    with first_contact(url):
        return _find(url, options)


def fetch_tokenizer(url: str, options: dict[str, Any] | None = None) -> Path:
    """A local path to the model file, with the file that belongs to it beside it: the file itself where it is local.

    Raises UserError where there is none, OSError where a request fails.
    """
    files = _find(url, options)
    listed = [files.model, *([files.special] if files.special else [])]
    local = [fetch_file(info.url, options) for info in listed]
    names = [posixpath.basename(path_of(info.url)) for info in listed]
    if len({path.parent for path in local}) == 1 and [path.name for path in local] == names:
        return local[0]
    versions = "\n".join(f"{info.url} {info.etag}" for info in listed)
    folder = cache_folder() / hashlib.sha256(versions.encode()).hexdigest()
    for path, name in zip(local, names):
        link_file(folder / name, path)
    return folder / names[0]


def _find(url: str, options: dict[str, Any] | None) -> TokenizerFiles:
    inside = [f"{url.rstrip('/')}/{name}" for name in MODELS]
    # A web server answers for a folder too, with a page; so a name without an extension is tried as a folder first.
    is_folder = url.endswith("/") or "." not in posixpath.basename(path_of(url))
    failure: OSError | None = None
    for candidate in [*inside, url] if is_folder else [url, *inside]:
        try:
            model = _info(candidate, options)
        except OSError as error:  # a store may refuse to say that a name is absent
            failure = failure or error
            continue
        if model is not None:
            is_json = path_of(candidate).endswith(".json")
            return TokenizerFiles(model, _special_tokens(candidate, options) if is_json else None)
    if failure:
        raise failure
    raise UserError(
        f"{public_url(url)}: no such file or object; check the URL (text_tokenizer.path): it is that of a "
        f"tokenizer.model, of a tokenizer.json, or of a folder with one"
    )


def _special_tokens(model: str, options: dict[str, Any] | None) -> ObjectInfo | None:
    beside = (_info(_beside(model, name), options) for name in SPECIAL_TOKENS)
    return next((info for info in beside if info is not None), None)


def _info(url: str, options: dict[str, Any] | None) -> ObjectInfo | None:
    """The object, or None where there is none. Raises OSError where that cannot be known."""
    try:
        return object_info(url, options)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _beside(url: str, name: str) -> str:
    """The URL of a name in the folder of a file; a web address keeps its query."""
    beside = posixpath.join(posixpath.dirname(path_of(url)), name)
    return urlsplit(url)._replace(path=beside).geturl() if url.startswith(("http://", "https://")) else beside
