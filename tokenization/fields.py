"""A record and a field spec to the tokens of one training example, in LWM's layout (arXiv 2402.08268).

`tokenization.field_spec` says how a spec is written. `<vision>` and `</vision>` are ordinary text. Between them, each
frame's codes are followed by `<eof>`, the last frame's by `<eov>`. The example begins with BOS, without loss, and ends
with EOS, with loss.

Two things differ from the released code. There, a tokenizer that adds BOS by itself puts one before every text and both
vision markers; here it adds none. And the first token is never marked for loss, since no token precedes it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from storage.errors import BadData, UserError
from tokenization.field_spec import BOS, EOS, FieldSpec, lacks, text_of
from tokenization.media.frame_sampling import uniform_sample
from tokenization.text.tokenizer import TextTokenizer
from tokenization.vocabulary import JointVocabulary

Spans = tuple[tuple[int, int], ...]

_parsed = lru_cache(maxsize=1024)(FieldSpec.parse)


def spec_for_record(specs: str | Sequence[str], index: int) -> FieldSpec:
    """The spec of a record by its index in its source; of several, drawn as in LWM.

    Raises UserError if there is no spec or the drawn one is malformed.
    """
    if isinstance(specs, str):
        return _parsed(specs)
    if not specs:
        raise UserError("the list of field specs is empty; name at least one, such as [caption],vision")
    return _parsed(random.Random(index).choice(specs))


def field_names(specs: str | Sequence[str]) -> tuple[str, ...]:
    """The fields of a record that the specs use, each once. Raises UserError on a malformed spec."""
    parsed = map(_parsed, [specs] if isinstance(specs, str) else specs)
    return tuple(dict.fromkeys(name for spec in parsed for name in spec.names))


def build_tokens(
    record: Mapping[str, Any],
    spec: FieldSpec,
    tokenizer: TextTokenizer,
    vocabulary: JointVocabulary,
    *,
    max_n_frames: int | None = None,
    codes_per_frame: int | None = None,
    prepend_text: str = "",
    subfield_separator: str = " ",
    add_bos: bool = True,
    add_eos: bool = True,
) -> tuple[np.ndarray, Spans]:
    """Tokens int32 [L] in the joint vocabulary, and the half-open spans of them that are predicted with loss.

    record: text fields are str; vision fields are integers [n_frames, codes_per_frame], or flat [n] if
    `codes_per_frame` is given, where an incomplete last frame is dropped. max_n_frames: of more frames, this many are
    sampled uniformly. prepend_text: put before the first entry if that is text. Raises BadData on a missing field or
    one of another type, UserError on a tokenizer with more ids than the vocabulary has for text.
    """
    check_sizes(tokenizer, vocabulary)
    parts: list[tuple[np.ndarray, bool]] = []
    bos, eos = np.array([[vocabulary.bos_id], [vocabulary.eos_id]], dtype=np.int32)
    if add_bos:
        parts.append((bos, False))
    for position, field in enumerate(spec.fields):
        if field.names in ((BOS,), (EOS,)):
            tokens = bos if field.names == (BOS,) else eos
        elif field.is_vision:
            tokens = _vision_tokens(record, field.names[0], codes_per_frame, max_n_frames, tokenizer, vocabulary)
        else:
            text = subfield_separator.join(text_of(record, name) for name in field.names)
            tokens = tokenizer.encode(text if position else prepend_text + text)
        parts.append((tokens, field.loss))
    if add_eos:
        parts.append((eos, True))
    tokens = np.concatenate([tokens for tokens, _ in parts])
    return tokens, _loss_spans([(len(tokens), loss) for tokens, loss in parts])


def check_sizes(tokenizer: TextTokenizer, vocabulary: JointVocabulary) -> None:
    """Raise UserError on a tokenizer with more ids than the vocabulary has for text."""
    if tokenizer.size > vocabulary.text_size:
        raise UserError(
            f"{tokenizer.path or 'the default tokenizer'} has {tokenizer.size} ids, more than the vocabulary's "
            f"{vocabulary.text_size} for text; make its text size at least that"
        )


def _vision_tokens(
    record: Mapping[str, Any],
    name: str,
    per_frame: int | None,
    max_n_frames: int | None,
    tokenizer: TextTokenizer,
    vocabulary: JointVocabulary,
) -> np.ndarray:
    if record.get(name) is None:
        raise lacks(name)
    try:
        codes = np.asarray(record[name])
    except ValueError:
        raise BadData(f'the frames in the field "{name}" differ in length') from None
    if codes.size and codes.dtype.kind not in "iu":
        raise BadData(f'the field "{name}" holds no VQGAN codes')
    if codes.ndim == 1 and per_frame:
        codes = codes[: len(codes) // per_frame * per_frame].reshape(-1, per_frame)
    if codes.ndim != 2 or codes.size == 0 or (per_frame and codes.shape[1] != per_frame):
        expected = f"no whole frame of {per_frame or 'n'} codes"
        raise BadData(f'the field "{name}" of shape {list(codes.shape)} holds {expected}')
    if max_n_frames:
        codes = codes[uniform_sample(len(codes), max_n_frames)]
    try:
        ids = vocabulary["vision"].codes_to_ids(codes)
    except ValueError as error:
        raise BadData(f'field "{name}": {error}') from None
    ends = np.full((len(codes), 1), vocabulary.eof_id, dtype=np.int32)
    ends[-1] = vocabulary.eov_id
    stream = np.concatenate([ids, ends], axis=1).ravel()
    return np.concatenate([tokenizer.encode("<vision>"), stream, tokenizer.encode("</vision>")])


def _loss_spans(parts: Sequence[tuple[int, bool]]) -> Spans:
    """Spans with loss of concatenated (length, loss) parts; adjacent ones are merged, token 0 is left out."""
    spans: list[tuple[int, int]] = []
    end = 0
    for length, loss in parts:
        start, end = max(end, 1), end + length
        if loss and start < end:
            joined = spans and spans[-1][1] == start
            spans.append((spans.pop()[0] if joined else start, end))
    return tuple(spans)
