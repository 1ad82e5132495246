"""What the GPU script needs beyond torch and transformers, as files for a machine that reaches no network.

In: a folder, and the Python of that machine. Out: wheels for Linux on x86-64 there, of the versions in constraints.txt,
a few MB in all, and how to use them. DeepSpeed has no wheel of its own; one is built here, with none of its operators.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from storage.errors import UserError

ROOT = Path(__file__).parents[2]
BUILT = ("deepspeed",)
"""Published as sources alone."""
WHEELS = (
    "annotated-types",
    "diffusers",
    "einops",
    "hjson",
    "importlib-metadata",
    "liger-kernel",
    "markdown-it-py",
    "mdurl",
    "msgpack",
    "ninja",
    "psutil",
    "py-cpuinfo",
    "pydantic",
    "pydantic-core",
    "pygments",
    "rich",
    "typing-extensions",
    "typing-inspection",
    "zipp",
)
"""With what they need themselves, but for what comes with torch, transformers, numba, pillow and requests."""
UNPINNED = {"liger-kernel": ">=0.8,<0.9"}
"""Of pyproject.toml's optional packages, which constraints.txt leaves out."""
PLATFORMS = tuple(f"manylinux{name}_x86_64" for name in ("_2_28", "_2_27", "_2_17", "2014", "1"))


def gather(folder: Path, python: str, also: Sequence[str] = ()) -> list[Path]:
    """Download and build the wheels into the folder; python: "3.12". Raises UserError where pip does.

    also: further packages of constraints.txt, such as numba and llvmlite.
    """
    pins = pinned((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    there = ["--implementation", "cp", "--python-version", python, *platforms]
    wanted = [_wanted(name, pins) for name in (*WHEELS, *also)]
    _pip("download", "--no-deps", "--only-binary=:all:", *there, "--dest", str(folder), *wanted)
    sources = [_wanted(name, pins) for name in BUILT]
    # Not isolated: its build asks for torch, which is here, and would download it.
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), *sources)
    return sorted(folder.glob("*.whl"))


def pinned(constraints: str) -> dict[str, str]:
    """ "==VERSION" by package, of the lines of constraints.txt; names as pip normalizes them."""
    lines = (line.split("==") for line in constraints.splitlines() if "==" in line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): f"=={version}" for name, version in lines}


def _wanted(name: str, pins: dict[str, str]) -> str:
    version = pins.get(name) or UNPINNED.get(name)
    if version is None:
        raise UserError(f"{name}: constraints.txt has no version of it; name a package that it has")
    return f"{name}{version}"


def _pip(*arguments: str) -> None:
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
        raise UserError(f"pip {arguments[0]} failed: {reason}; is the network's index reachable?")


def how_to_use(folder: Path, wheels: Sequence[Path]) -> str:
    """What to do with them, for a terminal."""
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    lines = (
        f"{len(wheels)} wheels, {size:.1f} MB, in {folder}. On the other machine, beside its torch and transformers:",
        f"  python -m pip install --no-index --no-deps --no-compile --target /tmp/site {folder}/*.whl",
        "  PYTHONPATH=/tmp/site python -m jobs.cli bench gpu --json gpu.json",
    )
    return "\n".join(lines)
