"""What the patterns of `heldout` hold out of a listing: told in the plan, checked when what is inside has been read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from pipelines.recipe import Recipe
from pipelines.report.numbers import count_of
from pipelines.sources.heldout_patterns import heldout_by
from pipelines.sources.identity import Names
from pipelines.sources.list_sources import inner_patterns
from pipelines.sources.listing import Listing, SourceObject, json_names
from pipelines.sources.splits import WITH_INSIDES
from storage.errors import UserError
from storage.printable import printable
from storage.public_url import public_below


def heldout_notes(recipe: Recipe, objects: Listing) -> tuple[str, ...]:
    """How many objects each pattern of `heldout` holds out, a sentence each. objects: as `list_sources` made them."""
    notes = []
    for name, source in sorted(recipe.sources.items()):
        if not source.heldout:
            continue
        of_source = objects.of_source(name)
        has_insides = not WITH_INSIDES.isdisjoint(of_source.distinct("kind"))
        inside = set(inner_patterns(recipe, name).values()) if has_insides else set()
        combinations = of_source.distinct("heldout_by")
        for pattern in dict.fromkeys(source.heldout):
            naming = [one for one in combinations if pattern in json_names(one)]
            count = len(of_source.where_in("heldout_by", naming).distinct("url"))
            shown = printable(public_below(recipe.storage.data, pattern))
            note = f"sources.{name}.heldout {shown}: {count_of(count, 'objects')}"
            if pattern in inside:
                note += ", and what it names inside the others, which is seen when they are read"
            notes.append(note)
    return tuple(notes)


def check_heldout(recipe: Recipe, objects: Iterable[SourceObject], matched: Mapping[str, Collection[str]]) -> None:
    """Raise UserError where a pattern of `heldout` names no object, and nothing inside of tars and files of records.

    matched: the globs of `inner_patterns` that named something inside of a source's objects, by source.
    """
    listing = Listing.of(objects)
    for name, source in recipe.sources.items():
        of_source = listing.of_source(name) if source.heldout else Listing.of([])
        if of_source.column("inner_heldout").null_count == len(of_source):  # what is whole was checked when listed
            continue
        inner = inner_patterns(recipe, name)
        idle = set(inner.values()) - {inner[glob] for glob in matched.get(name, ()) if glob in inner}
        called = [*of_source.column("url").to_pylist(), *of_source.column("key").to_pylist()]
        names = Names(called, [*range(len(of_source))] * 2)
        if idle := idle.difference(*set(heldout_by(source, recipe.storage, names).values())):
            shown = printable(public_below(recipe.storage.data, sorted(idle)[0]))
            raise UserError(
                f"sources.{name}.heldout: {shown} names no object of the source and nothing inside of its tars and "
                f"files of records, so all would be trained on; mend it or take it out, and run again"
            )
