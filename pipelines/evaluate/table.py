"""Rows of held-out loss, beside unigram models of the same targets.

In: what `tasks/heldout_loss.py` counted of one stage and source each. Out: the rows of any grouping of them, exactly,
since sums and counts add up. `unigram_heldout` is the empirical entropy of the same targets, which no unigram model can
beat; `unigram_train` was counted on the targets of training shards, plus one for each id of the modality.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import safetensors.numpy

from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.record import Row


def tabulate(job: EvaluateJob, records: Sequence[Row], source: str) -> list[Row]:
    """One row a modality that has targets, over all `records` together; `source` names what they are."""
    rows: list[Row] = []
    counts = []
    for record in records:
        with job.store.open(record["counts"]) as file:
            counts.append(safetensors.numpy.load(file.read()))
    for modality in job.vocabulary.modalities:
        name, ids = modality.name, slice(modality.start, modality.stop)
        targets = sum(record["targets"].get(name, 0) for record in records)
        if not targets:
            continue
        heldout = np.sum([count["heldout"][ids] for count in counts], axis=0)
        train = np.sum([count["train"][ids] for count in counts], axis=0)
        rows.append(
            {
                "stage": records[0]["stage"],
                "source": source,
                "modality": name,
                "context": max(record["context"] for record in records),
                "sequences": sum(record["sequences"] for record in records),
                "of_sequences": sum(record["of_sequences"] for record in records),
                "targets": targets,
                "nats_per_token": sum(record["nats"].get(name, 0.0) for record in records) / targets,
                "unigram_heldout": entropy(heldout),
                "unigram_train": cross_entropy(heldout, train),
                "unigram_train_targets": int(train.sum()),
                "uniform": float(np.log(len(heldout))),
            }
        )
    return rows


def entropy(counts: np.ndarray) -> float:
    """Nats per token of tokens with these counts under their own frequencies."""
    seen = counts[counts > 0].astype(np.float64)
    return float(np.log(seen.sum()) - (seen * np.log(seen)).sum() / seen.sum())


def cross_entropy(counts: np.ndarray, model_counts: np.ndarray) -> float:
    """Nats per token of tokens with these counts under frequencies of `model_counts` plus one, over the same ids."""
    smoothed = model_counts.astype(np.float64) + 1
    return float(-(counts * np.log(smoothed / smoothed.sum())).sum() / counts.sum())
