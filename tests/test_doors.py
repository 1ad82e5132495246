"""The doors between the rooms stand one way; an import against an arrow is a defect."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
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
    "ringworld": {"ringworld", "pipelines", "model"},
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


def modules_of(room: str) -> dict[str, Path]:
    paths = sorted((ROOT / room).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported_modules(path: Path, modules: Collection[str]) -> set[str]:
    """Which of these modules a file imports anywhere: at its head, inside a function, or for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inside if name in modules} or {node.module}
    return found & set(modules)


def circles(edges: Mapping[str, Collection[str]]) -> list[set[str]]:
    """Modules that reach each other: each circle whole, none twice."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [*edges[start]]
        while ahead:
            if (one := ahead.pop()) not in seen:
                seen.add(one)
                ahead.extend(edges[one])
        return seen

    ways = {name: reached(name) for name in edges}
    found: list[set[str]] = []
    for name in edges:
        circle = {other for other in ways[name] if name in ways[other]}
        if circle and circle not in found:
            found.append(circle)
    return found


def test_a_circle_is_found_and_a_plain_chain_is_none() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [{"b", "c"}, {"d"}]


@pytest.mark.parametrize("room", ROOMS)
def test_no_imports_go_in_a_circle(room: str) -> None:
    modules = modules_of(room)
    found = circles({name: imported_modules(path, modules) for name, path in modules.items()})
    assert found == []


@pytest.mark.parametrize("room", sorted(set(ROOMS) - PRINT))
def test_only_jobs_reads_arguments_and_prints(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path.relative_to(ROOT)}:{node.lineno} prints"
            if isinstance(node, ast.Attribute) and node.attr == "argv":
                pytest.fail(f"{path.relative_to(ROOT)}:{node.lineno} reads argv")


@pytest.mark.parametrize("room", ROOMS)
def test_every_logger_is_below_the_one_that_ringworld_log_governs(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr == "getLogger" and call.args:
                assert ast.unparse(call.args[0]) != "__name__", (
                    f"{path.relative_to(ROOT)}: name it ringworld.{{__name__}}"
                )


@pytest.mark.parametrize(
    "module",
    ["pipelines.build", *(f"pipelines.{stage}.run" for stage in ("tokenize", "pack", "evaluate"))],
)
def test_a_driver_imports_no_torch_for_a_stage_that_does_not_train(module: str) -> None:
    assert imported_by(module).isdisjoint({"torch", "ray.train"})


def test_a_driver_that_trains_imports_no_transformers() -> None:
    assert "transformers" not in imported_by("pipelines.train.run")


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
