"""What torch's operators and Liger's functions take, by version, and whether a call fits it.

    python -m testing.operator_schemas                   # every version below
    python -m testing.operator_schemas torch==2.15.0     # one more

downloads packages with pip, reads in them what is declared, and adds it to `operator_schemas.json`; nothing of them is
installed or run. In a test, `recorded` has what was read, and `bound` the arguments of a call by their declared names.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".json")
REQUIREMENTS = (
    *("torch==2.10.0", "torch==2.11.0", "torch==2.12.0", "torch==2.13.0", "torch"),
    *("liger-kernel==0.8.0", "liger-kernel"),
)
"""The oldest versions that pyproject.toml allows, the newest, and some between."""
OPERATORS = (
    "_flash_attention_forward",
    "_flash_attention_backward",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)
"""Those that `model.attention.flash_kernels` calls."""
MODULES = {"torch.nn.attention": "torch/nn/attention/__init__.py"}
"""Modules of which we import names that are new in torch."""
LIGER = {
    "liger_kernel/ops/rms_norm.py": ("LigerRMSNormFunction.forward",),
    "liger_kernel/ops/rope.py": ("LigerRopeFunction.forward",),
    "liger_kernel/ops/swiglu.py": ("LigerSiLUMulFunction.forward", "swiglu_forward", "swiglu_backward"),
}
"""Those that `model.layers.kernels.liger` calls."""
PLATFORMS = ("macosx_14_0_arm64", "macosx_11_0_arm64")
"""torch's smallest wheels: what is declared is the same in all."""


def recorded(package: str) -> dict[str, Any]:
    """By version of "torch": {"operators": {name: schema}, "names": {module: [name]}}; of "liger-kernel": {function:
    {"parameters": [name, or "name=" where it has a default], "returns": [expression]}}.
    """
    return json.loads(FILE.read_text(encoding="utf-8"))[package]


def bound(schema: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names of an operator's schema. Raises TypeError where they do not fit it."""
    declared = torch._C.parse_schema(schema).arguments
    positional = [argument.name for argument in declared if not argument.kwarg_only]
    required = [argument.name for argument in declared if not argument.has_default_value()]
    given = by_name(positional, required, [argument.name for argument in declared], args, kwargs)
    for argument in declared:
        if argument.name in given and not _fits(given[argument.name], str(argument.type)):
            raise TypeError(f"{argument.name} is {argument.type}, not {type(given[argument.name]).__name__}")
    return given


def bound_to_function(parameters: Sequence[str], args: Sequence[Any]) -> dict[str, Any]:
    """The same for a Python function's recorded parameters, without autograd's `ctx`, called by position."""
    names = [name.removesuffix("=") for name in parameters if name != "ctx"]
    return by_name(names, [name for name in names if name in parameters], names, args, {})


def by_name(
    positional: Sequence[str],
    required: Sequence[str],
    known: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Arguments by name. Raises TypeError on too many, an unknown name, one given twice, and a missing one."""
    if len(args) > len(positional):
        raise TypeError(f"{len(args)} arguments by position, of {len(positional)}")
    given = dict(zip(positional, args))
    if wrong := [name for name in kwargs if name in given or name not in known]:
        raise TypeError(f"{wrong[0]} is unknown or given twice")
    given |= kwargs
    if missing := [name for name in required if name not in given]:
        raise TypeError(f"{missing[0]} is missing")
    return given


_TYPES: dict[str, type | tuple[type, ...]] = {
    "Tensor": Tensor,
    "float": (float, int),
    "int": int,
    "SymInt": int,
    "bool": bool,
}


def _fits(value: Any, declared: str) -> bool:
    if declared.startswith("Optional["):
        return value is None or _fits(value, declared.removeprefix("Optional[").removesuffix("]"))
    return isinstance(value, bool) == (declared == "bool") and isinstance(value, _TYPES[declared])


# --- The command ---


def record(requirements: Sequence[str]) -> None:
    """Add to the file what these packages declare."""
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for requirement in requirements:
        with tempfile.TemporaryDirectory() as folder:
            wheel = _download(requirement, Path(folder))
            package, version = _package_and_version(wheel)
            with zipfile.ZipFile(wheel) as archive:
                declared = _of_torch(archive) if package == "torch" else _of_liger(archive)
        known.setdefault(package, {})[version] = declared
    FILE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement, by pip as it is configured here."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", *platforms, "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, requirement], check=True)
    (wheel,) = folder.iterdir()
    return wheel


def _package_and_version(wheel: Path) -> tuple[str, str]:
    package, version, _ = wheel.name.split("-", 2)
    return package.replace("_", "-"), version


def _of_torch(archive: zipfile.ZipFile) -> dict[str, Any]:
    functions = archive.read("torchgen/packaged/ATen/native/native_functions.yaml").decode()
    schemas = {name: f"aten::{name}{rest}" for name, rest in re.findall(r"^- func: ([\w.]+)(\(.*)$", functions, re.M)}
    names = {module: _exported(archive.read(path).decode()) for module, path in MODULES.items()}
    return {"operators": {name: schemas[name] for name in OPERATORS}, "names": names}


def _exported(source: str) -> list[str]:
    """A module's `__all__`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and "__all__" in ast.unparse(node).split(" ")[0]:
            return ast.literal_eval(node.value) if node.value is not None else []
    return []


def _of_liger(archive: zipfile.ZipFile) -> dict[str, Any]:
    declared = {}
    for path, names in LIGER.items():
        tree = ast.parse(archive.read(path))
        for name in names:
            function = _function(tree.body, name)
            declared[name] = {"parameters": _parameters(function.args), "returns": _returned(function)}
    return declared


def _function(body: Sequence[ast.stmt], name: str) -> ast.FunctionDef:
    """The function or method of a dotted name."""
    first, _, rest = name.partition(".")
    (found,) = (node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == first)
    if isinstance(found, ast.ClassDef):
        return _function(found.body, rest)
    return found


def _parameters(arguments: ast.arguments) -> list[str]:
    names = [argument.arg for argument in arguments.args]
    plain = len(names) - len(arguments.defaults)
    return [*names[:plain], *(f"{name}=" for name in names[plain:])]


def _returned(function: ast.FunctionDef) -> list[str]:
    """What its last `return` gives, one expression a value."""
    *_, last = (node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value)
    return [ast.unparse(x) for x in (last.elts if isinstance(last, ast.Tuple) else [last])]


if __name__ == "__main__":
    record(sys.argv[1:] or REQUIREMENTS)
