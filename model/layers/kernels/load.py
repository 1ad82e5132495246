"""From a name to its `LayerKernels`, or to what this machine lacks to run them."""

from __future__ import annotations

import importlib.util

from model.layers.kernels.interface import Kernels, LayerKernels


def load_kernels(name: Kernels) -> LayerKernels:
    """The kernels of "compile" or "liger"; imports what they need, which takes seconds."""
    if name == "liger":
        from model.layers.kernels.liger import KERNELS
    else:
        from model.layers.kernels.torch_compile import KERNELS
    return KERNELS


def missing_for(name: Kernels) -> str | None:
    """What this machine lacks to run them, and the remedy, if anything; a GPU is not looked for."""
    if name == "liger" and not _is_installed("liger_kernel"):
        return "the package liger-kernel is not installed; pip install 'ringworld[liger]' here and on the workers"
    if name == "compile" and not _has_compiler():
        return "torch.compile finds no C++ compiler; install g++ here and on the workers"
    return None


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler  # seconds to import: only those who compile pay
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
