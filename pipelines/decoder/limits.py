"""What a decoder may use of the machine: limits that a recipe sets and the kernel enforces.

The process sets them on itself before it sees any data. They count memory and processor time, never wall time: a slow
object store or a busy machine does not change which data is bad.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_OPEN_FILES = 256
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Limits:
    """memory: bytes that decoding may allocate, beyond what libraries take as they are imported. cpu_seconds: processor
    time that it may take without reading on in its file and without finishing a chunk of frames. Recipes set both.
    """

    memory: int = 4 << 30
    cpu_seconds: int = 120


DEFAULT_LIMITS = Limits()


def end_with_parent(parent: int) -> None:
    """Have this process killed when the thread that started it ends, and end it if that has happened already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()


def confine(limits: Limits) -> None:
    """Put this process under the limits: memory, open files, no core dump, no file written."""
    # Not the address space, which counts what is only reserved and so varies with versions. What libraries allocate
    # varies with the processor (OpenBLAS has buffers for each of its kernels) and is not counted either.
    _lower(resource.RLIMIT_DATA, _status_bytes("VmData") + limits.memory)
    _lower(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, 0)  # pipes are no files
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for the parent, which ends this process


def _lower(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


class Stopwatch:
    """Processor time since the last progress. Past the limit the kernel ends the process with SIGXCPU."""

    def __init__(self, cpu_seconds: int) -> None:
        self._most = cpu_seconds
        self._started = -math.inf

    def progress(self) -> None:
        """Start again from zero. Cheap enough for every read of a file."""
        now = time.process_time()
        if now - self._started >= 1:  # the kernel counts whole seconds
            hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
            soft = math.ceil(now) + 1 + self._most
            resource.setrlimit(resource.RLIMIT_CPU, (soft if hard < 0 else min(soft, hard), hard))
            self._started = now


class Strain:
    """Whether this process has come near its memory limit: libraries report that in many different ways."""

    def __init__(self, limits: Limits) -> None:
        self._most = limits.memory // 2 + _status_bytes("VmSize")

    def __bool__(self) -> bool:
        return _status_bytes("VmPeak") > self._most


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0
