"""What a plan's cost is computed from: the machine's speeds and the shape of one attention layer."""

from __future__ import annotations

from dataclasses import dataclass

from storage.setting_types import Above0, AtLeast0, Positive


@dataclass(frozen=True)
class Hardware:
    """The machine as the planner models it, one rank a GPU or CPU core.

    It decides which plan is chosen, hence in which order sums are rounded, and nothing else. The defaults are near an
    H100 node: NVLink inside, one 400 Gb/s port a rank across.
    """

    flops: Above0 = 400e12
    """Floating-point operations a second that the attention kernel of one rank reaches on large blocks."""
    inside: Above0 = 400e9
    """Bytes a second between two ranks of a node, each way."""
    across: Above0 = 50e9
    """Bytes a second between two ranks of different nodes, each way."""
    uplink: Above0 | None = None
    """Bytes a second of a whole node to all others, each way; None where every rank has `across` to itself."""
    latency: AtLeast0 = 2e-6
    """Seconds that a message costs the rank that sends or receives it, however short."""
    ranks_per_node: Positive = 8
    """Neighbouring ranks that share a node; a Ulysses degree never exceeds them."""
    peak_flops: Above0 | None = None
    """Peak floating-point operations a second of one rank's device, for MFU alone; None: by the name of its GPU."""

    @property
    def node_uplink(self) -> float:
        """`uplink`, or its default."""
        return self.across * self.ranks_per_node if self.uplink is None else self.uplink


CPU_CORES = Hardware(flops=80e9, inside=2e9, across=1.25e9, latency=1e-4)
"""One rank a core of an x86 server with AVX-512, in fp32; messages by gloo, across nodes by 10 Gb/s Ethernet."""


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer. The defaults are those of LWM and LLaMA-2 7B in bf16."""

    heads: int = 32
    kv_heads: int = 32
    head_size: int = 128
    itemsize: int = 2
    """Bytes of one number of q, k or v; gradients of keys travel in the accumulators' 4 (8 where this is 8)."""

    @property
    def flops_per_pair(self) -> int:
        """Forward operations for one query and one key, over all heads: q.k and p.v, a multiply and an add each."""
        return 4 * self.heads * self.head_size

    @property
    def key_bytes(self) -> int:
        """Bytes of one token's key and value, over all heads."""
        return 2 * self.kv_heads * self.head_size * self.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of one token's key and value, over all heads."""
        return 2 * self.kv_heads * self.head_size * max(4, self.itemsize)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's query, key, value and output, over all heads."""
        return 2 * (self.heads + self.kv_heads) * self.head_size * self.itemsize
