"""What a user says of an LWM checkpoint: its file, and what its arrays do not show: heads, context and theta.

In: the JSON of LWM's own configuration or of Hugging Face's, or a preset's name with context and theta beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.llama.sizes import PRESETS
from storage.errors import UserError

FORMATS = ("params", "flax_params", "trainstate")
"""What LWM's options write before the name of a file, with "::" between."""
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class LWMSettings:
    """heads: of attention. context: tokens. The defaults are LWM's."""

    heads: int
    context: int
    rope_theta: float
    rms_norm_eps: float = 1e-6
    bos_id: int = 1
    eos_id: int = 2


_KEYS = {
    "heads": ("num_attention_heads",),
    "context": ("max_sequence_length", "max_position_embeddings"),
    "rope_theta": ("theta", "rope_theta"),
    "rms_norm_eps": ("rms_norm_eps",),
    "bos_id": ("bos_token_id",),
    "eos_id": ("eos_token_id",),
}
"""By field the names that LWM and Hugging Face have for it."""
_WHOLE = ("heads", "context", "bos_id", "eos_id")
_REQUIRED = {"heads": "", "context": "; give it by --context", "rope_theta": "; give it by --rope-theta"}


def file_of(checkpoint: str) -> str:
    """The path or URL in an LWM checkpoint's name, whose prefix says its format, or which has none."""
    prefix, separator, file = checkpoint.partition("::")
    return file if separator and prefix in FORMATS else checkpoint


def preset_settings(name: str, context: int | None, rope_theta: float | None) -> LWMSettings:
    """Those of a preset (7B, ..). Raises UserError on an unknown name, and where context or theta are not given."""
    if name not in PRESETS:
        raise UserError(f"--config {name}: neither a file nor one of {', '.join(PRESETS)}; name one of them")
    if context is None or rope_theta is None:
        missing = "--context" if context is None else "--rope-theta"
        raise UserError(
            f"--config {name}: a size says nothing of {missing}, which LWM raised from model to model; give both "
            f"--context and --rope-theta (LWM-1M: 1048576 and 5e7)"
        )
    return _checked({"heads": PRESETS[name]["num_attention_heads"], "context": context, "rope_theta": rope_theta}, name)


def json_settings(name: str, content: bytes, context: int | None, rope_theta: float | None) -> LWMSettings:
    """Those in a configuration's JSON, at `name`; context and rope_theta, where given, replace its own.

    Raises UserError where it is no such JSON, lacks one, or has a value that cannot be.
    """
    try:
        tree = json.loads(content) if len(content) <= _MOST_BYTES else None
    except ValueError:
        tree = None
    if not isinstance(tree, Mapping):
        raise UserError(f"{name}: not the JSON of a configuration; name LWM's or that of a Hugging Face Llama")
    rope = tree.get("rope_parameters")
    flat = {**(rope if isinstance(rope, Mapping) else {}), **tree}
    found = {
        field: next((flat[key] for key in keys if flat.get(key) is not None), None) for field, keys in _KEYS.items()
    }
    given = {"context": context, "rope_theta": rope_theta}
    values = {**found, **{field: value for field, value in given.items() if value is not None}}
    for field, remedy in _REQUIRED.items():
        if values[field] is None:
            raise UserError(f"{name}: has no {' or '.join(_KEYS[field])}{remedy or '; name a whole configuration'}")
    return _checked({field: value for field, value in values.items() if value is not None}, name)


def _checked(values: Mapping[str, Any], name: str) -> LWMSettings:
    for field, value in values.items():
        least = 0 if field.endswith("_id") else 1
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or (field in _WHOLE and (value != int(value) or value < least)) or value < 0:
            raise UserError(f"{name}: {_KEYS[field][0]} {value!r} is no such number; name a configuration of LWM's")
    typed = {field: int(value) if field in _WHOLE else float(value) for field, value in values.items()}
    return LWMSettings(**typed)  # type: ignore[arg-type]
