"""How training saves memory: activations kept or computed again, offloading to the host, tiles.

In: a recipe's or a caller's choice. Out: one `MemorySettings`, which the engine applies
(`model.layers.activation_checkpointing`, DeepSpeed's offloading) and from which `model.memory_estimate.plan` predicts
the peak. No choice changes a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from storage.setting_types import Positive

Activations = Literal["keep", "mlp", "all-but-attention", "full"]
"""What is kept of a decoder layer for its backward, from the fastest to the leanest; see `MemorySettings`.

The attention, which all-but-attention never runs twice, is nearly all the work at a million tokens (as in
DistFlashAttn, arXiv 2310.03294).
"""


@dataclass(frozen=True)
class MemorySettings:
    """The defaults save no memory, and cost no time. `ringworld plan --memory` prints what each choice takes and which
    fit. Raises ValueError on choices that contradict each other.
    """

    activations: Activations = "keep"
    """What is kept of a layer for its backward. keep: everything. mlp: norms and MLP are run again. all-but-attention:
    the layer's input and the attention's result, which is never run twice. full: the layer's input alone."""
    offload_activations: bool = False
    """What is kept of each layer waits in host memory, pinned for a GPU. For all-but-attention and full."""
    mlp_tile: Positive | None = None
    """Tokens that the MLP takes at once, so that its wide rows exist for so many only; None: all of the rank's."""
    offload_optimizer: bool = False
    """fp32 weights, moments and the optimizer's step live on the host. ZeRO 1 to 3."""
    offload_parameters: bool = False
    """The weights live on the host too and come layer by layer. ZeRO 3."""

    def __post_init__(self) -> None:
        if self.activations not in get_args(Activations):
            raise ValueError(f"activations must be one of {', '.join(get_args(Activations))}, not {self.activations!r}")
        if self.offload_activations and self.activations in ("keep", "mlp"):
            raise ValueError(
                f"offload_activations with activations {self.activations!r} would move what is kept once for each of "
                f"its uses; choose all-but-attention or full"
            )
        if self.mlp_tile is not None and self.mlp_tile < 1:
            raise ValueError(f"mlp_tile must be 1 or more tokens, not {self.mlp_tile}")

    def unfit_for(self, zero_stage: int) -> str | None:
        """What is wrong with these choices at a ZeRO stage, or None."""
        if self.offload_parameters and zero_stage != 3:
            return f"offload_parameters needs ZeRO stage 3, not {zero_stage}; set zero: 3 or drop it"
        if self.offload_optimizer and zero_stage == 0:
            return "offload_optimizer needs ZeRO stage 1, 2 or 3, not 0; set zero: 1 or drop it"
        return None

    def zero_options(self, on_cuda: bool) -> dict[str, Any]:
        """The keys of DeepSpeed's `zero_optimization` section that offload."""
        host = {"device": "cpu", "pin_memory": on_cuda}
        chosen = {"offload_optimizer": self.offload_optimizer, "offload_param": self.offload_parameters}
        return {key: dict(host) for key, wanted in chosen.items() if wanted}
