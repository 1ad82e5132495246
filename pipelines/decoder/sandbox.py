"""What a decoder process may do besides computing: nothing new, no network, no other program, no other process.

A filter of system calls (seccomp, https://docs.kernel.org/userspace-api/seccomp_filter.html) needs no privilege, and
containers allow it where they forbid namespaces. It is set when the libraries are imported, before any data is seen.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from typing import NamedTuple

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_MODE_FILTER = 2
_CAPABILITIES_VERSION = 0x20080522
# Instructions of the kernel's filter machine: load a word, jump if equal or at least, return.
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in what it loads from
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
_OTHER_ABI = 0x40000000  # numbers from here on are the same calls of x86-64 once more


class _Machine(NamedTuple):
    """architecture: by the kernel's audit header. calls: the numbers of those that are refused."""

    architecture: int
    capset: int
    calls: tuple[int, ...]


# socket, connect; execve, execveat; ptrace, process_vm_readv, process_vm_writev; io_uring_setup, which makes sockets
# too; pidfd_open, pidfd_getfd; bpf, userfaultfd, keyctl.
_MACHINES = {
    "x86_64": _Machine(0xC000003E, 126, (41, 42, 59, 322, 101, 310, 311, 425, 434, 438, 321, 323, 250)),
    "aarch64": _Machine(0xC00000B7, 91, (198, 203, 221, 281, 117, 270, 271, 425, 434, 438, 280, 282, 219)),
}


def confine_calls() -> bool:
    """Give up all privileges of this process, for good, and the said calls. False where the kernel does not do it."""
    machine = _MACHINES.get(platform.machine())
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or machine is None:
        return False
    header, none = struct.pack("Ii", _CAPABILITIES_VERSION, 0), bytes(24)
    libc.syscall(machine.capset, header, none)
    program = b"".join(_program(machine))
    array = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    filled = Program(len(program) // 8, ctypes.addressof(array))
    return libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(filled), 0, 0) == 0


def clean_environment(paths: list[str]) -> dict[str, str]:
    """The environment of such a process: where its libraries are, and nothing that may be a secret."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "LANG") if name in os.environ}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**kept, **threads, "PYTHONPATH": os.pathsep.join(paths)}


def _program(machine: _Machine) -> list[bytes]:
    refused = len(machine.calls)
    return [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_EQUAL, machine.architecture, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
        _instruction(_AT_LEAST, _OTHER_ABI, refused + 1, 0),
        *(_instruction(_EQUAL, call, refused - place, 0) for place, call in enumerate(machine.calls)),
        _instruction(_RETURN, _ALLOW),
        _instruction(_RETURN, _REFUSE),
    ]


def _instruction(code: int, value: int, if_so: int = 0, if_not: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_so, if_not, value)
