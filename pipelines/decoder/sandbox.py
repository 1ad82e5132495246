"""What a decoder process may do besides computing: read files. No network, no other program or process, no change.

A filter of system calls (seccomp, https://docs.kernel.org/userspace-api/seccomp_filter.html) needs no privilege, and
containers allow it where they forbid namespaces. It is set when the libraries are imported, before any data is seen.
Where the kernel has Landlock (https://docs.kernel.org/userspace-api/landlock.html), the process cannot look into the
memory or the environment of others by their files in /proc either.
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
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446  # on every machine
_MAKE_DEVICE = 1 << 6
# Instructions of the kernel's filter machine: load a word, and, jump, jump if equal or at least, return.
_LOAD, _AND, _JUMP, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x05, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _SECOND_ARGUMENT, _THIRD_ARGUMENT = 0, 4, 24, 32  # offsets in what it loads from
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
_OTHER_ABI = 0x40000000  # numbers from here on are the same calls of x86-64 once more
# Of glibc: buffers of some MiB are used again, where each new one would cost a page fault for every 4 KiB.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}


class _Machine(NamedTuple):
    """architecture: by the kernel's audit header. opens: open and openat, -1 where there is none. calls: the numbers of
    those that are refused."""

    architecture: int
    capset: int
    opens: tuple[int, int]
    calls: tuple[int, ...]


# socket, connect; execve, execveat; ptrace, process_vm_readv, process_vm_writev; io_uring_setup, which makes sockets
# too; pidfd_open, pidfd_getfd; bpf, userfaultfd, keyctl; kill, tkill; mount, umount2, chroot, pivot_root, unshare,
# setns; openat2, whose flags a filter cannot see; and what changes files: truncate, rename, link, unlink, mkdir, mknod,
# chmod, chown and their like.
_EVERYWHERE = (425, 434, 438, 437, 452)
_OF_X86_64 = (41, 42, 59, 322, 101, 310, 311, 321, 323, 250, 62, 200, 165, 166, 161, 155, 272, 308, 133, 268, 316)
_OF_AARCH64 = (198, 203, 221, 281, 117, 270, 271, 280, 282, 219, 129, 130, 97, 268, 276)
_CHANGES_X86_64 = (76, 77, *range(82, 89), *range(90, 95), *range(258, 262), *range(263, 267))
_CHANGES_AARCH64 = (*range(33, 43), 45, 46, *range(51, 56))
_MACHINES = {
    "x86_64": _Machine(0xC000003E, 126, (2, 257), (*_EVERYWHERE, *_OF_X86_64, *_CHANGES_X86_64)),
    "aarch64": _Machine(0xC00000B7, 91, (-1, 56), (*_EVERYWHERE, *_OF_AARCH64, *_CHANGES_AARCH64)),
}


def confine_calls() -> bool:
    """Give up all privileges of this process, for good, and the said calls. False where the kernel does not do it."""
    machine = _MACHINES.get(platform.machine())
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or machine is None:
        return False
    header, none = struct.pack("Ii", _CAPABILITIES_VERSION, 0), bytes(24)
    libc.syscall(machine.capset, header, none)
    _leave_other_processes(libc)
    program = b"".join(_program(machine))
    array = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    filled = Program(len(program) // 8, ctypes.addressof(array))
    return libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(filled), 0, 0) == 0


def _leave_other_processes(libc: ctypes.CDLL) -> None:
    """Enter a domain of Landlock, from which no process outside can be traced; nothing where the kernel has none."""
    handled = struct.pack("Q", _MAKE_DEVICE)  # a domain has to forbid something
    ruleset = libc.syscall(_LANDLOCK_CREATE, handled, len(handled), 0)
    if ruleset >= 0:
        libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0)
        os.close(ruleset)


def clean_environment(paths: list[str]) -> dict[str, str]:
    """The environment of such a process: where its libraries are, and nothing that may be a secret."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "LANG") if name in os.environ}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**kept, **threads, **_MALLOC, "PYTHONPATH": os.pathsep.join(paths)}


def _program(machine: _Machine) -> list[bytes]:
    by_path, by_folder = machine.opens
    allow = 5 + len(machine.calls) + (by_path >= 0) + 1  # the place of the instruction that allows the call
    refuse = allow + 6
    targets = [(call, refuse) for call in machine.calls] + [(by_folder, allow + 3)]
    targets += [(by_path, allow + 1)] if by_path >= 0 else []
    return [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_EQUAL, machine.architecture, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
        _instruction(_AT_LEAST, _OTHER_ABI, refuse - 5, 0),
        *(_instruction(_EQUAL, call, target - place, 0) for place, (call, target) in enumerate(targets, 6)),
        _instruction(_RETURN, _ALLOW),
        _instruction(_LOAD, _SECOND_ARGUMENT),  # open's flags
        _instruction(_JUMP, 1),
        _instruction(_LOAD, _THIRD_ARGUMENT),  # openat's
        _instruction(_AND, _WRITING),
        _instruction(_EQUAL, 0, 1, 0),
        _instruction(_RETURN, _REFUSE),
        _instruction(_RETURN, _ALLOW),
    ]


def _instruction(code: int, value: int, if_so: int = 0, if_not: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_so, if_not, value)
