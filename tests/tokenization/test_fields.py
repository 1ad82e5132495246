"""Field specs, against what LWM's released processors made of the same records (arXiv 2402.08268).

In tests/data/fields, `data_processors.json` holds records with the released processors' output;
`data_vision_expected.json` their output for the lines of `data_vision.jsonl`; `train_vision_batches.npz` the batches
that the released loader made of `train_vision.jsonl`. Vision ids are compared as the released code has them: codes,
`<eof>` and `<eov>` counted from 0.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import BadData, UserError
from tokenization.field_spec import FieldSpec
from tokenization.fields import build_tokens, spec_for_record
from tokenization.readers.records import BadRecord, read_records
from tokenization.text.tokenizer import TextTokenizer, load_text_tokenizer
from tokenization.vocabulary import JointVocabulary

DATA = Path(__file__).parents[1] / "data" / "fields"
RECORDED = json.loads((DATA / "data_processors.json").read_text())
LWM_OPTIONS = {
    "prepend_text": "prepend_text",
    "subfield_separator": "subfield_separator",
    "n_tokens_per_frame": "codes_per_frame",
    "max_n_frames": "max_n_frames",
    "add_bos_token": "add_bos",
    "add_eos_token": "add_eos",
}
VOCABULARY = JointVocabulary.for_codebook(512, 8192)


@lru_cache
def tokenizer(name: str = "nobos") -> TextTokenizer:
    return load_text_tokenizer(str(DATA / f"tokenizer_{name}"))


def masks(
    tokens: np.ndarray, spans: tuple[tuple[int, int], ...], vocabulary: JointVocabulary = VOCABULARY
) -> dict[str, list]:
    """Tokens, loss mask and vision mask as LWM writes them."""
    loss = np.zeros(len(tokens))
    for start, end in spans:
        loss[start:end] = 1
    vision = vocabulary["vision"].contains(tokens)
    apart = np.where(vision, tokens - vocabulary.text_size, tokens)
    return {"token_buffer": apart.tolist(), "loss_mask": loss.tolist(), "vision_mask": vision.tolist()}


def build(case: dict[str, Any]) -> dict[str, list]:
    options = {
        LWM_OPTIONS[key]: value for key, value in {**case["config"], **case["call"]}.items() if key in LWM_OPTIONS
    }
    specs = case["config"].get("fields") or case["example"]["fields"]
    spec = spec_for_record(specs, case["aux"][-1] if "aux" in case else 0)
    return masks(*build_tokens(case["example"], spec, tokenizer(case["tokenizer"]), VOCABULARY, **options))


def recorded(fails: bool) -> Iterator[Any]:
    for kind in ("text", "vision"):
        for number, case in enumerate(RECORDED[kind]):
            if ("error" in case) == fails:
                yield pytest.param(case, id=f"{kind}{number}")


def first_token_has_no_loss(expected: dict[str, list]) -> None:
    """Deliberate difference: without BOS the released mask may mark token 0, which nothing in its example predicts."""
    expected["loss_mask"][0] = 0.0


def without_inserted_bos(expected: dict[str, list], added: bool) -> None:
    """Released bug: a tokenizer that adds BOS puts one before every text field and inside both vision markers."""
    vision = expected.get("vision_mask", [False] * len(expected["token_buffer"]))
    bos = [n for n, token in enumerate(expected["token_buffer"]) if token == 1 and not vision[n]]
    for n in reversed(bos[added:]):
        for values in expected.values():
            del values[n]


@pytest.mark.parametrize("case", recorded(fails=False))
def test_released_processors_output_is_reproduced(case: dict[str, Any]) -> None:
    got = build(case)
    expected = {key: list(case[key]) for key in ("token_buffer", "loss_mask", "vision_mask") if key in case}
    if "vision_mask" in case and case["tokenizer"] == "bos":
        before = len(expected["token_buffer"])
        without_inserted_bos(expected, added=True)
        text_fields = {"[text],vision": 1, "[question],vision,caption": 2, "text": 1}[case["example"]["fields"]]
        markers = 2 * ("vision" in case["example"]["fields"])
        assert before - len(expected["token_buffer"]) == text_fields + markers
    if not case["config"].get("add_bos_token", True) or not case["call"].get("add_bos_token", True):
        first_token_has_no_loss(expected)
    assert {key: got[key] for key in expected} == expected
    if "vision_mask" not in case:
        assert not any(got["vision_mask"])


def test_records_span_what_the_specs_can_say() -> None:
    cases = [param.values[0] for param in recorded(fails=False)]
    assert len(cases) == 25
    assert {case["tokenizer"] for case in cases} == {"nobos", "bos", "vis_single"}
    assert sum(case["loss_mask"][0] for case in cases) == 1  # the deliberate difference shows in one record


@pytest.mark.parametrize(
    ("number", "kind", "error"),
    [
        (8, "text", 'lacks the field "missing"'),  # KeyError in the released code
        (2, "vision", "only text can be joined"),  # KeyError: 'vision+question'
        (9, "vision", "only text can be joined"),
        (19, "vision", "no whole frame of 16 codes"),  # AssertionError: 15
    ],
)
def test_what_the_released_code_dies_on_is_told_in_a_sentence(number: int, kind: str, error: str) -> None:
    with pytest.raises((BadData, UserError), match=error):
        build(RECORDED[kind][number])


def test_every_failing_record_is_covered() -> None:
    assert len(list(recorded(fails=True))) == 4


def test_lines_of_a_vision_file_are_reproduced_with_their_drawn_specs() -> None:
    expected = json.loads((DATA / "data_vision_expected.json").read_text())
    with (DATA / "data_vision.jsonl").open("rb") as file:
        records = list(read_records(file, "data_vision.jsonl"))
    assert [record.index for record in records if isinstance(record, BadRecord)] == [
        8
    ]  # the released code prints and skips it
    good = [record for record in records if not isinstance(record, BadRecord)]
    assert [index for index, _ in good] == [line["index"] for line in expected]
    drawn = set()
    for (index, record), line in zip(good, expected):
        spec = spec_for_record(record["fields"], index)
        drawn.add(str(spec))
        tokens, spans = build_tokens(record, spec, tokenizer(), VOCABULARY, codes_per_frame=16)
        assert tokens.dtype == np.int32
        got = masks(tokens, spans)
        assert got["token_buffer"] == line["tokens"]
        assert got["loss_mask"] == line["loss_mask"]
        assert got["vision_mask"] == line["vision_mask"]
    assert drawn == {"vision,text", "[text],vision", "[vision],text"}


def test_documents_laid_end_to_end_are_the_released_training_batches() -> None:
    vocabulary = JointVocabulary.for_codebook(
        text_size=512, codebook_size=318, vision_size=320
    )  # that model's <eof> and <eov>: 318, 319
    stream: dict[str, list] = {"token_buffer": [], "loss_mask": [], "vision_mask": []}
    with (DATA / "train_vision.jsonl").open("rb") as file:
        for record in read_records(file, "train_vision.jsonl"):
            assert not isinstance(record, BadRecord)
            index, fields = record
            spec = spec_for_record(fields["fields"], index)
            for key, values in masks(
                *build_tokens(fields, spec, tokenizer(), vocabulary, codes_per_frame=16), vocabulary
            ).items():
                stream[key] += values
    batches = np.load(DATA / "train_vision_batches.npz")
    released = {
        name: np.concatenate([batches[f"step{step}/{name}"].ravel() for step in range(4)])
        for name in ("input_tokens", "target_tokens", "loss_masks", "input_vision_masks", "target_vision_masks")
    }
    size = len(released["input_tokens"])
    assert size == 4 * 2 * 64 < len(stream["token_buffer"])
    np.testing.assert_array_equal(released["input_tokens"], stream["token_buffer"][:size])
    np.testing.assert_array_equal(released["target_tokens"], stream["token_buffer"][1 : size + 1])
    np.testing.assert_array_equal(released["loss_masks"], stream["loss_mask"][1 : size + 1])
    np.testing.assert_array_equal(released["input_vision_masks"], stream["vision_mask"][:size])
    np.testing.assert_array_equal(released["target_vision_masks"], stream["vision_mask"][1 : size + 1])


# The layout, said without the recording

RECORD = {"text": "the river", "answer": "yellow", "vision": np.arange(12).reshape(3, 4)}


def spelled(spec: str, **options: Any) -> list[int | str]:
    """Tokens of RECORD with vision ids spelled out."""
    tokens, _ = build_tokens(RECORD, FieldSpec.parse(spec), tokenizer(), VOCABULARY, **options)
    names: dict[int, int | str] = {1: "<s>", 2: "</s>", VOCABULARY.eof_id: "<eof>", VOCABULARY.eov_id: "<eov>"}
    return [names.get(token, f"v{token - 512}" if token >= 512 else token) for token in tokens.tolist()]


def test_frames_end_in_eof_the_last_in_eov_between_textual_markers() -> None:
    start, end = tokenizer().encode("<vision>").tolist(), tokenizer().encode("</vision>").tolist()
    frames = ["v0", "v1", "v2", "v3", "<eof>", "v4", "v5", "v6", "v7", "<eof>", "v8", "v9", "v10", "v11", "<eov>"]
    assert spelled("vision") == ["<s>", *start, *frames, *end, "</s>"]
    assert spelled("vision", max_n_frames=1) == ["<s>", *start, "v0", "v1", "v2", "v3", "<eov>", *end, "</s>"]


def test_more_frames_than_the_most_are_sampled_uniformly_first_and_last_kept() -> None:
    record = {"vision": np.arange(10)[:, None]}
    tokens, _ = build_tokens(record, FieldSpec.parse("vision"), tokenizer(), VOCABULARY, max_n_frames=4)
    vision = tokens[VOCABULARY["vision"].contains(tokens)][::2] - 512
    assert vision.tolist() == [0, 3, 6, 9]


def test_a_joined_field_is_encoded_as_one_text() -> None:
    tokens, _ = build_tokens(RECORD, FieldSpec.parse("text+answer"), tokenizer(), VOCABULARY, subfield_separator="\n")
    assert tokenizer().decode(tokens[1:-1]) == "the river\nyellow"


def test_brackets_take_the_loss_from_the_whole_field_and_eos_keeps_it() -> None:
    tokens, spans = build_tokens(RECORD, FieldSpec.parse("[vision],text"), tokenizer(), VOCABULARY)
    text = len(tokenizer().encode("the river"))
    assert spans == ((len(tokens) - text - 1, len(tokens)),)


def test_prepended_text_stands_only_before_text_that_comes_first() -> None:
    assert spelled("text", prepend_text="Q: ")[1:-1] == tokenizer().encode("Q: the river").tolist()
    assert spelled("vision,text", prepend_text="Q: ") == spelled("vision,text")


def test_a_literal_bos_in_a_record_is_text() -> None:
    tokens, _ = build_tokens({"text": "<s></s>"}, FieldSpec.parse("text"), tokenizer(), VOCABULARY)
    assert (tokens == 1).sum() == (tokens == 2).sum() == 1


@given(
    st.lists(
        st.sampled_from(["text", "[answer]", "vision", "[vision]", "<|eos|>", "[<|bos|>]", "[text+answer]"]), min_size=1
    )
)
def test_spans_are_ordered_apart_within_and_never_hold_the_first_token(entries: list[str]) -> None:
    for add in (True, False):
        tokens, spans = build_tokens(
            RECORD, FieldSpec.parse(",".join(entries)), tokenizer(), VOCABULARY, add_bos=add, add_eos=add
        )
        edges = [0, *(edge for span in spans for edge in span)]
        assert all(left < right for left, right in itertools.pairwise(edges))
        assert edges[-1] <= len(tokens)


def test_draws_depend_on_the_index_alone_and_reach_every_spec() -> None:
    specs = ["vision,text", "[text],vision", "[vision],text"]
    draws = [spec_for_record(specs, index).text for index in range(300)]
    assert draws == [spec_for_record(specs, index).text for index in range(300)]
    assert all(80 < draws.count(spec) < 120 for spec in specs)
    assert spec_for_record("vision,text", 7).text == "vision,text"


def test_names_are_the_fields_a_record_must_have() -> None:
    assert FieldSpec.parse("[a+b], vision ,<|eos|>,c", known=["a", "b", "c", "vision"]).names == (
        "a",
        "b",
        "vision",
        "c",
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "an entry is empty"),
        ("text,", "an entry is empty"),
        ("[]", "an entry is empty"),
        ("text+", "an entry is empty"),
        ("[text", "brackets go around a whole entry"),
        ("[text+[answer]]", "brackets go around a whole entry"),
        ("<|pad|>", r"markers are <\|bos\|> and <\|eos\|>"),
        ("text+<|eos|>", "cannot be joined"),
        ("text+vision", "only text can be joined"),
        ("caption", 'no field "caption"; they have answer, text, vision'),
    ],
)
def test_a_malformed_spec_or_unknown_field_is_the_users_mistake(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        FieldSpec.parse(spec, known=RECORD)
    assert f'"{spec}"' in str(caught.value)


def test_no_spec_at_all_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="list of field specs is empty"):
        spec_for_record([], 0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, 'lacks the field "text"'),
        ({"text": None}, "holds NoneType, not text"),
        ({"text": 7}, "holds int, not text"),
        ({"text": "a\ud800"}, "lone surrogate"),
        ({"text": "a"}, 'lacks the field "vision"'),
        ({"text": "a", "vision": None}, 'lacks the field "vision"'),
        ({"text": "a", "vision": []}, "no whole frame"),
        ({"text": "a", "vision": [1, 2, 3]}, "no whole frame"),
        ({"text": "a", "vision": [[1, 2], [3]]}, "differ in length"),
        ({"text": "a", "vision": [[0.5, 1.0]]}, "no VQGAN codes"),
        ({"text": "a", "vision": "abc"}, "no VQGAN codes"),
        ({"text": "a", "vision": [[0, 8192]]}, "outside the codebook of 8192"),  # clamped silently in the released code
        ({"text": "a", "vision": [[-1, 0]]}, "outside the codebook of 8192"),
    ],
)
def test_a_record_without_what_the_spec_names_is_bad_data(record: dict[str, Any], message: str) -> None:
    with pytest.raises(BadData, match=message):
        build_tokens(record, FieldSpec.parse("text,vision"), tokenizer(), VOCABULARY)


def test_a_tokenizer_larger_than_the_text_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="342 ids, more than the vocabulary's 340"):
        build_tokens(RECORD, FieldSpec.parse("text"), tokenizer("vis_single"), JointVocabulary.for_codebook(340, 256))
