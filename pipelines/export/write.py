"""From what a training made to the parts of the folder of an exported model, and the folder.

Weights are copied as the stage left them, or made of a checkpoint's fp32 masters, one at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from model.checkpoint.stored_weights import CheckpointWeights, manifest_of, stored_model
from model.convert.export_hf import described, planned_files, stored_dtype, write_weights
from model.llama.config import modality_ranges
from model.llama.hf_weights import CONFIG, stored_config
from model.llama.initial_weights import weight_shapes
from pipelines.export.card import model_card
from pipelines.export.folder import CARD, CODECS, CodecEntry, Description, Origin, Part, check_target, write_folder
from pipelines.export.trained import Trained
from pipelines.inspect.content import tokenizer_of
from pipelines.train.job import CHECKPOINTS, MODEL
from storage.errors import UserError
from storage.store import Store
from tokenization.text.hf_files import tokenizer_files
from tokenization.vocabulary import JointVocabulary

if TYPE_CHECKING:
    from transformers import LlamaConfig

GENERATION = "generation_config.json"
_CHUNK = 1 << 24


def export_model(trained: Trained, target: Store, replace: bool = False) -> Description:
    """Write the model's folder and return its description. Raises UserError as `write_folder`, and where a part of what
    the model was made from is gone or damaged.
    """
    origin = origin_of(trained)
    check_target(target, origin, replace)
    vocabulary = trained.vocabulary()
    config = _config(trained)
    found = {name: len(ids) for name, ids in modality_ranges(config).items()}
    if found != vocabulary.sizes:
        raise UserError(
            f"{trained.store.path()}: its model has ids {found}, its shards {vocabulary.sizes}; run the recipe again"
        )
    _, tokenizer = tokenizer_of(trained.tokenize)
    description = Description(trained.name, origin, vocabulary.to_json(), _codecs(trained))
    texts = {
        GENERATION: _generation_config(vocabulary),
        **tokenizer_files(Path(tokenizer.path), config.max_position_embeddings),
    }
    parameters = sum(shape.numel() for shape in weight_shapes(config).values())
    texts[CARD] = model_card(trained, description, config, parameters).encode()
    small = [Part.of_bytes(name, content) for name, content in texts.items()]
    weights = _checkpoint_parts(trained, config) if trained.checkpoint else _model_parts(trained)
    heavy = [part for part in [*weights, *_codec_parts(trained)] if part.name not in texts]
    return write_folder(target, description, [*small, *heavy], replace)


def origin_of(trained: Trained) -> Origin:
    """Which model it is."""
    declaration = trained.declaration
    precision = declaration.settings["train"].get("precision", "fp32")
    return Origin(declaration.stage, trained.manifest.fingerprint, trained.step, precision)


def _config(trained: Trained) -> LlamaConfig:
    """The model's configuration: as the stage left it, or as the checkpoint has it."""
    if trained.checkpoint:
        kept = stored_model(manifest_of(trained.store.at(CHECKPOINTS), trained.step))
        if kept is not None:
            return kept
    if not trained.store.exists(f"{MODEL}/{CONFIG}"):
        raise UserError(
            f"{trained.store.path()}: neither checkpoint nor stage has the model's configuration, which an earlier "
            f"version did not keep; train on to the stage's end and export that"
        )
    return stored_config(trained.store.at(MODEL).fetch_folder("", CONFIG))


def _generation_config(vocabulary: JointVocabulary) -> bytes:
    """Of a prompt without padding there is no pad token; by EOS stock generation fills up finished rows."""
    from transformers import GenerationConfig

    ends = {"bos_token_id": vocabulary.bos_id, "eos_token_id": vocabulary.eos_id, "pad_token_id": vocabulary.eos_id}
    return (GenerationConfig(**ends).to_json_string() + "\n").encode()


def _codecs(trained: Trained) -> dict[str, CodecEntry]:
    if trained.codec is None:
        return {}
    tokenize = trained.tokenize.manifest.declaration.settings
    fingerprint, precision = trained.codec.record.outputs.fingerprint, tokenize["encoder"]
    fps = tokenize["tokenize"]["fps"] / tokenize["tokenize"].get("frame_step", 1)
    return {"vision": CodecEntry(f"{CODECS}/vision", "vqgan", fingerprint, precision, fps)}


def _model_parts(trained: Trained) -> Iterator[Part]:
    """The files of the model that the stage left, with the hashes that it committed."""
    hashes = trained.record["outputs"].get("files", {})
    names = trained.store.names(MODEL)
    if f"{MODEL}/{CONFIG}" not in names:
        raise UserError(f"{trained.store.path(MODEL)}: the model is gone; run the recipe again, or give a checkpoint")
    for name in names:
        copy = partial(_copy, trained.store, name)
        yield Part(name.removeprefix(f"{MODEL}/"), copy, hashes.get(name, ""))


def _checkpoint_parts(trained: Trained, config: LlamaConfig) -> Iterator[Part]:
    """Files of weights in the precision of the training, and what describes them."""
    weights = CheckpointWeights(trained.store.at(CHECKPOINTS), trained.step, config)
    dtype = stored_dtype(origin_of(trained).precision)
    llama, files = planned_files(config, dtype)
    shapes = {name: tuple(weight.shape) for name, weight in llama.state_dict().items()}
    for file, names in files.filename_to_tensors.items():
        own = {name: shapes[name] for name in names}
        yield Part(file, partial(write_weights, shapes=own, dtype=dtype, read=weights.read))
    for name, content in described(llama, files).items():
        yield Part.of_bytes(name, content)


def _codec_parts(trained: Trained) -> Iterator[Part]:
    if trained.codec is None:
        return
    outputs = trained.codec.record.outputs
    for name in trained.codec.store.names(outputs.weights):
        own = f"{CODECS}/vision/{name.removeprefix(f'{outputs.weights}/')}"
        yield Part(own, partial(_copy, trained.codec.store, name), (outputs.files or {}).get(name, ""))


def _copy(source: Store, name: str, file: BinaryIO) -> None:
    with source.open(name) as opened:
        shutil.copyfileobj(opened, file, _CHUNK)
