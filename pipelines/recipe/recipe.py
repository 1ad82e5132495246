"""The whole recipe."""

from __future__ import annotations

from pydantic import Field, model_validator

from pipelines.recipe.base import Config, Name
from pipelines.recipe.checks import check_parts
from pipelines.recipe.data import Pack, Source, Storage, TextTokenizer, Tokenize, VisualTokenizer
from pipelines.recipe.evaluate import Evaluate
from pipelines.recipe.train import Model, Train


class Recipe(Config):
    """The whole of what to run."""

    name: Name
    seed: int = 0
    storage: Storage
    sources: dict[Name, Source] = Field(min_length=1)
    text_tokenizer: TextTokenizer = TextTokenizer()
    vqgan: VisualTokenizer | None = None
    tokenize: Tokenize = Tokenize()
    pack: Pack = Pack()
    model: Model = Model()
    train: Train
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Recipe:
        check_parts(self.sources, self.vqgan, self.model, self.train, self.evaluate)
        return self
