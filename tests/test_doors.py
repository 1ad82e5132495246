"""The doors between the rooms stand one way; an import against an arrow is a defect."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = tuple(sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"))
"""Every top-level package, as the tree has them, so that none drops out by moving."""
ALLOWED = {
    "recipes": set(),
    "storage": {"storage"},
    "tokenization": {"tokenization", "storage"},
    "model": {"model", "storage", "tokenization.vocabulary", "tokenization.compiled", "tokenization.loader.batch"},
    "pipelines": {"pipelines", "tokenization", "model", "storage", "ray"},
    "testing": {"testing", "pipelines", "tokenization", "model", "storage", "ray"},
    "benchmarks": {"benchmarks", "testing", "pipelines", "tokenization", "model", "storage"},
    "jobs": {"jobs", "benchmarks", "pipelines", "model", "storage"},
}
PRINT = {"jobs", "benchmarks", "testing"}
"""Rooms that read arguments and print."""


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: relative import"
            yield node.module


def test_every_room_has_its_doors() -> None:
    assert set(ALLOWED) == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_through_its_doors(room: str) -> None:
    for path in sorted((ROOT / room).rglob("*.py")):
        for name in imports(path):
            if name.split(".")[0] not in (*ROOMS, "tests", "ray"):
                continue
            allowed = any(name == door or name.startswith(door + ".") for door in ALLOWED[room])
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", sorted(set(ROOMS) - PRINT))
def test_only_jobs_reads_arguments_and_prints(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path.relative_to(ROOT)}:{node.lineno} prints"
            if isinstance(node, ast.Attribute) and node.attr == "argv":
                pytest.fail(f"{path.relative_to(ROOT)}:{node.lineno} reads argv")


@pytest.mark.parametrize(
    "stage", ["pipelines.codecs", "pipelines.tokenize", "pipelines.pack.stage", "pipelines.evaluate"]
)
def test_a_driver_imports_no_torch_for_a_stage_that_does_not_train(stage: str) -> None:
    assert imported_by(stage).isdisjoint({"torch", "ray.train"})


@pytest.mark.parametrize(
    "module", ["pipelines.tokenize.partition", "pipelines.decoder.child", "tokenization.loader.loader"]
)
def test_what_runs_many_times_on_a_node_holds_no_torch(module: str) -> None:
    assert "torch" not in imported_by(module)


def imported_by(module: str) -> set[str]:
    """Names of all modules that a process has after importing this one."""
    said = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", said], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(done.stdout.split())
