"""Bytes of a model's weights, gradients and optimizer under DeepSpeed on one rank, by ZeRO stage.

In: the number of parameters and the engine's settings. Out: `ZeroBytes`. The copies are those of DeepSpeed 0.19's
stages 1 to 3, checked against torch's profiler (`ringworld bench memory`), on the CPU; what a GPU does otherwise, the
optimizer's step and pinned memory, is as torch's source has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from model.training.settings import EngineSettings

FP32 = 4
FP64 = 8
REDUCE_BUCKET = 500_000_000
"""Gradients that are reduced at once at most."""
LIVE_PARAMETERS = 10**9
"""Of ZeRO-3: parameters that may be gathered at once, by DeepSpeed's default (`stage3_max_live_parameters`)."""
SUB_GROUP = 10**9
"""Of ZeRO-3: parameters that the optimizer steps at once, by DeepSpeed's default (`sub_group_size`)."""
NORM_PART = 250_000_000
"""Of ZeRO-3: elements whose norm is taken at once, in fp64."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of the model, of one layer, and of the largest weight."""

    model: int
    layer: int
    largest: int


@dataclass(frozen=True)
class ZeroBytes:
    """Bytes on one rank.

    weights, with those held for a group, masters (fp32 weights and moments): always there. gradients: there from one
    backward to the update. buffers: of the backward's gradients and ZeRO-3's gathered weights. reduction: copies while
    gradients are reduced. update: held by the optimizer's step besides weights and masters. reduced: share of the model
    whose gradients are collected before they are first reduced. offloaded: on the host, by part, always there.
    offloaded_update: held there by the optimizer's step besides. Of what is offloaded the device holds nothing, but for
    `copies`, always there.
    """

    weights: int
    masters: int
    gradients: int
    buffers: int
    reduction: int
    update: int
    reduced: float
    copies: int = 0
    offloaded: Mapping[str, int] = field(default_factory=dict)
    offloaded_update: int = 0


def reduce_bucket(n_parameters: int) -> int:
    """Gradients that are reduced at once: no buffer is larger than the model."""
    return min(REDUCE_BUCKET, n_parameters)


def pinned_bytes(size: int, on_cuda: bool) -> int:
    """What torch's allocator takes for pinned memory: the next power of two; a CPU pins nothing."""
    return 1 << (size - 1).bit_length() if on_cuda and size else size


def zero_bytes(sizes: Sizes, settings: EngineSettings, world: int, kept_share: float, on_cuda: bool) -> ZeroBytes:
    """See `ZeroBytes`.

    kept_share: share of the weights whose gathered copies autograd holds from the forward on, at stage 3.
    """
    if settings.memory.offload_optimizer:
        return _offloading(sizes, settings, world, kept_share, on_cuda)
    itemsize, n, own = _itemsize(settings), sizes.model, -(-sizes.model // world)
    bucket = reduce_bucket(n)
    owned, masters = FP32 * own, 3 * FP32 * own  # moments and fp32 weights
    step = _step(own, on_cuda)
    if settings.zero == 0:
        return ZeroBytes(FP32 * n, 2 * FP32 * n, FP32 * n, 0, 2 * FP32 * bucket, FP32 * n, 1.0)
    if settings.zero == 3:
        weights, buffers, host = _partitioned(sizes, settings, own, kept_share, world, on_cuda)
        part = min(own, SUB_GROUP)
        update = FP32 * part + _step(part, on_cuda) + FP32 * bucket + owned
        buffers += owned  # gradients have their place from the start on
        return ZeroBytes(weights, masters, 0, buffers, FP32 * bucket, update, bucket / n, offloaded=host)
    if settings.zero == 1 and itemsize == FP32:
        rest = FP32 * (n - bucket)  # the bucket alone holds the gradients that are in it
        return ZeroBytes(FP32 * n, masters, rest, FP32 * bucket, max(FP32 * bucket, owned), owned + step, 1.0)
    if settings.zero == 1:  # whole fp32 sums stay from step to step
        gradients = (FP32 + itemsize) * n
        return ZeroBytes(itemsize * n, masters, gradients, 0, 0, gradients + step, 1.0)
    # Gradients in fp32 are added up apart from the partition; those in bf16 within it.
    gradients = owned * (2 if settings.grad_accum > 1 and itemsize == FP32 else 1)
    return ZeroBytes(
        itemsize * n,
        masters,
        gradients,
        itemsize * bucket,
        _summed(bucket, itemsize),
        owned + step,
        bucket / n,
    )


def _offloading(sizes: Sizes, settings: EngineSettings, world: int, kept_share: float, on_cuda: bool) -> ZeroBytes:
    """With the optimizer on the host."""
    itemsize, n, own = _itemsize(settings), sizes.model, -(-sizes.model // world)
    bucket, owned = reduce_bucket(n), FP32 * own

    def pinned(size: int) -> int:
        return pinned_bytes(size, on_cuda)

    if settings.zero == 3:
        weights, buffers, host = _partitioned(sizes, settings, own, kept_share, world, on_cuda)
        # A bucket's gradients in one tensor; each then goes to the host and, for its norm, comes back.
        share = -(-sizes.largest // world)
        reduction = FP32 * bucket + FP32 * share + FP64 * min(share, NORM_PART)
        parts = [SUB_GROUP] * (own // SUB_GROUP) + ([own % SUB_GROUP] if own % SUB_GROUP else [])
        gradients = pinned(owned) + sum(pinned(FP32 * part) for part in parts)
        host = {**host, "masters and moments": 3 * owned, "gradients": gradients}
        step = _step(min(own, SUB_GROUP), on_cuda=False)
        return ZeroBytes(weights, 0, 0, buffers, reduction, 0, bucket / n, 0, host, step)
    half = itemsize < FP32  # gradients are summed in fp32 on the device first
    accumulated = itemsize * own if settings.grad_accum > 1 and not half else 0
    host = {
        "masters and moments": pinned(owned) + 2 * owned,
        "gradients": pinned(owned) + accumulated,
        "copies for the device": pinned(itemsize * own) + pinned(itemsize * sizes.largest),
    }
    copies, step = itemsize * sizes.largest, _step(own, on_cuda=False)
    norm = FP64 * min(sizes.largest, own)
    if settings.zero == 1:  # all gradients are there, and an empty bucket, which then takes the place of some
        gradients = FP32 * (n + bucket)
        reduction = max(FP32 * bucket, norm) + owned * half - FP32 * bucket
        return ZeroBytes(itemsize * n, 0, gradients, 0, reduction, owned * half, 1.0, copies, host, step)
    reduction = max(_summed(bucket, itemsize), norm)
    gradients = owned * half
    return ZeroBytes(
        itemsize * n, 0, gradients, itemsize * bucket, reduction, gradients, bucket / n, copies, host, step
    )


def _itemsize(settings: EngineSettings) -> int:
    return FP32 if settings.precision == "fp32" else 2


def _step(parameters: int, on_cuda: bool) -> int:
    """Of Adam's step: the second moment's root, and a CPU, which steps tensor by tensor, has its quotient as well."""
    return FP32 * parameters * (1 if on_cuda else 2)


def _summed(bucket: int, itemsize: int) -> int:
    """A bucket's gradients in one tensor, and in fp32, in which ranks add them up."""
    return (itemsize if itemsize == FP32 else itemsize + FP32) * bucket


def _partitioned(
    sizes: Sizes, settings: EngineSettings, own: int, kept_share: float, world: int, on_cuda: bool
) -> tuple[int, int, dict[str, int]]:
    """Of ZeRO-3: weights and buffers on the device, and weights on the host by part.

    The ranks of a `zero_group` hold all weights among them too. A rank that has all of them uses them where they are.
    """
    itemsize, offloaded, group = _itemsize(settings), settings.memory.offload_parameters, settings.zero_group
    gathered = 0
    if world > 1 or offloaded:
        held = max(int(kept_share * sizes.model), 2 * sizes.layer)  # by autograd: one layer's, twice, at least
        gathered = itemsize * (min(sizes.model, LIVE_PARAMETERS) + held)
    buffers = FP32 * reduce_bucket(sizes.model) + gathered
    of_group = itemsize * -(-sizes.model // group) if group is not None and group < world else 0
    if offloaded:
        return 0, buffers, {"weights": pinned_bytes(itemsize * own, on_cuda) + of_group}
    return itemsize * own + of_group, buffers, {}
