"""Sources that generate documents: listed without files, by ranges of numbers that stay as they are when they grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.preflight import check_recipe
from pipelines.recipe import Recipe
from pipelines.recipe.load import load_recipe
from pipelines.sources.generated import TEXTS
from pipelines.sources.list_sources import list_sources
from pipelines.sources.listing import Listing, listing_digest
from pipelines.tokenize.generated_documents import generated_documents
from pipelines.tokenize.partition import Partitions
from pipelines.tokenize.records import Tally, TokenizeJob
from storage.errors import UserError
from tokenization.text.tokenizer import load_text_tokenizer
from tokenization.vocabulary import JointVocabulary

NEEDLES = {"kind": "needles", "documents": 300, "tokens": [288, 8192], "text": "books", "needles": [1, 4]}


def tree(folder: Path, **generate: Any) -> dict[str, Any]:
    """A recipe of twelve books, two of them held out, and of one source that generates documents."""
    for number in range(12):
        text = f"Chapter {number}. It was a dark night of {number} storms.\n" * 30
        (folder / f"book-{number:02d}.txt").write_text(text)
    return {
        "name": "tiny",
        "storage": {"root": str(folder / "run"), "data": str(folder)},
        "sources": {
            "books": {"urls": ["book-*.txt"], "heldout": ["book-00.txt", "book-01.txt"]},
            "made": {"generate": {**NEEDLES, **generate}},
        },
        "pack": {"stages": [{"name": "a", "context": 512, "objective": "text", "sources": ["made"]}]},
    }


def listed(made: dict[str, Any]) -> Listing:
    return list_sources(Recipe.model_validate(made))


def of_made(listing: Listing) -> dict[str, Any]:
    return {found.key: found for found in listing.of_source("made")}


def partitions(listing: Listing) -> list[str]:
    settings: dict[str, dict[str, Any]] = {"books": {}, "made": {}}
    return [name for name in Partitions(listing, 64 * 2**20, settings) if name.startswith("made-")]


def test_objects_are_ranges_of_numbers_and_partitions_of_their_own(tmp_path: Path) -> None:
    listing = listed(tree(tmp_path))
    made = of_made(listing)
    assert list(made) == ["made/000000000-000000127", "made/000000128-000000255", "made/000000256-000000299"]
    assert {found.kind for found in made.values()} == {"generated"}
    assert [found.side["documents"] for found in made.values()] == [[0, 128], [128, 256], [256, 300]]
    assert len(partitions(listing)) == 3
    check_recipe(Recipe.model_validate(tree(tmp_path)), listing)


def test_listing_is_the_same_again_and_other_where_the_settings_are(tmp_path: Path) -> None:
    digest = listing_digest(listed(tree(tmp_path)))["made"]["digest"]
    assert listing_digest(listed(tree(tmp_path)))["made"]["digest"] == digest
    others = ({"seed": 4}, {"tokens": [288, 8191]}, {"needles": [1, 5]}, {"documents": 301})
    for other in others:
        assert listing_digest(listed(tree(tmp_path, **other)))["made"]["digest"] != digest


def test_more_documents_leave_all_full_partitions_as_they_are(tmp_path: Path) -> None:
    before, after = partitions(listed(tree(tmp_path))), partitions(listed(tree(tmp_path, documents=1000)))
    assert len(set(before) & set(after)) == 2
    assert len(after) == 8


def test_text_is_of_what_is_trained_on_alone(tmp_path: Path) -> None:
    for found in of_made(listed(tree(tmp_path, documents=3000))).values():
        names = {Path(one["url"]).name for one in found.side["texts"]}
        assert 0 < len(names) <= TEXTS
        assert not names & {"book-00.txt", "book-01.txt"}


def test_a_new_text_makes_another_of_few_objects(tmp_path: Path) -> None:
    before = of_made(listed(tree(tmp_path, documents=12_800, tokens=[288, 8192])))
    (tmp_path / "book-99.txt").write_text("One more book. It is short.\n" * 30)
    after = of_made(listed(tree(tmp_path, documents=12_800, tokens=[288, 8192])))
    assert list(before) == list(after)
    assert len(before) == 100
    changed = [key for key in before if before[key] != after[key]]
    assert 0 < len(changed) < 90


def test_heldout_names_ranges_by_their_keys(tmp_path: Path) -> None:
    made = tree(tmp_path)
    made["sources"]["made"]["heldout"] = ["made/000000128-*"]
    assert [key for key, found in of_made(listed(made)).items() if found.heldout] == ["made/000000128-000000255"]
    made["sources"]["made"]["heldout"] = ["made/7*"]
    with pytest.raises(UserError, match="names none of the 3 objects"):
        listed(made)


def test_documents_follow_from_their_object_and_say_what_they_are_of(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(tree(tmp_path, documents=200))
    first, second = list_sources(recipe).of_source("made")
    tokenizer = load_text_tokenizer()
    job = TokenizeJob(recipe, JointVocabulary.of_text(tokenizer.size, bos_id=1, eos_id=2), 0)
    tally = Tally()
    documents = list(generated_documents(second, job, tokenizer, tally))
    assert [one.key for one in documents] == [f"made#{number}" for number in range(128, 200)]
    assert tally.documents == tally.units == 72
    assert tally.tokens == sum(map(len, documents))
    again = list(generated_documents(second, job, tokenizer, Tally()))
    assert [one.tokens.tolist() for one in again] == [one.tokens.tolist() for one in documents]
    assert "dark night" in tokenizer.decode(documents[0].tokens)
    provenance = documents[0].provenance
    assert (provenance["url"], provenance["record"]) == ("generated://made/000000128-000000199", 128)
    assert provenance["texts"]
    assert all(url.startswith(str(tmp_path)) for url in provenance["texts"])
    assert first.side["texts"] != second.side["texts"]


def test_an_object_without_readable_text_goes_to_quarantine(tmp_path: Path) -> None:
    made = tree(tmp_path)
    for number in range(2, 12):
        (tmp_path / f"book-{number:02d}.txt").write_text(" \n")
    recipe = Recipe.model_validate(made)
    tokenizer, tally = load_text_tokenizer(), Tally()
    job = TokenizeJob(recipe, JointVocabulary.of_text(tokenizer.size, bos_id=1, eos_id=2), 0)
    first = list_sources(recipe).of_source("made")[0]
    assert list(generated_documents(first, job, tokenizer, tally)) == []
    assert tally.quarantine[0]["reason"] == "no text of source books can be read to hide needles in"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources.made.urls": ["x.txt"]}, "give either urls or generate, not both and not neither"),
        ({"sources.made.fields": ["text"]}, "fields is of sources with urls, not of generated documents; drop it"),
        ({"sources.made.generate": None}, "give either urls or generate"),
        ({"sources.made.generate.text": "plays"}, "names the source 'plays', which sources does not define"),
        ({"sources.made.generate.text": "made"}, "which is generated itself"),
        ({"sources.made.generate.kind": "haystack"}, "key-values"),
        ({"sources.made.generate.tokens": [512, 256]}, r"tokens \[512, 256\] has its least above its most"),
        ({"sources.made.generate.tokens": [16, 256]}, "at least 274"),
        ({"sources.made.generate.needle": [1, 2]}, "unknown key 'sources.made.generate.needles.needle'"),
        ({"sources.made.generate.documents": 0}, "greater than 0"),
    ],
)
def test_a_mistake_in_the_recipe_is_one_sentence(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    made = tree(tmp_path)
    for key, value in change.items():
        *parents, last = key.split(".")
        node = made
        for part in parents:
            node = node[part]
        node[last] = value
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made))
    with pytest.raises(UserError, match=message):
        load_recipe(str(tmp_path / "recipe.yaml"))


def test_needles_need_text_that_is_trained_on(tmp_path: Path) -> None:
    made = tree(tmp_path)
    made["sources"]["books"]["heldout"] = ["*"]
    with pytest.raises(UserError, match="has no text that is trained on"):
        listed(made)
