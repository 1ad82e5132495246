"""One optimizer step at a time: this rank's shares of micro-batches in, updated weights and figures out.

DeepSpeed holds the weights, gradients and optimizer state (ZeRO 0-3 over the whole world). The dp x sp mesh and the
scaling of the loss are ours: DeepSpeed's own sequence-parallel routes scale gradients wrongly.

The gradient of a step is that of the global batch's loss, sum(w * nll) / N over all tokens on all ranks in all
micro-batches, N being the examples of the global batch. DeepSpeed averages over the world and over the accumulation,
so each local sum is multiplied by world * grad_accum / N, which leaves the plain sum on any mesh at any stage.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from model.attention.p2p import Exchange, GroupExchange, TimedExchange
from model.layers.activation_checkpointing import apply_memory_settings
from model.layers.fused_layers import fuse
from model.llama.config import modality_ranges
from model.llama.initial_weights import Weights
from model.llama.llama import empty_llama, fill
from model.memory_estimate.zero import reduce_bucket
from model.step_timer import StepClock
from model.training.lr_schedule import Schedule
from model.training.mesh import Mesh
from model.training.micro_batch_loss import SUMS, MicroBatchLoss
from model.training.parameter_groups import parameter_groups
from model.training.rank_batch import RankBatch, check_same_plans
from model.training.settings import EngineSettings
from model.training.zero_group import known_to_deepspeed, open_group


@dataclass(frozen=True)
class TargetLoss:
    """The targets of one modality, or of one source of the mixture.

    loss: their part of the loss that training minimises. nats: plain sum of their token losses. targets: the number of
    them that carry loss; nats / targets is nats per token.
    """

    loss: float
    nats: float
    targets: int


@dataclass(frozen=True)
class LossMetrics:
    """Losses of one global batch, summed over all ranks and micro-batches; the same on every rank.

    loss: what training minimises. modalities: its parts by name of the modality, which sum to it (with text and vision,
    each is half of LWM's text or vision loss). sources: its parts by number of the source in the mixture, which sum to
    it too. tokens: all tokens read. useful_tokens: those of documents, not padding; useful_pairs: of a query and a key
    of one document, per head.
    """

    loss: float
    modalities: Mapping[str, TargetLoss]
    sources: tuple[TargetLoss, ...]
    tokens: int
    seconds: float
    useful_tokens: int = 0
    useful_pairs: int = 0


@dataclass(frozen=True, kw_only=True)
class StepMetrics(LossMetrics):
    """A training step: its number from 0, the learning rate it used, and the gradient's norm before clipping."""

    step: int
    lr: float
    grad_norm: float


class TrainingEngine:
    """Trains one Llama over a mesh. Every method is collective: all ranks call it, in the same order.

    weights: the initial ones. Rank 0 alone reads them, one at a time, and sends them to the others: beside the engine's
    own memory, the host holds one weight. Raises UserError, on every rank, where they cannot be read.

    `step` counts the updates made; `clock` has this rank's seconds by part of the step: forward, backward and update,
    and of the first two those spent waiting for other ranks' keys (communication).
    """

    def __init__(self, weights: Weights, mesh: Mesh, settings: EngineSettings, schedule: Schedule) -> None:
        self.mesh = mesh
        self.settings = settings
        self.schedule = schedule
        self.step = 0
        mesh.on_rank_zero(weights.check)
        self.modalities = tuple(modality_ranges(weights.config))
        self._zero_group = open_group(mesh, settings)
        with known_to_deepspeed(self._zero_group):
            self.deepspeed = _initialize(weights, mesh, settings, self._zero_group)
        self.clock = StepClock(self.deepspeed.device)
        self._exchange: Exchange | None = None
        if mesh.sp_group is not None:
            self._exchange = TimedExchange(GroupExchange(mesh.sp_group), self.clock)

    @property
    def model(self) -> LlamaForCausalLM:
        """The model inside; under ZeRO-3 its weights are whole only while the engine runs."""
        return self.deepspeed.module.model

    def train_step(
        self, micro_batches: Sequence[RankBatch], n_examples: int, is_spike: Callable[[float], bool] | None = None
    ) -> StepMetrics:
        """One optimizer step on this rank's shares of its dp rank's `grad_accum` micro-batches.

        n_examples: N, the examples of the whole global batch. is_spike: called with the step's loss, the same on every
        rank; where it is a spike the weights stay, and the norm is NaN. A step's figures are of the weights before it.
        """
        started = time.perf_counter()
        figures = self.accumulate(micro_batches, n_examples, is_spike)
        step = self.step
        with self.clock.part("update"):
            lr, grad_norm = self.update()
        losses = self._all_ranks(figures, n_examples)
        seconds = time.perf_counter() - started
        return StepMetrics(**losses, seconds=seconds, step=step, lr=lr, grad_norm=grad_norm)

    def eval_step(self, micro_batches: Sequence[RankBatch], n_examples: int) -> LossMetrics:
        """The same loss without a backward. Any number of micro-batches, the same on all ranks.

        It is taken between two steps, and leaves weights, gradients and random states as they are.
        """
        started = time.perf_counter()
        self._check_plans(micro_batches)
        self.deepspeed.eval()
        figures = []
        with torch.no_grad():
            for batch in micro_batches:
                figures.append(self._forward(batch)[1])
                self.mesh.on_progress(False)
        self.deepspeed.train()
        losses = self._all_ranks(figures, n_examples)
        return LossMetrics(**losses, seconds=time.perf_counter() - started)

    def accumulate(
        self, micro_batches: Sequence[RankBatch], n_examples: int, is_spike: Callable[[float], bool] | None = None
    ) -> list[Tensor]:
        """Forward and backward of one step's micro-batches, leaving the global batch's gradient for `update`.

        The loss of the global batch is known before the last backward. A spike's becomes NaN there, for which DeepSpeed
        drops the step at ZeRO stages 1 to 3, and `update` at stage 0.

        Returns this rank's figures, one vector a micro-batch. Raises ValueError unless there are `grad_accum` of them,
        RuntimeError where the ranks of a sequence planned one differently.
        """
        grad_accum = self.settings.grad_accum
        if len(micro_batches) != grad_accum:
            raise ValueError(f"an engine of grad_accum {grad_accum} was given {len(micro_batches)} micro-batches")
        self._check_plans(micro_batches)
        scale = self.mesh.world_size * grad_accum / n_examples
        figures = []
        for number, batch in enumerate(micro_batches):
            if number:
                self.deepspeed.step()  # only counts the micro-batch before this one; `update` takes the real step
            with self.clock.part("forward"):
                local_sum, sums = self._forward(batch)
            figures.append(sums)
            is_last = number == len(micro_batches) - 1
            if is_last and is_spike is not None and is_spike(self._all_ranks(figures, n_examples)["loss"]):
                local_sum = local_sum * math.nan
            with self.clock.part("backward"):
                self.deepspeed.backward(local_sum * scale)
        return figures

    def update(self) -> tuple[float, float]:
        """Clip, step the optimizer and count the step. Returns the learning rate used and the norm before clipping.

        A gradient that is not finite leaves the weights as they are, and its norm is NaN or infinite.
        """
        lr = self.schedule(self.step)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        norm: Any = None
        if self.settings.zero == 0:  # there DeepSpeed neither gives the norm nor skips a bad step
            most = self.settings.clip_norm if self.settings.clip_norm > 0 else math.inf
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), most)
            if not norm.isfinite():
                self.deepspeed.zero_grad()
        self.deepspeed.step()
        self.step += 1
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm() if self.deepspeed.was_step_applied() else math.nan
        return lr, float(norm)

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers, so that the next stage's engine can use their memory."""
        self.deepspeed.destroy()
        if self._zero_group is not None:
            dist.destroy_process_group(self._zero_group)

    def _check_plans(self, micro_batches: Sequence[RankBatch]) -> None:
        if self.mesh.sp_group is not None and micro_batches:
            check_same_plans([batch.plan for batch in micro_batches], self.mesh.sp_group)

    def _forward(self, batch: RankBatch) -> tuple[Tensor, Tensor]:
        """This rank's weighted sum of token losses, and its figures: fp64, in the order of `_all_ranks`.

        A rank without targets runs the same forward and backward, with a sum of 0: the ring and ZeRO-3 need every rank
        in every collective.
        """
        local_sum, sums = self.deepspeed(
            batch.to(self.deepspeed.device), group=self._exchange, chunk=self.settings.loss_chunk
        )
        counts = torch.tensor([len(batch.tokens), batch.useful_tokens, batch.useful_pairs], dtype=torch.float64)
        modalities = torch.stack([sums[f"{name}_{what}"] for name in self.modalities for what in SUMS])
        sources = [sums[f"source_{what}"] for what in SUMS]
        return local_sum, torch.cat([modalities, counts.to(modalities.device, non_blocking=True), *sources])

    def _all_ranks(self, figures: Sequence[Tensor], n_examples: int) -> dict[str, Any]:
        """`LossMetrics`' fields but the seconds, by one collective: sums over all micro-batches and ranks."""
        total = torch.stack(list(figures)).sum(0)
        dist.all_reduce(total)
        total = total.cpu()
        n_sums = len(SUMS) * len(self.modalities)
        tokens, useful_tokens, useful_pairs = total[n_sums : n_sums + 3].tolist()

        def losses(sums: Tensor) -> list[TargetLoss]:
            return [TargetLoss(weighted / n_examples, nats, round(n)) for weighted, nats, n in sums.tolist()]

        return {
            "loss": sum(total[: n_sums : len(SUMS)].tolist()) / n_examples,
            "modalities": dict(zip(self.modalities, losses(total[:n_sums].view(-1, len(SUMS))))),
            "sources": tuple(losses(total[n_sums + 3 :].view(len(SUMS), -1).T)),
            "tokens": round(tokens),
            "useful_tokens": round(useful_tokens),
            "useful_pairs": round(useful_pairs),
        }


def _initialize(weights: Weights, mesh: Mesh, settings: EngineSettings, zero_group: dist.ProcessGroup | None) -> Any:
    """The DeepSpeed engine around a model of these weights, with torch's AdamW."""
    import deepspeed  # imported here: it takes seconds
    import deepspeed.ops

    _import_muon_uncompiled()
    # On CPU it would compile a shared-memory collective at start-up: minutes, and a failure where there is no compiler.
    # On a GPU it has none, and to look at this table it would run the compilers of all its operators.
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # launchers set it; DeepSpeed refuses to start a lone process without
    model = empty_llama(weights.config, dtype=torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    apply_memory_settings(model, settings.memory)
    fuse(model, settings.kernels)
    config = _deepspeed_config(settings, sum(p.numel() for p in model.parameters()), zero_group)
    _fill(model, weights, mesh, config if settings.zero == 3 else None, zero_group)
    module = MicroBatchLoss(model)
    groups = parameter_groups(module, settings.decay)
    optimizer = torch.optim.AdamW(groups, 0.0, settings.betas, settings.eps, settings.weight_decay)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory use
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which no engine here uses, before `deepspeed.initialize` does.

    It is compiled where it is imported, for which torch loads Inductor: a second of processor time a worker.
    """
    from deepspeed.runtime import compiler

    compiled = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    except ImportError:  # of another version of DeepSpeed
        pass
    finally:
        compiler.compile = compiled


def _fill(
    model: LlamaForCausalLM,
    weights: Weights,
    mesh: Mesh,
    sharding: Mapping[str, Any] | None,
    zero_group: dist.ProcessGroup | None,
) -> None:
    """Put rank 0's weights, and memory for them elsewhere, on the training device; DeepSpeed sends them to all ranks.

    sharding: DeepSpeed's settings of ZeRO-3, by which each weight is sent and split before the next is read.
    zero_group: the ranks that then hold it among them too.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    device = torch.device(get_accelerator().device_name(int(os.environ["LOCAL_RANK"])))

    def weight(name: str, empty: nn.Parameter) -> Tensor:
        mesh.on_progress(False)
        value = weights.read(name).to(device, empty.dtype) if mesh.rank == 0 else torch.empty_like(empty, device=device)
        mesh.on_progress(True)
        return value

    def shard(module: nn.Module) -> None:
        if sharding is not None:
            deepspeed.zero.Init(module=module, config_dict_or_path=sharding, zero_param_parallel_group=zero_group)

    fill(model, weight, shard)


def _deepspeed_config(
    settings: EngineSettings, n_parameters: int, zero_group: dist.ProcessGroup | None
) -> dict[str, Any]:
    zero = {
        "stage": settings.zero,
        "reduce_bucket_size": reduce_bucket(n_parameters),
        "zero_hpz_partition_size": 1 if zero_group is None else zero_group.size(),
        **settings.memory.zero_options(torch.cuda.is_available()),
        **settings.zero_options,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": settings.grad_accum,
        "gradient_clipping": settings.clip_norm if settings.zero else 0.0,  # stage 0: `update` clips
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": settings.precision == "bf16"},
        # Ranks and micro-batches add up in fp32, also where the weights are bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 2**31,
        # Its timer makes the host wait for the GPU twice a micro-batch; `StepClock` does not.
        "timers": {"throughput": {"enabled": False}},
    }
