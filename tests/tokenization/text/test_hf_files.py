"""`AutoTokenizer` loads what we write of a tokenizer, and gives every text the ids of our own encoding."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import model
from storage.errors import UserError
from testing.miniature import train_tokenizer
from tests.tokenization.text.test_tokenizer import FIXTURES, FRAGMENTS, package_folder, plays
from tokenization.text.hf_files import PROBE, tokenizer_files
from tokenization.text.tokenizer import TextTokenizer, load_text_tokenizer

EMOJI = (
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f3f4\U000e0067\U000e007f"
    + "\u2764\ufe0f\U0001f1eb\U0001f1f7"
)
SCRIPTS = "".join(map(chr, [*range(32, 127), *range(0xA1, 0x250), *range(0x391, 0x450), *range(0x5D0, 0x5EA)]))
WIDE = "".join(map(chr, [*range(0x4E00, 0x4E80), *range(0xAC00, 0xAC40), *range(0x900, 0x950), *range(0x3041, 0x3090)]))
CONTROL = "".join(map(chr, [*range(32), *range(127, 160), 0x200B, 0x2028, 0x2581, 0xFEFF, 0xFFFD, 0xE000, 0x10FFFF]))
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<vision>", "</vision>", "<0x0A>", "[INST]", "<|endoftext|>", "<s", "s>"]


def ten_thousand_texts() -> Iterator[str]:
    """Lines and cuts of plays, code, scripts, emoji, control characters, runs of spaces, and literal special tokens."""
    generator = random.Random(5)
    yield from PROBE
    lines = [line for play in plays()[:6] for line in play.splitlines()]
    yield from generator.sample(lines, 3000)
    whole = "\n".join(lines)
    for _ in range(1000):
        start = generator.randrange(len(whole) - 600)
        yield whole[start : start + generator.randrange(600)]
    code = [path.read_text() for path in sorted(Path(model.__file__).parent.rglob("*.py"))]
    yield from generator.sample([line for file in code for line in file.splitlines(keepends=True)], 2500)
    yield from code[:20]
    for alphabet in (SCRIPTS, WIDE, EMOJI, CONTROL, " \n\t a", SCRIPTS + EMOJI + CONTROL + WIDE):
        for _ in range(400):
            yield "".join(generator.choices(alphabet, k=generator.randrange(40)))
    words = [*SPECIAL, " ", "  ", "\n", "and", "\u4e2d", "\U0001f600"]
    for _ in range(1200):
        yield "".join(generator.choices(words, k=generator.randrange(12)))


def written(file: Path, folder: Path) -> PreTrainedTokenizerBase:
    folder.mkdir(exist_ok=True)
    for name, content in tokenizer_files(file, 512).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return AutoTokenizer.from_pretrained(folder)


def made_json(folder: Path) -> Path:
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text(plays()[0])
    train_tokenizer(folder / "texts", folder / "tokenizer.json")
    return folder / "tokenizer.json"


@pytest.fixture(scope="module", params=["sentencepiece", "byte-level", "with-markers", "with-bos"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTokenizer, object]:
    folder = tmp_path_factory.mktemp("tokenizer")
    files = {
        "sentencepiece": lambda: package_folder("mistral_common") / "data" / "tokenizer.model.v1",
        "byte-level": lambda: made_json(folder),
        "with-markers": lambda: FIXTURES / "tokenizer_vis_single" / "tokenizer.json",
        "with-bos": lambda: FIXTURES / "tokenizer_bos" / "tokenizer.json",
    }
    file = files[request.param]()
    return load_text_tokenizer(str(file)), written(file, folder / "written")


@pytest.mark.slow
def test_ten_thousand_texts_have_our_ids_and_decode_to_our_text(pair) -> None:
    ours, theirs = pair
    texts = list(ten_thousand_texts())
    assert len(texts) >= 10_000
    for text in texts:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.decode(ids) == ours.decode(ids), text


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(text=st.one_of(st.text(), st.lists(FRAGMENTS, max_size=30).map("".join)))
def test_any_text_has_our_ids(pair, text: str) -> None:
    ours, theirs = pair
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text).tolist()


def test_bos_and_eos_are_ours_and_no_token_gets_an_id_of_another_modality(pair) -> None:
    ours, theirs = pair
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert len(theirs) <= ours.size
    assert theirs.model_max_length == 512


def test_a_written_tokenizer_is_one_of_ours_again(tmp_path: Path) -> None:
    ours = load_text_tokenizer()
    written(Path(package_folder("mistral_common") / "data" / "tokenizer.model.v1"), tmp_path)
    again = load_text_tokenizer(str(tmp_path))
    assert (again.bos_id, again.eos_id, again.size) == (ours.bos_id, ours.eos_id, ours.size)
    for text in [*plays()[:1], *PROBE]:
        ids = ours.encode(text)
        assert again.encode(text).tolist() == ids.tolist()
        assert again.decode(ids) == ours.decode(ids)


def test_a_text_begins_with_bos_by_default_as_documents_do(tmp_path: Path) -> None:
    theirs = written(Path(package_folder("mistral_common") / "data" / "tokenizer.model.v1"), tmp_path)
    assert theirs("the sea").input_ids == [1, *load_text_tokenizer().encode("the sea").tolist()]


def test_a_pad_token_that_the_vocabulary_lacks_is_left_out(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "tokenizer_bos", tmp_path / "source")
    config = json.loads((tmp_path / "source" / "tokenizer_config.json").read_text())
    config |= {"pad_token": "<nowhere>", "additional_special_tokens": ["<new>"], "chat_template": "{{ messages }}"}
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = written(tmp_path / "source" / "tokenizer.json", tmp_path / "written")
    assert theirs.pad_token is None
    assert theirs.chat_template == "{{ messages }}"
    assert len(theirs) <= load_text_tokenizer(str(FIXTURES / "tokenizer_bos")).size


def test_a_file_whose_limits_cut_texts_is_written_without_them(tmp_path: Path) -> None:
    file = made_json(tmp_path)
    tree = json.loads(file.read_text())
    tree["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(tree))
    theirs = written(file, tmp_path / "written")
    assert len(theirs.encode("one two three four five six seven eight")) > 4


def test_a_tokenizer_that_transformers_loads_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenization.text.hf_files.SPACE", "_")
    with pytest.raises(UserError, match=r"tokenizer\.model\.v1: transformers encodes .* to other ids; name another"):
        tokenizer_files(package_folder("mistral_common") / "data" / "tokenizer.model.v1", 512)
