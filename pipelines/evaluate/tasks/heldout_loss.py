"""Held-out loss: nats per token of the targets with loss, by modality.

In: packed held-out shards and the model of a training stage. Out: sums and target counts of one stage and source, from
which `table.py` makes rows. Every figure is of a softmax over the target's own modality, as in the loss. The
ranks of a cell share each sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from pipelines.evaluate.cell import Cell
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.record import Row
from pipelines.evaluate.subject import TrainedSubject
from pipelines.evaluate.table import tabulate
from tokenization.document import PackedSequence
from tokenization.media.frame_sampling import uniform_sample
from tokenization.shards.chosen_sequences import read_sequences
from tokenization.vocabulary import JointVocabulary

TITLE = "Held-out loss"
COUNTED_TOKENS = 2**24
"""Tokens of training shards, at most, that a unigram model is counted on."""


def lacks(job: EvaluateJob) -> str | None:
    """See `task_table`."""
    if job.run is None:
        return "held-out sequences are those of a run; give its recipe by --recipe"
    if not _packed_by(job):
        return "the recipe's run has packed no held-out sequences; run it, with sources that hold something out"
    return None


def cells(job: EvaluateJob) -> list[Cell]:
    """A model and a source each: of a run every stage on its own sources, and the last on all; else the one model."""
    return [
        Cell(f"loss-{stage or job.subject.name}-{source}", "heldout", {"stage": stage, "pack": pack, "source": source})
        for stage, pack, source in _scored(job)
    ]


def measure(job: EvaluateJob, cell: Cell) -> dict[str, Any]:
    """Score a model on the held-out sequences of a source: of train stage `stage`, or the job's subject where it is
    None, as pack stage `pack` made them.
    """
    from model.inference.scoring import score_batches
    from tokenization.loader.join import join_sequences

    assert job.run is not None
    stage, source = cell.arguments["stage"], cell.arguments["source"]
    subject = job.subject if stage is None else job.run.trained(stage)
    packed = job.run.packed(cell.arguments["pack"])
    assert packed is not None
    shards = packed.shared
    heldout, train = (packed.record.read_set(shards, source, split) for split in ("heldout", "train"))
    assert heldout is not None
    assert train is not None
    chosen = uniform_sample(len(heldout), job.settings.max_sequences)
    batches = (join_sequences([sequence]) for sequence in read_sequences(shards, heldout, chosen))
    scores = score_batches(subject.model(job.group), batches, job.group)
    names = job.vocabulary.sizes
    sums = {name: scores.of(name) if name in scores.modalities else (0.0, 0) for name in names}
    counts = target_counts(read_sequences(shards, heldout, chosen), job.vocabulary)
    counted = uniform_sample(len(train), max(1, COUNTED_TOKENS // train.context))
    train_counts = target_counts(read_sequences(shards, train, counted), job.vocabulary)
    name = f"counts/{cell.name}.safetensors"
    if job.is_first:
        with job.store.writing(name) as file:
            file.write(safetensors.numpy.save({"heldout": counts, "train": train_counts}))
    return {
        "stage": stage or subject.name,
        "source": source,
        "context": heldout.context,
        "sequences": len(chosen),
        "of_sequences": len(heldout),
        "nats": {modality: nats for modality, (nats, _) in sums.items()},
        "targets": {modality: targets for modality, (_, targets) in sums.items()},
        "counts": name,
    }


def rows(job: EvaluateJob, results: Mapping[str, dict[str, Any]]) -> list[Row]:
    """Rows of `tabulate`: for each stage over each source of its mixture and, as source "all", over all of them; then,
    as stage "final", the last model over every source of the run, each packed by the last stage that reads it.
    """
    assert job.run is not None
    losses = list(results.values())
    if isinstance(job.subject, TrainedSubject):
        by_stage = [
            (stage.name, [loss for loss in losses if loss["stage"] == stage.name and loss["source"] in stage.mixture])
            for stage in job.run.recipe.curriculum
        ]
        by_stage.append(("final", [loss for loss in losses if loss["stage"] == job.run.last]))
    else:
        by_stage = [(job.subject.name, losses)]
    found: list[Row] = []
    for stage, own in by_stage:
        of_stage = [row for loss in own for row in tabulate(job, [loss], loss["source"])]
        of_stage += tabulate(job, own, "all") if own else []
        found += [{**row, "stage": stage} for row in of_stage]
    return found


def _scored(job: EvaluateJob) -> list[tuple[str | None, str, str]]:
    """(model's stage, packing stage, source) of all that is scored; stage None: the job's subject."""
    assert job.run is not None
    packed_by = _packed_by(job)
    if not isinstance(job.subject, TrainedSubject):
        return [(None, pack, source) for source, pack in sorted(packed_by.items())]
    stages, last = job.run.recipe.curriculum, job.run.recipe.curriculum[-1]
    scored = [(stage.name, stage.name, source) for stage in stages for source in sorted(stage.mixture)]
    scored += [(last.name, pack, source) for source, pack in sorted(packed_by.items()) if source not in last.mixture]
    return [one for one in scored if _holds_out(job, one[1], one[2])]


def _packed_by(job: EvaluateJob) -> dict[str, str]:
    """The last stage that packed held-out sequences of each source that has some, by source."""
    assert job.run is not None
    stages = job.run.recipe.curriculum
    return {
        source: stage.name
        for stage in stages
        for source in sorted(stage.mixture)
        if _holds_out(job, stage.name, source)
    }


def _holds_out(job: EvaluateJob, stage: str, source: str) -> bool:
    packed = job.run.packed(stage) if job.run else None
    return packed is not None and "heldout" in packed.record.outputs.sets.get(source, {})


def target_counts(sequences: Iterable[PackedSequence], vocabulary: JointVocabulary) -> np.ndarray:
    """int64 [V]: how often each joint id is a target with loss."""
    counts = np.zeros(vocabulary.size, dtype=np.int64)
    for sequence in sequences:
        counts += np.bincount(sequence.tokens[sequence.loss_weight > 0], minlength=vocabulary.size)
    return counts
