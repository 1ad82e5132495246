"""From LWM's released files to the folder of a model that stands alone, as `ringworld export` writes it.

In: a checkpoint in any of LWM's formats, its sizes, and, where given, the text tokenizer and the VQGAN. Out: the
folder, made weight by weight, so that memory is that of the largest weight; a killed import carries on with the files
of weights that are there.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model.convert.export_hf import described, planned_files, write_weights
from model.convert.import_lwm import LWMWeights, lwm_config, open_lwm
from model.convert.lwm_settings import LWMSettings, file_of, json_settings, preset_settings
from model.llama.config import modality_ranges
from pipelines.export.card import imported_card
from pipelines.export.folder import CARD, CODECS, CodecEntry, Description, Origin, Part, check_target, write_folder
from storage.errors import UserError
from storage.public_url import public_url
from storage.store import Store
from storage.urls import fetch_file, is_folder
from tokenization.codecs.vqgan.import_lwm import load_lwm_vqgan
from tokenization.codecs.vqgan.model import VQGAN
from tokenization.text.hf_files import tokenizer_files
from tokenization.text.tokenizer import load_text_tokenizer
from tokenization.text.tokenizer_files import fetch_tokenizer
from tokenization.vocabulary import JointVocabulary

STAGE = "import-lwm"
"""What stands in place of a training stage in the origin of an imported model."""
LWM_CODES = {8448: 8192}
"""By the number of LWM's vision ids that of its codes; the rest are `<eof>`, `<eov>` and padding."""
LWM_FPS = 4.0
"""Frames a second at which LWM sampled videos (arXiv 2402.08268)."""

log = logging.getLogger("ringworld")


@dataclass(frozen=True)
class LWMFiles:
    """What to import. All are paths or fsspec URLs.

    checkpoint: with or without the prefix of its format. config: a JSON, or the name of a preset, which needs context
    and rope_theta beside it; of a JSON they replace its own. tokenizer, vqgan: None to leave them out. codes: of the
    vision ids, where they are neither LWM's own nor the VQGAN's. dtype: of the weights written, None for the file's.
    """

    checkpoint: str
    config: str
    context: int | None = None
    rope_theta: float | None = None
    tokenizer: str | None = None
    vqgan: str | None = None
    resolution: int = 256
    codes: int | None = None
    dtype: torch.dtype | None = None


def import_lwm(files: LWMFiles, target: Store, replace: bool = False) -> Description:
    """Write the model's folder and return its description. Raises UserError on files that cannot be used, and as
    `write_folder`.
    """
    check_target(target, replace=True)  # whether it may be written to, before a file of gigabytes is read
    settings = _settings(files)
    path = fetch_file(file_of(files.checkpoint))
    leaves = open_lwm(path)
    ids = {"bos_id": settings.bos_id, "eos_id": settings.eos_id}
    config = lwm_config(
        leaves, settings.heads, settings.context, settings.rope_theta, rms_norm_eps=settings.rms_norm_eps, **ids
    )
    weights = LWMWeights(leaves, config)
    weights.check()
    dtype = files.dtype or (weights.dtype if weights.dtype in (torch.float32, torch.bfloat16) else torch.float32)
    texts = _tokenizer(files, settings, modality_ranges(config)["text"].stop)
    with tempfile.TemporaryDirectory() as made:
        vqgan = _vqgan(files, Path(made))
        vocabulary = _vocabulary(files, {name: len(span) for name, span in modality_ranges(config).items()}, vqgan, ids)
        with path.open("rb") as file:
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
        origin = Origin(STAGE, fingerprint, 0, "bf16" if dtype == torch.bfloat16 else "fp32")
        check_target(target, origin, replace)
        codecs = {}
        if vqgan is not None:
            codecs["vision"] = CodecEntry(f"{CODECS}/vision", "vqgan", vqgan.fingerprint, "fp32", LWM_FPS)
        name = public_url(file_of(files.checkpoint)).rstrip("/").rpartition("/")[2]
        description = Description(name, origin, vocabulary.to_json(), codecs)
        llama, split = planned_files(config, dtype)
        shapes = {name: tuple(weight.shape) for name, weight in llama.state_dict().items()}
        parts = [
            Part(file, partial(write_weights, shapes={n: shapes[n] for n in names}, dtype=dtype, read=weights.read))
            for file, names in split.filename_to_tensors.items()
        ]
        texts |= described(llama, split)
        parameters = sum(weight.numel() for weight in llama.state_dict().values())
        texts[CARD] = imported_card(description, config, parameters).encode()
        parts += [Part.of_bytes(name, content) for name, content in texts.items()]
        parts += _codec_parts(Path(made))
        return write_folder(target, description, parts, replace)


def import_vqgan(file: str, target: Store, resolution: int) -> VQGAN:
    """Write LWM's VQGAN as the folder of a diffusers `VQModel`, config.json last, and return it.

    Raises UserError where the file is no such, or the folder holds something else.
    """
    target.check_output("--out")
    vqgan = load_lwm_vqgan(fetch_file(file), resolution)
    with tempfile.TemporaryDirectory() as made:
        vqgan.save(made)
        paths = sorted(Path(made).iterdir(), key=lambda path: path.name == "config.json")
        if others := set(target.names()) - {path.name for path in paths}:
            raise UserError(
                f"{public_url(target.path())}: holds something else ({min(others)}), which stays as it is; set --out "
                f"to a new folder"
            )
        target.sweep_temporaries()
        for path in paths:
            with target.writing(path.name) as written:
                written.write(path.read_bytes())
    return vqgan


def _settings(files: LWMFiles) -> LWMSettings:
    if "." not in files.config and "/" not in files.config and not Path(files.config).is_file():
        return preset_settings(files.config, files.context, files.rope_theta)
    content = fetch_file(files.config).read_bytes()
    return json_settings(public_url(files.config), content, files.context, files.rope_theta)


def _tokenizer(files: LWMFiles, settings: LWMSettings, n_ids: int) -> dict[str, bytes]:
    """The files of the tokenizer by name. Raises UserError where its ids are not the checkpoint's text ids."""
    if files.tokenizer is None:
        log.warning("no --tokenizer was given: the folder has none, so that nothing can be asked in words")
        return {}
    file = fetch_tokenizer(files.tokenizer)
    tokenizer = load_text_tokenizer(str(file))
    found = (tokenizer.size, tokenizer.bos_id, tokenizer.eos_id)
    if found != (n_ids, settings.bos_id, settings.eos_id):
        raise UserError(
            f"{public_url(files.tokenizer)}: it has {found[0]} ids, BOS {found[1]} and EOS {found[2]}, the checkpoint "
            f"{n_ids}, {settings.bos_id} and {settings.eos_id}; name the tokenizer of this model by --tokenizer"
        )
    return tokenizer_files(file, settings.context)


def _vqgan(files: LWMFiles, folder: Path) -> VQGAN | None:
    """The VQGAN, saved in a folder."""
    if files.vqgan is None:
        return None
    if is_folder(files.vqgan):
        vqgan = VQGAN.load(Store(files.vqgan).fetch_folder())
    else:
        vqgan = load_lwm_vqgan(fetch_file(files.vqgan), files.resolution)
    vqgan.save(str(folder))
    return vqgan


def _vocabulary(
    files: LWMFiles, sizes: dict[str, int], vqgan: VQGAN | None, special: dict[str, Any]
) -> JointVocabulary:
    if "vision" not in sizes:
        if vqgan is not None:
            raise UserError(f"--vqgan {files.vqgan}: the checkpoint has text ids alone; leave it out")
        return JointVocabulary.of_text(sizes["text"], **special)
    n_ids = sizes["vision"]
    codes = files.codes or (vqgan.config.codebook_size if vqgan else LWM_CODES.get(n_ids))
    if codes is None:
        raise UserError(f"the checkpoint has {n_ids} vision ids, of which LWM's models have 8448; give --codes")
    try:
        return JointVocabulary.for_codebook(sizes["text"], codes, n_ids, **special)
    except ValueError as error:
        raise UserError(f"--codes {codes}: {error}; give the number of codes of its VQGAN") from None


def _codec_parts(folder: Path) -> Iterator[Part]:
    for path in sorted(folder.iterdir()):
        yield Part.of_bytes(f"{CODECS}/vision/{path.name}", path.read_bytes())
