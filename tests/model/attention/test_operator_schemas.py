"""Calls of operators that need a card fit what each version of torch that pyproject.toml allows declares.

`testing/operator_schemas.json` has the declarations, read in torch's wheels; fake CUDA tensors stand in for a card.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

from model.attention import flash_kernels as kernels
from model.attention.flash_kernels import attend, attend_, attend_backward_
from model.attention.plan.planner import plan_sequence
from model.attention.plan.runs import Run
from testing.dense_attention import dense_results, random_tensors, relative_error
from testing.operator_schemas import MODULES, OPERATORS, bound, recorded
from testing.varlen_attention import varlen_backward, varlen_forward

TORCH = recorded("torch")
VERSIONS = sorted(TORCH, key=lambda version: [int(part) for part in version.split(".")])
INSTALLED = torch.__version__.partition("+")[0]
FORWARD, BACKWARD, CPU_FORWARD, CPU_BACKWARD = OPERATORS
# One document of 40 tokens whose keys come in two blocks, and one of 8: no two of the numbers in a call are the same.
OWN = [Run(0, 24, 0, 24, True), Run(24, 40, 24, 40, True), Run(40, 48, 40, 48, True)]
OLDER = [Run(24, 40, 0, 24, False)]


def results(tensors: list[Tensor], scale: float | None = None) -> list[Tensor]:
    """[out, dq, dk, dv] by a call of each kernel a block."""
    q, k, v, grad = tensors
    out, lse = attend(q, k, v, OWN, scale)
    attend_(out, lse, q, k, v, OLDER, scale)
    dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
    for runs in (OWN, OLDER):
        attend_backward_(dq, dk, dv, grad, q, k, v, out.to(q.dtype), lse, runs, scale)
    return [out, dq, dk, dv]


def by_schema(operator: Callable[..., Any], schema: str) -> Callable[..., Any]:
    """The operator called by the names that a schema gives to what it is called with."""
    return lambda *args, **kwargs: operator(**bound(schema, args, kwargs))


def assert_exact(tensors: list[Tensor], scale: float | None) -> None:
    reference = dense_results(tensors, np.array([0, 40, 48]), scale)
    assert max(relative_error(x, r) for x, r in zip(results(tensors, scale), reference)) <= 1e-12


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("size", "scale"), [(20, None), (24, 0.3)])
def test_what_the_cuda_path_passes_is_right_by_the_names_of_every_version(
    version: str, size: int, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    schemas = TORCH[version]["operators"]
    monkeypatch.setattr(kernels, "_cuda_forward", by_schema(varlen_forward, schemas[FORWARD]))
    monkeypatch.setattr(kernels, "_cuda_backward", by_schema(varlen_backward, schemas[BACKWARD]))
    monkeypatch.setattr(kernels, "_on_cpu", lambda q: False)
    assert_exact(random_tensors(48, 4, 2, size, torch.float64), scale)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_what_the_cpu_path_passes_is_right_by_the_names_of_every_version(
    version: str, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    schemas = TORCH[version]["operators"]
    monkeypatch.setattr(kernels, "_cpu_forward", by_schema(kernels._cpu_forward, schemas[CPU_FORWARD]))
    monkeypatch.setattr(kernels, "_cpu_backward", by_schema(kernels._cpu_backward, schemas[CPU_BACKWARD]))
    assert_exact(random_tensors(48, 4, 2, 20, torch.float64), scale)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_returns_out_and_lse_first_and_the_gradients_in_order(version: str) -> None:
    returns = {name: torch._C.parse_schema(TORCH[version]["operators"][name]).returns for name in OPERATORS}
    for name, lse in ((FORWARD, "softmax_logsumexp"), (CPU_FORWARD, "logsumexp")):
        assert [x.name for x in returns[name][:2]] == ["output", lse]
    assert [str(x.type) for x in returns[BACKWARD]] == ["Tensor"] * 3
    assert [x.name for x in returns[CPU_BACKWARD]] == ["grad_query", "grad_key", "grad_value"]


WRONG = (TypeError, ValueError, IndexError, RuntimeError, AssertionError)
"""How a call ends whose arguments are not what they should be."""


def swapped(operator: Callable[..., Any], i: int, j: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        turned = list(args)
        turned[i], turned[j] = turned[j], turned[i]
        return operator(*turned, **kwargs)

    return call


@pytest.mark.parametrize("i", range(9))
def test_two_arguments_of_the_forward_in_each_others_place_are_found(i: int, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = TORCH[VERSIONS[-1]]["operators"][FORWARD]
    monkeypatch.setattr(kernels, "_cuda_forward", swapped(by_schema(varlen_forward, schema), i, i + 1))
    monkeypatch.setattr(kernels, "_cuda_backward", varlen_backward)
    monkeypatch.setattr(kernels, "_on_cpu", lambda q: False)
    with pytest.raises(WRONG):
        assert_exact(random_tensors(48, 4, 2, 24, torch.float64), None)


@pytest.mark.parametrize("i", range(13))
def test_two_arguments_of_the_backward_in_each_others_place_are_found(i: int, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = TORCH[VERSIONS[-1]]["operators"][BACKWARD]
    monkeypatch.setattr(kernels, "_cuda_forward", varlen_forward)
    monkeypatch.setattr(kernels, "_cuda_backward", swapped(by_schema(varlen_backward, schema), i, i + 1))
    monkeypatch.setattr(kernels, "_on_cpu", lambda q: False)
    with pytest.raises(WRONG):
        assert_exact(random_tensors(48, 4, 2, 24, torch.float64), None)


@pytest.mark.parametrize(
    ("args", "kwargs", "wrong"),
    [
        ((1.0, 2.0), {}, "x is Tensor, not float"),
        ((torch.ones(1), True), {}, "p is float, not bool"),
        ((torch.ones(1), 0.0, True, None), {}, "4 arguments by position, of 3"),
        ((torch.ones(1),), {}, "p is missing"),
        ((torch.ones(1), 0.0), {"p": 0.0}, "p is unknown or given twice"),
        ((torch.ones(1), 0.0), {"q": 0.0}, "q is unknown or given twice"),
        ((torch.ones(1), 0.0), {"n": 1.5}, "n is Optional.*, not float"),
        ((torch.ones(1), 0.0, 1), {}, "causal is bool, not int"),
    ],
)
def test_a_call_that_does_not_fit_a_schema_is_refused(args: tuple, kwargs: dict, wrong: str) -> None:
    schema = "aten::f(Tensor x, float p, bool causal=False, *, SymInt? n=None) -> Tensor"
    assert bound(schema, (torch.ones(1), 0.0), {"n": 3})["n"] == 3
    with pytest.raises(TypeError, match=wrong):
        bound(schema, args, kwargs)


class Recorder:
    """An operator that remembers what it is called with."""

    def __init__(self, operator: Callable[..., Any], schema: str) -> None:
        self.operator, self.schema = operator, schema
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(bound(self.schema, args, kwargs))
        return self.operator(*args, **kwargs)


def cut(x: Tensor, index: Any) -> Tensor:
    """x[index] for slices, and dots before them."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if parts[0] is Ellipsis:
        parts = [slice(None)] * (x.dim() - len(parts) + 1) + parts[1:]
    for dim, part in enumerate(parts):
        x = torch.ops.aten.slice(x, dim, part.start, part.stop)
    return x


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Recorder, Recorder]]:
    """Of the installed torch's forward and backward on CUDA, on fake tensors."""
    made = []
    for name, operator in (("_cuda_forward", kernels._cuda_forward), ("_cuda_backward", kernels._cuda_backward)):
        made.append(Recorder(operator, str(operator.default._schema)))
        monkeypatch.setattr(kernels, name, made[-1])
    # These ask for the device itself when they are called from Python, which a build of torch for CPUs has not.
    monkeypatch.setattr(FakeTensor, "__getitem__", cut, raising=False)
    monkeypatch.setattr(FakeTensor, "copy_", lambda x, source: torch.ops.aten.copy_(x, source), raising=False)
    monkeypatch.setattr(FakeTensor, "contiguous", lambda x: torch.ops.aten.contiguous(x), raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield made[0], made[1]


@pytest.mark.parametrize("size", [20, 24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_fake_cuda_tensors_kernels_get_what_they_demand(
    size: int, dtype: torch.dtype, recorders: tuple[Recorder, Recorder]
) -> None:
    """torch infers shapes; this checks what FlashAttention does (mha_varlen_fwd and _bwd in its flash_api.cpp)."""
    shapes = [(48, heads, size) for heads in (4, 2, 2, 4)]
    out, dq, dk, dv = results([torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes])
    assert {x.device.type for x in (out, dq, dk, dv)} == {"cuda"}
    assert {x.dtype for x in (out, dq, dk, dv)} == {torch.float32}
    assert out.shape == dq.shape == (48, 4, size)
    assert dk.shape == dv.shape == (48, 2, size)
    forward, backward = recorders
    assert (
        [call["is_causal"] for call in forward.calls] == [call["is_causal"] for call in backward.calls] == [True, False]
    )
    for call, queries, keys, runs in zip(forward.calls + backward.calls, (48, 16) * 2, (48, 24) * 2, (3, 1) * 2):
        halves = [call[name] for name in ("query", "key", "value", "out", "grad_out") if name in call]
        assert {x.dtype for x in halves} == {dtype}
        assert {x.stride(-1) for x in halves} == {1}
        assert {x.shape[-1] for x in halves} == {24}
        assert [len(x) for x in halves] == [queries, keys, keys, queries, queries][: len(halves)]
        for bounds in (call["cum_seq_q"], call["cum_seq_k"]):
            assert (bounds.dtype, bounds.shape, bounds.is_contiguous()) == (torch.int32, (runs + 1,), True)
        assert call["scale"] == size**-0.5
        assert {x.device.type for x in call.values() if isinstance(x, Tensor)} == {"cuda"}
    for call, queries in zip(backward.calls, (48, 16)):
        lse, rng_state = call["logsumexp"], call["rng_state"]
        assert (lse.dtype, lse.shape, lse.is_contiguous()) == (torch.float32, (4, queries), True)
        assert (rng_state.dtype, rng_state.shape) == (torch.uint64, (2,))


def test_bounds_brought_to_a_card_are_those_that_calls_on_it_use(recorders: tuple[Recorder, Recorder]) -> None:
    plan = plan_sequence(np.array([0, 40, 48]), 2, "zigzag", 1, "direct").rank(1)
    kernels.CallBounds(plan).to("cuda:0")
    q, k, v = (torch.empty(24, heads, 8, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2))
    out, lse = attend(q, k, v, plan.local)
    for stage in plan.stages:
        attend_(out, lse, q, *(x.narrow(0, 0, stage.n_keys) for x in (k, v)), stage.runs)
    assert any(call.causal for call in plan.calls) != all(call.causal for call in plan.calls)
    assert [list(call.on_device) for call in plan.calls] == [[torch.device("cuda", 0)]] * len(plan.calls)
    assert len(recorders[0].calls) == len(plan.local.calls) + sum(len(stage.runs.calls) for stage in plan.stages)


def test_the_installed_torch_declares_what_is_recorded_of_its_version() -> None:
    for name in OPERATORS:
        installed = getattr(torch.ops.aten, name).default._schema
        if INSTALLED in TORCH:
            assert torch._C.parse_schema(TORCH[INSTALLED]["operators"][name]) == installed
        else:
            assert str(installed).startswith(f"aten::{name}(")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_has_the_names_that_are_imported(version: str) -> None:
    source = Path(kernels.__file__).read_text(encoding="utf-8")
    for module in MODULES:
        (names,) = re.findall(rf"^from {re.escape(module)} import (.*)$", source, re.M)
        assert set(names.split(", ")) <= set(TORCH[version]["names"][module])


def test_what_is_recorded_begins_at_the_oldest_torch_that_may_be_installed() -> None:
    pyproject = Path(__file__).parents[3].joinpath("pyproject.toml").read_text(encoding="utf-8")
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', pyproject)
    assert VERSIONS[0].startswith(f"{oldest}.")
