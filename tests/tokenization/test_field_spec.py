"""Whether a record has what a field spec asks for, told before anything is encoded."""

from __future__ import annotations

from typing import Any

import pytest

from storage.errors import BadData
from tokenization.field_spec import FieldSpec

CODES = [[1, 2]]


@pytest.mark.parametrize(
    ("spec", "record", "problem"),
    [
        ("text", {"text": "a"}, None),
        ("text", {"text": "", "id": 1}, "the text is empty"),
        ("text", {"text": " \n\t\u00a0"}, "the text is empty"),
        ("text", {"id": 1}, 'the record lacks the field "text"'),
        ("text", {"text": None}, 'the record holds NoneType, not text, in the field "text"'),
        ("[question],answer", {"question": "why?", "answer": ""}, "the text is empty"),
        ("[question],answer,<|eos|>", {"question": "why?", "answer": ""}, "the text is empty"),
        ("[question],answer", {"question": "", "answer": "so"}, None),
        ("question+answer", {"question": "", "answer": "so"}, None),
        ("question+answer", {"question": " ", "answer": ""}, "the text is empty"),
        ("[text]", {"text": ""}, None),  # no field has loss
        ("[vision],caption", {"vision": CODES, "caption": ""}, "the text is empty"),
        ("vision,caption", {"vision": CODES, "caption": ""}, None),
        ("vision,caption", {"vision": CODES}, 'the record lacks the field "caption"'),
        ("vision", {"vision": None}, 'the record lacks the field "vision"'),
        ("<|bos|>", {}, None),
    ],
)
def test_a_record_fits_where_all_its_fields_are_there_and_one_with_loss_has_something_to_learn(
    spec: str, record: dict[str, Any], problem: str | None
) -> None:
    if problem is None:
        FieldSpec.parse(spec).check(record)
    else:
        with pytest.raises(BadData) as caught:
            FieldSpec.parse(spec).check(record)
        assert str(caught.value) == problem
