"""`ringworld bench train`: steps of our engine beside plain transformers and torch, the same model and documents.

In: sizes of a model, a context, sequences of a global batch. Out: by system the useful tokens a second - tokens of
documents, not padding - by the wall and by the processor, and the targets beside them. Documents are pieces of real
plays, their lengths by the `lwm` mix (`mixes.py`), a byte a token:

    ours           our engine, one rank.
    ours_compiled  the same with norms, rotary embedding and SwiGLU fused by torch.compile.
    ours_saving    the same as ours; each step begins a checkpoint, which is written to the disk meanwhile.
    ours_sp2       our engine, two ranks that share each sequence, each on a core of its own.
    packed         transformers' own packing.
    padded         transformers on padded rows, equally many a micro-batch, as its trainer makes them.
    padded_budget  the same with micro-batches of about equally many tokens (all three: `plain_training.py`).

fp32, one torch thread a process, each system in processes of its own, by turns; the fastest round counts, after one
that warms up (compiles, where anything is) and in which loss and gradient of all are compared: none may win by
computing something else. What a system does to documents to train on them (planning, collating) counts.
"""

from __future__ import annotations

import itertools
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table
from torch.multiprocessing import get_context

from benchmarks.machine import machine
from benchmarks.mixes import document_mix
from benchmarks.plain_training import PlainDocument, PlainTrainer
from benchmarks.tables import claims_table, print_tables
from benchmarks.text import plays
from model import checkpoint
from model.attention.plan.hardware import CPU_CORES
from model.layers.kernels.interface import Kernels
from model.llama.config import llama_config
from model.llama.flops import step_flops
from model.llama.initial_weights import RandomWeights
from model.llama.llama import build_llama
from model.training.engine import TrainingEngine
from model.training.lr_schedule import Schedule
from model.training.mesh import build_mesh
from model.training.rank_batch import Dispatcher, attention_shape
from model.training.settings import EngineSettings
from storage.store import Store
from tokenization.document import PackedSequence
from tokenization.loader.join import join_sequences

SYSTEMS: dict[str, int] = {
    "ours": 1,
    "ours_compiled": 1,
    "ours_saving": 1,
    "packed": 1,
    "padded": 1,
    "padded_budget": 1,
    "ours_sp2": 2,
}
"""Processes of each."""
TARGETS = (
    ("ours over packed, useful tokens/s, at least", 1.0, lambda of: of["ours"] / of["packed"]),
    ("ours over padded, useful tokens/s, at least", 2.0, lambda of: of["ours"] / of["padded"]),
    ("compiled over ours, useful tokens/s, at least", 1.0, lambda of: of["ours_compiled"] / of["ours"]),
    ("saving over ours, useful tokens/s, at least", 0.9, lambda of: of["ours_saving"] / of["ours"]),
    ("sp = 2 over sp = 1, useful tokens/s a core, at least", 0.85, lambda of: of["ours_sp2"] / of["ours"]),
)
VOCABULARY = 256 + 3
LEARNING_RATE = 1e-4
SAME = 1e-4
"""How far losses and gradients may lie apart, relatively."""


def model_size(hidden: int) -> dict[str, int]:
    """Four layers as wide as asked for, their MLPs 8/3 as wide (rounded up to 16), heads of 64."""
    return {
        "hidden_size": hidden,
        "intermediate_size": -(-hidden * 8 // 48) * 16,
        "num_hidden_layers": 4,
        "num_attention_heads": hidden // 64,
    }


@dataclass(frozen=True)
class Settings:
    """One run. sequences: of the global batch, a micro-batch each. rounds: that count, after a warm-up."""

    context: int = 4096
    sequences: int = 4
    rounds: int = 3
    seed: int = 3
    size: Mapping[str, int] = field(default_factory=lambda: model_size(256))

    def engine(self, kernels: Kernels = "torch") -> EngineSettings:
        """Of ours; the peers have the same optimizer."""
        return EngineSettings(zero=1, precision="fp32", grad_accum=self.sequences, kernels=kernels)

    def batch(self) -> list[list[PlainDocument]]:
        """The documents of each sequence, the same in every process."""
        text = np.frombuffer("".join(itertools.islice(plays(), 8)).encode(), dtype=np.uint8)
        sequences, start = [], 0
        for number in range(self.sequences):
            lengths = np.diff(document_mix("lwm", self.context, self.seed + number)).tolist()
            documents = []
            for length in lengths:
                tokens = text[start : start + length].astype(np.int64) + 3
                weight = np.full(length, 1 / max(1, length - 1), dtype=np.float32)
                weight[0] = 0
                documents.append(PlainDocument(tokens, weight))
                start += length
            sequences.append(documents)
        return sequences


def train_report(settings: Settings) -> dict:
    """Run all systems; their figures and the targets. Raises ValueError where they compute something else."""
    batch = settings.batch()
    lengths = [len(document.tokens) for sequence in batch for document in sequence]
    tokens = sum(lengths)
    with _Systems(settings) as systems:
        firsts = {name: systems.turn(name, "first") for name in SYSTEMS}
        differences = _differences({name: answers[0] for name, answers in firsts.items()})
        rounds = [{name: systems.turn(name, "step") for name in SYSTEMS} for _ in range(settings.rounds)]
    figures = {}
    for name, processes in SYSTEMS.items():
        wall = [max(answer["wall"] for answer in one[name]) for one in rounds]
        cpu = [sum(answer["cpu"] for answer in one[name]) for one in rounds]
        figures[name] = {
            "processes": processes,
            "tokens_per_second": round(tokens / min(wall), 1),
            "tokens_per_second_and_core": round(tokens / min(wall) / processes, 1),
            "tokens_per_cpu_second": round(tokens / min(cpu), 1),
            "first_seconds": round(max(answer["wall"] for answer in firsts[name]), 1),
            "wall_by_round": [round(x, 3) for x in wall],
            "cpu_by_round": [round(x, 3) for x in cpu],
            "difference_of_loss": differences[name][0],
            "difference_of_gradient": differences[name][1],
        }
    flops = step_flops(
        _config(settings), tokens, sum(n * (n + 1) // 2 for n in lengths), {"text": tokens - len(lengths)}
    )
    where = f"lwm {settings.context} x {settings.sequences} seed {settings.seed}"
    return {
        "benchmark": "train",
        "settings": asdict(settings),
        "documents": len(lengths),
        "tokens": tokens,
        "gflops_of_a_step": round(flops / 1e9, 1),
        "machine": machine() | {package: version(package) for package in ("transformers", "deepspeed")},
        "claims": claims(figures, where),
        "systems": figures,
    }


def claims(figures: Mapping[str, Mapping[str, Any]], where: str) -> list[dict]:
    """The targets, by the wall clock and by processor seconds, which other work on the machine disturbs less."""
    rows = []
    for by, key in (("wall", "tokens_per_second_and_core"), ("processor", "tokens_per_cpu_second")):
        speeds = {name: figure[key] for name, figure in figures.items()}
        for claim, target, measure in TARGETS:
            measured = round(measure(speeds), 3)
            met = measured >= target
            rows.append({"claim": claim, "where": f"{where}, {by}", "target": target, "measured": measured, "met": met})
    return rows


def print_train(report: dict) -> None:
    """One line a system, then the claims."""
    table = Table(title=f"Training steps of {report['tokens']} tokens in {report['documents']} documents")
    table.add_column("system")
    for name in ("tokens/s", "tokens/s a core", "tokens/cpu-s", "first turn, s", "gradient differs by"):
        table.add_column(name, justify="right")
    for name, figures in report["systems"].items():
        table.add_row(
            name,
            f"{figures['tokens_per_second']:.0f}",
            f"{figures['tokens_per_second_and_core']:.0f}",
            f"{figures['tokens_per_cpu_second']:.0f}",
            f"{figures['first_seconds']:.1f}",
            f"{figures['difference_of_gradient']:.0e}",
        )
    print_tables(table, claims_table(report["claims"]))


def _differences(firsts: Mapping[str, dict]) -> dict[str, tuple[float, float]]:
    """Relative differences of loss and gradient to those on padded rows, by system."""
    expected, found = firsts["padded"], {}
    for name, first in firsts.items():
        loss = abs(first["loss"] - expected["loss"]) / abs(expected["loss"])
        gradient = max(
            float(np.linalg.norm(first["gradient"][key] - value) / np.linalg.norm(value))
            for key, value in expected["gradient"].items()
        )
        if not max(loss, gradient) < SAME:
            raise ValueError(f"{name} and padded rows differ: loss by {loss:.1e}, gradient by {gradient:.1e}")
        found[name] = loss, gradient
    return found


def _config(settings: Settings) -> Any:
    return llama_config(dict(settings.size), VOCABULARY, settings.context, 1e6)


# --- Processes that take turns ---


class _Systems:
    """All systems' processes, each with one torch thread; one system works at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pipes: dict[str, list[Any]] = {}
        self._processes: list[Any] = []

    def __enter__(self) -> _Systems:
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._folder = tempfile.TemporaryDirectory()
        for name, size in SYSTEMS.items():
            for rank in range(size):
                ours, theirs = context.Pipe()
                store = f"{self._folder.name}/{name}"
                arguments = (theirs, name, self._settings, rank, size, store)
                process = context.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.setdefault(name, []).append(ours)
        return self

    def turn(self, name: str, command: str) -> list[dict]:
        """The answers of a system's ranks. Raises RuntimeError with what a process died of."""
        for pipe in self._pipes[name]:
            pipe.send(command)
        answers = [pipe.recv() for pipe in self._pipes[name]]
        for answer in answers:
            if "error" in answer:
                raise RuntimeError(f"{name}: {answer['error']}")
        return answers

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(pipe: Connection, name: str, settings: Settings, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    try:
        if size > 1:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        trainer = _Ours(settings, name, size, store) if name.startswith("ours") else _Plain(settings, name)
        batch = settings.batch()
        while True:
            command = pipe.recv()
            wall, cpu = time.perf_counter(), time.process_time()
            answer = trainer.first(batch) if command == "first" else trainer.step(batch)
            pipe.send({**answer, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu})
    except EOFError:
        return
    except Exception:
        pipe.send({"error": traceback.format_exc()})


class _Plain:
    def __init__(self, settings: Settings, rows: str) -> None:
        self._trainer = PlainTrainer(build_llama(_config(settings), settings.seed), settings.engine(), rows)

    def first(self, batch: Sequence[Sequence[PlainDocument]]) -> dict:
        loss, gradient = self._trainer.accumulate(batch), self._trainer.gradient()
        self._trainer.update(0.0)
        return {"loss": loss, "gradient": gradient}

    def step(self, batch: Sequence[Sequence[PlainDocument]]) -> dict:
        loss = self._trainer.accumulate(batch)
        self._trainer.update(LEARNING_RATE)
        return {"loss": loss}


class _Ours:
    def __init__(self, settings: Settings, name: str, sp: int, store: str) -> None:
        config = _config(settings)
        self._engine = TrainingEngine(
            RandomWeights(config, settings.seed),
            build_mesh(sp),
            settings.engine("compile" if name == "ours_compiled" else "torch"),
            Schedule(LEARNING_RATE, warmup_steps=1),  # the first update has a rate of 0
        )
        self._writer = (
            checkpoint.Writer(self._engine, Store(f"{store}-checkpoints"), keep=1) if name == "ours_saving" else None
        )
        self._dispatcher = Dispatcher(sp, self._engine.mesh.sp_rank, attention_shape(config, "fp32"), CPU_CORES)

    def first(self, batch: Sequence[Sequence[PlainDocument]]) -> dict:
        from deepspeed.utils import safe_get_full_grad

        micro_batches, n_documents = self._dispatched(batch)
        loss = self._engine.eval_step(micro_batches, n_documents).loss
        self._engine.accumulate(micro_batches, n_documents)
        named = self._engine.model.named_parameters()
        gradient = {key: safe_get_full_grad(p).reshape(p.shape).numpy().copy() for key, p in named}
        self._engine.update()
        return {"loss": loss, "gradient": gradient}

    def step(self, batch: Sequence[Sequence[PlainDocument]]) -> dict:
        if self._writer is not None:
            self._writer.save({})
        return {"loss": self._engine.train_step(*self._dispatched(batch)).loss}

    def _dispatched(self, batch: Sequence[Sequence[PlainDocument]]) -> tuple[list, int]:
        micro_batches = [self._dispatcher(join_sequences([_packed(documents)])) for documents in batch]
        return micro_batches, sum(map(len, batch))


def _packed(documents: Sequence[PlainDocument]) -> PackedSequence:
    return PackedSequence(
        key="",
        tokens=np.concatenate([document.tokens for document in documents]).astype(np.int32),
        cu_seqlens=np.cumsum([0, *(len(document.tokens) for document in documents)]).astype(np.int32),
        loss_weight=np.concatenate([document.weight for document in documents]),
        n_examples=len(documents),
    )
