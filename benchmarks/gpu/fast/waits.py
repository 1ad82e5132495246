"""How often the host waits for the card in a step of the engine, and where: each time the card runs dry behind it.

In: a small Llama with two modalities, trained by the whole engine (DeepSpeed, ZeRO 1 and 3, bf16). Out: the waits of a
step by the line that asks for a value, from torch's dispatcher, and by kind from the card's runtime, which also sees
those that no operator asks for. A layer may add none; a step is to have few. In a rehearsal it counts what would wait
on a card, and the optimizer's counters, which lie on the host anyway.
"""

from __future__ import annotations

import functools
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.fast.llama import RECIPE
from benchmarks.gpu.part import Bench, Row
from model.llama.config import llama_config
from model.llama.initial_weights import RandomWeights
from model.training.engine import TrainingEngine
from model.training.lr_schedule import Schedule
from model.training.mesh import build_mesh
from model.training.rank_batch import Dispatcher, RankBatch
from model.training.settings import EngineSettings
from tokenization.loader.batch import MicroBatch

WAITS = 6
"""Of a step, at most: the losses at its end; three for the gradient's norm, which DeepSpeed looks at and
clips by, and we report; and the loss's rows, once for each of two modalities."""
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
VOCABULARY = {"text": 256, "vision": 256}
WARM_UP = 3
"""Steps in which DeepSpeed records and checks the order of weights, under ZeRO 3."""
_aten = torch.ops.aten
_READS = (_aten._local_scalar_dense, _aten.nonzero, _aten.equal, _aten.masked_select)
_INDEXED = (_aten.index, _aten.index_put_)
_RUNTIME = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@dataclass(frozen=True)
class Waits:
    """Of one step: by the place that asks for a value, and by the runtime's function (on a card alone)."""

    places: Mapping[str, int]
    runtime: Mapping[str, int]

    @property
    def most(self) -> int:
        """What the one or the other has seen."""
        return max(sum(self.places.values()), sum(self.runtime.values()))


def run(bench: Bench) -> None:
    """ZeRO 1 with a few layers and with more, then ZeRO 3."""
    few, more = (_of_a_step(bench, zero=1, layers=layers) for layers in (2, 4))
    added = {name: n - few.places.get(name, 0) for name, n in more.places.items()}
    bench.check("waits that two more layers add, by operators", sum(added.values()), at_most=0)
    bench.check("waits that two more layers add, in all", more.most - few.most, at_most=0)
    for zero, waits in ((1, more), (3, _of_a_step(bench, zero=3, layers=4))):
        bench.goal(
            f"waits of a step under ZeRO {zero}", waits.most, at_most=WAITS, explain=functools.partial(asdict, waits)
        )


def _of_a_step(bench: Bench, zero: int, layers: int) -> Waits:
    config = llama_config({**SIZES, "num_hidden_layers": layers}, VOCABULARY, 4096, 1e6)
    memory = replace(RECIPE, mlp_tile=bench.size(2048, 64))
    settings = EngineSettings(zero=zero, precision="bf16", memory=memory)  # type: ignore[arg-type]
    engine = TrainingEngine(RandomWeights(config, 0), build_mesh(), settings, Schedule(1e-3))
    batch = _batch(bench.size(4096, 128))
    for _ in range(WARM_UP):
        engine.train_step([batch], 2)
    expected = engine.eval_step([batch], 2).loss
    with _counted(bench.device) as places:
        loss = engine.train_step([batch], 2).loss
    name = f"ZeRO {zero}, {layers} layers"
    bench.check(f"{name}: loss of the counted step beside an evaluation's", abs(loss / expected - 1), at_most=1e-3)
    before = engine.step
    waits = Waits(dict(places), _by_runtime(bench, lambda: engine.train_step([batch], 2)))
    bench.check(f"{name}: steps made while counting", engine.step - before, at_least=1, at_most=1)
    bench.figures(name, places=waits.places, runtime=waits.runtime)
    engine.close()
    return waits


def _batch(tokens: int) -> RankBatch:
    """Two documents of both modalities."""
    drawn = np.random.default_rng(0).integers(0, sum(VOCABULARY.values()), tokens, dtype=np.int32)
    cu_seqlens = np.array([0, tokens // 3, tokens], np.int32)
    made = MicroBatch(drawn, np.roll(drawn, -1), np.ones(tokens, np.float32), cu_seqlens, ())
    return Dispatcher()(made)


@contextmanager
def _counted(device: torch.device) -> Iterator[Counter[str]]:
    """Within it, the places that wait: by an operator, or as DeepSpeed does, which also would on a CPU."""
    from deepspeed.accelerator import get_accelerator

    places: Counter[str] = Counter()
    accelerator = get_accelerator()
    synchronize = accelerator.synchronize

    def counted(*args: Any) -> Any:
        places[_place()] += 1
        return synchronize(*args)

    accelerator.synchronize = counted
    try:
        with _Operators(device, places):
            yield places
    finally:
        accelerator.synchronize = synchronize


class _Operators(TorchDispatchMode):
    """Counts operators that give the host a value of the device, by the line that calls them."""

    def __init__(self, device: torch.device, places: Counter[str]) -> None:
        super().__init__()
        self._places, self._device = places, device.type

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self._waits(func.overloadpacket, args, kwargs or {}):
            self._places[_place()] += 1
        return func(*args, **(kwargs or {}))

    def _waits(self, operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        if operator in _READS:
            return bool(args[0].device.type == self._device)
        if operator in _INDEXED:
            masks = (x for x in args[1] if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8))
            return any(mask.device.type == self._device for mask in masks)
        if operator is _aten._to_copy:
            to, blocking = kwargs.get("device"), not kwargs.get("non_blocking")
            return blocking and args[0].is_cuda and to is not None and torch.device(to).type == "cpu"
        if operator is _aten.copy_:
            blocking = not (kwargs.get("non_blocking") or args[2:3] == (True,))
            return blocking and not args[0].is_cuda and args[1].is_cuda
        return False


def _place() -> str:
    """The innermost line outside torch and this file."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if "torch" not in path.parts and path != Path(__file__):
            return f"{'/'.join(path.parts[-3:])}:{frame.lineno}"
    return "torch"


def _by_runtime(bench: Bench, call: Callable[[], object]) -> Mapping[str, int]:
    """The runtime's functions that wait for the card, without those of the profiler itself."""
    if not bench.on_cuda:
        call()
        return {}
    own, all_ = (_runtime(x) for x in (lambda: None, call))
    return {name: n - own.get(name, 0) for name, n in all_.items()}


def _runtime(call: Callable[[], object]) -> Row:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
    return {event.key: event.count for event in profiler.key_averages() if event.key in _RUNTIME}
