"""A tokenizer is all its files: from any URL they are found together, and a change of one is another tokenizer."""

from __future__ import annotations

import json
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from storage.errors import UserError
from testing.http_server import files_server, http_server
from testing.s3_server import ObjectStore
from tokenization.text.tokenizer import load_text_tokenizer
from tokenization.text.tokenizer_files import fetch_tokenizer, find_tokenizer

NAMED = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer.json with `<s>` and `</s>` at 0 and 1, and a config beside it that names tokens 4 and 5."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokens = ["<s>", "</s>", "a", "b", "<|begin|>", "<|end|>"]
    model = models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    Tokenizer(model).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMED))
    return folder


def ends(url: str, options: dict[str, Any] | None = None) -> tuple[int, int]:
    loaded = load_text_tokenizer(str(fetch_tokenizer(url, options)))
    return loaded.bos_id, loaded.eos_id


@pytest.mark.parametrize("name", ["", "/", "/tokenizer.json"])
def test_bos_and_eos_are_those_that_the_config_names_from_a_disk_or_a_web_server(folder: Path, name: str) -> None:
    assert ends(f"{folder}{name}") == ends(f"file://{folder}{name}") == (4, 5)
    with files_server(folder.parent) as address:
        assert ends(f"{address}/tokenizer{name}") == (4, 5)
        assert ends(f"{address}/tokenizer/tokenizer.json?download=true") == (4, 5)


@pytest.mark.slow
def test_so_they_are_from_a_bucket(folder: Path, object_store: ObjectStore) -> None:
    object_store.fs.put(str(folder), "data/llama-2.0/tokenizer", recursive=True)
    url = f"{object_store.url}/llama-2.0/tokenizer"
    for name in ("", "/", "/tokenizer.json"):
        assert ends(f"{url}{name}", object_store.options) == (4, 5)
    before = find_tokenizer(url, object_store.options)
    object_store.fs.pipe_file("data/llama-2.0/tokenizer/tokenizer_config.json", b'{"bos_token": "a"}')
    assert find_tokenizer(url, object_store.options) != before
    assert ends(url, object_store.options) == (2, 1)


def test_what_the_config_does_not_name_is_what_the_usual_names_say(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"eos_token": null}')
    assert ends(str(folder)) == (0, 1)
    (folder / "tokenizer_config.json").unlink()
    assert ends(str(folder)) == (0, 1)


def test_an_older_map_of_special_tokens_decides_where_there_is_no_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").rename(folder / "special_tokens_map.json")
    assert ends(str(folder)) == (4, 5)


@pytest.mark.parametrize("change", [{"bos_token": "a", "eos_token": "b"}, {}, None])
def test_a_change_of_the_config_is_a_change_of_the_tokenizer(folder: Path, change: dict[str, str] | None) -> None:
    before, loaded = find_tokenizer(str(folder)), load_text_tokenizer(str(folder))
    if change is None:
        (folder / "tokenizer_config.json").unlink()
    else:
        (folder / "tokenizer_config.json").write_text(json.dumps(change))
    assert find_tokenizer(str(folder)).model == before.model
    assert find_tokenizer(str(folder)).special != before.special
    assert load_text_tokenizer(str(folder)).fingerprint != loaded.fingerprint
    assert load_text_tokenizer(str(folder)).bos_id != loaded.bos_id


def test_a_sentencepiece_model_is_preferred_and_has_its_own_bos_and_eos(folder: Path) -> None:
    shutil.copy(fetch_tokenizer("package://mistral_common/data/tokenizer.model.v1"), folder / "tokenizer.model")
    assert find_tokenizer(str(folder)).model.url == str(folder / "tokenizer.model")
    assert find_tokenizer(str(folder)).special is None
    assert ends(str(folder)) == (1, 2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", r"tokenizer_config\.json: not JSON"),
        ('{"bos_token": 3}', "bos_token is 3; set it to a token"),
        ("[1]", "bos_token is "),
        ('{"bos_token": "c"}', r"no c; set bos_token in tokenizer_config\.json to a token that it has"),
    ],
)
def test_a_config_that_names_no_token_is_the_users_mistake(folder: Path, content: str, said: str) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=said):
        load_text_tokenizer(str(folder))


def test_a_place_without_a_tokenizer_is_named(folder: Path) -> None:
    with files_server(folder) as address:
        for url in (f"{folder}/none.json", str(folder.parent), f"{address}/none.json", "memory://none"):
            with pytest.raises(UserError, match="no such file or object; check the URL") as caught:
                find_tokenizer(url)
            assert url in str(caught.value)


class Denies(SimpleHTTPRequestHandler):
    """Serves the model and refuses everything else, as a bucket does that may not be listed."""

    def send_head(self) -> Any:
        if self.path.endswith("/tokenizer.json"):
            return super().send_head()
        self.send_error(403)
        return None

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


def test_a_config_that_may_not_be_read_is_not_taken_for_absent(folder: Path) -> None:
    with http_server(partial(Denies, directory=str(folder))) as address:
        for url in (f"{address}/tokenizer.json", address):
            with pytest.raises(UserError, match=r"tokenizer_config\.json: .*the server answers 403"):
                find_tokenizer(url)
