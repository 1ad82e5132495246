"""Calls of Liger's functions fit what each version that pyproject.toml allows declares, where there is no card.

`testing/operator_schemas.json` has their parameters and results, read in Liger's wheels. In their place stand torch's
own operations, called by those names and answering in that order.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from model.layers.kernels.interface import LayerKernels
from model.llama.rope import rope_tables, rotate_by_torch
from testing.operator_schemas import LIGER, bound_to_function, recorded

VERSIONS = recorded("liger-kernel")


def norm(given: dict[str, Any]) -> dict[str, Any]:
    assert (given["offset"], given["casting_mode"], given["in_place"]) == (0.0, "llama", False)
    own = LlamaRMSNorm(given["X"].shape[-1], given["eps"])
    own.weight.data = given["W"]
    return {"Y": own(given["X"])}


def rope(given: dict[str, Any]) -> dict[str, Any]:
    assert set(given) == {"q", "k", "cos", "sin"}
    q, k = apply_rotary_pos_emb(given["q"], given["k"], given["cos"], given["sin"])
    return {**given, "q": q, "k": k}


def product(given: dict[str, Any]) -> dict[str, Any]:
    assert set(given) == {"a", "b"}
    return {**given, "c": F.silu(given["a"]) * given["b"]}


def gradients(given: dict[str, Any]) -> dict[str, Any]:
    a, b = (given[name].detach().requires_grad_() for name in ("a", "b"))
    return dict(zip(("a", "b"), torch.autograd.grad(F.silu(a) * b, (a, b), given["dc"])))


BY_TORCH: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "LigerRMSNormFunction.forward": norm,
    "LigerRopeFunction.forward": rope,
    "LigerSiLUMulFunction.forward": product,
    "swiglu_forward": product,
    "swiglu_backward": gradients,
}


def stand_in(name: str, declared: dict[str, list[str]]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        results = BY_TORCH[name](bound_to_function(declared["parameters"], args))
        values = [results[re.match(r"\w+", expression)[0]] for expression in declared["returns"]]
        return values[0] if len(values) == 1 else tuple(values)

    return call


@pytest.fixture(params=VERSIONS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LayerKernels]:
    """`model.layers.kernels.liger` over such a version."""
    for path, names in LIGER.items():
        module = ModuleType(path.removesuffix(".py").replace("/", "."))
        for name in names:
            call = stand_in(name, VERSIONS[request.param][name])
            holder, _, method = name.partition(".")
            setattr(module, holder, type(holder, (), {"apply": staticmethod(call)}) if method else call)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "model.layers.kernels.liger", raising=False)
    yield importlib.import_module("model.layers.kernels.liger").KERNELS
    sys.modules.pop("model.layers.kernels.liger")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_a_norm_is_called_as_it_is_declared(kernels: LayerKernels) -> None:
    x, weight = random(5, 8), random(8)
    own = LlamaRMSNorm(8, 1e-5)
    own.weight.data = weight
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), own(x))


def test_a_rotation_is_called_as_it_is_declared(kernels: LayerKernels) -> None:
    q, k, tables = random(1, 5, 4, 8), random(1, 5, 2, 8), rope_tables(torch.arange(5)[None], 1e4, 8)
    for ours, exact in zip(kernels.rotate(q, k, *tables), rotate_by_torch(q, k, *tables), strict=True):
        torch.testing.assert_close(ours, exact)


def test_swiglu_is_called_as_it_is_declared(kernels: LayerKernels) -> None:
    grad, gate, up = random(5, 8), random(6, 8)[:5], random(7, 8)[:5]
    torch.testing.assert_close(kernels.swiglu.forward(gate, up), F.silu(gate) * up)
    inner, *ours = kernels.swiglu.backward(grad, gate, up)
    torch.testing.assert_close(inner, F.silu(gate) * up)
    leaves = [x.clone().requires_grad_() for x in (gate, up)]
    exact = torch.autograd.grad(F.silu(leaves[0]) * leaves[1], leaves, grad)
    torch.testing.assert_close(tuple(ours), exact)


def test_what_is_recorded_begins_at_the_oldest_liger_that_may_be_installed() -> None:
    pyproject = Path(__file__).parents[3].joinpath("pyproject.toml").read_text(encoding="utf-8")
    (oldest,) = re.findall(r'"liger-kernel>=([\d.]+)"', pyproject)
    assert min(VERSIONS).startswith(f"{oldest}.")
