"""What no part of a recipe can tell of itself: that its parts fit together.

In: a recipe whose parts are each valid. Out: nothing, or a ValueError that names the key and the remedy, before
anything has run rather than after weeks of training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.recipe import Recipe, TrainStage


def check_recipe(recipe: Recipe) -> None:
    """Raise ValueError on the first thing that does not fit."""
    vision = [name for name, source in recipe.sources.items() if any("vision" in spec for spec in source.fields)]
    if vision and recipe.vqgan is None:
        raise ValueError(f"sources.{vision[0]} has a vision field but the recipe has no vqgan; add one")
    names = [stage.name for stage in recipe.train.stages]
    if len(set(names)) < len(names):
        raise ValueError("train.stages: two stages have one name; give each its own")
    _check_device(recipe)
    for index, stage in enumerate(recipe.train.stages):
        _check_stage(recipe, f"train.stages.{index}", stage)
    _check_evaluation(recipe, recipe.train.stages[-1].context)


def _check_device(recipe: Recipe) -> None:
    """What trains, and what scores, can compute what is asked of it on its GPU or CPU."""
    train = recipe.train
    if train.resources.gpus not in (0, 1):
        raise ValueError(
            f"train.resources.gpus {train.resources.gpus:g} is not what a worker trains on, one GPU or none; set 1, or "
            f"0 for the CPU, and train.workers to the number of GPUs"
        )
    for key, pool in (("train", train.resources), ("evaluate", recipe.evaluate.resources)):
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


def _check_evaluation(recipe: Recipe, context: int) -> None:
    """What is asked of the last model fits its context: known now rather than after weeks of training."""
    needle, generation = recipe.evaluate.needle, recipe.evaluate.generation
    if needle and max(needle.contexts) > context:
        raise ValueError(
            f"evaluate.needle.contexts has {max(needle.contexts)}, above the last context {context}; lower it"
        )
    if generation and recipe.vqgan:
        frames = generation.prompt_frames + generation.frames
        tokens = frames * (recipe.vqgan.sizes.codes_per_frame + 1)
        if tokens > context:
            raise ValueError(
                f"evaluate.generation: {frames} frames are {tokens} tokens, more than the last stage's context "
                f"{context}; lower prompt_frames or frames"
            )


def _check_stage(recipe: Recipe, key: str, stage: TrainStage) -> None:
    for source in stage.mixture:
        if source not in recipe.sources:
            raise ValueError(f"{key}.mixture names the source {source!r}, which sources does not define")
    if not any(stage.mixture.values()):
        raise ValueError(f"{key}.mixture has no share above 0; raise one")
    if stage.batch_tokens % stage.context:
        raise ValueError(f"{key}.batch_tokens {stage.batch_tokens} is no multiple of its context {stage.context}")
    if recipe.train.workers % stage.sp:
        raise ValueError(
            f"{key}.sp {stage.sp} does not divide train.workers {recipe.train.workers}; "
            f"choose an sp that divides it or change the workers"
        )
    if stage.context * stage.rows % stage.sp:
        raise ValueError(
            f"{key}.context {stage.context} x rows {stage.rows} is no multiple of sp {stage.sp}, whose ranks hold "
            f"equally many tokens; change one of them"
        )
    _check_attention(recipe, key, stage)
    _check_zero(recipe, key, stage)
    _check_memory(recipe, key, stage)
    per_step = recipe.train.workers // stage.sp * stage.rows
    if recipe.train.min_workers is None and stage.sequences % per_step:  # of a range, some do not: padding is theirs
        raise ValueError(
            f"{key}.batch_tokens gives {stage.sequences} sequences a step, which {recipe.train.workers // stage.sp} "
            f"data-parallel ranks of {stage.rows} row(s) cannot share evenly; make it a multiple of {per_step}"
        )
    if stage.warmup_steps >= stage.steps:
        raise ValueError(f"{key}.warmup_steps {stage.warmup_steps} leaves no step of its {stage.steps}")


def _check_attention(recipe: Recipe, key: str, stage: TrainStage) -> None:
    attention = recipe.train.attention_of(stage)
    if attention.ulysses is None:
        return
    named = "train.attention" if stage.attention is None else f"{key}.attention"
    if stage.sp % attention.ulysses:
        raise ValueError(
            f"{named}.ulysses {attention.ulysses} does not divide {key}.sp {stage.sp}; choose a divisor of every "
            f"stage's sp, or set {key}.attention"
        )
    if recipe.model.init is None:  # a checkpoint's heads are known once it is loaded
        from model.llama.config import llama_config  # with torch, which a decode task that has a recipe does without
        from model.training.rank_batch import attention_shape

        config = llama_config(recipe.model.size, 1, stage.context, stage.rope_theta)
        if wrong := attention.unfit_for(attention_shape(config, recipe.train.precision).kv_heads):
            raise ValueError(f"{named}.{wrong}")


def _check_zero(recipe: Recipe, key: str, stage: TrainStage) -> None:
    if recipe.train.zero_of(stage) == 0 and recipe.train.precision == "bf16":
        named = "train" if stage.zero is None else key
        raise ValueError(
            f"{named}.zero 0 trains in fp32 only, and train.precision is bf16; set {named}.zero: 1, whose weights are "
            f"replicated too"
        )


def _check_memory(recipe: Recipe, key: str, stage: TrainStage) -> None:
    wrong = recipe.train.memory_of(stage).settings().unfit_for(recipe.train.zero_of(stage))
    if wrong:
        named = "train.memory" if stage.memory is None else f"{key}.memory"
        raise ValueError(f"{named}.{wrong} in {key}")
