"""`ringworld bench pack`: packers side by side, documents per CPU second and fill, on LWM's mix of documents.

In: contexts. Out: for each context what every packer makes of the same documents, in the same order:

    ringworld_filling   the packer's core: sequences filled from a pool of 10,000 documents at most, compiled.
    rooms_best_fit      best-fit-decreasing in plain Python, the rooms left kept sorted, in windows of 10,000 documents.
    tree_best_fit       the same in plain Python over a segment tree of rooms (Ding et al., arXiv 2404.10830), as TRL
                        packs, on all documents at once.
    next_fit            greedy concatenation: a document that does not fit opens the next sequence.
    ringworld_pack      the whole way to packed sequences with tokens, weights and lineage, on fewer documents.

Documents are drawn as LWM mixes them (`mixes`); those over the context are cut at it, in order, before the clock
starts, and a document here is one such piece. Fill is the share of all positions that hold a token. Rounds alternate
between packers and the fastest counts, so that a busy machine disturbs all alike. `neighbours` says what packing leaves
of the order that it works in: the correlation of the longest documents of neighbouring sequences, which are shuffled,
and of neighbouring bins of best-fit-decreasing, which are not.

All is done for each of `SEEDS`, which the packer's settings were not chosen on, and the worst of them counts.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from benchmarks.machine import machine
from benchmarks.mixes import document_mix
from benchmarks.plan import short
from tokenization.document import Document, PackedSequence
from tokenization.packing.best_fit import best_fit
from tokenization.packing.pack import KEPT, WINDOW, WINDOW_TOKENS, pack, pack_batches, pack_window
from tokenization.shards.document_parquet import to_batch
from tokenization.vocabulary import JointVocabulary

CONTEXTS = (8_192, 32_768, 1_048_576)
VOCABULARY = JointVocabulary.for_codebook(text_size=32_000, codebook_size=8_192)
BATCH = 1 << 10
PACK_TOKENS = 1 << 27  # the whole way is measured on at most this many tokens
MIX_CHUNK = 1 << 24
SEEDS = (10_000, 20_000, 30_000)
SPEED, FILL = 10e6, {32_768: 0.999, 1_048_576: 0.995}

Packer = Callable[[np.ndarray, int], int]
"""From lengths (int64 [N], each 2..context) to the number of sequences that they take."""


def mixed_lengths(documents: int, mix: str = "lwm", seed: int = 0) -> np.ndarray:
    """int64 [documents]: lengths of whole documents, as a mix draws them. Raises UserError on an unknown mix."""
    drawn: list[np.ndarray] = []
    while sum(map(len, drawn)) < documents:
        lengths = np.diff(document_mix(mix, MIX_CHUNK, seed + len(drawn)))
        drawn.append(lengths[:-1] if len(lengths) > 1 else lengths)  # the last one is cut at the end
    return np.concatenate(drawn)[:documents]


def cut(lengths: np.ndarray, context: int) -> np.ndarray:
    """int64 [N], 2..context: the pieces that packing cuts documents into, in order."""
    whole, rest = np.divmod(lengths, context)
    starts = np.cumsum(whole + 1) - (whole + 1)
    pieces = np.full(int((whole + 1).sum()), context, dtype=np.int64)
    pieces[starts + whole] = rest
    return pieces[pieces >= 2]


def windowed_filling(lengths: np.ndarray, context: int) -> int:
    """Ringworld's packer: sequences are filled from a window until half of it is left, and that is topped up again."""
    sequences = start = 0
    kept = lengths[:0]
    is_last = False
    while not is_last:
        members = np.concatenate([kept, lengths[start : start + WINDOW - len(kept)]])
        start += len(members) - len(kept)
        is_last = len(members) < WINDOW
        keep = (0, 0) if is_last else (WINDOW // KEPT, WINDOW_TOKENS // KEPT)
        sequence_of, n_sequences = pack_window(members, context, *keep)
        kept = members[sequence_of < 0]
        sequences += n_sequences
    return sequences


def rooms_best_fit(lengths: np.ndarray, context: int) -> int:
    """Best-fit-decreasing in plain Python: rooms of open sequences kept sorted, found by bisection."""
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


def tree_best_fit(lengths: np.ndarray, context: int) -> int:
    """The same rule in plain Python: a tree over all rooms 1..context whose nodes hold the largest room below them."""
    leaves = 1 << (context - 1).bit_length()
    largest = [0] * (2 * leaves)
    waiting = [0] * (context + 1)  # open sequences by their room

    def put(room: int, value: int) -> None:
        node = leaves + room - 1
        largest[node] = value
        while node > 1:
            node >>= 1
            left, right = largest[2 * node], largest[2 * node + 1]
            largest[node] = left if left > right else right

    put(context, context)
    sequences = 0
    for length in sorted(lengths.tolist(), reverse=True):
        node = 1
        while node < leaves:
            node = 2 * node if largest[2 * node] >= length else 2 * node + 1
        room = largest[node]
        if room == context:
            sequences += 1
        else:
            waiting[room] -= 1
            if not waiting[room]:
                put(room, 0)
        rest = room - length
        if rest:
            waiting[rest] += 1
            if waiting[rest] == 1:
                put(rest, rest)
    return sequences


PACKERS: dict[str, Packer] = {
    "ringworld_filling": windowed_filling,
    "rooms_best_fit": rooms_best_fit,
    "tree_best_fit": tree_best_fit,
    "next_fit": next_fit,
}
PEERS = ("rooms_best_fit", "tree_best_fit", "next_fit")


def race(lengths: np.ndarray, context: int, rounds: int) -> dict[str, dict[str, float]]:
    """Best of `rounds` for each packer, and its fill."""
    seconds = dict.fromkeys(PACKERS, float("inf"))
    sequences: dict[str, int] = {}
    for packer in PACKERS.values():
        packer(lengths[:2], context)  # compiled outside the clock
    for _ in range(rounds):
        for name, packer in PACKERS.items():
            started = time.process_time()
            sequences[name] = packer(lengths, context)
            seconds[name] = min(seconds[name], time.process_time() - started)
    return {
        name: {
            "documents_per_cpu_s": round(len(lengths) / seconds[name]),
            "fill": round(float(lengths.sum()) / (sequences[name] * context), 5),
        }
        for name in PACKERS
    }


def whole_way(lengths: np.ndarray, context: int) -> dict[str, float]:
    """Documents to packed sequences through `pack`: speed, and fill over the sequences of it."""
    lengths = lengths[: max(1, int(np.searchsorted(np.cumsum(lengths), PACK_TOKENS)))]
    tokens = np.random.default_rng(0).integers(3, VOCABULARY.eov_id, context).astype(np.int32)
    documents = [Document(str(i), "bench", tokens[:n], ((1, int(n)),)) for i, n in enumerate(lengths)]
    batches = [to_batch(documents[start : start + BATCH]) for start in range(0, len(documents), BATCH)]
    started = time.process_time()
    sequences = sum(1 for _ in pack_batches(batches, context, VOCABULARY, "vision-text"))
    seconds = time.process_time() - started
    return {
        "documents": len(documents),
        "documents_per_cpu_s": round(len(documents) / seconds),
        "tokens_per_cpu_s": round(float(lengths.sum()) / seconds),
        "fill": round(float(lengths.sum()) / (sequences * context), 5),
    }


def neighbours(lengths: np.ndarray, context: int) -> dict[str, float]:
    """Correlation of the longest document of each sequence with that of the next, over so many tokens."""
    lengths = lengths[: max(1, int(np.searchsorted(np.cumsum(lengths), PACK_TOKENS)))]
    tokens = np.zeros(context, dtype=np.int32)
    documents = [Document(str(i), "bench", tokens[:n], ()) for i, n in enumerate(lengths)]
    shuffled = [max(part["length"] for part in sequence.lineage) for sequence in _packed(documents, context)]
    bin_of, n_bins = best_fit(lengths, context)
    in_bins = np.zeros(n_bins, dtype=np.int64)
    np.maximum.at(in_bins, bin_of, lengths)
    return {"shuffled": _correlation(np.array(shuffled)), "sorted": _correlation(in_bins)}


def _packed(documents: Sequence[Document], context: int) -> Iterator[PackedSequence]:
    return pack(documents, context, VOCABULARY, "text")


def _correlation(values: np.ndarray) -> float:
    if len(values) < 3 or values[:-1].std() == 0 or values[1:].std() == 0:
        return 0.0
    return round(float(np.corrcoef(values[:-1], values[1:])[0, 1]), 3)


def pack_report(
    contexts: Sequence[int], documents: int, rounds: int, mix: str = "lwm", seeds: Sequence[int] = SEEDS
) -> dict:
    """One row for each context and seed, and the targets beside them. Raises UserError on an unknown mix."""
    rows: list[dict] = []
    for seed in seeds:
        whole = mixed_lengths(documents, mix, seed)
        for context in contexts:
            lengths = cut(whole, context)
            rows.append(
                {
                    "context": context,
                    "seed": seed,
                    "documents": len(lengths),
                    "packers": race(lengths, context, rounds),
                    "ringworld_pack": whole_way(lengths, context),
                    "neighbours": neighbours(lengths, context),
                }
            )
    rows.sort(key=lambda row: row["context"])
    return {
        "benchmark": "pack",
        "settings": {"documents": documents, "mix": mix, "window": WINDOW, "rounds": rounds, "seeds": list(seeds)},
        "machine": machine(),
        "claims": claims(rows),
        "rows": rows,
    }


def claims(rows: Sequence[dict]) -> list[dict]:
    """Speed at the slowest of the rows, and the least fill where there is a target for a context."""
    if not rows:
        return []
    ours = [(row["context"], row["packers"]["ringworld_filling"]) for row in rows]
    slowest, figures = min(ours, key=lambda row: row[1]["documents_per_cpu_s"])
    found = [("documents packed per CPU second at least", slowest, SPEED, figures["documents_per_cpu_s"])]
    for context, target in FILL.items():
        if fills := [figures["fill"] for where, figures in ours if where == context]:
            found.append(("fill at least", context, target, min(fills)))
    return [
        {"claim": claim, "where": short(where), "target": target, "measured": measured, "met": measured >= target}
        for claim, where, target, measured in found
    ]


def print_pack(report: dict) -> None:
    """One line a context, seed and packer, then the targets."""
    print(f"{'context':>8} {'packer':<20}{'documents/CPU s':>16}{'fill':>10}")
    for row in report["rows"]:
        for name, figures in {**row["packers"], "ringworld_pack": row["ringworld_pack"]}.items():
            print(f"{short(row['context']):>8} {name:<20}{figures['documents_per_cpu_s']:>16,}{figures['fill']:>10.5f}")
        along = row["neighbours"]
        print(
            f"{'':>8} longest documents of neighbours correlate by {along['shuffled']:g}, sorted by {along['sorted']:g}"
        )
    for claim in report["claims"]:
        verdict = "met" if claim["met"] else "MISSED"
        print(f"{claim['claim']} {claim['target']:g} at {claim['where']}: {claim['measured']:g}, {verdict}")
