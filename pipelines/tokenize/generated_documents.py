"""From an object of a source that generates documents to the documents that its range of numbers stands for.

In: a listed object, whose side data say which numbers and, where needles are hidden, in the text of which objects. Out:
documents, in order, each with the settings it is of. Texts that cannot be read are left out; without any the object
goes to quarantine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipelines.decoder.client import parsed_texts
from pipelines.decoder.content import Content
from pipelines.sources.identity import opening_urls
from pipelines.sources.listing import SourceObject
from pipelines.tokenize.records import Tally, TokenizeJob, record_key
from storage.errors import BadData
from tokenization.document import Document
from tokenization.field_columns import fits
from tokenization.fields import spec_for_record
from tokenization.generated.documents import generate
from tokenization.generated.settings import Needles
from tokenization.text.tokenizer import TextTokenizer

TEXT_TOKENS = 1 << 17
"""Tokens of each object of text that are taken, from its start."""


def generated_documents(
    found: SourceObject, job: TokenizeJob, tokenizer: TextTokenizer, tally: Tally
) -> Iterator[Document]:
    """The documents of an object. Raises what opening and reading its texts raises."""
    settings = job.recipe.sources[found.source].generate
    assert settings is not None, found.source
    text, read = None, {}
    if isinstance(settings, Needles):
        text, texts = _text(found, settings, job, tokenizer)
        if not len(text):
            tally.units += 1
            tally.bad(found, f"no text of source {settings.text} can be read to hide needles in")
            return
        read = {"texts": texts}
    for number in range(*found.side["documents"]):
        tokens, spans = generate(settings, number, tokenizer, text)
        tally.units += 1
        tally.documents += 1
        tally.tokens += len(tokens)
        provenance = {"url": found.url, "etag": found.etag, "record": number, "generate": settings.kind, **read}
        yield Document(record_key(found.source, number), found.source, tokens, spans, provenance)


def _text(
    found: SourceObject, settings: Needles, job: TokenizeJob, tokenizer: TextTokenizer
) -> tuple[np.ndarray, list[str]]:
    """Ids int32 [n] of the texts that an object draws, one after the other, and the URLs of those that were read."""
    storage, source = job.recipe.storage, job.recipe.sources[settings.text]
    opening = opening_urls(storage, source)
    spec = spec_for_record(source.fields[0], 0)
    pieces, read = [np.zeros(0, np.int32)], []
    for one in found.side["texts"]:
        url = opening(one["url"]) if opening else one["url"]
        content = Content(url, storage.options, etag=one["etag"])
        count = 0
        try:
            for texts in parsed_texts(content, one["url"], spec.names, job.recipe.tokenize.decoder_limits):
                rows = np.flatnonzero(fits(texts.texts, spec)).tolist()
                for row in rows:
                    ids = tokenizer.encode("\n\n".join(texts.texts[name][row].as_py() for name in spec.names))
                    pieces.append(ids[: TEXT_TOKENS - count])
                    count += len(pieces[-1])
                if count >= TEXT_TOKENS:
                    break
        except BadData:  # it is in quarantine itself
            pass
        read += [one["url"]] if count else []
    return np.concatenate(pieces), read
