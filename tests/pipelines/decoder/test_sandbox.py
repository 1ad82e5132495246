"""A process that hostile data has taken over can do nothing but answer."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipelines.decoder.client import MEDIA, TABLES, DecoderProcess
from pipelines.decoder.limits import DEFAULT_LIMITS
from testing.miniature import environment

ATTEMPTS = """
import ctypes, errno, json, os, platform, socket, subprocess
from pipelines.decoder.sandbox import confine_calls
libc = ctypes.CDLL(None, use_errno=True)
assert confine_calls()

def refused(action):
    try:
        return action() == -1 and ctypes.get_errno() == errno.EPERM
    except PermissionError:
        return True

def opened(flags):
    return lambda: os.close(os.open("/dev/null", flags))

numbers = {"x86_64": (425, 310, 434, 438), "aarch64": (425, 270, 434, 438)}[platform.machine()]
print(json.dumps({
    "socket": refused(lambda: socket.socket(socket.AF_INET)),
    "unix socket": refused(lambda: socket.socket(socket.AF_UNIX)),
    "program": refused(lambda: subprocess.run(["true"])),
    "execv": refused(lambda: os.execv("/bin/true", ["true"])),
    "ptrace": refused(lambda: libc.ptrace(16, os.getppid(), 0, 0)),
    "kill": refused(lambda: os.kill(os.getppid(), 0)),
    "environment of another": refused(lambda: open(f"/proc/{os.getppid()}/environ").close()),
    "unlink": refused(lambda: os.unlink("/tmp/none")),
    "rename": refused(lambda: os.rename("/tmp/none", "/tmp/nothing")),
    "mkdir": refused(lambda: os.mkdir("/tmp/none")),
    "link": refused(lambda: os.link("/tmp/none", "/tmp/nothing")),
    "symlink": refused(lambda: os.symlink("/tmp/none", "/tmp/nothing")),
    "chmod": refused(lambda: os.chmod("/tmp/none", 0)),
    "truncate": refused(lambda: os.truncate("/tmp/none", 0)),
    "open to write": refused(opened(os.O_WRONLY)),
    "open to change": refused(opened(os.O_RDWR)),
    "creat": refused(opened(os.O_CREAT)),
    "open by path": platform.machine() != "x86_64" or refused(lambda: libc.syscall(2, b"/dev/null", os.O_RDWR, 0)),
    "reads": opened(os.O_RDONLY)() is None and open("/proc/self/status").read() != "" and os.stat("/tmp") is not None,
    "threads": __import__("concurrent.futures").futures.ThreadPoolExecutor(2).submit(abs, -1).result() == 1,
    **{f"call {number}": refused(lambda: libc.syscall(number, 0, 0, 0, 0, 0, 0)) for number in numbers},
}))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no filter for this machine")
def test_a_confined_process_makes_no_connection_starts_no_program_and_looks_into_no_process() -> None:
    done = subprocess.run([sys.executable, "-c", ATTEMPTS], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == dict.fromkeys(found, True)


@pytest.mark.parametrize("kind", [MEDIA, TABLES])
def test_a_decoder_is_confined_and_has_no_secret_in_its_environment(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "HOME", "SSH_AUTH_SOCK", "http_proxy"):
        monkeypatch.setenv(name, "hush-hush")
    decoder = DecoderProcess(kind, DEFAULT_LIMITS)
    try:
        one = psutil.Process(decoder._process.pid)
        assert "hush-hush" not in one.environ().values()
        assert set(one.environ()) <= {
            *("PATH", "LANG", "LC_CTYPE", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH"),
            *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"),
        }
        with open(f"/proc/{one.pid}/status", encoding="ascii") as file:
            status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        assert (status["Seccomp"], status["NoNewPrivs"], int(status["CapEff"], 16)) == ("2", "1", 0)
        assert not one.net_connections("inet")
    finally:
        decoder.close()


ON_ANOTHER_MACHINE = f"""
import platform, runpy
platform.machine = lambda: "riscv64"
runpy.run_module({TABLES!r}, run_name="__main__")
"""


def test_where_there_is_no_filter_that_is_said_and_the_limits_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "on_another_machine.py").write_text(ON_ANOTHER_MACHINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hush-hush")
    decoder = DecoderProcess("on_another_machine", DEFAULT_LIMITS)
    try:
        one = psutil.Process(decoder._process.pid)
        assert "hush-hush" not in one.environ().values()
        assert one.rlimit(psutil.RLIMIT_FSIZE)[0] == 0
        assert one.rlimit(psutil.RLIMIT_DATA)[0] < 2 * DEFAULT_LIMITS.memory
        with open(f"/proc/{one.pid}/status", encoding="ascii") as file:
            assert "NoNewPrivs:\t1\n" in file.read()
    finally:
        decoder.close()
    assert "this kernel confines no decoder process: one that data takes over may reach the network" in caplog.text
