"""Single files that the settings of an evaluation name: questions, documents, in the version that is there.

In: their URLs, relative ones below `storage.data`. Out: each as a value that identifies its version, and its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipelines.dag.manifest import digest
from pipelines.decoder.content import Content
from pipelines.recipe.data import Storage
from pipelines.recipe.evaluate import Evaluate
from pipelines.sources.found import find_objects
from storage.errors import UserError
from tokenization.readers.record import MAX_RECORD_BYTES, lines_of


@dataclass(frozen=True)
class NamedFile:
    """url: without credentials. opens: the URL that opens it. etag: of its version."""

    url: str
    opens: str = field(repr=False)
    etag: str
    options: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def read(self) -> bytes:
        """All of it. Raises OSError, and UserError where it has changed."""
        with self._content.opened() as file:
            return file.read()

    def lines(self) -> Iterator[bytes | None]:
        """Its lines without their line feeds, None for one longer than a record may be."""
        with self._content.opened() as file:
            yield from lines_of(file.read, MAX_RECORD_BYTES)

    @property
    def _content(self) -> Content:
        return Content(self.opens, self.options, etag=self.etag)


def named_file(key: str, url: str, storage: Storage) -> NamedFile:
    """The one file that a setting names. Raises UserError where there is none, or several."""
    found = find_objects(key, [url], storage)
    if len(found) != 1:
        raise UserError(f"{key}: {url} finds {len(found)} files; name one")
    return NamedFile(found.urls[0], found.opens[0], found.etags[0], storage.options)


def named_urls(settings: Evaluate) -> dict[str, str]:
    """The files that settings name one by one, by their keys."""
    named = {f"evaluate.choice.{name}.file": one.file for name, one in (settings.choice or {}).items()}
    named |= {f"evaluate.qa.{name}.file": one.file for name, one in (settings.qa or {}).items()}
    if settings.ruler is not None:
        optional = {"squad": settings.ruler.squad, "hotpotqa": settings.ruler.hotpotqa}
        named |= {f"evaluate.ruler.{key}": url for key, url in optional.items() if url is not None}
    if settings.video_needle is not None and settings.video_needle.questions is not None:
        named["evaluate.video_needle.questions"] = settings.video_needle.questions
    return named


def files_digest(settings: Evaluate, storage: Storage, key: str = "") -> str | None:
    """What identifies those files in their present versions; None where there are none. key: of one task; "" of all."""
    named = {one: url for one, url in sorted(named_urls(settings).items()) if one.startswith(f"evaluate.{key}")}
    files = [(one, named_file(one, url, storage)) for one, url in named.items()]
    return digest([[one, file.url, file.etag] for one, file in files]) if files else None
