"""Tars of media and records that name media, tokenized and packed: captions, splits, quarantine, the same bytes."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.codecs.vqgan import _gather
from pipelines.dag.manifest import StageOutput
from pipelines.recipe import Recipe
from pipelines.run import _run_all, plan_recipe
from pipelines.sources.list_sources import list_sources
from pipelines.tokenize.record import TokenizeRecord, read_partitions
from testing.finished_stages import documents_of, only_output
from testing.made_tars import write_tar
from testing.miniature import VQGAN_SIZES, recipe, sample
from tests.pipelines.sources.media_listings import IMAGES, VIDEO
from tokenization.codecs.vqgan.config import VQGANConfig
from tokenization.codecs.vqgan.model import VQGAN
from tokenization.document import Document
from tokenization.media.image import load_image
from tokenization.text.tokenizer import load_text_tokenizer
from tokenization.vocabulary import JointVocabulary

pytestmark = pytest.mark.slow

VOCABULARY = JointVocabulary.for_codebook(512, 64, bos_id=0, eos_id=1)


def tree(data: Path, sources: Path, root: Path) -> dict[str, Any]:
    made = recipe(sources, root)
    made["storage"]["data"] = str(data)
    made["sources"] = {
        "tars": {"urls": ["tars/*.tar"], "fields": ["[caption],vision"], "heldout": ["*/held-*"], "max_frames": 20},
        "pairs": {
            "urls": ["qa.jsonl"],
            "media": "image",
            "media_from": [str(IMAGES[0].parent)],
            "fields": ["[vision],[question],answer"],
        },
    }
    made["tokenize"] |= {"max_bad_fraction": 0.3, "chunk_frames": 7, "frames_per_document": 4}
    made["train"]["workers"] = 1
    (stage,) = made["train"]["stages"][1:]
    stage |= {"sp": 1, "steps": 2, "mixture": {"tars": 0.5, "pairs": 0.5}, "rows": 2, "batch_tokens": 512}
    made["train"]["stages"] = [stage]
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars, the second of them damaged, and a list of questions about pictures."""
    folder = tmp_path_factory.mktemp("media")
    lion = IMAGES[1].read_bytes()
    other = sample("gradio", "media_assets/videos/muted_b.mp4").read_bytes()
    members = {"held-0.jpg": IMAGES[0].read_bytes(), "held-0.txt": b"a cheetah"}
    for number in range(9):
        members |= {f"{number}.jpg": lion, f"{number}.json": json.dumps({"caption": f"lion {number}"}).encode()}
    members |= {"bad.jpg": lion[: len(lion) // 2], "bad.txt": b"half a lion", "mute.jpg": lion, "none.txt": b"?"}
    members |= {"../../film.mp4": VIDEO.read_bytes(), "../../film.txt": b"a man in a car"}
    write_tar(folder / "tars/a.tar", members)
    damaged = write_tar(folder / "tars/b.tar", {"0.mp4": other, "0.txt": b"a bear", "1.jpg": lion, "1.txt": b"lost"})
    content = damaged.read_bytes()
    damaged.write_bytes(content[: content.index(b"1.jpg") + 5000])
    rows = [{"image": str(path), "question": "what is it?", "answer": path.stem} for path in IMAGES]
    rows += [{"image": "none.jpg", "question": "what is it?", "answer": "nothing"}]
    (folder / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def finished(local_ray: None, data: Path, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run up to its packed shards."""
    root = tmp_path_factory.mktemp("mediarun") / "run"
    stages = plan_recipe(Recipe.model_validate(tree(data, sources, root)))
    _run_all(stages[:4])
    assert stages[3].name == "pack-video"
    return root


def tokenized(root: Path) -> StageOutput[TokenizeRecord]:
    output: StageOutput[TokenizeRecord] = only_output(root, "tokenize", TokenizeRecord)
    return output


def documents(output: StageOutput[TokenizeRecord], heldout: bool) -> dict[str, Document]:
    return documents_of(output, [part for part in read_partitions(output) if part.heldout == heldout])


def test_every_sample_and_record_is_documents_of_its_split_with_its_own_text(finished: Path, sources: Path) -> None:
    train, held = documents(tokenized(finished), False), documents(tokenized(finished), True)
    film = [f"tars/tars/a.tar/../../film#{start}" for start in range(0, 20, 4)]
    lions = [f"tars/tars/a.tar/{number}#0" for number in range(9)]
    bears = [key for key in train if key.startswith("tars/tars/b.tar/0#")]
    assert sorted(train) == sorted([*film, *lions, *bears, *(f"pairs/qa.jsonl/{number}#0" for number in range(3))])
    assert bears
    assert list(held) == ["tars/tars/a.tar/held-0#0"]
    tokenizer = load_text_tokenizer(str(sources / "tokenizer.json"))

    def text(document: Document) -> str:
        return tokenizer.decode(document.tokens[~VOCABULARY["vision"].contains(document.tokens)])

    assert [text(train[key]) for key in lions] == [f"lion {number}<vision></vision>" for number in range(9)]
    assert {text(train[key]) for key in film} == {"a man in a car<vision></vision>"}
    assert text(held["tars/tars/a.tar/held-0#0"]) == "a cheetah<vision></vision>"
    assert text(train["pairs/qa.jsonl/1#0"]) == "<vision></vision>what is it?lion"


def test_codes_are_those_of_each_medium_alone_whatever_batch_it_was_in(finished: Path, sources: Path) -> None:
    vqgan = VQGAN.load(sources / "vqgan", VQGANConfig(**VQGAN_SIZES))
    (lion,) = VOCABULARY["vision"].codes_to_ids(vqgan.encode(load_image(IMAGES[1], 32)[None]))
    train = documents(tokenized(finished), False)
    for key in ("tars/tars/a.tar/0#0", "tars/tars/a.tar/8#0", "pairs/qa.jsonl/1#0"):
        tokens = train[key].tokens
        found = tokens[VOCABULARY["vision"].contains(tokens)]
        assert np.array_equal(found, [*lion, VOCABULARY.eov_id])


def test_what_cannot_be_used_is_in_quarantine_under_its_key_and_costs_no_other(finished: Path, data: Path) -> None:
    manifest = tokenized(finished).manifest
    told = {entry["key"]: (entry["url"], entry["record"], entry["reason"]) for entry in manifest.quarantine}
    assert len(told) == len(manifest.quarantine) == manifest.record.figures.quarantined
    a, b = str(data / "tars/a.tar"), str(data / "tars/b.tar")
    assert told.pop("tars/tars/a.tar/bad")[:2] == (a, 10)
    assert told.pop("tars/tars/a.tar/mute") == (a, 11, 'the record lacks the field "caption"')
    assert told.pop("tars/tars/a.tar/none") == (a, 12, "no video or image in it, only .txt")
    url, number, reason = told.pop("tars/tars/b.tar")
    assert (url, number) == (b, 1)
    assert reason.startswith("the tar is damaged from sample 1 (1) on: it ends at byte ")
    assert told == {"pairs/qa.jsonl/3": (str(data / "qa.jsonl"), 3, f"{data}/none.jpg: no such object")}


def test_nothing_is_written_outside_the_run(finished: Path, data: Path) -> None:
    assert [path.name for path in finished.parent.iterdir()] == ["run"]
    assert sorted(os.listdir(data)) == ["qa.jsonl", "tars"]
    assert not list(finished.rglob("*film*"))


def test_a_vqgan_is_trained_on_what_is_in_them_but_for_what_is_held_out(
    data: Path, sources: Path, tmp_path: Path
) -> None:
    made = tree(data, sources, tmp_path / "run")
    made["vqgan"] = {"config": VQGAN_SIZES, "train": {"steps": 3, "max_frames": 600}}
    whole = Recipe.model_validate(made)
    assert whole.vqgan is not None
    training = [found for found in list_sources(whole) if not found.heldout]
    assert [found.key for found in training] == ["pairs/qa.jsonl", "tars/tars/a.tar", "tars/tars/b.tar"]
    with tempfile.TemporaryFile() as scratch:
        frames, weights = _gather(whole, training, scratch)
        held = load_image(IMAGES[0], 32)
        # 3 pictures; 10 pictures and 3 frames of a film, as no medium gives more than a 64th of 200; 3 of another.
        assert len(frames) == len(weights) == 3 + (10 + 3) + 3
        assert sum((frame == held).all() for frame in frames) == 1, "of the list of questions alone, not of the tar"


@pytest.mark.faults
@pytest.mark.usefixtures("local_ray")
def test_another_pool_makes_the_same_bytes(finished: Path, data: Path, sources: Path, tmp_path: Path) -> None:
    again = tree(data, sources, tmp_path / "run")
    again["tokenize"] |= {"encode": {"workers": 2, "cpus": 0.2}, "decode": {"workers": 3, "cpus": 0.2}}
    first = tokenized(finished)
    _run_all(plan_recipe(Recipe.model_validate(again))[:3])
    second = tokenized(tmp_path / "run")
    assert second.record.figures.frames_encoded == second.record.figures.frames > 0, "none of the other run's codes"
    assert read_partitions(second) == read_partitions(first)
    assert second.shared.hashes("documents") == first.shared.hashes("documents")
