"""Held-out loss: nats per token of the targets with loss, by modality.

In: packed held-out shards and the model of a training stage. Out: sums and target counts of one stage and source, from
which `table.py` makes rows. Every figure is of a softmax over the target's own modality, as in the loss. One device
scores a sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from transformers import LlamaForCausalLM

from model.llama.config import modality_ranges
from model.training.micro_batch_loss import micro_batch_loss
from model.training.rank_batch import Dispatcher
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.models import trained_model
from storage.store import Store
from tokenization.document import PackedSequence
from tokenization.loader.join import join_sequences
from tokenization.media.frame_sampling import uniform_sample
from tokenization.shards.index import ShardSet
from tokenization.shards.shard import read_sequence
from tokenization.vocabulary import JointVocabulary

COUNTED_TOKENS = 2**24
"""Tokens of training shards, at most, that a unigram model is counted on."""


def score_part(job: EvaluateJob, name: str, stage: str, pack: str, source: str) -> dict[str, Any]:
    """Score the model of train stage `stage` on the held-out sequences of `source` that pack stage `pack` made."""
    packed = job.packed(pack)
    shards = packed.shared
    heldout, train = (packed.record.read_set(shards, source, split) for split in ("heldout", "train"))
    assert heldout is not None
    assert train is not None
    chosen = uniform_sample(len(heldout), job.recipe.evaluate.max_sequences)
    sums = score_sequences(trained_model(job, stage), read_sequences(shards, heldout, chosen), job.device)
    counts = target_counts(read_sequences(shards, heldout, chosen), job.vocabulary)
    counted = uniform_sample(len(train), max(1, COUNTED_TOKENS // train.context))
    train_counts = target_counts(read_sequences(shards, train, counted), job.vocabulary)
    name = f"counts/{name}.safetensors"
    with job.store.writing(name) as file:
        file.write(safetensors.numpy.save({"heldout": counts, "train": train_counts}))
    return {
        "stage": stage,
        "source": source,
        "context": heldout.context,
        "sequences": len(chosen),
        "of_sequences": len(heldout),
        "nats": {modality: sums[f"{modality}_nll"] for modality in job.vocabulary.sizes},
        "targets": {modality: round(sums[f"{modality}_targets"]) for modality in job.vocabulary.sizes},
        "counts": name,
    }


def read_sequences(store: Store, shard_set: ShardSet, numbers: Iterable[int]) -> Iterator[PackedSequence]:
    """The sequences of these ascending numbers, one shard open at a time; of an object store, their ranges alone."""
    located = (shard_set.locate(int(number)) for number in numbers)
    for shard, places in itertools.groupby(located, key=lambda place: place[0]):
        with store.open_ranged(shard) as file:
            for _, _, entry in places:
                yield read_sequence(file, entry)


def score_sequences(
    model: LlamaForCausalLM, sequences: Iterable[PackedSequence], device: str = "cpu"
) -> dict[str, float]:
    """Sums `NAME_{nll,targets}` of each modality over the targets with loss, each sequence and document by itself."""
    names = modality_ranges(model.config)
    total = dict.fromkeys((f"{name}_{figure}" for name in names for figure in ("nll", "targets")), 0.0)
    dispatcher = Dispatcher()
    for sequence in sequences:
        with torch.no_grad():
            _, sums = micro_batch_loss(model, dispatcher(join_sequences([sequence])).to(device))
        total = {name: value + float(sums[name]) for name, value in total.items()}
    return total


def target_counts(sequences: Iterable[PackedSequence], vocabulary: JointVocabulary) -> np.ndarray:
    """int64 [V]: how often each joint id is a target with loss."""
    counts = np.zeros(vocabulary.size, dtype=np.int64)
    for sequence in sequences:
        counts += np.bincount(sequence.tokens[sequence.loss_weight > 0], minlength=vocabulary.size)
    return counts
