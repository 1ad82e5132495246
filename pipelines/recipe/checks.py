"""What no part of a recipe can tell of itself: that its parts fit together.

In: the parts, each of them valid. Out: nothing, or a ValueError that names the key and the remedy, before anything has
run rather than after weeks of training.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.recipe.data import Source, VisualTokenizer
from pipelines.recipe.evaluate import Evaluate
from pipelines.recipe.train import Model, Train, TrainStage


def check_parts(
    sources: Mapping[str, Source], vqgan: VisualTokenizer | None, model: Model, train: Train, evaluate: Evaluate
) -> None:
    """Raise ValueError on the first thing that does not fit."""
    vision = [name for name, source in sources.items() if any("vision" in spec for spec in source.fields)]
    if vision and vqgan is None:
        raise ValueError(f"sources.{vision[0]} has a vision field but the recipe has no vqgan; add one")
    names = [stage.name for stage in train.stages]
    if len(set(names)) < len(names):
        raise ValueError("train.stages: two stages have one name; give each its own")
    _check_device(train, evaluate)
    for index, stage in enumerate(train.stages):
        key = f"train.stages.{index}"
        for source in stage.mixture:
            if source not in sources:
                raise ValueError(f"{key}.mixture names the source {source!r}, which sources does not define")
        _check_stage(train, key, stage)
        _check_attention(model, train, key, stage)
        _check_memory(train, key, stage)
    _check_evaluation(evaluate, vqgan, train.stages[-1].context)


def _check_device(train: Train, evaluate: Evaluate) -> None:
    """What trains, and what scores, can compute what is asked of it on its GPU or CPU."""
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
    """What is asked of the last model fits its context: known now rather than after weeks of training."""
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
    if train.min_workers is None and stage.sequences % per_step:  # of a range, some do not: padding is theirs
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
        from model.llama.config import llama_config  # with torch, which a decode task that has a recipe does without
        from model.training.rank_batch import attention_shape

        config = llama_config(model.size, 1, stage.context, stage.rope_theta)
        if wrong := attention.unfit_for(attention_shape(config, train.precision).kv_heads):
            raise ValueError(f"{named}.{wrong}")


def _check_memory(train: Train, key: str, stage: TrainStage) -> None:
    """The stage's ZeRO stage goes with the precision and with what is offloaded."""
    here = train.for_stage(stage)
    if here.zero == 0 and train.precision == "bf16":
        named = "train" if stage.zero is None else key
        raise ValueError(
            f"{named}.zero 0 trains in fp32 only, and train.precision is bf16; set {named}.zero: 1, whose weights are "
            f"replicated too"
        )
    if wrong := here.memory.unfit_for(here.zero):
        named = "train.memory" if stage.memory is None else f"{key}.memory"
        raise ValueError(f"{named}.{wrong} in {key}")
