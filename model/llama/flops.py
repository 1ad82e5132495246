"""Floating-point operations of a training step, and how many a GPU could do: model FLOPs utilisation (MFU).

In: a Llama's sizes and a step's tokens, pairs and targets. Out: its operations. MFU is as PaLM defines it
(arXiv 2204.02311, appendix B): operations of the model itself over what the device could do in the time, so what is
computed twice to save memory, spent on padding, or hidden by a mask counts for nothing. Attention is counted by the
documents: one of L tokens has L(L+1)/2 pairs of a query and a key, and not the square of the context.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import LlamaConfig

from model.llama.config import attention_sizes, modality_ranges

# Dense bf16 operations a second, from NVIDIA's data sheets, which also give twice as many, "with sparsity". By parts of
# the name that torch.cuda.get_device_name gives; the first part that matches counts.
_PEAK_FLOPS = (
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("L40S", 362e12),
)


def step_flops(
    config: LlamaConfig, tokens: int, pairs: int, targets: Mapping[str, int], backward: bool = True
) -> float:
    """Operations of a step of training, or of the forward alone; a multiply and an add are two.

    tokens: of documents. pairs: of a query and a key of one document, per head. targets: tokens with loss by modality;
    the head meets these alone, each with the ids of its own modality. Each weight of a matrix costs a token 2
    operations, each pair 4 a dimension of each head (q.k and p.v); the backward costs twice the forward (arXiv
    2001.08361, 2.1, and 2205.14135, appendix: what a kernel computes again is not counted).
    """
    layers = config.num_hidden_layers
    heads, kv_heads, head_size = attention_sizes(config)
    projections = config.hidden_size * head_size * 2 * (heads + kv_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    logits = sum(targets.get(name, 0) * len(ids) for name, ids in modality_ranges(config).items())
    forward = 2 * layers * (projections + mlp) * tokens
    forward += 4 * layers * heads * head_size * pairs
    forward += 2 * config.hidden_size * logits
    return float(forward * (3 if backward else 1))


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations a second of a GPU by its name, None where it is not known."""
    return next((flops for name, flops in _PEAK_FLOPS if name in device_name), None)
