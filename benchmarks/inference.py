"""`ringworld bench inference`: prefill and decoding beside transformers, the same small model and the same prompts.

In: contexts to decode at, a context to prefill. Out: by system the processor's and the wall's seconds, and the targets
beside them. fp32, a model of 4 layers of 256 with heads of 64, every process with one torch thread; systems take turns,
and the fastest round of each counts.

    decoding  TOKENS greedy tokens after a prompt: ours, and `transformers.generate`, whose own prefill is measured by
              asking it for one token and taken off. Both have to find the same tokens.
    prefill   ours in one process, `transformers.generate` for one token, ours over 2 processes on a core each.
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
from transformers import LlamaForCausalLM

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
PREFILL_TARGET = 1.3
RANKS_TARGET = 1.7


@dataclass(frozen=True)
class Settings:
    """One run. contexts: decoded at. prefill: tokens of the prompt that is prefilled alone. tokens: decoded.

    frames: drawn code by code and with codes drafted ahead.
    """

    contexts: Sequence[int] = tuple(DECODING)
    prefill: int = 65536
    tokens: int = 64
    frames: int = 2
    rounds: int = 3
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
        decoding = {str(context): _decoding(ours, plain, settings, context) for context in settings.contexts}
        prefill = _prefill(ours, plain, settings)
        frames = frames_report(FramesSettings(windows=(0, 32), frames=settings.frames, rounds=settings.rounds))
    finally:
        torch.set_num_threads(threads)
    return {
        "benchmark": "inference",
        "settings": asdict(settings),
        "machine": machine() | {"transformers": version("transformers")},
        "claims": _claims(decoding, prefill, settings),
        "decoding": decoding,
        "prefill": prefill,
        "frames": frames["frames"],
    }


def print_inference(report: dict) -> None:
    """A table of decoding, one of prefill, one of frames, the claims."""
    decoding = Table(title="Decoding, ms a token by the processor")
    for name in ("context", "ours", "transformers"):
        decoding.add_column(name, justify="right")
    for context, row in report["decoding"].items():
        decoding.add_row(context, *(f"{row[name]['cpu_ms_per_token']:.2f}" for name in ("ours", "transformers")))
    prefill = Table(title=f"Prefill of {report['settings']['prefill']} tokens")
    for name in ("system", "wall, s", "cpu of the slowest process, s"):
        prefill.add_column(name, justify="right")
    for name, row in report["prefill"].items():
        prefill.add_row(name, f"{row['wall']:.1f}", f"{row['cpu']:.1f}")
    print_tables(decoding, prefill, frames_table(report["frames"]), claims_table(report["claims"]))


def _plain(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Transformers' own model of the same weights."""
    plain = LlamaForCausalLM._from_config(copy.deepcopy(model.config), attn_implementation="sdpa", dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def _decoding(ours: LlamaForCausalLM, plain: LlamaForCausalLM, settings: Settings, context: int) -> dict:
    prompt = settings.prompt(context)
    by_system: dict[str, list[Seconds]] = {"ours": [], "transformers": []}
    with inference(ours):
        decoder = Decoder(ours, [prompt], room=settings.rounds * settings.tokens)
        for number in range(settings.rounds):
            tokens, seconds = _ours_decoded(decoder, settings.tokens)  # goes on where the round before ended
            by_system["ours"].append(seconds)
            _, first = _timed(lambda: _generated(plain, prompt, 1))
            expected, whole = _timed(lambda: _generated(plain, prompt, settings.tokens + 1))
            by_system["transformers"].append((whole[0] - first[0], whole[1] - first[1]))
            if number == 0 and tokens != expected:
                raise ValueError(f"at {context} tokens, ours and transformers decode different tokens")
    return {
        name: {
            "wall_ms_per_token": round(min(wall for wall, _ in seconds) / settings.tokens * 1e3, 3),
            "cpu_ms_per_token": round(min(cpu for _, cpu in seconds) / settings.tokens * 1e3, 3),
        }
        for name, seconds in by_system.items()
    }


def _ours_decoded(decoder: Decoder, n_tokens: int) -> tuple[list[int], Seconds]:
    """n_tokens + 1 greedy tokens, n_tokens of them timed: the first follows from the prefill."""

    def decode() -> list[torch.Tensor]:
        ids = [decoder.logits(0, VOCABULARY).argmax(-1)]
        for _ in range(n_tokens):
            decoder.append(ids[-1])
            ids.append(decoder.logits(0, VOCABULARY).argmax(-1))
        return ids

    ids, seconds = _timed(decode)
    return torch.cat(ids).tolist(), seconds


def _generated(plain: Any, prompt: np.ndarray, n_tokens: int) -> list[int]:
    ids = torch.from_numpy(prompt)[None]
    settings = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False, "pad_token_id": 0}
    found = plain.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **settings)
    return list(found[0, len(prompt) :].tolist())


def _prefill(ours: LlamaForCausalLM, plain: LlamaForCausalLM, settings: Settings) -> dict[str, dict]:
    prompt = settings.prompt(settings.prefill)

    def prefill() -> None:
        with inference(ours):
            Decoder(ours, [prompt])

    rounds: dict[str, list[Seconds]] = {"ours": [], "transformers": [], "ours, 2 processes": []}
    for _ in range(settings.rounds):
        rounds["ours"].append(_timed(prefill)[1])
        rounds["transformers"].append(_timed(lambda: _generated(plain, prompt, 1))[1])
        rounds["ours, 2 processes"].append(_over_processes(settings, 2))
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
        where, alone = f"{settings.prefill}, {by}", prefill["ours"][by]
        claim("prefill over transformers', at least", where, PREFILL_TARGET, prefill["transformers"][by] / alone)
        shared = prefill["ours, 2 processes"][by]
        claim("prefill over 2 processes over 1, at least", where, RANKS_TARGET, alone / shared)
    return rows
