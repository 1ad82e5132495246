"""What a decoder may use of the machine: limits that a recipe sets and the kernel enforces.

The process sets them on itself before it sees any data. They count memory and processor time, never wall time: a slow
object store or a busy machine does not change which data is bad.

**Processor time.** An answer may take `Limits.cpu_seconds`, and more by what it has achieved: SECONDS_A_MIB for each
MiB of the file that it has read, once, and SECONDS_A_FRAME for each frame that it has delivered. That it reads on is
not enough: a GIF of 60 KB can have thousands of frames of 60 million pixels, each a few bytes. An hour of 4K H.265
takes three hours on a slow core (24 frames a second, 0.13 s each) and has 800 MiB at 2 Mbit/s, hence thirteen hours; a
recording of a 4K screen where little moves (60 frames a second, 20 ms each, 100 kbit/s) takes 6 minutes for a piece of
5 minutes, and has 7.
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

SECONDS_A_MIB = 60.0
SECONDS_A_FRAME = 0.1
_OPEN_FILES = 256
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Limits:
    """memory: bytes that decoding may allocate, beyond what libraries take as they are imported. cpu_seconds: processor
    time that it may take beyond what it is allowed for the file that it reads and the frames that it delivers. Recipes
    set both.
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
    """The processor time of one answer after another. Past the limit the kernel ends the process with SIGXCPU."""

    def __init__(self, cpu_seconds: int) -> None:
        self._most = cpu_seconds
        self._end = self._set = -math.inf  # in seconds of this process

    def begin(self) -> None:
        """An answer begins, with nothing achieved."""
        self._end = time.process_time() + self._most
        self._limit()

    def has_read(self, count: int) -> None:
        """So many bytes of the file have been read that had not been before. Cheap enough for every read."""
        self._extend(SECONDS_A_MIB * count / 2**20)

    def has_delivered(self, frames: int) -> None:
        """So many frames have been taken."""
        self._extend(SECONDS_A_FRAME * frames)

    def _extend(self, seconds: float) -> None:
        self._end += seconds
        if self._end - self._set >= 1:  # the kernel counts whole seconds
            self._limit()

    def _limit(self) -> None:
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        soft = math.ceil(self._end) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (soft if hard < 0 else min(soft, hard), hard))
        self._set = self._end


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
