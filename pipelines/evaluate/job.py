"""What every part of the evaluation gets: the recipe and what the stages before made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.codecs.record import CodecRecord
from pipelines.codecs.stage import CodecStage
from pipelines.dag.manifest import StageOutput
from pipelines.pack.record import PackRecord
from pipelines.pack.stage import PackStage
from pipelines.recipe import Kind as SourceKind
from pipelines.recipe import Recipe
from pipelines.sources.listing import Listing, read_objects
from storage.store import Store
from tokenization.text.tokenizer import TextTokenizer, load_text_tokenizer
from tokenization.text.tokenizer_files import fetch_tokenizer
from tokenization.vocabulary import JointVocabulary

CONTINUATIONS = 4
"""Windows of held-out clips that are continued."""

Kind = Literal["loss", "needle", "reconstruction", "continuation", "prompt"]


@dataclass(frozen=True)
class Part:
    """One unit of work, of retry and of resume. arguments: of the function that measures this kind, beside the name."""

    name: str
    kind: Kind
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class EvaluateJob:
    """The inputs of the stage. `store` is the stage's own folder."""

    recipe: Recipe
    vocabulary: JointVocabulary
    inputs: Mapping[str, StageOutput[Any]]
    store: Store

    @property
    def last(self) -> str:
        """The name of the last training stage."""
        return self.recipe.curriculum[-1].name

    @property
    def device(self) -> str:
        """Where the models run."""
        return "cuda" if self.recipe.evaluate.resources.gpus else "cpu"

    @property
    def has_vision(self) -> bool:
        """Whether there is a VQGAN and room in the vocabulary for its codes."""
        return self.codec is not None and "vision" in self.vocabulary

    @property
    def codec(self) -> StageOutput[CodecRecord] | None:
        """The VQGAN; None where all is text."""
        return self.inputs.get(CodecStage.kind)

    def packed(self, stage: str) -> StageOutput[PackRecord]:
        """What was packed for a training stage."""
        return self.inputs[PackStage.named(stage)]

    def objects(self, kinds: tuple[SourceKind, ...], heldout: bool) -> Listing:
        """The raw objects of these kinds in one split, in the listing's order."""
        return read_objects(self.inputs["sources"].store, self.recipe).of_split(heldout, kinds)

    def tokenizer(self) -> TextTokenizer:
        """The recipe's text tokenizer."""
        return load_text_tokenizer(str(fetch_tokenizer(self.recipe.text_tokenizer.path, self.recipe.storage.options)))
