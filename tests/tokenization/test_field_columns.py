"""Examples built in columns are those built one by one, and the rows that a spec fits are those that it accepts."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import BadData, UserError
from tokenization.field_columns import build_examples, fits
from tokenization.field_spec import FieldSpec
from tokenization.fields import build_tokens
from tokenization.text.tokenizer import MAX_PART_CHARS, TextTokenizer, load_text_tokenizer
from tokenization.vocabulary import JointVocabulary

DATA = Path(__file__).parents[1] / "data" / "fields"
VOCABULARY = JointVocabulary.for_codebook(512, 8192)
SPECS = [
    "text",
    "[text]",
    "text+other",
    "[text],other",
    "text,[other],text",
    "[text+other],[other]",
    "<|bos|>,text,<|eos|>,[other]",
    "[<|eos|>],[text],<|bos|>",
]
VALUES = st.one_of(
    st.none(), st.sampled_from(["the river", "", "<s>", " a  b ", " \n\t", "\u2003", "\u2581", "\x1f", "caf\u00e9"])
)
ROWS = st.lists(st.tuples(VALUES, VALUES), max_size=8)


@lru_cache
def tokenizer() -> TextTokenizer:
    return load_text_tokenizer(str(DATA / "tokenizer_nobos"))


def columns(rows: list[tuple[str | None, str | None]]) -> dict[str, pa.StringArray]:
    return {name: pa.array([row[place] for row in rows], pa.utf8()) for place, name in enumerate(("text", "other"))}


def is_accepted(row: tuple[str | None, str | None], spec: FieldSpec) -> bool:
    record = {name: value for name, value in zip(("text", "other"), row) if value is not None}
    try:
        spec.check(record)
    except BadData:
        return False
    return True


@given(ROWS, st.sampled_from(SPECS))
def test_rows_that_fit_are_those_that_the_spec_accepts_and_their_examples_those_built_alone(
    rows: list[tuple[str | None, str | None]], written: str
) -> None:
    spec = FieldSpec.parse(written)
    found = fits(columns(rows), spec)
    assert (found.dtype, found.tolist()) == (bool, [is_accepted(row, spec) for row in rows])
    rows = [row for row, is_fitting in zip(rows, found) if is_fitting]
    rows = [row for row in rows if None not in row]
    made = build_examples(columns(rows), spec, tokenizer(), VOCABULARY)
    assert (made.tokens.dtype, len(made.ends), len(made.span_ends)) == (np.int32, len(rows), len(rows))
    bounds = zip([0, *made.ends], made.ends, [0, *made.span_ends], made.span_ends)
    for row, (start, end, first, last) in zip(rows, bounds):
        tokens, spans = build_tokens(dict(zip(("text", "other"), row)), spec, tokenizer(), VOCABULARY)
        assert made.tokens[start:end].tolist() == tokens.tolist()
        assert tuple(map(tuple, made.spans[first:last].tolist())) == spans


def test_blank_is_in_columns_what_it_is_in_python_for_every_character() -> None:
    characters = [chr(point) for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000]
    found = fits({"text": pa.array(characters, pa.utf8())}, FieldSpec.parse("text"))
    assert [one for one, is_text in zip(characters, found) if not is_text] == [c for c in characters if c.isspace()]


def test_what_cannot_be_encoded_is_bad_data_and_a_small_vocabulary_a_users_mistake() -> None:
    ours, text = load_text_tokenizer(), FieldSpec.parse("text")
    with pytest.raises(BadData, match="without a word boundary"):
        build_examples(columns([("fine", ""), ("a" * (MAX_PART_CHARS + 1), "")]), text, ours, VOCABULARY_OF_DEFAULT)
    with pytest.raises(UserError, match="make its text size at least that"):
        build_examples(columns([("fine", "")]), text, ours, VOCABULARY)


VOCABULARY_OF_DEFAULT = JointVocabulary.for_codebook(32_000, 64)
