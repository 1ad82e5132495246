"""`ringworld bench inference`: prefill and decoding beside transformers, the same small model and the same prompts.

In: contexts to decode at, a context to prefill, and which parts to run. Out: by system the processor's and the wall's
seconds, and the targets beside them. fp32, a model of 4 layers of 256 with heads of 64, every process with one torch
thread; systems take turns, and the fastest round of each counts.

    decoding  TOKENS greedy tokens after a prompt: ours; `transformers.generate`, whose cache grows by copying; and
              transformers with a static cache, allocated once at its full length, which saves the copies and attends
              through a mask. They go on from the cache of their own prefill, and have to find the same tokens.
    prefill   ours in one process, and transformers' (which is the same with either cache).
    ranks     ours in one process and over 2, on a core each.
    frames    by a random-initialised model with and without codes drafted ahead; `ringworld bench frames` has all

A token a second by the processor is what compares where other work runs on the machine; over processes, the slowest
rank's counts.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table
from torch.multiprocessing import set_forkserver_preload
from torch.multiprocessing.spawn import start_processes
from transformers import Cache, DynamicCache, LlamaForCausalLM, StaticCache
from transformers.cache_utils import DynamicLayer

from benchmarks.frames_ahead import Settings as FramesSettings
from benchmarks.frames_ahead import frames_report, frames_table
from benchmarks.machine import machine
from benchmarks.tables import claims_table, print_tables
from model.inference.kv_decoder import Decoder
from model.llama.config import llama_config
from model.llama.llama import build_llama, inference

VOCABULARY = 259
DECODING = {1024: 1.5, 16384: 2.0, 65536: 3.0}
"""Contexts and how many times as many tokens a second as transformers' are asked for."""
PARTS = ("decoding", "prefill", "ranks", "frames")
SYSTEMS = ("ours", "transformers", "transformers, static cache")
PREFILL_CLAIMS = (
    ("prefill over transformers', at least", "transformers", 1.3),
    ("prefill over 2 processes over 1, at least", "ours, 2 processes", 1.7),
)
"""A claim, the system beside ours in one process, the least ratio."""


@dataclass(frozen=True)
class Settings:
    """One run. contexts: decoded at. prefill: tokens of the prompt that is prefilled alone. tokens: decoded. frames:
    drawn code by code and with codes drafted ahead. parts: of `PARTS`.
    """

    contexts: Sequence[int] = tuple(DECODING)
    prefill: int = 65536
    tokens: int = 64
    frames: int = 2
    rounds: int = 3
    parts: Sequence[str] = PARTS
    seed: int = 0
    size: dict[str, int] = field(
        default_factory=lambda: {
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        }
    )

    def model(self) -> LlamaForCausalLM:
        """Ours, the same in every process."""
        longest = max(*self.contexts, self.prefill) + self.tokens
        return build_llama(llama_config(self.size, VOCABULARY, longest, 1e6), self.seed)

    def prompt(self, length: int) -> np.ndarray:
        """int64 [length] of random ids."""
        return np.random.default_rng(self.seed).integers(3, VOCABULARY, length)


Seconds = tuple[float, float]
"""Of the wall and of the processor."""


def inference_report(settings: Settings) -> dict:
    """Run all systems; their figures and the targets. Raises ValueError where greedy tokens differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours, plain = settings.model(), _plain(settings.model())
        contexts = settings.contexts if "decoding" in settings.parts else ()
        decoding = {str(context): _decoding(ours, plain, settings, context) for context in contexts}
        prefill = _prefill(ours, plain, settings)
        drawing = FramesSettings(windows=(0, 32), frames=settings.frames, rounds=settings.rounds)
        frames = frames_report(drawing)["frames"] if "frames" in settings.parts else []
    finally:
        torch.set_num_threads(threads)
    return {
        "benchmark": "inference",
        "settings": asdict(settings),
        "machine": machine() | {"transformers": version("transformers")},
        "claims": _claims(decoding, prefill, settings),
        "decoding": decoding,
        "prefill": prefill,
        "frames": frames,
    }


def print_inference(report: dict) -> None:
    """A table of decoding, one of prefill, one of frames, the claims."""
    decoding = Table(title="Decoding, ms a token by the processor")
    for name in ("context", *SYSTEMS):
        decoding.add_column(name, justify="right")
    for context, row in report["decoding"].items():
        decoding.add_row(context, *(f"{row[name]['cpu_ms_per_token']:.2f}" for name in SYSTEMS))
    prefill = Table(title=f"Prefill of {report['settings']['prefill']} tokens")
    for name in ("system", "wall, s", "cpu of the slowest process, s"):
        prefill.add_column(name, justify="right")
    for name, row in report["prefill"].items():
        prefill.add_row(name, f"{row['wall']:.1f}", f"{row['cpu']:.1f}")
    tables = [table for table in (decoding, prefill) if table.rows]
    tables += [frames_table(report["frames"])] if report["frames"] else []
    print_tables(*tables, claims_table(report["claims"]))


def _plain(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Transformers' own model of the same weights."""
    plain = LlamaForCausalLM._from_config(copy.deepcopy(model.config), attn_implementation="sdpa", dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def _decoding(ours: LlamaForCausalLM, plain: LlamaForCausalLM, settings: Settings, context: int) -> dict:
    """One prefill of each, then rounds of tokens by turns, each from where its round before ended."""
    prompt, room = settings.prompt(context), settings.rounds * settings.tokens + 1
    growing = DynamicCache(config=plain.config)
    first = _entered(plain, prompt, growing)
    ids = torch.tensor([[*prompt.tolist(), first]])
    systems = {
        "ours": _Ours(ours, prompt, first, room),
        "transformers": _Generating(plain, ids, growing),
        "transformers, static cache": _Generating(plain, ids, _static(growing, plain, context + room)),
    }
    seconds: dict[str, list[Seconds]] = {name: [] for name in systems}
    for _ in range(settings.rounds):
        found = {}
        for name, decode in systems.items():
            found[name], taken = _timed(lambda decode=decode: decode(settings.tokens))  # type: ignore[misc]
            seconds[name].append(taken)
        if len({tuple(tokens) for tokens in found.values()}) > 1:
            raise ValueError(f"at {context} tokens, ours and transformers decode different tokens")
    return {
        name: {
            "wall_ms_per_token": round(min(wall for wall, _ in taken) / settings.tokens * 1e3, 3),
            "cpu_ms_per_token": round(min(cpu for _, cpu in taken) / settings.tokens * 1e3, 3),
        }
        for name, taken in seconds.items()
    }


class _Ours:
    """Our decoder after a prompt and its first token. Called: the next n greedy tokens."""

    def __init__(self, model: LlamaForCausalLM, prompt: np.ndarray, first: int, room: int) -> None:
        self._model = model
        with inference(model):
            self._decoder = Decoder(model, [prompt], room=room)
            self._decoder.append(torch.tensor([first]))

    def __call__(self, n_tokens: int) -> list[int]:
        ids = []
        with inference(self._model):
            for _ in range(n_tokens):
                ids.append(self._decoder.logits(0, VOCABULARY).argmax(-1))
                self._decoder.append(ids[-1])
        return torch.cat(ids).tolist()


class _Generating:
    """`generate` from a cache that has all tokens so far but the last. Called: the next n greedy tokens."""

    def __init__(self, plain: Any, ids: torch.Tensor, cache: Cache) -> None:
        self._plain, self._ids, self._cache = plain, ids, cache

    def __call__(self, n_tokens: int) -> list[int]:
        settings = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False, "pad_token_id": 0}
        mask, before = torch.ones_like(self._ids), self._ids.shape[1]
        self._ids = self._plain.generate(
            self._ids, attention_mask=mask, eos_token_id=None, past_key_values=self._cache, **settings
        )
        return list(self._ids[0, before:].tolist())


@torch.no_grad()
def _entered(plain: LlamaForCausalLM, prompt: np.ndarray, cache: Cache) -> int:
    """Prefill at once, as `generate` does, and the greedy first token."""
    ids = torch.from_numpy(prompt)[None]
    return int(plain(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())


@torch.no_grad()  # as `generate`, which writes into it
def _static(growing: DynamicCache, plain: LlamaForCausalLM, length: int) -> StaticCache:
    """The same keys and values in memory for `length` tokens: a prefill into it would take a mask of S x S."""
    static = StaticCache(config=plain.config, max_cache_len=length)
    for number, layer in enumerate(growing.layers):
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        static.update(layer.keys, layer.values, number)
    return static


def _prefill(ours: LlamaForCausalLM, plain: LlamaForCausalLM, settings: Settings) -> dict[str, dict]:
    prompt = settings.prompt(settings.prefill)

    def prefill() -> None:
        with inference(ours):
            Decoder(ours, [prompt])

    systems: dict[str, Callable[[], Seconds]] = {}
    if {"prefill", "ranks"} & set(settings.parts):
        systems["ours"] = lambda: _timed(prefill)[1]
    if "prefill" in settings.parts:
        systems["transformers"] = lambda: _timed(lambda: _entered(plain, prompt, DynamicCache(config=plain.config)))[1]
    if "ranks" in settings.parts:
        systems["ours, 2 processes"] = lambda: _over_processes(settings, 2)
    rounds: dict[str, list[Seconds]] = {name: [] for name in systems}
    for _ in range(settings.rounds):
        for name, measure in systems.items():
            rounds[name].append(measure())
    return {
        name: {"wall": round(min(wall for wall, _ in seconds), 3), "cpu": round(min(cpu for _, cpu in seconds), 3)}
        for name, seconds in rounds.items()
    }


def _over_processes(settings: Settings, ranks: int) -> Seconds:
    """Seconds of the slowest of the ranks that prefill together."""
    set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_rank, args=(settings, ranks, folder), nprocs=ranks, start_method="forkserver")
        found = [np.loadtxt(f"{folder}/{rank}") for rank in range(ranks)]
    wall, cpu = np.max(found, axis=0).tolist()
    return wall, cpu


def _rank(rank: int, settings: Settings, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    model = settings.model()

    def prefill(length: int) -> None:
        with inference(model):
            Decoder(model, [settings.prompt(length)], group=dist.group.WORLD)

    prefill(64)  # connects the ranks
    dist.barrier()
    np.savetxt(f"{folder}/{rank}", _timed(lambda: prefill(settings.prefill))[1])
    dist.barrier()
    dist.destroy_process_group()


def _timed(action: Callable[[], Any]) -> tuple[Any, Seconds]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return result, (time.perf_counter() - wall, time.process_time() - cpu)


def _claims(decoding: dict, prefill: dict, settings: Settings) -> list[dict]:
    rows = []

    def claim(name: str, where: str, target: float, measured: float) -> None:
        rows.append(
            {
                "claim": name,
                "where": where,
                "target": target,
                "measured": round(measured, 3),
                "met": measured >= target,
            }
        )

    for by in ("wall", "cpu"):
        for context, row in decoding.items():
            if (target := DECODING.get(int(context))) is not None:
                ratio = row["transformers"][f"{by}_ms_per_token"] / row["ours"][f"{by}_ms_per_token"]
                claim("tokens/s decoding over transformers', at least", f"{context}, {by}", target, ratio)
        where = f"{settings.prefill}, {by}"
        for name, system, target in PREFILL_CLAIMS:
            if system in prefill:
                ratio = prefill[system][by] / prefill["ours"][by]
                claim(name, where, target, ratio if system == "transformers" else 1 / ratio)
    return rows
