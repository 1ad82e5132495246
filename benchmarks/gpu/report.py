"""`ringworld bench gpu`: runs the parts, keeps a report that is whole after every row, prints a table last."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.part import Part, Row
from benchmarks.gpu.run import run_parts
from benchmarks.machine import machine
from storage.errors import UserError

PACKAGES = ("transformers", "deepspeed", "diffusers", "liger-kernel", "triton", "flash-attn-3")
LAST = ("passed", "failed", "skipped", "out of time")


def gpu_report(parts: Sequence[Part], device: str, tiny: bool, minutes: float, path: Path | None) -> dict[str, Any]:
    """Run the parts and return the report: {"machine", "parts": {name: {"about", "state", "seconds", "rows"}}}.

    path: also written there after every row. Raises UserError where there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device here: run it on a machine with an NVIDIA GPU, or rehearse: --device cpu --tiny")
    report: dict[str, Any] = {
        "benchmark": "gpu",
        "settings": {"device": device, "tiny": tiny, "minutes": minutes},
        "machine": {**machine(), **_card(device), **dict(_versions())},
        "parts": {part.name: {"about": part.about, "state": "not run", "rows": []} for part in parts},
    }

    def each(name: str, row: Row) -> None:
        entry = report["parts"][name]
        if row["kind"] == "started":
            entry["state"] = "running"
            Console().print(f"{name}: {entry['about']}", highlight=False, soft_wrap=True)
        elif row["kind"] in LAST and "what" not in row:
            entry |= {"state": row["kind"], **{key: value for key, value in row.items() if key != "kind"}}
        else:
            entry["rows"].append(row)
        if path is not None:
            _write(path, report)

    run_parts(parts, device, tiny, minutes, each)
    return report


def failed(report: dict[str, Any]) -> list[str]:
    """The parts that failed: what they prove does not hold, or they broke."""
    return [name for name, entry in report["parts"].items() if entry["state"] == "failed"]


def _write(path: Path, report: dict[str, Any]) -> None:
    """Whole or not at all: the machine may go away at any moment."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _card(device: str) -> dict[str, Any]:
    if device != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "gpu_gib": round(properties.total_memory / 2**30, 1),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cuda": torch.version.cuda,
    }


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            yield package, version(package)


def print_gpu(report: dict[str, Any]) -> None:
    """The report for a terminal: what failed, was skipped or missed its goal, and why; last a table, a line a part.

    Goals are left out of a rehearsal's: its speeds are of no meaning.
    """
    console = Console()
    rehearsal = report["settings"]["device"] != "cuda"
    table = Table(title=f"{report['machine'].get('gpu', 'rehearsal on the CPU')}, {report['machine']['date']}")
    for heading in ("part", "state", "s", "checks", "goals met", "nearest to its limit"):
        table.add_column(heading)
    notes = []
    for name, entry in report["parts"].items():
        checks, goals = (_of(entry, kind) for kind in ("check", "goal"))
        met = f"{sum(row['met'] for row in goals)}/{len(goals)}" if goals and not rehearsal else ""
        held = f"{sum(row['holds'] for row in checks)}/{len(checks)}" if checks else ""
        nearest = max(checks, key=_strain, default=None)
        worst = f"{nearest['what']}: {_number(nearest):.2g}" if nearest else ""
        table.add_row(name, entry["state"], str(entry.get("seconds", "")), held, met, worst)
        if "why" in entry:
            notes.append(f"{name}: {entry['state']}: {entry['why']}")
        notes += [f"{name}: skipped {row['what']}: {row['why']}" for row in _of(entry, "skipped")]
        notes += [] if rehearsal else [_goal(name, row) for row in goals]
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    console.print(table)


def _of(entry: dict[str, Any], kind: str) -> list[Row]:
    return [row for row in entry["rows"] if row["kind"] == kind]


def _strain(row: Row) -> float:
    """How near a check is to its limit, 1 at it."""
    if row.get("at_most"):
        return _number(row) / row["at_most"]
    return row["at_least"] / _number(row) if row.get("at_least") and _number(row) else 0.0


def _number(row: Row) -> float:
    """What was measured, also where it is infinite or NaN, which a row has as words."""
    return float(row["measured"])


def _goal(name: str, row: Row) -> str:
    limit = f"at least {row['at_least']:g}" if "at_least" in row else f"at most {row['at_most']:g}"
    return f"{name}: {row['what']}: {_number(row):.4g}, goal {limit}{'' if row['met'] else ', MISSED'}"
