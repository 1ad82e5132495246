"""Which process it is, in which pid namespace, on which boot of which machine: whether it still runs is told by these.

In: what `ProcessIdentity.current` says, kept as JSON by whoever is to be recognised. Out: whether that process is
certainly gone, as far as it can be seen from here. Reads Linux's `/proc`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """boot: the kernel's id of this boot. pid_namespace: its inode, within which alone `pid` means something.

    start_ticks: when the process was started, in clock ticks since the boot, so that setting the clock changes nothing.
    What cannot be read is "" or 0.
    """

    host: str
    pid: int
    boot: str = ""
    pid_namespace: int = 0
    start_ticks: int = 0

    @classmethod
    def current(cls) -> ProcessIdentity:
        """Of this process."""
        boot, namespace = "", 0
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = os.stat("/proc/self/ns/pid").st_ino
        return cls(socket.gethostname(), os.getpid(), boot, namespace, _start_ticks("self") or 0)

    def shares_clock(self, other: ProcessIdentity) -> bool:
        """Whether both are on the same boot of the same machine, in containers or not."""
        return bool(self.boot) and (self.host, self.boot) == (other.host, other.boot)

    def is_gone(self) -> bool:
        """Whether this process certainly runs no more. False where it cannot be seen from here.

        Containers share their host's name and boot id, and have pids of their own; another boot of a machine of this
        name may be another machine.
        """
        here = ProcessIdentity.current()
        is_visible = self.shares_clock(here) and bool(self.pid_namespace) and self.pid_namespace == here.pid_namespace
        if not is_visible:
            return False
        try:
            os.kill(self.pid, 0)  # succeeds or is denied for a process that is there, though /proc may hide it
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        ticks = _start_ticks(self.pid)
        return ticks is not None and ticks != self.start_ticks


def seconds_since_boot() -> float:
    """A clock that nobody sets, and that goes on while the machine is suspended, unlike `time.monotonic`."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _start_ticks(pid: int | str) -> int | None:
    """When a process was started; -1 where it has ended and only waits for its parent; None where it cannot be seen."""
    try:
        # The name, in parentheses, may hold anything.
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return -1 if state in "ZX" else int(fields[18])
    except (OSError, ValueError, IndexError):
        return None
