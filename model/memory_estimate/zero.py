"""Bytes of a model's weights, gradients and optimizer under DeepSpeed on one rank, by ZeRO stage.

In: the number of parameters and the engine's settings. Out: `ZeroBytes`. The copies are those of DeepSpeed 0.19's
stages 1 to 3, checked against torch's profiler (`ringworld bench memory`).
"""

from __future__ import annotations

from dataclasses import dataclass

FP32 = 4
REDUCE_BUCKET = 500_000_000
"""Gradients that are reduced at once at most."""
LIVE_PARAMETERS = 10**9
"""Of ZeRO-3: parameters that may be gathered at once, by DeepSpeed's default (`stage3_max_live_parameters`)."""
SUB_GROUP = 10**9
"""Of ZeRO-3: parameters that the optimizer steps at once, by DeepSpeed's default (`sub_group_size`)."""


@dataclass(frozen=True)
class ZeroBytes:
    """Bytes on one rank.

    weights, with those held for a group, masters (fp32 weights and moments): always there. gradients: there from one
    backward to the update. buffers: of the backward's gradients and ZeRO-3's gathered weights. reduction: copies while
    gradients are reduced. update: held by the optimizer's step besides weights and masters. reduced: share of the model
    whose gradients are collected before they are first reduced.
    """

    weights: int
    masters: int
    gradients: int
    buffers: int
    reduction: int
    update: int
    reduced: float


def reduce_bucket(n_parameters: int) -> int:
    """Gradients that are reduced at once: no buffer is larger than the model."""
    return min(REDUCE_BUCKET, n_parameters)


def zero_bytes(
    n_parameters: int,
    layer_parameters: int,
    stage: int,
    itemsize: int,
    world: int,
    grad_accum: int,
    kept_share: float,
    group: int | None = None,
) -> ZeroBytes:
    """See `ZeroBytes`.

    layer_parameters: of one layer. group: ranks that hold all weights among them too, at stage 3; None: only the world
    does. itemsize: of weights, 4 or 2. kept_share: share of the weights whose gathered copies
    autograd holds from the forward on, at stage 3.
    """
    n, own = n_parameters, -(-n_parameters // world)
    bucket = reduce_bucket(n)
    owned, masters = FP32 * own, 3 * FP32 * own  # moments and fp32 weights
    copies = (itemsize if itemsize == FP32 else itemsize + FP32) * bucket  # of a bucket, in fp32 where ranks add it up
    if stage == 0:
        return ZeroBytes(FP32 * n, 2 * FP32 * n, FP32 * n, 0, 2 * FP32 * bucket, FP32 * n, 1.0)
    if stage == 3:
        gathered = min(n, LIVE_PARAMETERS) * itemsize
        held = max(int(kept_share * n), 2 * layer_parameters) * itemsize  # by autograd: one layer's, twice, at least
        buffers = itemsize * bucket + gathered + held
        update = 3 * FP32 * min(own, SUB_GROUP) + itemsize * bucket + owned
        of_group = itemsize * -(-n // group) if group is not None and group < world else 0
        return ZeroBytes(itemsize * own + of_group, masters, owned, buffers, copies, update, bucket / n)
    if stage == 1 and itemsize == FP32:
        rest = FP32 * (n - bucket)  # the bucket alone holds the gradients that are in it
        return ZeroBytes(FP32 * n, masters, rest, FP32 * bucket, max(FP32 * bucket, owned), 3 * owned, 1.0)
    if stage == 1:  # whole fp32 sums stay from step to step
        gradients = (FP32 + itemsize) * n
        return ZeroBytes(itemsize * n, masters, gradients, 0, 0, gradients + 2 * owned, 1.0)
    added = owned if grad_accum > 1 else 0
    gradients = owned + added + (itemsize * own if itemsize < FP32 else 0)
    update = 3 * owned + (gradients - owned if itemsize < FP32 else 0)
    return ZeroBytes(itemsize * n, masters, gradients, itemsize * bucket, copies, update, bucket / n)
