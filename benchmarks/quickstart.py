"""How long a recipe takes cold and cached, and the most memory that all its processes hold at once.

    python -m benchmarks.quickstart --json FILE

Runs `ringworld run` twice in a folder of its own. Memory is the sum of the proportional set sizes (PSS: shared pages
are shared out) over the command and all that it started, sampled every few seconds; Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"


def measure(command: list[str], environment: dict[str, str], every: float) -> dict[str, float]:
    """Wall seconds and peak PSS in GiB of a command and its descendants, which carry its mark in their environment."""
    started = time.monotonic()
    process = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(_pss(one) for one in _marked(environment["RINGWORLD_MEASURED"])))
        time.sleep(every)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {"seconds": round(time.monotonic() - started, 1), "peak_gib": round(peak / 2**30, 2)}


def _marked(mark: str) -> list[psutil.Process]:
    """Ray's daemons leave the process tree, but keep the environment they were started with."""
    found = []
    for one in psutil.process_iter():
        try:
            if one.environ().get("RINGWORLD_MEASURED") == mark:
                found.append(one)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def main() -> None:
    """Measure and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(RECIPE))
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two looks at the memory")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "RINGWORLD_MEASURED": folder, "OMP_NUM_THREADS": "1"}
        root = f"storage.root={folder}/run"
        command = [sys.executable, "-m", "jobs.cli", "run", arguments.recipe, "--set", root]
        figures: dict[str, Any] = {
            "cpus": os.cpu_count(),
            "cold": measure(command, environment, arguments.every),
            "cached": measure(command, environment, arguments.every),
        }
        report = json.loads(Path(folder, "run", "report.json").read_text())
    figures["verdicts"] = [verdict["text"] for verdict in report["verdicts"]]
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
