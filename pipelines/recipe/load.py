"""Reads a recipe file: YAML and `--set` overrides in, a validated `Recipe` out.

Every mistake is reported as one `UserError` sentence that names the file, the key and the remedy.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from model.convert.lwm_settings import file_of
from pipelines.recipe import Recipe
from pipelines.recipe.base import field_types
from pipelines.recipe.evaluate import Evaluate
from pipelines.recipe.yaml_tree import read_yaml
from storage.errors import UserError
from storage.urls import join_url

_EVALUATE = "evaluate"
_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply `key.path=value` overrides (values are YAML). Raises UserError on any mistake."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe file; give the path of a YAML recipe") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); give the path of a YAML recipe") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); give the path of a YAML recipe, which is a file") from None
    try:
        tree = read_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML ({error}); mend the file") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: this file holds no mapping of keys; start from the one that `ringworld init` writes")
    for override in overrides or []:
        _apply_override(tree, override)
    _make_paths_absolute(tree)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None


def load_evaluate(overrides: Sequence[str], settings: Evaluate | None = None) -> Evaluate:
    """Settings of an evaluation, those of a recipe or the defaults, with `key.path=value` overrides.

    The keys are those of `evaluate`, with or without its name. Raises UserError on any mistake.
    """
    branch: dict[str, Any] = {} if settings is None else settings.model_dump(mode="json")
    tree = {_EVALUATE: branch}
    for override in overrides:
        _apply_override(tree, override if override.startswith(f"{_EVALUATE}.") else f"{_EVALUATE}.{override}")
    try:
        return Evaluate.model_validate(tree[_EVALUATE])
    except ValidationError as error:
        raise UserError(f"--set: {_explain(error, (_EVALUATE,))}") from None


def _make_paths_absolute(tree: dict[str, Any]) -> None:
    """Local paths of the recipe are relative to where the command runs; tasks and workers run elsewhere."""
    storage = tree.setdefault("storage", {})
    if isinstance(storage, dict):
        storage["data"] = storage.get("data") or "."
    stages = tree["train"].get("stages") if isinstance(tree.get("train"), dict) else None
    paths = [(storage, key) for key in ("root", "data", "codes")]
    paths += [(tree.get("text_tokenizer"), "path"), (tree.get("vqgan"), "weights"), (tree.get("model"), "init")]
    paths += [(stage, "export") for stage in stages] if isinstance(stages, list) else []
    if isinstance(model := tree.get("model"), dict) and isinstance(model.get("init"), str):
        model["init"] = file_of(model["init"])  # LWM's formats are told apart by what is in the file
    for branch, key in paths:
        if isinstance(branch, dict) and isinstance(branch.get(key), str) and branch[key] and "://" not in branch[key]:
            branch[key] = os.path.abspath(join_url("", branch[key]))


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: not of the form key.path=value, e.g. --set train.stages.0.lr=3e-4")
    try:
        value = read_yaml(text)
    except ValueError as error:
        raise UserError(f"--set {override}: the value is not valid YAML ({error}); mend it or quote it") from None
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 reads `3e-4` as a string; users mean the number
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        place = _place(node, part, override)
        if isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        node = node[place]
    node[_place(node, last, override)] = value


def _place(node: Any, part: str, override: str) -> int | str:
    """The key or the index of a branch of the recipe that a part of an override's key names."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise UserError(f"--set {override}: {part!r} is below a value, which has no keys of its own")
    if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
        raise UserError(f"--set {override}: {part!r} is no index of a list of {len(node)}; count from 0")
    return int(part)


def _explain(error: ValidationError, branch: tuple[str, ...] = ()) -> str:
    """The first of pydantic's errors as one sentence; of a misspelt key before others, with the nearest known one.

    branch: of the recipe, which was validated alone.
    """
    errors = error.errors()
    first = next((one for one in errors if one["type"] in _UNKNOWN_KEY), errors[0])
    location = (*branch, *first["loc"])
    key = ".".join(str(part) for part in location)
    if first["type"] in _UNKNOWN_KEY:
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(sorted(known))}"
        return f"unknown key {key!r}; {hint}"
    if first["type"] == "missing":
        return f"the key {key!r} is missing; add it"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key and key not in message else message


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the branch at a location of the tree; list indices and names of dict entries lead nowhere new."""
    branch: type = Recipe
    for part in location:
        branch = next(iter(_branches(field_types(branch).get(str(part)))), branch)
    return list(field_types(branch))


def _branches(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_dataclass(annotation)):
        return [annotation]
    return [branch for part in get_args(annotation) for branch in _branches(part)]
