"""Why a call takes as long as it does: its largest kernels, and the time below which this device cannot do the work.

In: a call, its floating-point operations and the bytes it has to move. Out: a row for `Bench.goal(..., explain=...)`.
The floor is by speeds that this device reached here, each measured once in a process: of one large matrix product, and
of one large copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.part import Bench, Row
from benchmarks.gpu.timing import seconds_of

TOP = 10
NAME = 120
"""Characters of a kernel's name: its templates may run to thousands."""


def explained(call: Callable[[], object], device: torch.device, flops: float, bytes: float) -> Row:
    """{"profile": the largest kernels, "busy_seconds": of all of them, "floor_seconds", "floor_by"} of a call.

    flops: operations it cannot do without, a multiply and an add being two. bytes: those that it has to read and write
    on the device at least. busy_seconds far below the call's own time says that the device waits for the host.
    """
    kernels = _kernels(call, device)
    busy = sum(seconds for _, seconds, _ in kernels)
    return {"profile": _rows(kernels, TOP), "busy_seconds": busy, **floor(device, flops, bytes)}


def profile_top(call: Callable[[], object], device: torch.device, n: int = TOP) -> list[Row]:
    """The n largest kernels of a call by the device's time; on a CPU, operators by their own.

    Each is {"kernel", "seconds", "calls", "share" of the whole call's device time}.
    """
    return _rows(_kernels(call, device), n)


def floor(device: torch.device, flops: float = 0.0, bytes: float = 0.0) -> Row:
    """{"floor_seconds", "floor_by": "flops" or "bytes"}: the longer of computing and moving, which may overlap."""
    computing, moving = flops / matrix_peak(device), bytes / copy_bandwidth(device)
    return {"floor_seconds": max(computing, moving), "floor_by": "flops" if computing >= moving else "bytes"}


@functools.cache
def matrix_peak(device: torch.device) -> float:
    """Operations a second of one large matrix product: bf16 on a card, fp32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: a @ b, device)


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy within the device's memory."""
    size = 2**30 if device.type == "cuda" else 2**25
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device)


def check_share(bench: Bench, what: str, share: float) -> None:
    """Nothing is faster than the device: a share of its matrix peak that is over 1 by more than timing errs is wrong.

    In a rehearsal other processes may have slowed the measured peak, so that only far more is.
    """
    bench.check(f"{what}: share of the matrix peak", share, at_most=1.05 if bench.on_cuda else 20)


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    rounds = 40 if device.type == "cuda" else 7  # a card's clock rises with its work
    return min(seconds_of(call, device, rounds=1, warm_up=1) for _ in range(rounds))


def _kernels(call: Callable[[], object], device: torch.device) -> list[tuple[str, float, int]]:
    """(name, seconds, calls) of each kernel, the largest first."""
    on_card = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as profiler:
        call()
        if on_card:
            torch.cuda.synchronize(device)
    wanted = DeviceType.CUDA if on_card else DeviceType.CPU
    kernels = [
        (event.key[:NAME], (event.self_device_time_total if on_card else event.self_cpu_time_total) / 1e6, event.count)
        for event in profiler.key_averages()
        if event.device_type == wanted and not event.is_user_annotation
    ]
    return sorted(kernels, key=lambda kernel: -kernel[1])


def _rows(kernels: list[tuple[str, float, int]], n: int) -> list[Row]:
    whole = sum(seconds for _, seconds, _ in kernels)
    return [
        {"kernel": name, "seconds": seconds, "calls": calls, "share": round(seconds / whole, 4) if whole else 0.0}
        for name, seconds, calls in kernels[:n]
    ]
