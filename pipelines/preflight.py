"""What a recipe and the listing of its sources show to be impossible, told before any stage runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow.compute as pc

from pipelines.evaluate.checks import check_tasks
from pipelines.recipe import Recipe
from pipelines.sources.known_fields import known_fields
from pipelines.sources.listing import MEDIA, Listing, json_names
from storage.errors import UserError
from storage.urls import first_contact
from tokenization.field_spec import FieldSpec
from tokenization.text.tokenizer_files import fetch_tokenizer


def check_recipe(recipe: Recipe, objects: Listing) -> None:
    """Raise UserError where a stage could only fail. objects: the listing of the recipe's sources."""
    for name in recipe.sources:
        own = objects.of_source(name)
        if recipe.sources[name].generate is not None:
            continue
        _check_media(recipe, name, own)
        with contextlib.suppress(OSError):  # reading is repeated, and explained, where it matters
            _check_fields(recipe, name, own)
    _check_sets(recipe, objects)
    _check_objectives(recipe)
    _check_splits(objects)
    _check_tokenizer(recipe)
    if recipe.train is not None:
        check_tasks(recipe, objects)


def _check_media(recipe: Recipe, name: str, objects: Listing) -> None:
    media = objects.where_in("kind", MEDIA) if recipe.vqgan is None else ()
    if media:
        raise UserError(
            f"sources.{name}: {media[0].url} is of kind {media[0].kind}, and the recipe has no vqgan to encode its "
            f"frames; add one, or name texts"
        )


def _check_fields(recipe: Recipe, name: str, objects: Listing) -> None:
    known, are_whole, are_all = known_fields(objects, recipe.storage.options, recipe.tokenize.decoder_limits)
    media = recipe.sources[name].media
    if not are_whole:  # what was not looked at may have any other
        return
    if media is not None and media not in known and known != {"vision"}:
        raise UserError(
            f'sources.{name}.media: no record has the column "{media}" that is to name its video or image; they have '
            f"{', '.join(sorted(known - {'vision'}))}"
        )
    known.discard(media or "")  # what is the medium is no field
    if not known:
        return
    specs = [FieldSpec.parse(text) for text in recipe.sources[name].fields]
    lacking = {spec.text: field for spec in specs for field in spec.names if field not in known}
    if lacking and (are_all or len(lacking) == len(set(recipe.sources[name].fields))):
        spec, field = next(iter(lacking.items()))
        raise UserError(
            f'sources.{name}.fields: no record has the field "{field}" that "{spec}" names; they have '
            f"{', '.join(sorted(known))}"
        )


def _check_sets(recipe: Recipe, objects: Listing) -> None:
    trained_on = set(objects.where(pc.invert(objects.column("heldout"))).distinct("source"))
    for key, packed in recipe.packed.items():
        if missing := sorted(set(packed.source_names) - trained_on):
            raise UserError(
                f"{key}: all of source {missing[0]!r} is held out, which leaves nothing to train on; narrow "
                f"sources.{missing[0]}.heldout, or drop it from the stage"
            )


def _check_objectives(recipe: Recipe) -> None:
    """What is packed has something to learn, and no loss on frames where the objective has none."""
    for key, packed in recipe.packed.items():
        specs = [(name, FieldSpec.parse(text)) for name in packed.source_names for text in recipe.sources[name].fields]
        if not any(field.loss for _, spec in specs for field in spec.fields):
            raise UserError(
                f"{key}: no field spec of its sources has loss on anything, which leaves nothing to learn; take the "
                f"brackets off a field in sources.{specs[0][0]}.fields"
            )
        for name, spec in specs:
            if packed.objective == "text" and any(field.is_vision and field.loss for field in spec.fields):
                raise UserError(
                    f"{key}: the field spec {spec.text!r} of sources.{name} has loss on frames, and the objective text "
                    f"has none; set {key}.objective: vision-text, or write [vision]"
                )


def _check_tokenizer(recipe: Recipe) -> None:
    from tokenization.text.tokenizer import check_text_tokenizer  # a tokenizer's imports take time

    url, options = recipe.text_tokenizer.path, recipe.storage.options
    with first_contact(url):
        check_text_tokenizer(str(fetch_tokenizer(url, options)))


def _check_splits(objects: Listing) -> None:
    """No source trains on what another holds out."""
    is_heldout = objects.column("heldout")
    heldout, trained_on = objects.where(is_heldout), objects.where(pc.invert(is_heldout))
    # Of a million objects next to none have a URL in both splits, unless the tails of videos are held out.
    heldout = heldout.where(pc.is_in(heldout.column("url"), value_set=trained_on.column("url")))
    trained_on = trained_on.where(pc.is_in(trained_on.column("url"), value_set=heldout.column("url")))
    parts: dict[str, list[_Part]] = {}
    for url, part in _parts(trained_on):
        parts.setdefault(url, []).append(part)
    for url, held in _parts(heldout):
        leak = next((one for one in parts[url] if _overlap(held, one)), None)
        if leak:
            raise UserError(
                f"sources.{leak.source}: it trains on {url}, of which sources.{held.source} holds out "
                f"{'a part' if held.inner or (held.start, held.end) != (0.0, 1.0) else 'all'}; hold the same out in "
                f"both"
            )


class _Part(NamedTuple):
    """What a source lists of an object for one split. inner: its globs over what is inside, as JSON."""

    source: str
    start: float
    end: float
    inner: str | None


def _parts(objects: Listing) -> Iterator[tuple[str, _Part]]:
    """URL and part of each object."""
    columns = [objects.column(name).to_pylist() for name in ("source", "start", "end", "inner_heldout")]
    return zip(objects.column("url").to_pylist(), map(_Part, *columns), strict=True)


def _overlap(held: _Part, trained_on: _Part) -> bool:
    """Whether two listings of one object, for the two splits, have something in common."""
    if held.inner and set(json_names(held.inner)) <= set(json_names(trained_on.inner)):
        return False
    return max(held.start, trained_on.start) < min(held.end, trained_on.end)
