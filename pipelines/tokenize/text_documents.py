"""From an object of text to its documents in columns: no Python object a record from the reader to the Parquet file.

In: a listed object of records whose field specs name texts alone. Out: batches of documents, in order. What cannot be
used goes to the tally's quarantine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.decoder.client import parsed_texts
from pipelines.sources.listing import SourceObject, content_of
from pipelines.tokenize.records import Record, Tally, TokenizeJob, draw_spec, fitting_spec, record_key
from storage.errors import BadData
from tokenization.field_columns import build_examples, fits
from tokenization.field_spec import FieldSpec
from tokenization.fields import spec_for_record
from tokenization.readers.record import BadRecord
from tokenization.readers.record import Record as ParsedRecord
from tokenization.readers.rows import TextColumns
from tokenization.shards.document_parquet import SCHEMA, document_batch, provenance_column
from tokenization.text.tokenizer import TextTokenizer


def stays_in_columns(found: SourceObject, job: TokenizeJob) -> bool:
    """Whether `text_documents` makes documents of an object."""
    specs = [spec_for_record(spec, 0) for spec in job.recipe.sources[found.source].fields]
    return found.kind == "text" and all(spec.names and not spec.has_vision for spec in specs)


def text_documents(
    found: SourceObject, job: TokenizeJob, tokenizer: TextTokenizer, tally: Tally
) -> Iterator[pa.RecordBatch]:
    """Documents of a text object; a bad record is left out. Raises what opening and reading the object raises."""
    try:
        content = content_of(found, job.recipe.storage.options)
        for texts in parsed_texts(content, found.url, job.columns(found), job.recipe.tokenize.decoder_limits):
            tally.units += len(texts)
            yield from _documents(texts, found, job, tokenizer, tally)
    except BadData as error:
        tally.units += 1
        tally.bad(found, str(error))


def _documents(
    texts: TextColumns, found: SourceObject, job: TokenizeJob, tokenizer: TextTokenizer, tally: Tally
) -> Iterator[pa.RecordBatch]:
    """Documents of some records. Where a text cannot be encoded, they are halved until it is alone."""
    specs = job.recipe.sources[found.source].fields
    fitting = np.array([fits(texts.texts, spec_for_record(spec, 0)) for spec in specs])
    try:
        documents = _built(texts, fitting, found, job, tokenizer)
    except BadData as error:
        if len(texts) == 1:
            tally.bad(found, str(error), int(texts.index[0]))
            return
        middle = len(texts) // 2
        for start, end in ((0, middle), (middle, len(texts))):
            yield from _documents(texts.part(start, end), found, job, tokenizer, tally)
        return
    for row in np.flatnonzero(~fitting.any(axis=0)).tolist():
        tally.bad(found, _reason(texts.record(row), found, job), int(texts.index[row]))
    for batch in documents:
        tally.documents += len(batch)
        tally.tokens += len(batch["tokens"].flatten())
        yield batch


def _built(
    texts: TextColumns, fitting: np.ndarray, found: SourceObject, job: TokenizeJob, tokenizer: TextTokenizer
) -> list[pa.RecordBatch]:
    """The documents of the rows that some spec fits. fitting: bool [specs, n]."""
    batches, places = [], []
    for spec, rows in _drawn(texts, fitting, found, job).items():
        taken = pa.array(rows)
        columns = texts.texts
        if len(rows) < len(texts):
            columns = {name: columns[name].take(taken) for name in spec.names}
        made = build_examples(columns, spec, tokenizer, job.vocabulary)
        numbers = pa.array(texts.index).take(taken)
        keys = pc.binary_join_element_wise(record_key(found.key, ""), numbers.cast(pa.utf8()), "")
        same = {"url": found.url, "etag": found.etag, "fields": spec.text}
        provenance = provenance_column(same, "record", numbers)
        tokens = made.tokens, made.ends, made.spans, made.span_ends
        batches.append(document_batch(keys, found.source, *tokens, provenance))
        places.append(rows)
    if len(batches) < 2:
        return batches
    in_order = pa.Table.from_batches(batches, SCHEMA).take(pa.array(np.argsort(np.concatenate(places))))
    return list(in_order.combine_chunks().to_batches())


def _drawn(
    texts: TextColumns, fitting: np.ndarray, found: SourceObject, job: TokenizeJob
) -> dict[FieldSpec, np.ndarray]:
    """By spec the rows for which it is drawn, of those that fit them."""
    specs = job.recipe.sources[found.source].fields
    if len(specs) == 1:
        return {spec_for_record(specs[0], 0): np.flatnonzero(fitting[0])}
    drawn: dict[FieldSpec, list[int]] = {}
    for row in np.flatnonzero(fitting.any(axis=0)).tolist():
        fitting_one = [spec for spec, fits_row in zip(specs, fitting[:, row]) if fits_row]
        spec = draw_spec(fitting_one, record_key(found.key, texts.index[row]), job)
        drawn.setdefault(spec, []).append(row)
    return {spec: np.array(rows) for spec, rows in drawn.items()}


def _reason(record: ParsedRecord | BadRecord, found: SourceObject, job: TokenizeJob) -> str:
    """Why a record fits no spec."""
    if isinstance(record, BadRecord):
        return record.reason
    index, fields = record
    try:
        fitting_spec(Record(found, found.key, index, index, fields), job)
    except BadData as error:
        return str(error)
    raise AssertionError(f"record {index} of {found.url} fits a field spec by its fields and none by its columns")
