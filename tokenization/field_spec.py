"""A field spec as a recipe writes it: which fields of a record become tokens, in which order, and which carry loss.

A spec lists fields of the record in order, separated by commas: `[caption],vision`.

    caption       a text field
    a+b           text fields joined with a separator before they are encoded
    [caption]     the same without loss
    vision        a field of VQGAN codes (any field with "vision" in its name): `<vision>` frames `</vision>`
    <|bos|>       the BOS id, with loss unless in brackets; <|eos|> likewise

In: the spec's text. Out: its entries, and whether a record has what they need. `tokenization.fields` makes the tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from storage.errors import BadData, UserError
from tokenization.readers.record import NotText

BOS, EOS = "<|bos|>", "<|eos|>"


@dataclass(frozen=True)
class Field:
    """One entry of a spec: the record's fields that it joins, or BOS or EOS, and whether it has loss."""

    names: tuple[str, ...]
    loss: bool

    @property
    def is_marker(self) -> bool:
        """Whether the entry is BOS or EOS alone."""
        return self.names[0] in (BOS, EOS)

    @property
    def is_vision(self) -> bool:
        """Whether the entry is a stream of frames; as in LWM, its name decides."""
        return "vision" in self.names[0]


@dataclass(frozen=True)
class FieldSpec:
    """A parsed spec, and its source text for provenance."""

    text: str
    fields: tuple[Field, ...]

    @classmethod
    def parse(cls, text: str, known: Collection[str] | None = None) -> FieldSpec:
        """Parse a spec such as `[question+caption],vision,answer`.

        known: the fields of the records, where they are known. Raises UserError on a malformed spec or unknown field.
        """
        fields = []
        for entry in (part.strip() for part in text.split(",")):
            loss = not (entry.startswith("[") and entry.endswith("]"))
            names = tuple(name.strip() for name in (entry if loss else entry[1:-1]).split("+"))
            for name in names:
                _check_name(name, text, joined=len(names) > 1, known=known)
            fields.append(Field(names, loss))
        return cls(text, tuple(fields))

    def __str__(self) -> str:
        return self.text

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The fields of the record that the spec uses, in order."""
        return tuple(name for field in self.fields for name in field.names if name not in (BOS, EOS))

    @cached_property
    def has_vision(self) -> bool:
        """Whether an entry is a stream of frames."""
        return any(field.is_vision for field in self.fields)

    def check(self, record: Mapping[str, Any]) -> None:
        """Raise BadData where a record lacks a field, or where no entry with loss has anything to learn."""
        learnt = []
        for field in self.fields:
            if field.is_marker:
                continue
            if not field.is_vision:
                is_blank = all(not text or text.isspace() for text in [text_of(record, name) for name in field.names])
            elif record.get(field.names[0]) is None:
                raise lacks(field.names[0])
            else:
                is_blank = False
            learnt += [not is_blank] if field.loss else []
        if learnt and not any(learnt):
            raise BadData("the text is empty")


def _check_name(name: str, spec: str, joined: bool, known: Collection[str] | None) -> None:
    where = f'field spec "{spec}"'
    if not name:
        raise UserError(f"{where}: an entry is empty; separate fields by single commas, as in [caption],vision")
    if name in (BOS, EOS):
        if joined:
            raise UserError(f"{where}: {name} cannot be joined with +; give it an entry of its own")
        return
    if any(mark in name for mark in "[]<>|"):
        raise UserError(f'{where}: "{name}" is no field; brackets go around a whole entry, markers are {BOS} and {EOS}')
    if joined and "vision" in name:
        raise UserError(f"{where}: only text can be joined with +; give {name} an entry of its own")
    if known is not None and name not in known:
        raise UserError(f'{where}: the records have no field "{name}"; they have {", ".join(sorted(known)) or "none"}')


def text_of(record: Mapping[str, Any], name: str) -> str:
    """A text field of a record. Raises BadData where it lacks that, or holds something else or no Unicode in it."""
    value = record.get(name)
    if name not in record:
        raise lacks(name)
    if not isinstance(value, str):
        held = value.type_name if isinstance(value, NotText) else type(value).__name__
        raise BadData(f'the record holds {held}, not text, in the field "{name}"')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadData(f"the text holds a lone surrogate at character {error.start}") from None
    return value


def lacks(name: str) -> BadData:
    """The error of a record that lacks a field."""
    return BadData(f'the record lacks the field "{name}"')
