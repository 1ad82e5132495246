"""A range of ids beyond text and vision is trained on, and its loss stands by its name wherever the others' stand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from model.llama.config import modality_ranges
from model.llama.hf_weights import stored_config
from pipelines.cluster.progress import bar
from pipelines.pack.record import PackFigures, PackOutputs, PackRecord
from pipelines.pack.stage import PackStage
from pipelines.report.write import write_report
from pipelines.train.job import TrainJob
from pipelines.train.metrics.steps import modalities, read_metrics, step_figures
from pipelines.train.run import train_stage
from pipelines.train.stage import TrainStage
from storage.store import Store
from testing.packed_shards import CONTEXT
from testing.tensorboard_events import shown_by_tensorboard
from testing.tiny_run import VOCABULARY as TWO
from testing.tiny_run import output
from tests.pipelines.train.test_bad_shards import recipe_of
from tokenization.document import Document
from tokenization.packing.pack import pack
from tokenization.shards.index import ShardSet
from tokenization.shards.set_files import write_set
from tokenization.shards.shard import write_shard

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_this_process")]

VOCABULARY = TWO.extended("audio", 50)
OBJECTIVE = "audio-vision-text"
NAMES = ["text", "vision", "audio"]


def documents() -> list[Document]:
    """Text, the codes of a frame, and as many of a sound, one after the other in each."""
    rng = np.random.default_rng(5)
    made = []
    for number in range(200):
        frame = VOCABULARY["vision"].codes_to_ids(rng.integers(0, 8, 9))
        sound = VOCABULARY["audio"].codes_to_ids(np.arange(9) * 5)
        text = rng.integers(3, 500, 12)
        tokens = np.concatenate([text, frame, [VOCABULARY.eov_id], sound]).astype(np.int32)
        made.append(Document(f"b{number}", "books", tokens, ((1, len(tokens)),)))
    return made


def packed(store: Store) -> PackRecord:
    """The record of a pack stage of one source."""
    sequences = list(pack(documents(), CONTEXT, VOCABULARY, OBJECTIVE))
    with store.writing("shards/0.tar") as file:
        stats = write_shard(file, sequences, VOCABULARY)
    shard_set = ShardSet(CONTEXT, VOCABULARY, OBJECTIVE, ("shards/0.tar",), (stats,))
    write_set(store, "sets/books-train.json", shard_set)
    entry = {"file": "sets/books-train.json", **shard_set.totals(), "fill": 1.0}
    return PackRecord(PackOutputs({"books": {"train": entry}}), PackFigures(len(sequences)))


def test_three_modalities_are_trained_on_and_each_is_named_in_metrics_model_and_report(tmp_path: Path) -> None:
    shards, store, recipe = Store(str(tmp_path / "pack")), Store(str(tmp_path / "train")), recipe_of(tmp_path, 0)
    record = packed(shards)
    settings = recipe.train.stages[0].model_copy(update={"lr": 3e-2})
    with bar("train", settings.steps, "step") as line:
        trained = train_stage(TrainJob(recipe, settings, VOCABULARY, shards, record, None, store), line)
    lines = list(read_metrics(store))
    assert [line["step"] for line in lines] == list(range(settings.steps))
    for line in lines:
        assert modalities(line) == NAMES
        assert sum(line[f"{name}_loss"] for name in NAMES) == pytest.approx(line["loss"], rel=1e-5)
        assert sum(line[f"{name}_targets"] for name in NAMES) == line["sources"]["books"]["targets"]
        assert {f"{name}_nats_per_token" for name in NAMES} <= set(step_figures(line))
    first, *_, last = (line["audio_nats"] / line["audio_targets"] for line in lines)
    assert first == pytest.approx(np.log(VOCABULARY["audio"].size), rel=0.1)
    assert last < first - 0.5, "what the sounds have in common is learnt"
    assert {f"{name}_loss" for name in NAMES} <= set(shown_by_tensorboard(tmp_path / "train" / "tensorboard"))

    ranges = modality_ranges(stored_config(tmp_path / "train" / "model"))
    assert {name: len(ids) for name, ids in ranges.items()} == VOCABULARY.sizes

    pack_stage, train = PackStage(recipe, settings), TrainStage(recipe, settings, None)
    inputs = {pack_stage.name: output(pack_stage, shards, record), train.name: output(train, store, trained)}
    write_report(recipe, [pack_stage, train], inputs, Store(str(tmp_path / "report")))
    facts = json.loads((tmp_path / "report" / "report.json").read_text())
    (training,), (row,) = facts["training"], facts["shards"]
    assert training["per_step"]["audio_nats"] == [line["audio_nats"] for line in lines]
    assert training["audio_nats_per_token"] == pytest.approx(last)
    assert row["targets"]["audio"] == 9 * 200
    page = (tmp_path / "report" / "report.html").read_text()
    for words in (
        *(f"{name}, nats/token" for name in NAMES),
        *(f"{name} targets" for name in NAMES),
        "audio, training",
    ):
        assert words in page
