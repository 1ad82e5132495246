"""A run as its finished stages leave it on disk, made in seconds: `tiny_run` with manifests and a tokenizer."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from pipelines.codecs.record import CodecOutputs, CodecRecord
from pipelines.dag.manifest import MANIFEST, STARTED, Declaration, Manifest, StageOutput
from pipelines.recipe import Recipe, output_settings
from pipelines.tokenize.record import KeptTokenizer, TokenizeFigures, TokenizeOutputs, TokenizeRecord
from pipelines.train.record import TrainOutputs
from storage.store import Store
from storage.urls import fetch_file
from testing.tiny_run import make_run
from tokenization.codecs.vqgan.model import VQGAN
from tokenization.text.tokenizer import load_text_tokenizer

INPUTS: dict[str, tuple[str, ...]] = {
    "sources": (),
    "vqgan": ("sources",),
    "tokenize": ("sources", "vqgan"),
    "pack-text": ("tokenize",),
    "train-text": ("pack-text",),
    "pack-video": ("tokenize",),
    "train-video": ("pack-video", "train-text"),
}


def commit_run(folder: Path) -> tuple[Recipe, dict[str, Store]]:
    """The recipe, and by stage the folder of its only fingerprint. folder: new; the run is in `run`."""
    recipe, outputs = make_run(folder)
    root = Store(recipe.storage.root).at("stages")
    outputs["tokenize"] = StageOutput(root.at("tokenize"), _tokenized(root.at("tokenize")))
    declared: dict[str, Declaration] = {}
    stores: dict[str, Store] = {}
    for number, (name, inputs) in enumerate(INPUTS.items()):
        before = {one: declared[one].fingerprint for one in inputs}
        kind = name.partition("-")[0]
        declared[name] = Declaration(name, kind, _settings(recipe, name), 1, before)
        place, stores[name] = Path(root.path(name)), root.at(name, declared[name].fingerprint[:16])
        shutil.move(place, place.with_name("moved"))
        place.mkdir()
        shutil.move(place.with_name("moved"), stores[name].path())
        record = _committed(name, outputs[name].record, stores[name])
        facts = {"fingerprint": declared[name].fingerprint, "finished": f"2025-01-01T00:00:{number:02d}+00:00"}
        folders = {one: f"stages/{one}/{declared[one].fingerprint[:16]}" for one in inputs}
        manifest: Manifest[Any] = Manifest(declared[name], record, input_folders=folders, format=2, **facts)  # type: ignore[arg-type]
        stores[name].write_json(STARTED, {"format": 2, **declared[name].to_json()})
        stores[name].write_json(MANIFEST, {**manifest.to_json(), "made_by": {"code": "0123456789abcdef"}})
    return recipe, stores


def _settings(recipe: Recipe, name: str) -> dict[str, Any]:
    if name == "vqgan":
        assert recipe.vqgan is not None
        return {"config": recipe.vqgan.sizes.to_dict()}
    if name == "tokenize":
        fields = {source: of.fields for source, of in recipe.sources.items()}
        return {"tokenize": output_settings(recipe.tokenize), "encoder": "fp32", "fields": fields}
    for stage in recipe.curriculum:
        if name == f"train-{stage.name}":
            return {"stage": output_settings(stage), "train": output_settings(recipe.training), "seed": recipe.seed}
    return {}


def _tokenized(store: Store) -> Manifest[TokenizeRecord]:
    """Of a stage that has kept its text tokenizer, the default one."""
    model = fetch_file("package://mistral_common/data/tokenizer.model.v1")
    with store.writing("tokenizer/tokenizer.model") as file:
        file.write(model.read_bytes())
    kept = KeptTokenizer("tokenizer/tokenizer.model", "", load_text_tokenizer().fingerprint)
    record = TokenizeRecord(TokenizeOutputs(text_tokenizer=kept), TokenizeFigures(5, 12345, frames=32))
    return Manifest(Declaration("tokenize", "tokenize", {}, 1, {}), record)


def _committed(name: str, record: Any, store: Store) -> Any:
    """The record with the hashes of what the stage made."""
    if name == "vqgan":
        fingerprint = VQGAN.load(store.path("weights")).fingerprint
        return CodecRecord(CodecOutputs("weights", fingerprint, store.hashes("weights")), record.figures)
    if name.startswith("train-"):
        return dataclasses.replace(record, outputs=TrainOutputs("model", store.hashes("model")))
    return record
