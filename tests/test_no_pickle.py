"""A pickle is a program: none is run in reading data. Our own calls are looked at, not what libraries do inside."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")
RESTRICTED = "tokenization/codecs/vqgan/import_lwm.py"
"""Reads the one released file that is a pickle, with an unpickler that refuses all but a handful of functions."""

RUN_PICKLES = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
    "pandas.read_pickle",
}
SAFE_IF = {"numpy.load": ("allow_pickle", False), "torch.load": ("weights_only", True)}


def findings(tree: ast.AST) -> Iterator[str]:
    """What in a module might run a pickle."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
            yield from (f"imports {alias.name}" for alias in node.names if alias.name.split(".")[0] in RUN_PICKLES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            if node.module.split(".")[0] in RUN_PICKLES:
                yield f"imports from {node.module}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        called = dotted(node.func, names)
        if called in SAFE_IF:
            name, safe = SAFE_IF[called]
            value = given.get(name)
            if not (isinstance(value, ast.Constant) and value.value is safe):
                yield f"calls {called} without {name}={safe}"
        elif called in RUN_PICKLES:
            yield f"calls {called}"
        elif any(
            isinstance(given.get(name), ast.Constant) and given[name].value is not safe  # type: ignore[attr-defined]
            for name, safe in SAFE_IF.values()
        ):
            yield f"calls {called} with {' and '.join(filter(None, given))}"


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """What a called expression names, by its imports: `np.load` is numpy.load."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("room", ROOMS)
def test_no_pickle_is_run_in_reading_data(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        found = list(findings(ast.parse(path.read_text(encoding="utf-8"))))
        assert found == (["imports pickle"] if name == RESTRICTED else []), name


def test_the_one_exception_makes_nothing_but_an_unpickler_that_refuses() -> None:
    tree = ast.parse((ROOT / RESTRICTED).read_text(encoding="utf-8"))
    used = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and dotted(node.value, {}) == "pickle"
    }
    assert used == {"Unpickler", "UnpicklingError"}
    (own,) = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.bases]
    assert [ast.unparse(base) for base in own.bases] == ["pickle.Unpickler"]
    assert "find_class" in [item.name for item in own.body if isinstance(item, ast.FunctionDef)]


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import dill as d",
        "import numpy as np\nnp.load('x')",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "from numpy import load\nload('x')",
        "import torch\ntorch.load('x')",
        "from torch import load as read\nread('x', weights_only=False)",
        "import torch\ntorch.load('x', weights_only=careful)",
        "import pandas as pd\npd.read_pickle('x')",
        "checkpoint.load_file('x', weights_only=False)",
    ],
)
def test_what_would_run_one_is_found(code: str) -> None:
    assert list(findings(ast.parse(code)))


def test_what_runs_none_is_passed() -> None:
    code = "import numpy as np, torch, json\nnp.load('x', allow_pickle=False)\ntorch.load('x', weights_only=True)\n"
    assert not list(findings(ast.parse(code + "json.load(open('x'))")))
