"""Raw objects to documents: how work is cut, and what real acts and clips become."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.recipe import Kind, Recipe
from pipelines.recipe.data import TextTokenizer
from pipelines.sources.listing import Listing, SourceObject
from pipelines.tokenize.partition import Partition, Partitions
from pipelines.tokenize.record import TokenizeRecord, read_partitions
from pipelines.tokenize.stage import TokenizeStage
from testing.finished_stages import documents_of, only_output
from testing.miniature import VQGAN_SIZES, text_recipe
from tokenization.codecs.vqgan.config import VQGANConfig
from tokenization.codecs.vqgan.model import VQGAN
from tokenization.document import Document
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.frames import media_frames
from tokenization.text.tokenizer import load_text_tokenizer
from tokenization.vocabulary import JointVocabulary

CODES = VQGANConfig(**VQGAN_SIZES).codes_per_frame
VOCABULARY = JointVocabulary.for_codebook(512, 64, bos_id=0, eos_id=1)


def found(key: str, size: int = 10, kind: Kind = "text", heldout: bool = False) -> SourceObject:
    return SourceObject(key, key.split("/")[0], f"/x/{key}", size, "e", kind, heldout, {})


OBJECTS = st.lists(
    st.builds(
        found,
        st.from_regex(r"[ab]/[a-z]{1,6}", fullmatch=True),
        st.integers(0, 100),
        st.sampled_from(["text", "image", "video", "webdataset", "records"]),
        st.booleans(),
    ),
    unique_by=lambda one: one.key,
    max_size=30,
)


SETTINGS = {"a": {"fields": ["text"]}, "b": {"fields": ["vision"]}}


def cut(objects: list[SourceObject], limit: int, **settings: Any) -> list[Partition]:
    return list(Partitions(Listing.of(objects), limit, {**SETTINGS, **settings}).values())


@given(OBJECTS, st.integers(1, 200), st.randoms())
def test_every_object_is_in_one_partition_of_its_source_and_split_whatever_the_listings_order(
    objects: list[SourceObject], limit: int, random: Any
) -> None:
    parts = cut(objects, limit)
    assert sorted(one.key for part in parts for one in part.objects) == sorted(one.key for one in objects)
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        assert {(one.source, one.heldout) for one in part.objects} == {(part.source, part.heldout)}
        assert len(part.objects) == 1 or sum(one.size for one in part.objects) <= limit
        assert list(part.objects) == [one for one in objects if one in part.objects], "in the listing's order"
    together = {frozenset(one.key for one in part.objects) for part in parts}
    random.shuffle(objects)
    assert {frozenset(one.key for one in part.objects) for part in cut(objects, limit)} == together


@pytest.mark.parametrize("kind", ["video", "records"])
def test_objects_whose_size_does_not_say_how_much_work_they_are_are_few_to_a_partition(kind: Kind) -> None:
    heavy = [len(part.objects) for part in cut([found(f"a/{n}", 1, kind) for n in range(200)], 3200)]
    assert max(heavy) <= 32
    light = [len(part.objects) for part in cut([found(f"a/{n}", 1) for n in range(200)], 3200)]
    assert light == [200]
    assert len(cut([found("a/long", 1601, kind), found("a/short", 1, kind)], 3200)) == 2


def test_partitions_are_named_by_source_and_split_and_by_all_that_decides_their_documents() -> None:
    objects = [found("a/1"), found("a/2"), found("a/h", heldout=True), found("b/1", kind="video")]

    def names(objects: list[SourceObject] = objects, **settings: Any) -> dict[str, str]:
        return {part.name.rpartition("-")[0]: part.name for part in cut(objects, 1000, **settings)}

    first = names()
    assert list(first) == ["a-train-0b0", "a-heldout-0b0", "b-train-0b0"]
    assert all(re.fullmatch(r"\w+-\w+-0b0-[0-9a-f]{16}", name) for name in first.values())
    assert names() == first

    def changed(then: dict[str, str]) -> set[str]:
        assert list(then) == list(first)
        return {name for name in first if then[name] != first[name]}

    assert changed(names(a={"fields": ["other"]})) == {"a-heldout-0b0", "a-train-0b0"}
    for change in ({"etag": "new"}, {"size": 11}, {"side": {"caption": "a bear"}}):
        assert changed(names([replace(objects[0], **change), *objects[1:]])) == {"a-train-0b0"}
    assert changed(names([*objects, found("b/2", kind="video")])) == {"b-train-0b0"}
    assert changed(names(objects[1:])) == {"a-train-0b0"}


def test_every_file_of_the_tokenizer_is_in_the_fingerprint(sources: Path, tmp_path: Path) -> None:
    shutil.copy(sources / "tokenizer.json", tmp_path)
    stage = TokenizeStage(Recipe.model_validate(text_recipe(sources, tmp_path / "run")), None)
    path = {"path": str(tmp_path)}
    stage = replace(stage, recipe=stage.recipe.model_copy(update={"text_tokenizer": TextTokenizer(**path)}))
    seen = [stage.settings()]
    for content in ('{"bos_token": "a", "eos_token": "b"}', '{"bos_token": "b", "eos_token": "a"}'):
        (tmp_path / "tokenizer_config.json").write_text(content)
        seen.append(stage.settings())
    assert seen[0] != seen[1] != seen[2]
    (tmp_path / "tokenizer_config.json").unlink()
    assert stage.settings() == seen[0]


@pytest.fixture(scope="module")
def documents(undisturbed: Path) -> dict[str, Document]:
    output = only_output(undisturbed, "tokenize", TokenizeRecord)
    made: dict[str, Document] = {}
    for part in read_partitions(output):
        own = documents_of(output, [part])
        assert len(own) == part.documents
        assert sum(map(len, own.values())) == part.tokens
        vision = sum(int(VOCABULARY["vision"].contains(one.tokens).sum()) for one in own.values())
        assert vision == part.vision_tokens
        assert output.shared.sha256(part.file) == part.sha256
        assert not made.keys() & own.keys()
        made |= own
    return made


@pytest.mark.slow
def test_a_text_is_one_document_that_decodes_to_itself(documents: dict[str, Document], sources: Path) -> None:
    tokenizer = load_text_tokenizer(str(sources / "tokenizer.json"))
    texts = sorted((sources / "acts").iterdir())
    assert sorted(key for key in documents if key.startswith("acts/")) == [f"acts/acts/{path.name}#0" for path in texts]
    for path in texts:
        document = documents[f"acts/acts/{path.name}#0"]
        assert tokenizer.decode(document.tokens) == path.read_text(encoding="utf-8")
        assert document.tokens[0] == VOCABULARY.bos_id
        assert document.tokens[-1] == VOCABULARY.eos_id
        assert document.provenance["url"] == str(path)


@pytest.mark.slow
def test_a_clip_becomes_documents_of_three_frames_in_order_with_lwms_markup(
    documents: dict[str, Document], sources: Path
) -> None:
    vqgan = VQGAN.load(sources / "vqgan", VQGANConfig(**VQGAN_SIZES))
    with (sources / "clips" / "carphone.mp4").open("rb") as file:
        request = FrameRequest(fps=12, size=32, chunk=64, max_frames=60)
        frames = np.concatenate([chunk.frames for chunk in media_frames(file, "video", request)])
    expected = VOCABULARY["vision"].codes_to_ids(vqgan.encode(frames))
    made = [document for key, document in documents.items() if key.startswith("clips/clips/carphone.mp4#")]
    assert len(made) == -(-len(frames) // 3)
    tokenizer = load_text_tokenizer(str(sources / "tokenizer.json"))
    captions = 0
    for number, document in enumerate(made):
        vision = document.tokens[VOCABULARY["vision"].contains(document.tokens)]
        own = expected[3 * number : 3 * number + 3]
        ends = [VOCABULARY.eof_id] * (len(own) - 1) + [VOCABULARY.eov_id]
        assert vision.tolist() == np.column_stack([own, ends]).ravel().tolist()
        before, after = np.flatnonzero(VOCABULARY["vision"].contains(document.tokens))[[0, -1]]
        assert tokenizer.decode(document.tokens[:before]) == "<vision>"
        said = tokenizer.decode(document.tokens[after + 1 :])
        captions += said == "</vision>a man talks in a car"
        assert said in ("</vision>", "</vision>a man talks in a car")
    assert 0 < captions < len(made), "both field specs are drawn"


@pytest.mark.slow
def test_the_manifest_of_shards_says_what_they_are_made_of(undisturbed: Path, sources: Path) -> None:
    (manifest,) = (undisturbed / "stages" / "pack-video").glob("*/manifest.json")
    made_of = json.loads(manifest.read_text())["outputs"]["made_of"]
    assert made_of["text_tokenizer"] == load_text_tokenizer(str(sources / "tokenizer.json")).fingerprint
    assert made_of["vqgan"] == VQGAN.load(sources / "vqgan").fingerprint
    assert {name: source["objects"] for name, source in made_of["sources"].items()} == {"acts": 9, "clips": 2}
    assert all(len(source["digest"]) == 64 for source in made_of["sources"].values())
