"""Modelled seconds of a plan: forward and backward of one attention layer, on its slowest rank.

In: the traffic of a layout, how keys travel, the shape of the layer and the hardware. Out: seconds. The model: messages
within a node and across nodes travel at the same time, both ways at once, during the compute. Exposed are the compute
on the last stage of keys, and the last gradients' way to their owners beyond the pairs that a backward keeps for its
end. A backward computes 2.5 times a forward (five products instead of two, FlashAttention-2, arXiv 2307.08691), fetches
the keys again, and sends their gradients in accumulator precision. Ulysses' exchanges overlap with nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.attention.plan.hardware import AttentionShape, Hardware
from model.attention.plan.runs import KEPT_BACK
from model.attention.plan.segments import Traffic, stage_of_distance
from tokenization.compiled import compiled

BACKWARD_OVER_FORWARD = 2.5
Part = tuple[float, float, float]
"""Operations of a pair, bytes of a key and of its gradient, over the heads that one rank computes."""


@dataclass(frozen=True)
class Cost:
    """Seconds of one layer. ideal: the useful work spread evenly, with no exchange at all."""

    forward: float
    backward: float
    ulysses: float
    ideal: float

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward + self.ulysses

    @property
    def efficiency(self) -> float:
        """The share of the time in which the hardware does useful work."""
        return self.ideal / self.seconds


def direct_cost(traffic: Traffic, tokens: int, ulysses: int, shape: AttentionShape, hardware: Hardware) -> Cost:
    """Each rank receives exactly the keys it needs. tokens: those that one rank of the ring stores."""
    _, n_stages = stage_of_distance(traffic.keys, tokens)
    speeds = np.array([hardware.flops, hardware.inside, hardware.across, hardware.node_uplink, hardware.latency])
    part = _per_part(shape, ulysses)
    forward, backward = _slowest(traffic, ulysses, hardware.ranks_per_node, n_stages, part, speeds, KEPT_BACK)
    return Cost(forward, backward, *_ends(traffic, tokens, ulysses, shape, hardware))


def relay_cost(traffic: Traffic, tokens: int, ulysses: int, shape: AttentionShape, hardware: Hardware) -> Cost:
    """Every rank's keys go once around the ring, from neighbour to neighbour."""
    ring = len(traffic.work)
    per_pair, key, gradient = _per_part(shape, ulysses)
    if ring * ulysses > hardware.ranks_per_node:  # the hop that leaves a node sets the pace of all
        speed = min(hardware.across, hardware.node_uplink / ulysses)
    else:
        speed = hardware.inside
    hops = ring - 1
    compute = traffic.work.max() * per_pair / hardware.flops
    last = (traffic.work - traffic.local).max() * per_pair / hardware.flops / max(1, hops)
    arrive = hops * (tokens * key / speed + hardware.latency)
    arrive_back = hops * (tokens * (key + gradient) / speed + 2 * hardware.latency)
    home = tokens * gradient / speed if hops else 0.0
    kept = traffic.local.min() * per_pair / hardware.flops / (KEPT_BACK * max(1, hops)) * BACKWARD_OVER_FORWARD
    forward = max(compute, arrive + last)
    backward = max(
        BACKWARD_OVER_FORWARD * compute + max(0.0, home - kept), arrive_back + BACKWARD_OVER_FORWARD * last + kept
    )
    return Cost(float(forward), float(backward), *_ends(traffic, tokens, ulysses, shape, hardware))


def _per_part(shape: AttentionShape, ulysses: int) -> Part:
    return shape.flops_per_pair / ulysses, shape.key_bytes / ulysses, shape.gradient_bytes / ulysses


def _ends(
    traffic: Traffic, tokens: int, ulysses: int, shape: AttentionShape, hardware: Hardware
) -> tuple[float, float]:
    """Seconds of the exchanges of heads for tokens, forward and backward, and of the ideal."""
    own_bytes = tokens / ulysses * shape.row_bytes
    there_and_back = (ulysses - 1) * (own_bytes / ulysses / hardware.inside + 2 * hardware.latency)
    work = int(traffic.work.sum()) * shape.flops_per_pair * (1 + BACKWARD_OVER_FORWARD)
    return 2 * there_and_back, work / (len(traffic.work) * ulysses) / hardware.flops


@compiled
def _slowest(
    traffic: Traffic, ulysses: int, ranks_per_node: int, n_stages: int, part: Part, speeds: np.ndarray, kept_back: int
) -> tuple[float, float]:
    """Seconds of the slowest rank, forward and backward. Sums are of integers, so every machine gets the same."""
    work, local, keys = traffic
    per_pair, key, gradient = part
    flops, inside, across, uplink, latency = speeds
    ring = len(work)
    n_nodes = (ring * ulysses - 1) // ranks_per_node + 1
    near_in, near_out = np.zeros(ring, np.int64), np.zeros(ring, np.int64)
    far_in, far_out, peers = np.zeros(ring, np.int64), np.zeros(ring, np.int64), np.zeros(ring, np.int64)
    node_in, node_out = np.zeros(n_nodes, np.int64), np.zeros(n_nodes, np.int64)
    for r in range(ring):
        here = r * ulysses // ranks_per_node
        for p in range(ring):
            n = keys[r, p]
            if n == 0:
                continue
            peers[r] += 1
            there = p * ulysses // ranks_per_node
            if here == there:
                near_in[r] += n
                near_out[p] += n
            else:
                far_in[r] += n
                far_out[p] += n
                node_in[here] += ulysses * n
                node_out[there] += ulysses * n
    slowest_forward, slowest_backward = 0.0, 0.0
    for r in range(ring):
        node = r * ulysses // ranks_per_node
        compute = work[r] * per_pair / flops
        stages = max(1, min(n_stages, peers[r]))
        last = (work[r] - local[r]) * per_pair / flops / stages
        arrive = max(
            max(near_in[r], near_out[r]) * key / inside,
            max(far_in[r], far_out[r]) * key / across,
            max(node_in[node], node_out[node]) * key / uplink,
        )
        arrive_back = max(
            max(near_in[r] * key + near_out[r] * gradient, near_out[r] * key + near_in[r] * gradient) / inside,
            max(far_in[r] * key + far_out[r] * gradient, far_out[r] * key + far_in[r] * gradient) / across,
            max(node_in[node] * key + node_out[node] * gradient, node_out[node] * key + node_in[node] * gradient)
            / uplink,
        )
        home = max(near_in[r] / inside, far_in[r] / across) * gradient / stages
        kept = BACKWARD_OVER_FORWARD * local[r] * per_pair / flops / (kept_back * stages) if peers[r] > 0 else 0.0
        slowest_forward = max(slowest_forward, compute, arrive + peers[r] * latency + last)
        slowest_backward = max(
            slowest_backward,
            BACKWARD_OVER_FORWARD * compute + max(0.0, home - kept),
            arrive_back + 2 * peers[r] * latency + BACKWARD_OVER_FORWARD * last + kept,
        )
    return slowest_forward, slowest_backward
