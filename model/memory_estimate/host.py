"""What a rank holds in host memory while it starts, trains and exports, in bytes, by part.

In: how many parameters there are, the engine's settings, what DeepSpeed and the activations take. Out: the parts of
each moment. What the process itself takes (Python, torch, the CUDA runtime), its loader's batches and, on a store, the
32 MiB of an upload's parts are not in them; nor is what counts as the device where there is no GPU. Of pinned memory,
which torch gives in powers of two, activations are counted so; what DeepSpeed offloads is counted by the byte.
"""

from __future__ import annotations

from model.convert.export_hf import FILE_BYTES
from model.memory_estimate.zero import FP32, ZeroBytes
from model.training.settings import EngineSettings


def host_moments(
    n_parameters: int, largest: int, settings: EngineSettings, zero: ZeroBytes, activations: int, world: int
) -> dict[str, dict[str, int]]:
    """Bytes by part while the first weights are read, while training, and while the model is exported.

    largest: elements of the largest parameter. activations: bytes of those kept on the host.
    """
    itemsize = FP32 if settings.precision == "fp32" else 2
    own = -(-n_parameters // world)
    weights = {"weights": zero.weights} if settings.memory.offload_parameters else {}
    optimizer = {}
    if settings.memory.offload_optimizer:
        optimizer = {"masters and moments": zero.masters, "gradients": FP32 * own}
    return {
        # A text table in fp32 beside the joint one, or a weight in fp32 beside itself in bf16.
        "start": {**weights, "a weight that rank 0 reads": 2 * FP32 * largest},
        "training": {
            **weights,
            **optimizer,
            **({"activations": activations} if activations else {}),
            "a checkpoint being written": 3 * FP32 * own,  # of the masters and both moments
        },
        "export": {
            **weights,
            **optimizer,
            "a file that rank 0 exports": max(min(FILE_BYTES, itemsize * n_parameters), itemsize * largest),
        },
    }
