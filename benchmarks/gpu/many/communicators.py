"""Two communicators at work at once on two cards: ZeRO-3 over both, a ring over the two that share each sequence.

Each card is a process of its own. Held are: the law, by every way to share a sequence, in fp32 with attention's
operators by their definition and in bf16 with FlashAttention (see `benchmarks.gpu.right.law` for both limits), against
padded training on one card; that what the processes launch on their groups is one order for both; and that many steps
of a model whose gathers and messages take long enough to overlap come to their end, with the same losses on both.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.part import Bench
from benchmarks.gpu.right.exact_attention import exact_attention
from benchmarks.gpu.right.law import LAW, SIZES, YARDSTICK, rms_error
from model.llama.initial_weights import RandomWeights
from model.training.engine import TrainingEngine
from model.training.lr_schedule import Schedule
from model.training.mesh import Mesh, build_mesh
from model.training.rank_batch import Dispatcher, attention_shape
from model.training.settings import EngineSettings
from testing.launch_order import Launch, launches, left_waiting
from testing.law_batch import (
    SEED,
    TINY,
    VOCABULARY,
    RoundedWeights,
    rank_batches,
    relative_difference,
    tiny_config,
    tiny_engine,
)
from testing.padded_reference import PaddedReference
from testing.sharings import SHARINGS, Sharing, gradients_by_sharing
from tokenization.loader.batch import MicroBatch

RANKS = 2
TINY_SHARINGS = (Sharing("shared-0.5%", 2, "direct"), Sharing("contiguous", 1, "relay"))
OVERLAPPING = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
"""On cards: a layer's weights are 100 MB in bf16, its keys at 16K tokens 67 MB a card."""
STALLED = timedelta(seconds=60)
"""After which torch ends a process whose operation on a group does not come to its end."""
SPARE = 3.0
"""Seconds of the part's time that processes which hang are not waited for."""


def run(bench: Bench) -> None:
    """The reference on one card, the processes, and what they found."""
    weights = RoundedWeights(tiny_config(bench.size(SIZES, TINY)), SEED)
    exact, plain = (
        PaddedReference("vision-text", weights, dtype, bench.device).gradient()
        for dtype in (torch.float64, torch.bfloat16)
    )
    found = _on_all_ranks(bench)
    if found is None:
        return
    first, *others = found
    for sharing, gradient in first["fp32"].items():
        bench.check(f"fp32, {_name(sharing)}: gradient", relative_difference(gradient, exact), at_most=LAW)
    for sharing, gradient in first["bf16"].items():
        error = rms_error(gradient, exact) / rms_error(plain, exact)
        bench.check(f"bf16, {_name(sharing)}: error in those of plain transformers", error, at_most=YARDSTICK)
    waiting = left_waiting([rank["launched"] for rank in found])
    bench.check("ranks that would wait for ever if each ran its operations one by one", len(waiting), at_most=0)
    groups = {launch.group for launch in first["launched"]}
    bench.check("groups whose operations are launched by turns", len(groups), at_least=2)
    differ = sum(other["losses"] != first["losses"] for other in others)
    bench.check("ranks whose losses of overlapping steps differ from the first one's", differ, at_most=0)
    bench.check("largest of these losses", float(torch.tensor(first["losses"]).max()), at_most=2 * first["losses"][0])
    bench.figures("overlapping steps", n=len(first["losses"]), seconds=first["seconds"], order=first["order"])


def _name(sharing: Sharing) -> str:
    return ", ".join(str(choice) for choice in sharing if choice is not None) or "the planner's choice"


def _on_all_ranks(bench: Bench) -> list[dict[str, Any]] | None:
    """What `rank_findings` says on each rank; None, and a failed check, where a process hangs.

    Raises RuntimeError with what a rank raises.
    """
    context = _context(bench.on_cuda)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, bench.on_cuda, bench.tiny)
        processes = [context.Process(target=rank_findings, args=(rank, *arguments)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        _wait(processes, bench.left - SPARE)
        died = [rank for rank, process in enumerate(processes) if process.exitcode]
        hung = [process for process in processes if process.is_alive()]
        for process in hung:
            process.kill()
            process.join()
        if died:
            # The first is the cause: where one rank fails, others soon miss it.
            said = sorted(Path(folder).glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
            why = said[0].read_text() if said else f"exit code {processes[died[0]].exitcode}"
            raise RuntimeError(f"ranks {died} died: {why}")
        bench.check("processes that hang", len(hung), at_most=0)
        if hung:
            return None
        with torch.serialization.safe_globals([Sharing, Launch]):
            return [torch.load(Path(folder, str(rank)), weights_only=True) for rank in range(RANKS)]


def _wait(processes: Sequence[BaseProcess], seconds: float) -> None:
    """Until all have ended, one has died, for which the others would wait, or the time is up."""
    end = time.monotonic() + seconds
    while waiting := [process.sentinel for process in processes if process.is_alive()]:
        left = end - time.monotonic()
        if left <= 0 or any(process.exitcode for process in processes):
            return
        wait(waiting, left)


def _context(on_cuda: bool) -> SpawnContext | ForkServerContext:
    """On a card processes start anew; in a rehearsal they are forked from one that has imported what takes seconds."""
    if on_cuda:
        return multiprocessing.get_context("spawn")
    multiprocessing.set_forkserver_preload([__name__, "deepspeed"])
    return multiprocessing.get_context("forkserver")


# --- In the processes ---


def rank_findings(rank: int, folder: str, on_cuda: bool, tiny: bool) -> None:
    """Write what this rank finds to a file of its own: gradients by sharing, launches, losses, seconds."""
    try:
        with _world(rank, folder, on_cuda):
            mesh = build_mesh(RANKS, timeout=STALLED)
            found = {**_law(mesh, tiny), **_overlapping(mesh, tiny)}
        torch.save({**found, "order": os.environ["NCCL_LAUNCH_ORDER_IMPLICIT"]}, Path(folder, str(rank)))
    except Exception:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise


@contextlib.contextmanager
def _world(rank: int, folder: str, on_cuda: bool) -> Iterator[None]:
    torch.set_num_threads(1)
    if on_cuda:
        os.environ["LOCAL_RANK"] = str(rank)  # by which DeepSpeed finds the card
        torch.cuda.set_device(rank)
    store = f"file://{folder}/store"
    backend = "nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=RANKS, timeout=STALLED)
    yield
    dist.destroy_process_group()


def _law(mesh: Mesh, tiny: bool) -> dict[str, Any]:
    weights = RoundedWeights(tiny_config(TINY if tiny else SIZES), SEED)
    sharings = TINY_SHARINGS if tiny else SHARINGS
    with exact_attention():
        in_fp32 = gradients_by_sharing(mesh, sharings, zero_stage=3, weights=weights)
    in_bf16 = gradients_by_sharing(mesh, sharings[:2], zero_stage=3, weights=weights, precision="bf16")
    return {"fp32": _on_cpu(in_fp32), "bf16": _on_cpu(in_bf16), "launched": _launched(mesh, weights)}


def _on_cpu(gradients: dict[Sharing, dict[str, Tensor]]) -> dict[Sharing, dict[str, Tensor]]:
    return {sharing: {name: x.cpu() for name, x in gradient.items()} for sharing, gradient in gradients.items()}


def _launched(mesh: Mesh, weights: RandomWeights) -> list[Any]:
    """Of a step over each route. DeepSpeed gathers weights ahead once it knows the modules' order, in the third."""
    engine = tiny_engine(mesh, zero_stage=3, weights=weights, precision="bf16")
    with launches() as launched:
        for route in ("direct", "relay", "direct"):
            engine.train_step(*rank_batches(mesh, layout="zigzag", route=route))
    engine.close()
    return launched


def _overlapping(mesh: Mesh, tiny: bool) -> dict[str, Any]:
    """Many steps of a model large enough that gathers of weights and messages of keys are under way at once."""
    length, steps = (128, 2) if tiny else (32768, 20)
    config = tiny_config(TINY if tiny else OVERLAPPING)
    settings = EngineSettings(3, precision="bf16", zero_options={"stage3_param_persistence_threshold": 0})
    engine = TrainingEngine(RandomWeights(config, SEED), mesh, settings, Schedule(peak=1e-4))
    dispatch = Dispatcher(mesh.sp, mesh.sp_rank, attention_shape(config, "bf16"), layout="zigzag", ulysses=1)
    batch = dispatch(_one_document(length))
    losses = [_step(engine, batch)]
    started = time.perf_counter()
    losses += [_step(engine, batch) for _ in range(steps - 1)]
    seconds = (time.perf_counter() - started) / (steps - 1)
    engine.close()
    return {"losses": losses, "seconds": round(seconds, 4)}


def _step(engine: TrainingEngine, batch: Any) -> float:
    return engine.train_step([batch], len(batch.tokens) * engine.mesh.sp).loss


def _one_document(length: int) -> MicroBatch:
    """Random text ids, all of them targets."""
    tokens = np.random.default_rng(SEED).integers(3, VOCABULARY.text_size, length, dtype=np.int32)
    weights = np.ones(length, np.float32)
    weights[-1] = 0
    return MicroBatch(tokens, np.roll(tokens, -1), weights, np.array([0, length], np.int32), ())
