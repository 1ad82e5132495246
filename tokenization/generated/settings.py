"""What a source that generates documents makes: one dataclass a kind, as a recipe has it below `generate`.

Documents are numbered, and each is a function of these settings (but for `documents`), the tokenizer, its number and,
of needles, the text that it is given: more documents are further documents beside the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from storage.setting_types import AtLeast2, Count, OutputNeutral, Positive, Text

Range = Annotated[tuple[Positive, Positive], Field(description="the least and the most, both included")]

OBJECT_TOKENS = 1 << 20
"""Tokens of the documents that are listed as one object, at most, unless a single one is longer."""
OBJECT_DOCUMENTS = 1 << 12
"""Documents of one object at most."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What all kinds have. Raises ValueError on a range whose least is above its most."""

    documents: OutputNeutral[Positive]
    """How many; with more of them later, those that are there stay as they are."""
    tokens: Range
    """Least and most tokens of a document, BOS and EOS included; lengths are drawn evenly on a logarithmic scale."""
    seed: Count = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, tuple) and len(value) == 2 and value[0] > value[1]:
                raise ValueError(f"{name} [{value[0]}, {value[1]}] has its least above its most; swap them")
        if self.tokens[0] < self.least_tokens:
            raise ValueError(
                f"tokens begins at {self.tokens[0]}, which leaves no room; use at least {self.least_tokens}"
            )

    @property
    def least_tokens(self) -> int:
        """Of a document, so that something to learn has room in it."""
        return 16

    @property
    def documents_per_object(self) -> int:
        """Documents that are listed as one object, and are made by one task."""
        return min(max(1, OBJECT_TOKENS // self.tokens[1]), OBJECT_DOCUMENTS)


@dataclass(frozen=True, kw_only=True)
class Spans(Generated):
    """A span of random tokens that repeats until the document is full, with loss from its second time on. What follows
    is known only to who looks back for the same token: attention learns that soonest, from short documents of these.
    """

    kind: Literal["spans"]
    span: Range = (4, 48)
    """Least and most tokens of the span; at most a third of the document."""
    alphabet: AtLeast2 = 256
    """Different tokens that spans are drawn from: those of the ten digits, and so many from the start of the vocabulary
    that stand for text with a letter, which in byte-pair vocabularies are the most common ones."""
    targets: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.25
    """Share of the repeated tokens that carry loss, drawn one by one: a target costs more than the rest of a small
    model."""


@dataclass(frozen=True, kw_only=True)
class KeyValues(Generated):
    """Lines of a key and its value, a number, and then some of the keys again, with loss on their values."""

    kind: Literal["key-values"]
    pairs: Range = (2, 1024)
    """Least and most of them; as many as there is room for."""
    asked: Range = (1, 64)
    """Least and most of the pairs that are asked for, at most all."""
    digits: Range = (4, 9)
    """Least and most digits of a value."""

    @property
    def least_tokens(self) -> int:
        """See `Generated`."""
        return 96 + 2 * self.digits[1]


@dataclass(frozen=True, kw_only=True)
class Needles(Generated):
    """Sentences that each tell a number, hidden in text at sentence breaks, and questions about them behind the text,
    with loss on the answers. Names are made up and wordings are drawn for each document.
    """

    kind: Literal["needles"]
    text: Text
    """The source in whose text they are hidden, of which only what is trained on is taken."""
    needles: Range = (1, 4)
    """Least and most of them; as many as there is room for."""
    asked: Range = (1, 64)
    """Least and most of the needles that are asked for, at most all."""
    digits: Range = (4, 9)
    """Least and most digits of a number."""

    @property
    def least_tokens(self) -> int:
        """See `Generated`."""
        return 256 + 2 * self.digits[1]


Kind = Spans | KeyValues | Needles
