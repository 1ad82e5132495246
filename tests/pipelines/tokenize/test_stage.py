"""Raw objects to documents: how work is cut, and what real acts and clips become."""

from __future__ import annotations

import json
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
from pipelines.sources.listing import SourceObject
from pipelines.tokenize.partition import cut_partitions
from pipelines.tokenize.stage import TokenizeStage
from testing.miniature import VQGAN_SIZES, text_recipe
from tokenization.codecs.vqgan.config import VQGANConfig
from tokenization.codecs.vqgan.model import VQGAN
from tokenization.document import Document
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.frames import media_frames
from tokenization.shards.document_parquet import read_documents
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


@given(OBJECTS, st.integers(1, 200), st.randoms())
def test_every_object_is_in_one_partition_of_its_source_and_split_whatever_the_listings_order(
    objects: list[SourceObject], limit: int, random: Any
) -> None:
    parts = cut_partitions(objects, limit)
    cut = [one for part in parts for one in part.objects]
    assert sorted(one.key for one in cut) == sorted(one.key for one in objects)
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        assert {(one.source, one.heldout) for one in part.objects} == {(part.source, part.heldout)}
        assert len(part.objects) == 1 or sum(one.size for one in part.objects) <= limit
        assert len(part.objects) == 1 or all(one.kind not in ("video", "records") for one in part.objects)
    random.shuffle(objects)
    assert cut_partitions(objects, limit) == parts


def test_partitions_are_named_by_source_split_and_number() -> None:
    objects = [found("a/1"), found("a/2"), found("a/3"), found("a/h", heldout=True), found("b/1", kind="video")]
    parts = cut_partitions(objects, 20)
    assert [(part.name, len(part.objects)) for part in parts] == [
        ("a-train-000000", 2),
        ("a-train-000001", 1),
        ("a-heldout-000000", 1),
        ("b-train-000000", 1),
    ]


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
    (folder,) = (undisturbed / "stages" / "tokenize").iterdir()
    parts = json.loads((folder / "manifest.json").read_text())["outputs"]["partitions"]
    made = {}
    for part in parts:
        with (folder / part["file"]).open("rb") as file:
            own = list(read_documents(file))
        assert len(own) == part["documents"]
        assert sum(map(len, own)) == part["tokens"]
        assert sum(int(VOCABULARY["vision"].contains(one.tokens).sum()) for one in own) == part["vision_tokens"]
        made |= {one.key: one for one in own}
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
