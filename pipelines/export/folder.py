"""The folder of an exported model, which stands alone: what is in it, how it is written, and how it is opened.

    config.json, generation_config.json   of a plain `LlamaForCausalLM`
    model*.safetensors [, their index]    its weights
    tokenizer.json, tokenizer_config.json what `AutoTokenizer` loads, with our own ids
    codecs/vision/                        a diffusers `VQModel`, where the model has seen frames
    ringworld.json                        the `Description`: the joint vocabulary, the codecs, the origin, all hashes
    README.md                             the model card

`ringworld.json` is written first, without hashes, and declares which model the folder is to hold; it is written again,
with them, when all else is there, and `config.json` comes last. A folder without it is no model to any library, and the
same export carries on there: files of weights that are there are kept, since every write is atomic.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pydantic import TypeAdapter, ValidationError

from storage.errors import UserError
from storage.public_url import public_url
from storage.store import Store
from storage.urls import first_contact
from tokenization.vocabulary import JointVocabulary

if TYPE_CHECKING:  # seconds to import, which a driver that checks a place does without
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tokenization.codecs.vqgan.model import VQGAN
    from tokenization.text.tokenizer import TextTokenizer

CONFIG = "config.json"
DESCRIPTION = "ringworld.json"
CARD = "README.md"
CODECS = "codecs"
FORMAT = 1
"""Of `ringworld.json`."""
_OWN = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", CARD, DESCRIPTION)
_OWN_ENDS = (".safetensors", ".safetensors.index.json")

log = logging.getLogger("ringworld")


@dataclass(frozen=True)
class Origin:
    """Which model it is: two exports of equal origins hold the same weights.

    stage, fingerprint: of the training stage; of imported weights `import-lwm` and the sha256 of their file. step: the
    last one trained. precision: in which it was trained, or is stored.
    """

    stage: str
    fingerprint: str
    step: int
    precision: str


@dataclass(frozen=True)
class CodecEntry:
    """What turns codes of one modality into its medium and back.

    folder: in the exported one. kind: "vqgan". fingerprint: sha256 of its weights. precision: in which codes were made,
    "fp32" or "bf16". fps: frames a second at which videos were sampled.
    """

    folder: str
    kind: str
    fingerprint: str
    precision: str
    fps: float


@dataclass(frozen=True)
class Description:
    """The content of `ringworld.json`. vocabulary: as `JointVocabulary.to_json`. codecs: by modality. files: sha256 of
    each file by name, but for `ringworld.json` itself; empty while the export is not whole.
    """

    name: str
    origin: Origin
    vocabulary: Mapping[str, Any]
    codecs: Mapping[str, CodecEntry] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class Part:
    """A file to write. write: writes its bytes. sha256: which it has to have, where that is known."""

    name: str
    write: Callable[[BinaryIO], object]
    sha256: str = ""

    @classmethod
    def of_bytes(cls, name: str, content: bytes) -> Part:
        """One whose bytes are known."""
        return cls(name, lambda file: file.write(content))


def check_target(target: Store, origin: Origin | None = None, replace: bool = False, key: str = "--out") -> None:
    """Raise UserError where nothing can be exported to: the folder holds something else, or cannot be written to.

    origin: of the model, None where it is not trained yet. replace: whether another model that was exported there may
    be replaced. key: the option that names the folder.
    """
    target.check_output(key)
    with first_contact(target.url):
        names = target.names()
        is_file = not names and target.exists("") and not _is_folder(target)
    where = public_url(target.path())
    if is_file or names in ([""], [Path(target.path()).name]):
        raise UserError(f"{where}: this is a file; set {key} to a new folder")
    if names and DESCRIPTION not in names:
        raise UserError(f"{where}: holds something else ({names[0]}), which stays as it is; set {key} to a new folder")
    if not names or replace or CONFIG not in names:
        return
    held = read_description(target)
    if held is None or held.origin != origin:
        of = f"{held.origin.stage}, step {held.origin.step}" if held else "another version"
        raise UserError(f"{where}: holds another exported model ({of}); set {key} to a new folder, or give --replace")


def write_folder(target: Store, description: Description, parts: Sequence[Part], replace: bool = False) -> Description:
    """Write an exported model, `CONFIG` last, and return its description with the hashes of all files.

    parts: all files but `ringworld.json`. Called again after a kill, it carries on. Raises UserError as `check_target`,
    and where a part has another hash than it has to have.
    """
    check_target(target, description.origin, replace)
    target.sweep_temporaries()
    names = set(target.names())
    held = read_description(target) if DESCRIPTION in names else None
    is_same = held is not None and held.origin == description.origin
    if held and is_same and not replace and CONFIG in names and _holds(target, held, names):
        log.info("%s holds this model already", public_url(target.path()))
        return held
    target.delete(CONFIG)  # from here on the folder is no model
    left = {name for name in names if is_same and any(part.name == name for part in parts)}
    target.delete_many(sorted(filter(_is_own, names - left - {DESCRIPTION})))
    if held is not None:
        target.write_json(DESCRIPTION, dataclasses.asdict(description))
    elif not target.create_json(DESCRIPTION, dataclasses.asdict(description)):
        raise UserError(f"{public_url(target.path())}: another export has begun there just now; set --out elsewhere")
    files = {}
    for part in parts:
        if part.name == CONFIG:
            continue
        if part.name in left and part.name.endswith(_OWN_ENDS[0]) and _is_whole(target, part):
            log.info("%s is there", part.name)
            files[part.name] = target.sha256(part.name)
        else:
            files[part.name] = _write(target, part)
            log.info("%s is written", part.name)
    config = _bytes_of(next(part for part in parts if part.name == CONFIG))
    files[CONFIG] = hashlib.sha256(config).hexdigest()
    whole = dataclasses.replace(description, files=dict(sorted(files.items())))
    target.write_json(DESCRIPTION, dataclasses.asdict(whole))
    _write(target, Part.of_bytes(CONFIG, config))
    return whole


@dataclass(frozen=True)
class ModelFolder:
    """An exported model that is whole. What it holds is fetched, and loaded, when it is asked for."""

    store: Store
    description: Description

    @cached_property
    def vocabulary(self) -> JointVocabulary:
        """The ranges of ids, with their markers."""
        return JointVocabulary.from_json(self.description.vocabulary)

    @cached_property
    def config(self) -> LlamaConfig:
        """The model's configuration."""
        from model.llama.hf_weights import stored_config

        return stored_config(self.store.fetch_folder("", CONFIG))

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The text tokenizer, whose ids are the first of the vocabulary. Raises UserError where the model has none."""
        from tokenization.text.hf_files import TOKENIZER, TOKENIZER_CONFIG
        from tokenization.text.tokenizer import load_text_tokenizer

        if TOKENIZER not in self.description.files:
            raise UserError(
                f"{public_url(self.store.path())}: the model has no tokenizer; import it again with --tokenizer"
            )
        return load_text_tokenizer(str(self.store.fetch_folder("", TOKENIZER, TOKENIZER_CONFIG) / TOKENIZER))

    @property
    def weights(self) -> Path:
        """A local folder with configuration and weights, for `load_llama` and `StoredWeights`."""
        named = [name for name in self.description.files if "/" not in name and name.endswith(_OWN_ENDS)]
        return self.store.fetch_folder("", CONFIG, *named)

    def llama(self, attention: str = "ring", dtype: torch.dtype | None = None) -> LlamaForCausalLM:
        """The model on the host. dtype: None keeps the stored one."""
        from model.llama.llama import load_llama

        return load_llama(self.weights, attention, dtype)

    def codec(self, modality: str = "vision", **compute: Any) -> VQGAN:
        """What decodes the codes of a modality, by default in the precision in which codes were made.

        compute: as of `VQGAN`. Raises UserError where the model has none, or the weights are damaged.
        """
        import torch

        from tokenization.codecs.vqgan.model import VQGAN

        entry = self.description.codecs.get(modality)
        if entry is None:
            raise UserError(f"{public_url(self.store.path())}: the model has no codec of {modality}; name one that has")
        dtype = torch.bfloat16 if entry.precision == "bf16" else torch.float32
        return VQGAN.load(self.store.fetch_folder(entry.folder), **{"dtype": dtype, **compute})


def open_model(url: str, options: dict[str, Any] | None = None) -> ModelFolder:
    """The exported model in a folder at any fsspec URL. Reads `ringworld.json` alone.

    Raises UserError where there is none, it is not whole, or a later version wrote it.
    """
    store = Store(url.rstrip("/") or url, options or {})
    where = public_url(store.path())
    with first_contact(url):
        description, is_whole = read_description(store), store.exists(CONFIG)
    if description is None:
        raise UserError(
            f"{where}: no exported model is there; make one by `ringworld export RUN --out DIR` and give that folder"
        )
    if not is_whole or not description.files:
        raise UserError(f"{where}: its export was not finished; run the same command again")
    return ModelFolder(store, description)


def read_description(store: Store) -> Description | None:
    """That of a folder, None where there is none. Raises UserError where a later version wrote it, or it is damaged."""
    tree = store.read_json(DESCRIPTION)
    if tree is None:
        return None
    where = public_url(store.path(DESCRIPTION))
    try:
        if tree["format"] > FORMAT:
            raise UserError(f"{where}: has format {tree['format']}, this version reads {FORMAT}; upgrade ringworld")
        description = TypeAdapter(Description).validate_python(tree)
        JointVocabulary.from_json(description.vocabulary)
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: not what an export writes ({reason}); export the model to a new folder") from None
    return description


def _is_folder(target: Store) -> bool:
    return not target.is_local or Path(target.path()).is_dir()


def _is_own(name: str) -> bool:
    """Whether a file is one that an export writes; others in the folder stay."""
    return name in _OWN or name.startswith(f"{CODECS}/") or ("/" not in name and name.endswith(_OWN_ENDS))


def _holds(target: Store, description: Description, names: Collection[str]) -> bool:
    """Whether all files are there as they were described."""
    files = description.files
    return bool(files) and files.keys() <= set(names) and all(target.sha256(one) == files[one] for one in files)


def _is_whole(target: Store, part: Part) -> bool:
    return not part.sha256 or target.sha256(part.name) == part.sha256


def _bytes_of(part: Part) -> bytes:
    file = io.BytesIO()
    part.write(file)
    return file.getvalue()


def _write(target: Store, part: Part) -> str:
    """Write a part and return its sha256."""
    with target.writing(part.name) as file:
        part.write(file)
        file.flush()
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if part.sha256 and sha256 != part.sha256:
            raise UserError(
                f"{part.name}: what is to be exported is not what was committed; `ringworld inspect --verify` says "
                f"what is damaged"
            )
    return sha256
