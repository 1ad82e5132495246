"""Long text that a model has not seen, in which needles and the like are hidden.

In: the files of `evaluate.text`, or the texts that a run holds out. Out: their text, or ids of it. Only as much is read
as is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipelines.dag.manifest import digest
from pipelines.decoder.client import parsed_records
from pipelines.decoder.content import Content
from pipelines.evaluate.job import EvaluateJob
from pipelines.recipe.data import Storage
from pipelines.recipe.evaluate import Evaluate
from pipelines.sources.found import Found, find_objects
from pipelines.sources.listing import content_of
from storage.errors import BadData, UserError
from storage.urls import NothingFoundError
from tokenization.field_spec import FieldSpec
from tokenization.readers.record import BadRecord
from tokenization.readers.records import EXTENSIONS, extension_of

KEY = "evaluate.text"


def lacks_text(job: EvaluateJob) -> str | None:
    """Why there is no text, with the remedy; None where there is some. Raises UserError where a URL names nothing."""
    if job.settings.text is not None:
        _found(job.settings, job.storage)
        return None
    if job.run is None:
        return f"there is no text to hide anything in; set {KEY} to text files"
    if not job.run.objects(("text",), heldout=True):
        return f"the recipe's sources hold out no text to hide anything in; set {KEY} to text files"
    return None


def haystack(job: EvaluateJob, tokens: int) -> np.ndarray:
    """Ids int32 of text, one record after the other, as many as there are up to `tokens`.

    Raises UserError where there is none at all.
    """
    tokenizer = job.subject.tokenizer()
    pieces: list[np.ndarray] = []
    for text in texts(job):
        pieces.append(tokenizer.encode(text))
        if sum(map(len, pieces)) >= tokens:
            break
    if not any(map(len, pieces)):
        raise UserError(f"{KEY}: no text can be read in its files, nor in those that are held out; name others")
    return np.concatenate(pieces)[:tokens]


def texts(job: EvaluateJob) -> Iterator[str]:
    """The texts of all records, in the order of their files; what cannot be read is passed over."""
    for content, url, names in _files(job):
        try:
            for record in parsed_records(content, url, names, job.limits):
                if not isinstance(record, BadRecord):
                    values = [record[1].get(name) for name in names]
                    yield "\n\n".join(value for value in values if isinstance(value, str) and value)
        except BadData:  # of a run, the tokenize stage has it in quarantine
            continue


def _files(job: EvaluateJob) -> Iterator[tuple[Content, str, tuple[str, ...]]]:
    """Content, URL, and the fields of its records that are text, of each file."""
    if job.settings.text is not None:
        found = _found(job.settings, job.storage)
        for url, opens, etag in zip(found.urls, found.opens, found.etags, strict=True):
            yield Content(opens, job.storage.options, etag=etag), url, ("text",)
    elif job.run is not None:
        for listed in job.run.objects(("text",), heldout=True):
            spec = FieldSpec.parse(job.run.recipe.sources[listed.source].fields[0])
            yield content_of(listed, job.storage.options), listed.url, spec.names


def text_digest(settings: Evaluate, storage: Storage) -> str | None:
    """What identifies the files of `evaluate.text` in their present versions; None where none are named."""
    if settings.text is None:
        return None
    found = _found(settings, storage)
    return digest([found.urls, found.sizes, found.etags])


def _found(settings: Evaluate, storage: Storage) -> Found:
    try:
        return find_objects(KEY, settings.text or (), storage, lambda url: extension_of(url) in EXTENSIONS)
    except NothingFoundError as error:
        raise UserError(f"{KEY}: {str(error).partition(';')[0]}; name text files that are there") from None
