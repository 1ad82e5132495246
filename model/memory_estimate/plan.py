"""The peak of training's memory on one rank, predicted by part, without allocating anything.

In: a Llama's sizes, the engine's settings, the plan of a packed sequence, the world. Out: `MemoryPlan`. The moments on
the device are the loss, the last layer's backward (all activations are still there), the first reduction of gradients
and the last, the first layer's backward (all gradients are there), and the update. Not counted on the host are the
process itself (Python, torch, the CUDA runtime), its loader's batches, an upload's 32 MiB of parts, and, without a GPU,
what counts as the device. Pinned host memory is counted in the powers of two in which torch allocates it for a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import LlamaConfig

from model.attention.plan.sequence_plan import SequencePlan
from model.llama.config import attention_sizes
from model.llama.hf_weights import FILE_BYTES
from model.memory_estimate.activations import ActivationBytes, activation_bytes
from model.memory_estimate.zero import FP32, Sizes, ZeroBytes, zero_bytes
from model.training.settings import EngineSettings


@dataclass(frozen=True)
class MemoryPlan:
    """device: bytes by part at the peak; moment: when that is; moments: the total at each; on_host: bytes by part."""

    device: Mapping[str, int]
    moment: str
    moments: Mapping[str, int]
    on_host: Mapping[str, Mapping[str, int]]

    @property
    def peak(self) -> int:
        """Bytes on the device at the peak."""
        return sum(self.device.values())

    @property
    def host_moment(self) -> str:
        """The moment of the host's peak."""
        return max(self.on_host, key=lambda moment: sum(self.on_host[moment].values()))

    @property
    def host_peak(self) -> int:
        """Bytes on the host at its peak."""
        return sum(self.on_host[self.host_moment].values())


def plan_memory(
    config: LlamaConfig, settings: EngineSettings, plan: SequencePlan, world: int, on_cuda: bool
) -> MemoryPlan:
    """The peak of one rank's step over `world` ranks. plan: of the tokens of one forward pass, by its sp ranks."""
    itemsize = 2 if settings.precision == "bf16" else FP32
    acts = activation_bytes(config, itemsize, plan, settings, on_cuda)
    n_parameters, n_layer, n_attention = parameter_counts(config)
    largest = max(config.vocab_size, config.intermediate_size) * config.hidden_size
    layers = config.num_hidden_layers
    # Of a layer's gathered weights autograd holds those whose products it will not compute again.
    held = {"keep": n_layer, "mlp": n_attention}.get(settings.memory.activations, 0)
    kept_share = layers * held / n_parameters
    zero = zero_bytes(Sizes(n_parameters, n_layer, largest), settings, world, kept_share, on_cuda)
    fixed = {"weights": zero.weights, "masters and moments": zero.masters, "batch": acts.batch}
    if zero.copies:
        fixed["offloading's copies"] = zero.copies
    moments = _moments(acts, zero, fixed, layers)
    totals = {name: sum(parts.values()) for name, parts in moments.items()}
    moment = max(totals, key=lambda name: totals[name])
    on_host = _host_moments(n_parameters, largest, settings, zero, acts.kept_host * layers, world)
    return MemoryPlan(moments[moment], moment, totals, on_host)


def _moments(
    acts: ActivationBytes, zero: ZeroBytes, fixed: Mapping[str, int], layers: int
) -> dict[str, dict[str, int]]:
    work = {"mlp": {"one layer at work": acts.mlp}}
    work["attention"] = {"one layer at work": acts.attention, "attention's exchange": acts.exchange}
    halves = {half: sum(parts.values()) for half, parts in work.items()}
    layer = work[max(halves, key=lambda half: halves[half])]
    # The attention's backward may need less than the layer's second half has given back by then.
    freed = min(0, layer["one layer at work"])
    layer = layer | {"one layer at work": max(0, layer["one layer at work"])}
    kept, buffers = acts.kept_layer * layers, {"ZeRO buffers": zero.buffers}
    # A bucket as large as the model is reduced once, after the last layer's work is done.
    at_once = zero.reduced >= 1
    between = {} if at_once else {"one layer at work": acts.between}
    reduction = {"ZeRO buffers": zero.buffers + zero.reduction}
    kept_then = {"activations kept": int(kept * max(0.0, 1 - zero.reduced))}
    gradients_then = {"gradients": int(zero.gradients * min(1.0, zero.reduced))}
    first = {"activations kept": acts.kept_layer + freed, **layer}
    all_gradients = {"gradients": 0 if at_once and zero.buffers else zero.gradients}
    return {
        "loss": {**fixed, **buffers, "activations kept": kept, "loss": acts.final + acts.loss},
        "last layer": {**fixed, **buffers, "activations kept": kept + freed, **layer},
        "first reduction": {**fixed, **reduction, **kept_then, **between, **gradients_then},
        "first layer": {**fixed, **buffers, **first, **all_gradients},
        "last reduction": {**fixed, **reduction, **between, "gradients": zero.gradients},
        "update": {**fixed, "gradients and the optimizer's step": zero.update},
    }


def _host_moments(
    n_parameters: int, largest: int, settings: EngineSettings, zero: ZeroBytes, activations: int, world: int
) -> dict[str, dict[str, int]]:
    """Bytes by part while the first weights are read, while training, and while the model is exported.

    largest: elements of the largest parameter. activations: bytes of those kept on the host.
    """
    itemsize = FP32 if settings.precision == "fp32" else 2
    own = -(-n_parameters // world)
    kept = dict(zero.offloaded)
    weights = {part: size for part, size in kept.items() if part == "weights"}
    offloaded = {"activations": activations} if activations else {}
    copy = {"a checkpoint being written": 3 * FP32 * own}
    update = {"update": {**kept, **copy, "the optimizer's step": zero.offloaded_update}}
    exported = max(min(FILE_BYTES, itemsize * n_parameters), itemsize * largest)
    return {
        # A text table in fp32 beside the joint one, or a weight in fp32 beside itself in bf16.
        "start": {**weights, "a weight that rank 0 reads": 2 * FP32 * largest},
        # A checkpoint is of the masters and both moments.
        "training": {**kept, **offloaded, **copy},
        **(update if zero.offloaded_update else {}),
        "export": {**kept, "a file that rank 0 exports": exported},
    }


def parameter_counts(config: LlamaConfig) -> tuple[int, int, int]:
    """Parameters of the model, of one decoder layer, and of its attention's projections."""
    hidden = config.hidden_size
    heads, kv_heads, head = attention_sizes(config)
    attention = 2 * hidden * head * (heads + kv_heads)
    layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    return layer * config.num_hidden_layers + 2 * config.vocab_size * hidden + hidden, layer, attention
