"""The whole recipe, and the checks that its parts fit together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

from pydantic import Field, model_validator

from pipelines.recipe.base import Config, Name
from pipelines.recipe.data import Pack, PackedData, Source, Storage, TextTokenizer, Tokenize, VisualTokenizer
from pipelines.recipe.evaluate import Evaluate
from pipelines.recipe.train import Model, Train, TrainStage
from storage.public_url import public_below, public_url
from storage.setting_types import Count
from tokenization.generated.settings import Needles


class Recipe(Config):
    """The whole of what to run."""

    name: Name
    seed: Count = 0
    storage: Storage
    sources: dict[Name, Source] = Field(min_length=1)
    text_tokenizer: TextTokenizer = TextTokenizer()
    vqgan: VisualTokenizer | None = None
    tokenize: Tokenize = Tokenize()
    pack: Pack = Pack()
    model: Model = Model()
    train: Train | None = None
    """None: data alone, the shards of `pack.stages`."""
    evaluate: Evaluate = Evaluate()

    @property
    def training(self) -> Train:
        """How the model is trained, of a recipe that trains one."""
        assert self.train is not None, "the recipe has no train"
        return self.train

    @property
    def curriculum(self) -> list[TrainStage]:
        """The stages of training; none of a recipe of data alone."""
        return self.train.stages if self.train else []

    @property
    def packed(self) -> dict[str, PackedData]:
        """What is packed, by the recipe's key that says so."""
        named = {f"train.stages.{index}": stage for index, stage in enumerate(self.curriculum)}
        return {**named, **{f"pack.stages.{index}": stage for index, stage in enumerate(self.pack.stages)}}

    def public_json(self) -> dict[str, Any]:
        """Plain JSON for files and logs: without storage options, and with URLs without credentials."""
        tree = _public(self.model_dump(mode="json", exclude={"storage": {"options"}}))
        for source in tree["sources"].values():
            if source["generate"] is None:  # what is of files says no more of itself than it always did
                del source["generate"]
            for key in ("urls", "side", "heldout", "media_from"):
                source[key] = [public_below(self.storage.data, url) for url in source[key]]
        return cast("dict[str, Any]", tree)

    def max_frames(self, source: str) -> int | None:
        """The most frames of a video of this source, None for all: documents that are windows of it leave none out."""
        windows = self.tokenize.frames_per_document is not None
        return self.sources[source].max_frames or (None if windows else self.tokenize.max_frames)

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Recipe:
        scheme = self.storage.root.partition("://")[0]
        if scheme in ("http", "https", "package"):
            raise ValueError(f"storage.root is read-only ({scheme}://); name a folder or a bucket to write to")
        vision = [name for name, source in self.sources.items() if source.has_vision]
        if vision and self.vqgan is None:
            raise ValueError(f"sources.{vision[0]} has a vision field but the recipe has no vqgan; add one")
        _check_generated(self.sources)
        _check_data_alone(self)
        if len({stage.name for stage in self.packed.values()}) < len(self.packed):
            raise ValueError(
                f"{'train' if self.train else 'pack'}.stages: two stages have the same name; give each its own"
            )
        for key, packed in self.packed.items():
            _check_packed(key, packed, self.sources)
        if self.train is not None:
            _check_device(self.train, self.evaluate)
            _check_training(self.model, self.train)
            _check_evaluation(self.evaluate, self.vqgan, self.train.stages[-1].context)
        return self


def _check_generated(sources: Mapping[str, Source]) -> None:
    """Needles are hidden in the text of a source of files."""
    for name, source in sources.items():
        if not isinstance(source.generate, Needles):
            continue
        key, text = f"sources.{name}.generate.text", source.generate.text
        if text not in sources:
            raise ValueError(f"{key} names the source {text!r}, which sources does not define")
        if sources[text].generate is not None:
            raise ValueError(f"{key} names {text!r}, which is generated itself; name a source of texts with urls")


def _public(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _public(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_public(value) for value in tree]
    return public_url(tree) if isinstance(tree, str) else tree


def _check_data_alone(recipe: Recipe) -> None:
    """A recipe either trains, or says what is packed and nothing of a model."""
    if recipe.train is not None:
        if recipe.pack.stages:
            raise ValueError("pack.stages is for recipes without train, each of whose stages names its data; drop one")
        return
    if not recipe.pack.stages:
        raise ValueError("neither train nor pack.stages is there; add train, or pack.stages to make shards alone")
    if needless := sorted({"model", "evaluate"} & recipe.model_fields_set):
        raise ValueError(f"{needless[0]} is of a model, and without train there is none; drop it, or add train")


def _check_packed(key: str, packed: PackedData, sources: Collection[str]) -> None:
    """The data of a stage is of sources that there are, and some length of documents fits."""
    if unknown := [source for source in packed.source_names if source not in sources]:
        where = "mixture" if isinstance(packed, TrainStage) else "sources"
        raise ValueError(f"{key}.{where} names the source {unknown[0]!r}, which sources does not define")
    if packed.max_document_tokens is not None and packed.min_document_tokens > packed.max_document_tokens:
        raise ValueError(
            f"{key}.min_document_tokens {packed.min_document_tokens} is more than its max_document_tokens "
            f"{packed.max_document_tokens}, so no document fits; lower it"
        )


def _check_training(model: Model, train: Train) -> None:
    for index, stage in enumerate(train.stages):
        key = f"train.stages.{index}"
        _check_stage(train, key, stage)
        _check_attention(model, train, key, stage)
        _check_memory(train, key, stage)


def _check_device(train: Train, evaluate: Evaluate) -> None:
    """Training and evaluation can compute what the recipe asks for on their GPUs or CPUs."""
    if train.resources.gpus not in (0, 1):
        raise ValueError(
            f"train.resources.gpus {train.resources.gpus:g} is not what a worker trains on, one GPU or none; set 1, or "
            f"0 for the CPU, and train.workers to the number of GPUs"
        )
    for key, pool in (("train", train.resources), ("evaluate", evaluate.resources)):
        if pool.gpus and train.precision == "fp32":
            raise ValueError(
                f"{key}.resources.gpus {pool.gpus:g} needs half precision, the only one that a GPU's attention kernels "
                f"take, and train.precision is fp32; set train.precision: bf16, or {key}.resources.gpus: 0"
            )
    if train.kernels == "liger" and not train.resources.gpus:
        raise ValueError(
            "train.kernels liger needs a GPU a worker and train.resources asks for none; set train.resources.gpus: 1, "
            "or train.kernels: compile"
        )


def _check_evaluation(evaluate: Evaluate, vqgan: VisualTokenizer | None, context: int) -> None:
    """The evaluation of the last model fits its context."""
    needle, generation = evaluate.needle, evaluate.generation
    if needle and max(needle.contexts) > context:
        raise ValueError(
            f"evaluate.needle.contexts has {max(needle.contexts)}, above the last context {context}; lower it"
        )
    if generation and vqgan:
        frames = generation.prompt_frames + generation.frames
        tokens = frames * (vqgan.sizes.codes_per_frame + 1)
        if tokens > context:
            raise ValueError(
                f"evaluate.generation: {frames} frames are {tokens} tokens, more than the last stage's context "
                f"{context}; lower prompt_frames or frames"
            )


def _check_stage(train: Train, key: str, stage: TrainStage) -> None:
    if not any(stage.mixture.values()):
        raise ValueError(f"{key}.mixture has no share above 0; raise one")
    if stage.batch_tokens % stage.context:
        raise ValueError(f"{key}.batch_tokens {stage.batch_tokens} is no multiple of its context {stage.context}")
    if train.workers % stage.sp:
        raise ValueError(
            f"{key}.sp {stage.sp} does not divide train.workers {train.workers}; "
            f"choose an sp that divides it or change the workers"
        )
    if stage.context * stage.rows % stage.sp:
        raise ValueError(
            f"{key}.context {stage.context} x rows {stage.rows} is no multiple of sp {stage.sp}, whose ranks hold "
            f"equally many tokens; change one of them"
        )
    per_step = train.workers // stage.sp * stage.rows
    if train.min_workers is None and stage.sequences % per_step:  # some sizes of a range pad
        raise ValueError(
            f"{key}.batch_tokens gives {stage.sequences} sequences a step, which {train.workers // stage.sp} "
            f"data-parallel ranks of {stage.rows} row(s) cannot share evenly; make it a multiple of {per_step}"
        )
    if stage.warmup_steps >= stage.steps:
        raise ValueError(f"{key}.warmup_steps {stage.warmup_steps} leaves no step of its {stage.steps}")


def _check_attention(model: Model, train: Train, key: str, stage: TrainStage) -> None:
    attention = train.for_stage(stage).attention
    if attention.ulysses is None:
        return
    named = "train.attention" if stage.attention is None else f"{key}.attention"
    if stage.sp % attention.ulysses:
        raise ValueError(
            f"{named}.ulysses {attention.ulysses} does not divide {key}.sp {stage.sp}; choose a divisor of every "
            f"stage's sp, or set {key}.attention"
        )
    if model.init is None:  # a checkpoint's heads are known once it is loaded
        from model.llama.config import llama_config  # imports torch, which decode tasks do without
        from model.training.rank_batch import attention_shape

        config = llama_config(model.size, 1, stage.context, stage.rope_theta)
        if wrong := attention.unfit_for(attention_shape(config, train.precision).kv_heads):
            raise ValueError(f"{named}.{wrong}")


def _check_memory(train: Train, key: str, stage: TrainStage) -> None:
    """The stage's ZeRO stage goes with the precision, with the group that holds weights and with what is offloaded."""
    here = train.for_stage(stage)
    if here.zero == 0 and train.precision == "bf16":
        named = "train" if stage.zero is None else key
        raise ValueError(
            f"{named}.zero 0 trains in fp32 only, and train.precision is bf16; set {named}.zero: 1, whose weights are "
            f"replicated too"
        )
    if wrong := here.unfit_group(train.workers):
        named = "train" if stage.zero_group is None else key
        raise ValueError(f"{named}.{wrong} in {key}")
    if wrong := here.memory.unfit_for(here.zero):
        named = "train.memory" if stage.memory is None else f"{key}.memory"
        raise ValueError(f"{named}.{wrong} in {key}")
