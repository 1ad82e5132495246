"""A process is called gone only where it would be seen: same machine, same boot, same pid namespace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from storage.process_identity import ProcessIdentity, seconds_since_boot

SAY = (
    "import json, sys\nfrom dataclasses import asdict\nfrom storage.process_identity import ProcessIdentity\n"
    "print(json.dumps(asdict(ProcessIdentity.current())), flush=True)\nsys.stdin.read()\n"
)


@pytest.fixture(scope="module")
def other() -> Iterator[tuple[subprocess.Popen[str], ProcessIdentity]]:
    process = subprocess.Popen([sys.executable, "-c", SAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process, told(process)
    process.kill()
    process.wait()


def told(process: subprocess.Popen[str]) -> ProcessIdentity:
    assert process.stdout is not None
    return ProcessIdentity(**json.loads(process.stdout.readline()))


def test_a_process_is_gone_once_it_is_killed_though_its_parent_has_not_asked(
    other: tuple[subprocess.Popen[str], ProcessIdentity],
) -> None:
    process, identity = other
    assert not identity.is_gone()
    assert replace(identity, start_ticks=identity.start_ticks - 1).is_gone(), "its pid is another's now"
    for elsewhere in (
        replace(identity, pid=2**22 + 1, boot="another"),  # a reboot, or another machine of the same name
        replace(identity, pid=2**22 + 1, host="another"),
        replace(identity, pid=2**22 + 1, pid_namespace=1),
        replace(identity, pid=2**22 + 1, boot="", pid_namespace=0),
        replace(identity, pid=2**70),
    ):
        assert not elsewhere.is_gone()
    process.kill()
    deadline = time.monotonic() + 20
    while "Z" not in Path(f"/proc/{process.pid}/stat").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert identity.is_gone(), "as a zombie"
    process.wait()
    assert identity.is_gone()


@pytest.mark.skipif(os.geteuid() != 0, reason="another pid namespace needs root")
def test_a_process_of_another_pid_namespace_of_this_host_is_not_called_gone() -> None:
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", SAY]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        inside, here = told(process), ProcessIdentity.current()
        assert inside.pid == 1
        assert inside.shares_clock(here)
        assert inside.pid_namespace != here.pid_namespace
        assert inside.start_ticks > 0
        assert not inside.is_gone()
        assert not replace(inside, pid=2**22 + 1).is_gone()
    finally:
        process.kill()
        process.wait()


def test_the_clock_of_the_boot_is_the_kernels() -> None:
    assert abs(seconds_since_boot() - float(Path("/proc/uptime").read_text().split()[0])) < 1.0
    assert set(asdict(ProcessIdentity.current()).values()).isdisjoint({"", 0})
