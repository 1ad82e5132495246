"""`ringworld bench gpu --gather`: what a machine without a network gets, for its Python, as constraints.txt pins it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import wheels
from benchmarks.gpu.wheels import BUILT, UNPINNED, WHEELS, pinned
from jobs.cli import main
from jobs.guard import USER_MISTAKE

PINS = pinned((wheels.ROOT / "constraints.txt").read_text())


def test_every_package_has_one_version() -> None:
    assert [name for name in (*WHEELS, *BUILT) if name not in PINS and name not in UNPINNED] == []
    assert pinned("# a_b==1\nPyYAML==6.0.3\nast_serialize==0.13.1\n") == {
        "pyyaml": "==6.0.3",
        "ast-serialize": "==0.13.1",
    }


def test_wheels_are_asked_for_by_that_machines_python_and_never_built_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []

    def pip(*arguments: str) -> None:
        asked.append(arguments)
        (tmp_path / "deepspeed-0.19.8-py3-none-any.whl").write_bytes(bytes(10**6))

    monkeypatch.setattr(wheels, "_pip", pip)
    assert main(["bench", "gpu", "--gather", str(tmp_path), "--python", "3.13", "--also", "numba"]) == 0
    download, build = asked
    assert {"--no-deps", "--only-binary=:all:", "3.13", f"numba{PINS['numba']}"} < set(download)
    assert not [name for name in BUILT if any(word.startswith(name) for word in download)]
    assert build[0] == "wheel"
    assert build[-1] == f"deepspeed{PINS['deepspeed']}"
    out = capsys.readouterr().out
    assert "1 wheels, 1.0 MB" in out
    assert "--no-index --no-deps" in out


def test_what_constraints_do_not_pin_and_what_pip_does_not_find_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "gpu", "--gather", str(tmp_path), "--also", "no-such"]) == USER_MISTAKE
    assert "no-such: constraints.txt has no version of it" in capsys.readouterr().err
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: a\nERROR: No matching distribution found for hjson\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert main(["bench", "gpu", "--gather", str(tmp_path)]) == USER_MISTAKE
    assert "pip download failed: ERROR: No matching distribution found for hjson" in capsys.readouterr().err


@pytest.mark.slow
def test_the_wheels_of_this_python_can_be_imported_from_their_folder(tmp_path: Path) -> None:
    """By the real pip; skipped where no index answers it."""
    probe = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(tmp_path / "probe"), "hjson"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no package index answers")
    found = wheels.gather(tmp_path / "wheels", f"{sys.version_info.major}.{sys.version_info.minor}")
    names = {path.name.split("-")[0].lower().replace("_", "-") for path in found}
    assert names == {*WHEELS, *BUILT}
    assert sum(path.stat().st_size for path in found) < 60e6
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
    subprocess.run([sys.executable, *install, *map(str, found)], check=True)
    where = (
        "import diffusers, hjson, pydantic, pydantic_core; print(diffusers.__file__, hjson.__file__, pydantic.__file__)"
    )
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", where], env=environment, capture_output=True, text=True, check=True)
    assert all(path.startswith(str(site)) for path in done.stdout.split())
