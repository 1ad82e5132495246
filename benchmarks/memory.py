"""`ringworld bench memory`: the peak of a training step on every rank, measured, beside what is predicted of it.

In: contexts and numbers of ranks that share a sequence. Out: a report: the peak per rank at each context, how it grows
with the tokens that a rank holds (a straight line's slope and R^2), and predicted against measured over the ways to
save memory, ZeRO stages and precisions, with the targets beside them.

Measured is what torch's profiler counts of the allocator on the CPU, weights and optimizer state included, in the
second step of the real engine over gloo processes; garbage of the first is collected before. The model is small, so
that activations and weights weigh about as much as in earnest; documents have DOCUMENT tokens at most.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.multiprocessing import set_forkserver_preload
from torch.multiprocessing.spawn import start_processes

from benchmarks.allocations import peak_bytes
from benchmarks.machine import machine
from model.layers.kernels.interface import Kernels
from model.layers.memory_settings import MemorySettings
from model.llama.config import llama_config
from model.llama.initial_weights import RandomWeights
from model.memory_estimate.plan import plan_memory
from model.training.engine import TrainingEngine
from model.training.lr_schedule import Schedule
from model.training.mesh import build_mesh
from model.training.rank_batch import Dispatcher, RankBatch, attention_shape
from model.training.settings import EngineSettings
from tokenization.loader.batch import MicroBatch

WITHIN = 0.15
STRAIGHT = 0.999
SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 3}
TEXT, VOCABULARY = 1536, 2048
DOCUMENT = 2048


@dataclass(frozen=True)
class Case:
    """One way to run a step. document: tokens of the longest document. ulysses: None is the planner's choice."""

    context: int
    sp: int = 1
    zero: int = 2
    precision: str = "fp32"
    memory: Mapping[str, Any] = field(default_factory=lambda: {"activations": "all-but-attention", "mlp_tile": 512})
    kernels: Kernels = "torch"
    document: int = DOCUMENT
    ulysses: int | None = None

    @property
    def settings(self) -> EngineSettings:
        """The engine's."""
        return EngineSettings(
            zero=self.zero,  # type: ignore[arg-type]
            precision=self.precision,  # type: ignore[arg-type]
            loss_chunk=256,
            memory=MemorySettings(**self.memory),
            kernels=self.kernels,
        )

    @property
    def name(self) -> str:
        """Everything but the context, in a line."""
        memory = ", ".join(f"{key} {value}" for key, value in self.memory.items()) or "keep"
        documents = ", one document" if self.document >= self.context else ""
        kernels = "" if self.kernels == "torch" else f", kernels {self.kernels}"
        return f"sp {self.sp}, ZeRO {self.zero}, {self.precision}, {memory}{documents}{kernels}"


def cases(context: int, ranks: Sequence[int]) -> list[Case]:
    """Ways to save memory, spread over ZeRO stages, ranks and precisions."""
    tiled = {"activations": "all-but-attention", "mlp_tile": 512}
    varied = [
        Case(context, zero=1, memory={}),
        Case(context, zero=2, memory={"activations": "mlp"}),
        Case(context, zero=3, memory={"activations": "full", "mlp_tile": 512}),
        Case(context, zero=2, precision="bf16", memory=tiled),
        Case(context, sp=2, zero=1, memory={"activations": "mlp"}),
        Case(context, sp=2, zero=2, memory={"activations": "full"}),
        Case(context, sp=2, zero=3, memory=tiled),
        Case(context, sp=2, zero=2, memory=tiled, document=context),
        Case(context, sp=2, zero=3, memory={"activations": "all-but-attention"}, ulysses=1),
        Case(context, sp=2, zero=2, precision="bf16", memory={}),
        Case(context, zero=1, memory={}, kernels="compile"),
        Case(context, zero=2, precision="bf16", memory={"activations": "mlp"}, kernels="compile"),
        Case(context, zero=2, precision="bf16", memory={"activations": "full"}, kernels="compile"),
        Case(context, sp=2, zero=3, memory=tiled, kernels="compile"),
    ]
    return [case for case in varied if case.sp in ranks]


def memory_report(contexts: Sequence[int], ranks: Sequence[int]) -> dict:
    """Measure and predict all cases; figures, targets and what was run."""
    grown = [Case(context, sp) for sp in ranks for context in contexts]
    varied = cases(contexts[0], ranks)
    measured: dict[str, dict] = {}
    for sp in ranks:
        mine = [case for case in (*grown, *varied) if case.sp == sp]
        by_rank = _in_processes(mine, sp)
        for i, case in enumerate(mine):
            most = max(by_rank, key=lambda rank: rank[i]["measured"])[i]
            measured[repr(case)] = {"case": asdict(case), "name": case.name, **most}
    lines = {f"sp {sp}": _line([measured[repr(case)] for case in grown if case.sp == sp]) for sp in ranks}
    rows = list(measured.values())
    worst = max(abs(row["predicted"] / row["measured"] - 1) for row in rows)
    return {
        "machine": machine(),
        "model": {**SIZES, "vocabulary": VOCABULARY},
        "rows": rows,
        "lines": lines,
        "targets": [
            {"target": f"R^2 of peak over tokens a rank at {name}", "goal": STRAIGHT, "measured": line["r2"]}
            for name, line in lines.items()
        ]
        + [{"target": "predicted off measured at most", "goal": WITHIN, "measured": round(worst, 4)}],
    }


def _line(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Least squares of the peak over the tokens that a rank holds."""
    tokens, peaks = (np.array([row[key] for row in rows], float) for key in ("tokens", "measured"))
    slope, constant = np.polyfit(tokens, peaks, 1)
    rest = peaks - (slope * tokens + constant)
    total = float(((peaks - peaks.mean()) ** 2).sum())
    r2 = 1 - float((rest**2).sum()) / total
    return {"bytes_per_token": round(float(slope), 1), "constant": round(float(constant)), "r2": round(r2, 6)}


def print_memory(report: Mapping[str, Any]) -> None:
    """The report for a terminal."""
    table = Table(title="peak of a training step on the fullest rank")
    for heading in ("case", "context", "measured MB", "predicted MB", "off", "most at"):
        table.add_column(heading)
    for row in report["rows"]:
        off = f"{row['predicted'] / row['measured'] - 1:+.1%}"
        sizes = [f"{row[key] / 1e6:.1f}" for key in ("measured", "predicted")]
        table.add_row(row["name"], str(row["case"]["context"]), *sizes, off, row["moment"])
    console = Console()
    console.print(table)
    for name, line in report["lines"].items():
        console.print(f"{name}: {line['bytes_per_token']:.0f} bytes a token of a rank, R^2 {line['r2']:.5f}")
    for target in report["targets"]:
        console.print(f"{target['target']}: {target['measured']:.4f}, goal {target['goal']}")


# --- In the processes ---


def _in_processes(mine: Sequence[Case], size: int) -> list[list[dict]]:
    set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_process, args=(folder, size, mine), nprocs=size, start_method="forkserver")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]


def _process(rank: int, folder: str, size: int, mine: Sequence[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    figures = [measure(case) for case in mine]
    Path(folder, f"{rank}.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def measure(case: Case) -> dict[str, Any]:
    """Of this rank: tokens, bytes measured and predicted, and the moment of the predicted peak. Collective."""
    config = llama_config(SIZES, {"text": TEXT, "vision": VOCABULARY - TEXT}, case.context, 1e6)
    made: list[tuple[TrainingEngine, RankBatch]] = []

    def before() -> None:
        mesh = build_mesh(case.sp)
        engine = TrainingEngine(RandomWeights(config, seed=0), mesh, case.settings, Schedule(peak=1e-3))
        shape = attention_shape(config, case.precision)
        batch = Dispatcher(mesh.sp, mesh.sp_rank, shape, ulysses=case.ulysses)(_micro_batch(case))
        engine.train_step([batch], 1)
        made.append((engine, batch))
        gc.collect()

    peak = peak_bytes(lambda: made[0][0].train_step([made[0][1]], 1), before)
    engine, batch = made.pop()
    plan = plan_memory(config, case.settings, batch.plan, engine.mesh.world_size, on_cuda=False)
    engine.close()
    del engine
    gc.collect()
    return {"tokens": len(batch.tokens), "measured": peak, "predicted": plan.peak, "moment": plan.moment}


def _micro_batch(case: Case) -> MicroBatch:
    """Random tokens, all of them targets, in documents of the case's length."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, case.context, dtype=np.int32)
    cu_seqlens = np.unique(np.r_[np.arange(0, case.context, case.document), case.context]).astype(np.int32)
    return MicroBatch(tokens, np.roll(tokens, -1), np.ones(case.context, np.float32), cu_seqlens, ())
