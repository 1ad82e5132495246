"""What the patterns of `heldout` hold out of a listing: told in the plan, checked when what is inside has been read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from pipelines.recipe import Recipe
from pipelines.report.numbers import count_of
from pipelines.sources.heldout_patterns import heldout_by
from pipelines.sources.identity import Names
from pipelines.sources.list_sources import WITH_INSIDES, inner_patterns
from pipelines.sources.listing import SourceObject
from storage.errors import UserError
from storage.printable import printable
from storage.public_url import public_below


def heldout_notes(recipe: Recipe, objects: Sequence[SourceObject]) -> tuple[str, ...]:
    """How many objects each pattern of `heldout` holds out, a sentence each. objects: as `list_sources` made them."""
    notes = []
    for name, source in sorted(recipe.sources.items()):
        of_source = [found for found in objects if found.source == name]
        has_insides = any(found.kind in WITH_INSIDES for found in of_source)
        inside = set(inner_patterns(recipe, name).values()) if has_insides else set()
        for pattern in dict.fromkeys(source.heldout):
            count = len({found.url for found in of_source if pattern in found.heldout_by})
            shown = printable(public_below(recipe.storage.data, pattern))
            note = f"sources.{name}.heldout {shown}: {count_of(count, 'objects')}"
            if pattern in inside:
                note += ", and what it names inside the others, which is seen when they are read"
            notes.append(note)
    return tuple(notes)


def check_heldout(recipe: Recipe, objects: Sequence[SourceObject], matched: Mapping[str, Collection[str]]) -> None:
    """Raise UserError where a pattern of `heldout` names no object, and nothing inside of tars and files of records.

    matched: the globs of `inner_patterns` that named something inside of a source's objects, by source.
    """
    for name, source in recipe.sources.items():
        of_source = [found for found in objects if found.source == name]
        inner = inner_patterns(recipe, name) if any(found.inner_heldout for found in of_source) else {}
        whole = heldout_by(source, recipe.storage, [Names((one.url,), (one.key,)) for one in of_source])
        idle = set(inner.values()) - {inner[glob] for glob in matched.get(name, ()) if glob in inner}
        if idle := idle.difference(*whole):
            shown = printable(public_below(recipe.storage.data, sorted(idle)[0]))
            raise UserError(
                f"sources.{name}.heldout: {shown} names no object of the source and nothing inside of its tars and "
                f"files of records, so all would be trained on; mend it or take it out, and run again"
            )
