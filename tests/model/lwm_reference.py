"""LWM's own numbers in tests/data/lwm, and the models they were made with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import msgpack
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from model.attention.plan.planner import plan_sequence
from model.attention.plan.sequence_plan import SequencePlan
from model.convert.flax_msgpack import DTYPES, Leaf
from model.convert.import_lwm import LAYER_NAMES, ROTATED, STACKED, LWMWeights, lwm_config, open_lwm
from model.llama.config import modality_ranges
from model.llama.initial_weights import weight_shapes
from model.llama.llama import build_llama
from model.training.micro_batch_loss import micro_batch_loss
from model.training.rank_batch import rank_batch
from tokenization.loader.batch import MicroBatch

DATA = Path(__file__).parents[1] / "data" / "lwm"
TEXT = 512  # text ids of both models
EVERY = 16  # thinning of stored logits (positions) and gradients (elements)
CHUNKED = "__msgpack_chunked_array__"
THETA = {"text_A": 1e6, "vision_V1": 5e7}


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as stored:
        return dict(stored)


def load(name: str) -> LlamaForCausalLM:
    leaves = open_lwm(DATA / f"{name}_fp32")
    model = build_llama(lwm_config(leaves, heads=4, context=256, rope_theta=THETA[name]), seed=0)
    model.load_state_dict(llama_tensors(leaves, model.config), strict=True)
    return model


def llama_tensors(leaves: Mapping[str, Leaf], config: LlamaConfig) -> dict[str, Tensor]:
    """All weights of a Llama by name, of an LWM checkpoint."""
    weights = LWMWeights(leaves, config)
    return {name: weights.read(name) for name in weight_shapes(config)}


def joint(tokens: np.ndarray, is_vision: np.ndarray) -> np.ndarray:
    """LWM's ids beside their vision mask, as ids of the joint vocabulary."""
    return tokens + TEXT * is_vision.astype(tokens.dtype)


def rows_in_one_sequence(segments: np.ndarray) -> SequencePlan:
    """Rows [B, L] of segment ids laid end to end, as LWM's segments would be packed into one sequence."""
    distinct = (segments + 1000 * np.arange(len(segments))[:, None]).reshape(-1)
    starts = np.flatnonzero(np.diff(distinct)) + 1
    return plan_sequence(np.concatenate(([0], starts, [distinct.size])), sp=1)


def logits(model: LlamaForCausalLM, ids: np.ndarray, plan: SequencePlan) -> np.ndarray:
    """[B, L, V] through the ring attention of the packed rows, at the stored positions."""
    hidden = model.model(
        input_ids=torch.from_numpy(ids).long().reshape(1, -1),
        position_ids=torch.from_numpy(plan.positions)[None],
        plan=plan,
        group=None,
    ).last_hidden_state
    return model.lm_head(hidden).reshape(*ids.shape, -1)[:, EVERY - 1 :: EVERY].detach().numpy()


def padded_weights(is_vision: np.ndarray, mask: np.ndarray, objective: str) -> np.ndarray:
    """Weights [B, L] of LWM's loss: 1 / (B x valid targets of the row and modality), halved for two modalities."""
    weights = np.zeros(mask.shape)
    for modality in (is_vision, ~is_vision):
        valid = mask * modality
        weights += valid / np.maximum(valid.sum(axis=1, keepdims=True), 1e-10)
    return (weights / len(mask) * (0.5 if objective == "vision-text" else 1.0)).astype(np.float32)


def loss(
    model: LlamaForCausalLM, ids: np.ndarray, labels: np.ndarray, weights: np.ndarray, plan: SequencePlan
) -> tuple[Tensor, dict[str, Tensor]]:
    tokens, targets = (values.reshape(-1).astype(np.int32) for values in (ids, labels))
    batch = MicroBatch(tokens, targets, weights.reshape(-1), plan.cu_seqlens.astype(np.int32), keys=())
    return micro_batch_loss(model, rank_batch(batch, plan))


def assert_close_to_thinned(
    ours: dict[str, Tensor], stored: dict[str, np.ndarray], norms: np.ndarray, atol: float
) -> None:
    """Every 16th element of every leaf within atol, and the norm of every whole leaf within 1e-5 of it."""
    assert set(ours) == set(stored)
    for name in stored:
        np.testing.assert_allclose(
            ours[name].numpy().reshape(-1)[::EVERY], stored[name], rtol=0, atol=atol, err_msg=name
        )
    norms_of_ours = [float(ours[name].double().norm()) for name in sorted(ours)]
    np.testing.assert_allclose(norms_of_ours, norms, rtol=1e-5)


def gradients(model: LlamaForCausalLM, stacked: bool) -> dict[str, Tensor]:
    """The model's gradients under LWM's names and in its layout."""
    of_weights = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return lwm_tensors(of_weights, model.config, stacked)


def lwm_tensors(state: Mapping[str, Tensor], config: LlamaConfig, stacked: bool) -> dict[str, Tensor]:
    """The inverse of `llama_tensors`, of weights or of their gradients. stacked: LWM's scan_layers layout."""
    text, head_dim = modality_ranges(config)["text"].stop, config.hidden_size // config.num_attention_heads
    tables, heads = state["model.embed_tokens.weight"], state["lm_head.weight"]
    out = {"transformer/wte/embedding": tables[:text], "lm_head/kernel": heads[:text].t()}
    if text < config.vocab_size:
        out |= {"transformer/vte/embedding": tables[text:], "vision_head/kernel": heads[text:].t()}
    out["transformer/ln_f/kernel"] = state["model.norm.weight"]
    for flax_name, name in LAYER_NAMES.items():
        layers = []
        for layer in range(config.num_hidden_layers):
            weight = state[f"model.layers.{layer}.{name}.weight"]
            weight = _to_pairs(weight, head_dim) if flax_name in ROTATED else weight
            layers.append(weight.t() if weight.dim() == 2 else weight)
        if stacked:
            out[STACKED + flax_name] = torch.stack(layers)
        else:
            out |= {f"transformer/h/{layer}/{flax_name}": weight for layer, weight in enumerate(layers)}
    return {name: tensor.contiguous() for name, tensor in out.items()}


def _to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a q or k projection from halves to LWM's interleaved pairs."""
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_leaves(file: BinaryIO, leaves: dict[str, Tensor], chunk_bytes: int = 1 << 30) -> None:
    """Write arrays by flax path as LWM does, one record at a time; leaves past chunk_bytes are cut in chunks."""
    for path, tensor in leaves.items():
        tensor = tensor.detach().contiguous().cpu()
        if tensor.nbytes > chunk_bytes:
            flat = tensor.reshape(-1).split(max(1, chunk_bytes // tensor.itemsize))
            value: object = {
                CHUNKED: True,
                "shape": {str(i): n for i, n in enumerate(tensor.shape)},
                "chunks": {str(i): _ext(chunk) for i, chunk in enumerate(flat)},
            }
        else:
            value = _ext(tensor)
        file.write(msgpack.packb([path.split("/"), msgpack.packb(value)]))


def _ext(tensor: Tensor) -> msgpack.ExtType:
    names = {dtype: name for name, dtype in DTYPES.items()}
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return msgpack.ExtType(1, msgpack.packb([list(tensor.shape), names[tensor.dtype], data]))
