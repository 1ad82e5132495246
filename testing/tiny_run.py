"""A run as the stages before the evaluation leave it, made in seconds: real shards, a real VQGAN, real (random) Llamas.

Two training stages: text at 128 tokens, then clips and text at 512. Each source has held-out objects.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np

from model.llama.config import llama_config
from model.llama.llama import build_llama
from model.training.engine import StepMetrics, TargetLoss
from pipelines.build import build_stages
from pipelines.codecs.record import CodecOutputs, CodecRecord
from pipelines.codecs.stage import CodecStage
from pipelines.dag.manifest import Declaration, Manifest, StageOutput
from pipelines.dag.stage import Stage, StageContext
from pipelines.pack.record import PackFigures, PackOutputs, PackRecord
from pipelines.pack.stage import PackStage
from pipelines.recipe import Recipe
from pipelines.sources.list_sources import list_sources
from pipelines.sources.listing import SourceObject
from pipelines.sources.stage import SourcesStage
from pipelines.train.metrics.steps import step_line
from pipelines.train.record import TrainFigures, TrainOutputs, TrainRecord
from pipelines.train.stage import TrainStage
from storage.store import Store
from storage.urls import open_url
from tokenization.codecs.vqgan.config import VQGANConfig
from tokenization.codecs.vqgan.model import VQGAN, build_vqgan
from tokenization.document import Document
from tokenization.field_spec import FieldSpec
from tokenization.fields import build_tokens
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.video import decode_frames
from tokenization.packing.pack import pack
from tokenization.shards.index import ShardSet
from tokenization.shards.set_files import write_set
from tokenization.shards.shard import write_shard
from tokenization.text.tokenizer import load_text_tokenizer
from tokenization.vocabulary import JointVocabulary

VQGAN_SIZES = {
    "resolution": 16,
    "channels": [16, 16, 16],
    "res_blocks": 1,
    "latent_channels": 16,
    "embed_dim": 8,
    "codebook_size": 64,
    "norm_groups": 4,
}
VOCABULARY = JointVocabulary.for_codebook(32000, 64)
LLAMA = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SENTENCE = "the sea was calm and the old ship went slowly home while all the birds sang to the morning sun"


def tiny_recipe(folder: Path, **evaluate: Any) -> Recipe:
    """A recipe of books and clips below `folder`, small enough to train in seconds."""
    stage = {"rope_theta": 10000, "steps": 4, "lr": 1e-3}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "seed": 3,
            "storage": {"root": str(folder / "run"), "data": str(folder / "data")},
            "sources": {
                "books": {"urls": ["*.txt"], "heldout": ["*held*"]},
                "clips": {"urls": ["*.mp4"], "fields": ["vision"], "heldout": ["*held*"]},
            },
            "vqgan": {"config": VQGAN_SIZES, "weights": "unused"},
            "tokenize": {"fps": 8},
            "model": {"size": LLAMA},
            "train": {
                "stages": [
                    {**stage, "name": "text", "context": 128, "batch_tokens": 256, "mixture": {"books": 1}}
                    | {"objective": "text"},
                    {**stage, "name": "video", "context": 512, "batch_tokens": 512, "objective": "vision-text"}
                    | {"mixture": {"clips": 0.8, "books": 0.2}},
                ]
            },
            "evaluate": {
                "max_sequences": 4,
                "needle": {"contexts": [128, 256], "depths": 3, "rounds": 2},
                "generation": {"prompt_frames": 2, "frames": 2, "prompts": ["a red square"]},
                "reconstructions": 3,
                "resources": {"workers": 1},
                **evaluate,
            },
        }
    )


def make_run(folder: Path) -> tuple[Recipe, dict[str, StageOutput[Any]]]:
    """The recipe and the evaluation's inputs, below `folder`."""
    recipe = tiny_recipe(folder)
    (folder / "data").mkdir(parents=True)
    for name, seed in (("train-a", 1), ("train-b", 2), ("held-a", 3)):
        (folder / "data" / f"{name}.txt").write_text(story(seed))
    for name, speed in (("train-a", 1), ("held-a", 2)):
        write_clip(folder / "data" / f"{name}.mp4", speed)
    root = Store(recipe.storage.root).at("stages")
    objects = list_sources(recipe)
    vqgan = VQGAN(build_vqgan(VQGANConfig(**VQGAN_SIZES), seed=5))  # type: ignore[arg-type]
    vqgan.save(root.at("vqgan").path("weights"))
    documents = [document(listed, recipe, vqgan) for listed in objects]
    outputs: dict[str, StageOutput[Any]] = {}
    for number, stage in enumerate(build_stages(recipe, objects)):
        store = root.at(stage.name)
        record: Any = None
        match stage:
            case SourcesStage():
                record = stage.run(StageContext(store, {})).record
            case CodecStage():
                record = CodecRecord(CodecOutputs("weights"), {"steps": 9, "psnr": 11.5})
            case PackStage():
                record = _pack(store, stage.stage, documents)
            case TrainStage():
                settings = stage.stage
                config = llama_config(LLAMA, VOCABULARY.sizes, settings.context, settings.rope_theta)
                build_llama(config, seed=number).save_pretrained(store.path("model"))
                vision = settings.name == "video"
                record = TrainRecord(TrainOutputs("model"), _metrics(store, settings, vision=vision))
        if record is not None:
            outputs[stage.name] = output(stage, store, record, 1.5 * number)
    return recipe, outputs


def story(seed: int, sentences: int = 60) -> str:
    """Made-up sentences, the same for the same seed."""
    generator = np.random.default_rng(seed)
    lines = []
    for _ in range(sentences):
        line = " ".join(generator.choice(SENTENCE.split(), size=8))
        lines.append(line.capitalize() + ".")
    return " ".join(lines)


def write_clip(path: Path, speed: int, frames: int = 16) -> None:
    """Two seconds of a bright square that moves over a dark ground."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            picture = np.full((32, 32, 3), 30, np.uint8)
            left = number * speed % 24
            picture[8:16, left : left + 8] = (220, 60, 40)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def document(found: SourceObject, recipe: Recipe, vqgan: VQGAN) -> tuple[bool, Document]:
    """What tokenizing makes of one listed object, and whether it is held out."""
    tokenizer = load_text_tokenizer()
    with open_url(found.url) as file:
        if found.kind == "text":
            record: dict[str, Any] = {"text": file.read().decode()}
        else:
            chunks = decode_frames(file, FrameRequest(fps=recipe.tokenize.fps, size=16))
            record = {"vision": vqgan.encode(np.concatenate([chunk.frames for chunk in chunks]))}
    spec = FieldSpec.parse(recipe.sources[found.source].fields[0])
    tokens, spans = build_tokens(record, spec, tokenizer, VOCABULARY)
    return found.heldout, Document(f"{found.key}#0", found.source, tokens, spans)


def _pack(store: Store, stage: Any, documents: list[tuple[bool, Document]]) -> PackRecord:
    sets: dict[str, dict[str, Any]] = {}
    for source in stage.mixture:
        for split in ("train", "heldout"):
            chosen = [doc for heldout, doc in documents if doc.source == source and heldout == (split == "heldout")]
            sequences = pack(chosen, stage.context, VOCABULARY, stage.objective, key_prefix=f"{source}-{split}-")
            name = f"shards/{source}-{split}.tar"
            with store.writing(name) as file:
                stats = write_shard(file, sequences, VOCABULARY)
            shard_set = ShardSet(stage.context, VOCABULARY, stage.objective, (name,), (stats,))
            totals = write_set(store, f"sets/{source}-{split}.json", shard_set)
            entry = {"file": f"sets/{source}-{split}.json", **totals, "fill": totals["n_filled"] / totals["n_tokens"]}
            sets.setdefault(source, {})[split] = entry
    outputs = PackOutputs(sets, context=stage.context, objective=stage.objective)
    return PackRecord(outputs, PackFigures(sequences=9, documents=3, split_documents=2))


def _metrics(store: Store, stage: Any, vision: bool) -> TrainFigures:
    steps, tokens = stage.steps, stage.batch_tokens
    with store.writing("metrics/00000004.jsonl") as file:
        for step in range(steps):
            metrics = StepMetrics(
                loss=10 - step,
                modalities={
                    "text": TargetLoss(5.0, (9.0 - step) * 100, 100),
                    "vision": TargetLoss(5.0 - step, (6.0 - step) * 100 if vision else 0.0, 100 if vision else 0),
                },
                tokens=tokens,
                seconds=0.5,
                step=step,
                lr=1e-3 * step,
                grad_norm=1.0 + step,
                sources=(TargetLoss(10.0 - step, (15.0 - 2 * step) * 100, 200),),
            )
            line = step_line(metrics, ["books"], {"mfu": 0.25 + 0.1 * step, "step_seconds": 0.8})
            file.write((json.dumps(line) + "\n").encode())
    return TrainFigures(steps, steps * tokens, tokens / 0.8, last_loss=7.0)


def output(stage: Stage[Any], store: Store, record: Any, seconds: float = 0.0) -> StageOutput[Any]:
    """A stage as done, with this record, at a fixed time."""
    declaration = Declaration(stage.name, stage.kind, {}, stage.output_version, {name: name for name in stage.inputs})
    facts = {"fingerprint": declaration.fingerprint, "seconds": seconds, "finished": "2025-01-01T00:00:00+00:00"}
    facts["format"] = 2  # whose folders have all of a stage
    return StageOutput(store, Manifest(declaration, record, **facts))  # type: ignore[arg-type]
