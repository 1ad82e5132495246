"""What is evaluated: a model with its vocabulary, its text tokenizer and its codec, wherever it lies.

In: what a training stage of a run left, or the folder of an exported model. A subject is sent to workers; what it names
is fetched and loaded there, once a process. Nothing heavy is imported before.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.codecs.record import CodecRecord
from pipelines.dag.manifest import StageOutput
from pipelines.export.folder import ModelFolder
from pipelines.recipe import Recipe
from pipelines.train.record import TrainRecord
from tokenization.text.tokenizer import TextTokenizer, load_text_tokenizer
from tokenization.text.tokenizer_files import fetch_tokenizer
from tokenization.vocabulary import JointVocabulary

if TYPE_CHECKING:  # they take seconds to import, which a driver does without
    import torch
    from transformers import LlamaForCausalLM

    from model.attention.p2p import Group
    from tokenization.codecs.vqgan.model import VQGAN


@dataclass(frozen=True)
class Subject(ABC):
    """A trained model.

    name: for people. fingerprint: of its weights, or of how they were made. device: "cpu" or "cuda". precision: in
    which it computes, "fp32" or "bf16". fps: frames a second at which videos were sampled for it, None where it has
    seen none.
    """

    name: str
    fingerprint: str
    vocabulary: JointVocabulary
    device: str
    precision: str
    fps: float | None

    @property
    def has_codec(self) -> bool:
        """Whether it can be given, and give, frames."""
        return self.fps is not None and "vision" in self.vocabulary

    def model(self, group: Group = None) -> LlamaForCausalLM:
        """The model, ready to evaluate; cells that follow each other in a process share it.

        group: the ranks of the cell, each of which asks alike.
        """
        import torch

        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return _model(self._weights(), self.device, dtype)

    @abstractmethod
    def tokenizer(self) -> TextTokenizer:
        """The text tokenizer, whose ids are the first of the vocabulary."""

    @abstractmethod
    def codec(self) -> VQGAN:
        """What turns frames into codes and back, in the precision in which codes were made, on the device."""

    @abstractmethod
    def _weights(self) -> Path:
        """A local folder with configuration and weights."""


@dataclass(frozen=True)
class PlannedSubject(Subject):
    """The model that a recipe will train, of which there are only the vocabulary and the tokenizer yet."""

    recipe: Recipe

    @classmethod
    def of_recipe(cls, recipe: Recipe, vocabulary: JointVocabulary) -> PlannedSubject:
        """Of the recipe's last stage."""
        return cls(recipe.name, "", vocabulary, *_computes(recipe), recipe)

    def tokenizer(self) -> TextTokenizer:
        """See `Subject`."""
        return _recipe_tokenizer(self.recipe)

    def codec(self) -> VQGAN:
        """There is none yet."""
        raise NotImplementedError

    def _weights(self) -> Path:
        raise NotImplementedError


@dataclass(frozen=True)
class TrainedSubject(Subject):
    """The model that a training stage of a run left."""

    recipe: Recipe
    trained: StageOutput[TrainRecord]
    codec_output: StageOutput[CodecRecord] | None

    @classmethod
    def of_stage(
        cls,
        recipe: Recipe,
        vocabulary: JointVocabulary,
        trained: StageOutput[TrainRecord],
        codec: StageOutput[CodecRecord] | None,
    ) -> TrainedSubject:
        """codec: of the run, None where all is text."""
        device, precision, fps = _computes(recipe)
        manifest, fps = trained.manifest, fps if codec else None
        stage, fingerprint = manifest.declaration.stage, manifest.fingerprint
        return cls(stage, fingerprint, vocabulary, device, precision, fps, recipe, trained, codec)

    def tokenizer(self) -> TextTokenizer:
        """See `Subject`."""
        return _recipe_tokenizer(self.recipe)

    def codec(self) -> VQGAN:
        """See `Subject`."""
        from pipelines.codecs.vqgan import load_vqgan

        assert self.recipe.vqgan is not None
        assert self.codec_output is not None
        return load_vqgan(self.codec_output.store, self.recipe.vqgan, device=self.device)

    def _weights(self) -> Path:
        return self.trained.store.fetch_folder(self.trained.record.outputs.model)


@dataclass(frozen=True)
class ExportedSubject(Subject):
    """An exported model."""

    folder: ModelFolder

    @classmethod
    def of_folder(cls, folder: ModelFolder, gpu: bool = False) -> ExportedSubject:
        """gpu: whether it runs on one, which computes in half precision; else fp32, as models are evaluated on CPUs."""
        described = folder.description
        codec = described.codecs.get("vision")
        origin = described.origin
        return cls(
            described.name,
            f"{origin.fingerprint}-{origin.step}",
            JointVocabulary.from_json(described.vocabulary),
            "cuda" if gpu else "cpu",
            "bf16" if gpu else "fp32",
            codec.fps if codec else None,
            ModelFolder(folder.store, described),  # without what it has loaded
        )

    def tokenizer(self) -> TextTokenizer:
        """See `Subject`."""
        return self.folder.tokenizer

    def codec(self) -> VQGAN:
        """See `Subject`."""
        return self.folder.codec(device=self.device)

    def _weights(self) -> Path:
        return self.folder.weights


def _computes(recipe: Recipe) -> tuple[str, str, float | None]:
    """Device, precision and fps of a model of a recipe."""
    on_gpu = recipe.evaluate.resources.gpus > 0
    is_half = on_gpu and recipe.training.precision == "bf16"
    return (
        "cuda" if on_gpu else "cpu",
        "bf16" if is_half else "fp32",
        recipe.tokenize.document_fps if recipe.vqgan else None,
    )


def _recipe_tokenizer(recipe: Recipe) -> TextTokenizer:
    return load_text_tokenizer(str(fetch_tokenizer(recipe.text_tokenizer.path, recipe.storage.options)))


@functools.lru_cache(maxsize=1)
def _model(folder: Path, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    from model.llama.llama import load_llama

    model = load_llama(folder, dtype=dtype)
    return model.to(device).eval()  # type: ignore[arg-type]
