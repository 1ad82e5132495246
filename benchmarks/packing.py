"""Packing, side by side in one run: documents per CPU second and fill, as JSON on stdout.

    python -m benchmarks.packing [--documents 100000] [--rounds 3] [--contexts 8192 32768 1048576]

Three packers see the same lengths: Ringworld's compiled best-fit-decreasing and a plain-Python one over sorted rooms
(the same rule, so the same fill), both in windows of 10,000 documents, and greedy next-fit, which needs no window.
Lengths are log-normal with a median of a twelfth of the context, clipped to it: many short ones, a few that fill it.
`ringworld_pack` is the whole way to packed sequences with tokens, weights and lineage. Rounds alternate between packers
and the fastest counts, so that a busy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import bisect
import json
import platform
import time
from collections.abc import Callable

import numpy as np

from tokenization.document import Document
from tokenization.packing import WINDOW, best_fit, pack
from tokenization.vocabulary import JointVocabulary

VOCABULARY = JointVocabulary.for_codebook(text_size=32_000, codebook_size=8_192)
PACK_TOKENS = 1 << 28  # the whole way is measured on at most this many tokens


def mixed_lengths(documents: int, context: int, seed: int = 0) -> np.ndarray:
    """int64 [documents], 2..context."""
    drawn = np.random.default_rng(seed).lognormal(np.log(context / 12), 1.1, documents)
    return np.clip(drawn, 2, context).astype(np.int64)


def windowed_best_fit(lengths: np.ndarray, context: int) -> int:
    """Sequences that Ringworld's packer fills."""
    return sum(best_fit(lengths[start : start + WINDOW], context)[1] for start in range(0, len(lengths), WINDOW))


def plain_best_fit(lengths: np.ndarray, context: int) -> int:
    """The same rule in plain Python: rooms of open sequences kept sorted, found by bisection."""
    sequences = 0
    for start in range(0, len(lengths), WINDOW):
        rooms: list[int] = []
        for length in sorted(lengths[start : start + WINDOW].tolist(), reverse=True):
            place = bisect.bisect_left(rooms, length)
            if place == len(rooms):
                sequences += 1
                room = context
            else:
                room = rooms.pop(place)
            if room > length:
                bisect.insort(rooms, room - length)
    return sequences


def next_fit(lengths: np.ndarray, context: int) -> int:
    """Greedy concatenation: a document that does not fit the open sequence opens the next."""
    sequences, room = 0, 0
    for length in lengths.tolist():
        if length > room:
            sequences += 1
            room = context
        room -= length
    return sequences


PACKERS: dict[str, Callable[[np.ndarray, int], int]] = {
    "ringworld_best_fit": windowed_best_fit,
    "python_best_fit": plain_best_fit,
    "python_next_fit": next_fit,
}


def race(lengths: np.ndarray, context: int, rounds: int) -> dict[str, dict[str, float]]:
    """Best of `rounds` for each packer, and its fill."""
    seconds = dict.fromkeys(PACKERS, float("inf"))
    sequences = {}
    for packer in PACKERS.values():
        packer(lengths[:2], context)  # compile outside the clock
    for _ in range(rounds):
        for name, packer in PACKERS.items():
            start = time.process_time()
            sequences[name] = packer(lengths, context)
            seconds[name] = min(seconds[name], time.process_time() - start)
    return {
        name: {
            "documents_per_cpu_s": round(len(lengths) / seconds[name]),
            "fill": round(float(lengths.sum()) / (sequences[name] * context), 5),
        }
        for name in PACKERS
    }


def whole_way(lengths: np.ndarray, context: int) -> dict[str, float]:
    """Documents to packed sequences through `pack`."""
    lengths = lengths[: max(1, int(np.searchsorted(np.cumsum(lengths), PACK_TOKENS)))]
    tokens = np.random.default_rng(0).integers(3, VOCABULARY.eov_id, context).astype(np.int32)
    documents = [Document(str(i), "benchmark", tokens[:n], ((1, int(n)),)) for i, n in enumerate(lengths)]
    start = time.process_time()
    sequences = sum(1 for _ in pack(documents, context, VOCABULARY, "vision-text"))
    seconds = time.process_time() - start
    return {
        "documents_per_cpu_s": round(len(documents) / seconds),
        "tokens_per_cpu_s": round(float(lengths.sum()) / seconds),
        "fill": round(float(lengths.sum()) / (sequences * context), 5),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="Packers side by side, as JSON.")
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8_192, 32_768, 1_048_576])
    settings = parser.parse_args()
    results = []
    for context in settings.contexts:
        lengths = mixed_lengths(settings.documents, context)
        row = race(lengths, context, settings.rounds)
        results.append({"context": context, **row, "ringworld_pack": whole_way(lengths, context)})
    machine = {"platform": platform.platform(), "python": platform.python_version(), "numpy": np.__version__}
    report = {
        "benchmark": "packing",
        "documents": settings.documents,
        "window": WINDOW,
        "machine": machine,
        "results": results,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
