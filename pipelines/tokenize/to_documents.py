"""Records to documents: each through its source's field spec, with what it is from.

In: records of any kind, in order. Out: their documents, in order. A record that its field spec cannot use goes to the
tally's quarantine and costs itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipelines.tokenize.records import Record, Tally, TokenizeJob
from tokenization.document import Document
from tokenization.errors import BadData
from tokenization.fields import FieldSpec, build_tokens, spec_for_record
from tokenization.text import TextTokenizer
from tokenization.vocabulary import JointVocabulary


def to_documents(
    records: Iterator[Record], job: TokenizeJob, tokenizer: TextTokenizer, tally: Tally
) -> Iterator[Document]:
    """Each record as a document; provenance names its object, its number in there, its field spec and its frames."""
    for record in records:
        found = record.found
        draw = int.from_bytes(hashlib.sha256(f"{job.recipe.seed}/{record.key}".encode()).digest()[:8], "big")
        spec: FieldSpec = spec_for_record(job.recipe.sources[found.source].fields, draw)
        try:
            tokens, spans = build_tokens(record.fields, spec, tokenizer, job.vocabulary)
        except BadData as error:
            tally.bad(found, str(error), record.number, record.unit)
            continue
        where = {"url": found.url, "etag": found.etag, "record": record.number, "fields": str(spec)}
        where |= _streams(tokens, job.vocabulary)
        yield Document(record.key, found.source, tokens, spans, {**where, **record.provenance})


def _streams(tokens: np.ndarray, vocabulary: JointVocabulary) -> dict[str, Any]:
    """Where a document's frames lie in its tokens, so that those of a piece of it can be told by number."""
    edges = np.flatnonzero(np.diff(vocabulary.is_vision(tokens), prepend=False, append=False))
    ends = np.isin(tokens, (vocabulary.eof_id, vocabulary.eov_id))
    streams = [
        {"start": int(start), "end": int(end), "frames": int(ends[start:end].sum())}
        for start, end in zip(edges[::2], edges[1::2])
    ]
    return {"vision": streams} if streams else {}
