"""What can only fail is refused with the recipe and the listing alone, before anything runs or is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from testing.miniature import write_recipe
from testing.tiny_run import tiny_recipe, write_clip


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A recipe of texts, lines, columns and clips, of which some have captions."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "held"):
        (data / f"{name}.txt").write_text("a text")
        write_clip(data / f"{name}.mp4", 1, 2)
    (data / "qa.jsonl").write_text('{"question": "why?"}\nbroken\n{"question": "so?", "answer": "so"}\n')
    pq.write_table(pa.table({"prompt": ["a"], "reply": ["b"]}), data / "chat.parquet")
    (data / "captions.jsonl").write_text(json.dumps({"file": "a.mp4", "caption": "a square"}))
    (data / "vqgan").mkdir()
    (data / "vqgan" / "config.json").write_text("{}")
    made = tiny_recipe(tmp_path).model_dump(mode="json")
    made["vqgan"]["weights"] = str(data / "vqgan")
    made["sources"]["clips"]["side"] = ["captions.jsonl"]
    made["sources"]["qa"] = {"urls": ["qa.jsonl"], "fields": ["[question],answer"]}
    made["sources"]["chat"] = {"urls": ["chat.parquet"], "fields": ["[prompt],reply"]}
    return made


def refused(tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    path = write_recipe(tmp_path / "recipe.yaml", tree)
    words = [word for override in overrides for word in ("--set", override)]
    told = []
    for command in ("plan", "run"):
        assert main([command, str(path), *words]) == 2
        told.append(capsys.readouterr().err.splitlines()[-1])
    assert told[0] == told[1]
    assert not (tmp_path / "run" / "stages").exists()
    return told[0]


def test_a_store_of_codes_that_cannot_be_used_is_refused_before_a_codec_is_trained(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(tree, tmp_path, capsys, "storage.codes=https://h/codes")
    assert "https://h/codes: this can be read at most" in said
    assert "set storage.codes to a folder of this machine or to an s3://" in said
    tree["storage"]["codes"] = codes = f"{tmp_path}/data/a.txt/codes"
    assert main(["run", str(write_recipe(tmp_path / "recipe.yaml", tree))]) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith(f"ringworld: {codes}")
    assert not (tmp_path / "run" / "stages").exists()


def test_what_can_run_is_planned(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["sources"]["clips"]["fields"] = ["[caption],vision", "vision"]
    assert main(["plan", str(write_recipe(tmp_path / "recipe.yaml", tree))]) == 0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sources.books.fields=[txt]", 'no record has the field "txt" that "txt" names; they have text'),
        ("sources.qa.fields=[answr]", 'no record has the field "answr" that "answr" names; they have answer, question'),
        ("sources.qa.fields=[answer, answr]", 'no record has the field "answr"'),
        ("sources.chat.fields=[text]", 'no record has the field "text" that "text" names; they have prompt, reply'),
        ("sources.clips.fields=['[captoin],vision', vision]", 'no record has the field "captoin"'),
        ("sources.books.fields=[vision]", 'no record has the field "vision" that "vision" names; they have text'),
        (
            "sources.books.heldout=['*']",
            "train.stages.0: all of source 'books' is held out, which leaves nothing",
        ),
        (
            "sources.chat={urls: [chat.parquet], media: clip, fields: [vision]}",
            'sources.chat.media: no record has the column "clip" that is to name its video or image; they have prompt',
        ),
        (
            "sources.chat={urls: [chat.parquet], media: prompt, fields: ['[prompt],vision']}",
            'no record has the field "prompt"',
        ),
        ("sources.more={urls: [a.txt, held.txt]}", "held.txt, of which sources.books holds out all; hold the same out"),
        (
            "sources.more={urls: ['*.mp4'], fields: [vision], heldout_tail: 0.5, heldout: [a.mp4]}",
            "sources.more: it trains on",
        ),
        (
            "train.stages.1.objective=text",
            "train.stages.1: the field spec 'vision' of sources.clips has loss on frames, and the objective text has "
            "none; set train.stages.1.objective: vision-text, or write [vision]",
        ),
        (
            "sources.books.fields=['[text]']",
            "train.stages.0: no field spec of its sources has loss on anything, which leaves nothing to learn; take",
        ),
        ("model.init=TMP/data", "data: no config.json is in this folder"),
        ("model.init=/nowhere/llama", "/nowhere/llama: no such file or folder; check model.init"),
        ("vqgan.weights=/nowhere/vqgan", "/nowhere/vqgan: no such file or folder; check vqgan.weights"),
        ("vqgan=null", "is of kind video, and the recipe has no vqgan to encode its frames"),
        ("evaluate.needle.contexts=[32]", "evaluate.needle.contexts: 32 tokens leave no room for text beside"),
        ("tokenize.fps=0", "tokenize.fps: Input should be greater than 0"),
        ("tokenize.fps=-1", "tokenize.fps: Input should be greater than 0"),
        ("tokenize.fps=.nan", "tokenize.fps: "),
        ("tokenize.piece_seconds=.inf", "tokenize.piece_seconds: Input should be a finite number"),
        ("tokenize.encode.custom={encode: -1}", "tokenize.encode.custom.encode: Input should be greater than or equal"),
        ("model.size=7b", "model.size: '7b' is none of 7B, 1B, 200M, debug; name one or give the four sizes"),
        ("model.size.num_attention_heads=5", "hidden_size 32 is no multiple of num_attention_heads 5"),
        ("model.size.num_hidden_layers=0", "model.size.num_hidden_layers: 0 is no whole number above 0"),
        (
            "train.stages.0={name: t, context: 128, rope_theta: 1, steps: 1, batch_tokens: 128, mixture: {books: 1}, "
            "objective: text, lr: 1, min_document_tokens: 9, max_document_tokens: 8}",
            "train.stages.0.min_document_tokens 9 is more than its max_document_tokens 8",
        ),
        ("evaluate.needle.contexts=[0]", "evaluate.needle.contexts.0: Input should be greater than 0"),
        (
            "evaluate.generation.temperature=-1",
            "evaluate.generation.temperature: Input should be greater than",
        ),
        ("vqgan.config.norm_groups=0", "vqgan: norm_groups is 0; set vqgan.config.norm_groups to a number above 0"),
        ("vqgan.config.channels=[]", "vqgan: channels is ()"),
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
        ("sources.books.fields=[]", "sources.books.fields: List should have at least 1 item"),
        ("sources.books.fields=['text,']", 'field spec "text,": an entry is empty'),
        ("train.workers=true", "train.workers: true is no number"),
    ],
)
def test_what_can_only_fail_is_refused_by_plan_and_run(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    if override == "vqgan=null":
        tree["sources"]["clips"]["fields"] = ["caption"]
    assert said in refused(tree, tmp_path, capsys, override.replace("TMP", str(tmp_path)))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("a.txt", "a.txt: not a sentencepiece model"),
        ("held.mp4", "held.mp4: not a sentencepiece model"),
        ("vqgan/config.json", "config.json: not a Hugging Face tokenizer.json"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_by_plan_and_run(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, said: str
) -> None:
    del tree["evaluate"]["needle"]  # which short contexts have to have room for
    assert said in refused(tree, tmp_path, capsys, f"text_tokenizer.path={tmp_path}/data/{file}")


def test_what_two_sources_hold_out_alike_is_planned(tree: dict[str, Any], tmp_path: Path) -> None:
    for name in ("first", "second"):
        tree["sources"][name] = {"urls": ["a.mp4"], "fields": ["vision"], "heldout_tail": 0.5}
        tree["sources"][f"{name}-chat"] = {"urls": ["chat.parquet"], "media": "prompt", "heldout": ["*/x.mp4"]}
        tree["sources"][f"{name}-chat"]["fields"] = ["[reply],vision"]
    path = write_recipe(tmp_path / "recipe.yaml", tree)
    del tree["sources"]["clips"], tree["train"]["stages"][1], tree["sources"]["chat"], tree["evaluate"]["needle"]
    assert main(["plan", str(write_recipe(path, tree))]) == 0


def test_a_field_that_begins_late_in_a_long_file_is_no_mistake(tree: dict[str, Any], tmp_path: Path) -> None:
    lines = ['{"question": "why?"}'] * 1500 + ['{"question": "so?", "answer": "so"}']
    (tmp_path / "data" / "qa.jsonl").write_text("\n".join(lines))
    assert main(["plan", str(write_recipe(tmp_path / "recipe.yaml", tree))]) == 0


def test_a_footer_that_arrow_cannot_read_says_nothing(tree: dict[str, Any], tmp_path: Path) -> None:
    chat = tmp_path / "data" / "chat.parquet"
    content = bytearray(chat.read_bytes())
    content[-40] ^= 0xFF
    chat.write_bytes(content)
    assert main(["plan", str(write_recipe(tmp_path / "recipe.yaml", tree))]) == 0
    chat.write_bytes(b"")
    assert main(["plan", str(write_recipe(tmp_path / "recipe.yaml", tree))]) == 0
