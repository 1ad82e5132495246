"""The sizes of a Llama: a preset of LWM (arXiv 2402.08268), or one by one. Free of torch, as recipes are read by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from storage.errors import UserError

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
PRESETS: dict[str, dict[str, int]] = {
    "7B": dict(zip(_SIZES, (4096, 11008, 32, 32))),
    "1B": dict(zip(_SIZES, (2048, 5504, 22, 16))),
    "200M": dict(zip(_SIZES, (1024, 2048, 14, 8))),
    "debug": dict(zip(_SIZES, (256, 256, 2, 2))),
}
REQUIRED = frozenset(_SIZES)
OPTIONAL = frozenset({"num_key_value_heads", "head_dim", "initializer_range", "rms_norm_eps"})
FRACTIONS = frozenset({"initializer_range", "rms_norm_eps"})


def llama_sizes(size: str | Mapping[str, Any]) -> dict[str, Any]:
    """The sizes by their Hugging Face names, of a preset or as given.

    Raises UserError on an unknown name or key, a missing size, one that is not positive, or sizes that do not fit each
    other.
    """
    if isinstance(size, str):
        if size not in PRESETS:
            raise UserError(f"model.size: {size!r} is none of {', '.join(PRESETS)}; name one or give the four sizes")
        return dict(PRESETS[size])
    unknown, missing = set(size) - REQUIRED - OPTIONAL, REQUIRED - set(size)
    if unknown:
        raise UserError(f"model.size: unknown key {sorted(unknown)[0]!r}; known are {sorted(REQUIRED | OPTIONAL)}")
    if missing:
        raise UserError(f"model.size: {sorted(missing)[0]!r} is missing; give it or name one of {', '.join(PRESETS)}")
    sizes = {name: value for name, value in size.items() if value is not None}
    for name, value in sizes.items():
        is_whole = name not in FRACTIONS
        if isinstance(value, bool) or not 0 < value < math.inf or (is_whole and value != int(value)):
            raise UserError(f"model.size.{name}: {value} is no {'whole ' if is_whole else ''}number above 0")
    heads, kv_heads = sizes["num_attention_heads"], sizes.get("num_key_value_heads") or sizes["num_attention_heads"]
    if heads % kv_heads:
        raise UserError(f"model.size: num_key_value_heads {kv_heads} must divide num_attention_heads {heads}")
    if sizes.get("head_dim") is None and sizes["hidden_size"] % heads:
        raise UserError(f"model.size: hidden_size {sizes['hidden_size']} is no multiple of num_attention_heads {heads}")
    if (sizes.get("head_dim") or sizes["hidden_size"] // heads) % 2:
        raise UserError("model.size: RoPE turns pairs of dimensions, so choose an even head_dim")
    return sizes
