"""Records to documents: each through its source's field spec, with what it is from.

In: records of any kind, in order. Out: their documents, in order. A record that its field spec cannot use goes to the
tally's quarantine and costs itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from pipelines.tokenize.records import Record, Tally, TokenizeJob
from storage.errors import BadData
from tokenization.document import Document
from tokenization.fields import FieldSpec, build_each, spec_for_record
from tokenization.text.tokenizer import TextTokenizer
from tokenization.vocabulary import JointVocabulary


def to_documents(
    records: Iterable[Record], job: TokenizeJob, tokenizer: TextTokenizer, tally: Tally
) -> Iterator[Document]:
    """Each record as a document; provenance names its object, its number in there, its field spec and its frames."""
    chosen = (((record, spec := _spec(record, job)), record.fields, spec) for record in records)
    for (record, spec), built in build_each(chosen, tokenizer, job.vocabulary):
        found = record.found
        if isinstance(built, BadData):
            tally.bad(found, str(built), record.number, record.unit)
            continue
        tokens, spans = built
        provenance = {"url": found.url, "etag": found.etag, "record": record.number, "fields": spec.text}
        if spec.has_vision:
            provenance |= _streams(tokens, job.vocabulary)
        provenance |= record.provenance
        yield Document(record.key, found.source, tokens, spans, provenance)


def _spec(record: Record, job: TokenizeJob) -> FieldSpec:
    specs = job.recipe.sources[record.found.source].fields
    if len(specs) == 1:
        return spec_for_record(specs[0], 0)
    draw = hashlib.sha256(f"{job.recipe.seed}/{record.key}".encode()).digest()[:8]
    return spec_for_record(specs, int.from_bytes(draw, "big"))


def _streams(tokens: np.ndarray, vocabulary: JointVocabulary) -> dict[str, Any]:
    """Where a document's frames lie in its tokens, so that those of a piece of it can be told by number."""
    edges = np.flatnonzero(np.diff(vocabulary["vision"].contains(tokens), prepend=False, append=False))
    ends = np.isin(tokens, (vocabulary.eof_id, vocabulary.eov_id))
    streams = [
        {"start": int(start), "end": int(end), "frames": int(ends[start:end].sum())}
        for start, end in zip(edges[::2], edges[1::2])
    ]
    return {"vision": streams} if streams else {}
