"""model/kernels: fused parts of a layer compute what transformers' own do, and are refused where they cannot run.

That training by them obeys the law is in test_memory_law.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from model.layers.activation_checkpointing import apply_memory_settings
from model.layers.fused_layers import fuse, load_kernels
from model.layers.kernels import interface as loading
from model.layers.kernels.interface import LayerKernels, missing_for
from model.layers.memory_settings import MemorySettings
from model.llama.rope import rope_tables
from testing.law_batch import tiny_llama
from tests.model.peak_memory import peak_bytes

THETA, HEAD, EPS = 5e7, 16, 1e-6
HEADS, KV_HEADS, HIDDEN, WIDE = 4, 2, 32, 64
LAST = 1_048_575  # the last position of a million tokens

CUDA = pytest.mark.skipif(
    not torch.cuda.is_available() or missing_for("liger") is not None,
    reason="Liger's kernels need a CUDA GPU and the optional package ringworld[liger]: they are not tested",
)
NAMES = [
    pytest.param("compile", marks=pytest.mark.slow),
    pytest.param("liger", marks=[CUDA, pytest.mark.gpu, pytest.mark.slow]),
]


@pytest.fixture(scope="module", params=NAMES)
def kernels(request: pytest.FixtureRequest) -> LayerKernels:
    return load_kernels(request.param)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return "cuda" if "liger" in request.node.name else "cpu"


def norm(x: Tensor, weight: Tensor) -> Tensor:
    own = LlamaRMSNorm(len(weight), EPS)
    del own.weight
    own.weight = weight
    return own(x)


def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    turned_q, turned_k = apply_rotary_pos_emb(q, k, *tables(q), unsqueeze_dim=2)
    return turned_q.to(q.dtype), turned_k.to(k.dtype)  # as the ring rounds them


def tables(q: Tensor) -> tuple[Tensor, Tensor]:
    """Of q's tokens, the last of which is the last of a million."""
    return rope_tables(torch.arange(LAST + 1 - q.shape[1], LAST + 1, device=q.device)[None], THETA, HEAD)


def parts(kernels: LayerKernels) -> Iterator[tuple[Callable, Callable, list[tuple[int, ...]]]]:
    """A part by the kernels, the same by transformers, and the shapes of its arguments, -1 for tokens."""
    yield lambda x, weight: kernels.rms_norm(x, weight, EPS), norm, [(1, -1, HIDDEN), (HIDDEN,)]
    yield lambda q, k: kernels.rotate(q.clone(), k.clone(), *tables(q)), rotate, [(1, -1, n, HEAD) for n in (4, 2)]
    yield kernels.swiglu.forward, lambda gate, up: F.silu(gate) * up, [(1, -1, WIDE)] * 2


def results(part: Callable, arguments: list[Tensor]) -> list[Tensor]:
    """What it gives, and the gradients of its arguments for a gradient that differs from element to element."""
    arguments = [x.detach().clone().requires_grad_() for x in arguments]
    outs = part(*arguments)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = torch.autograd.grad(outs, arguments, [out.detach().cos() for out in outs])
    return [*(out.detach() for out in outs), *grads]


def random(shapes: list[tuple[int, ...]], tokens: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    sizes = [[tokens if size == -1 else size for size in shape] for shape in shapes]
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


def test_each_part_computes_what_transformers_own_does(kernels, device):
    for fused, own, shapes in parts(kernels):
        arguments = random(shapes, 96, device, torch.float32)
        for ours, exact in zip(results(fused, arguments), results(own, arguments), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_in_bf16_each_part_is_as_near_to_the_exact_result_as_transformers_own(kernels, device):
    for fused, own, shapes in parts(kernels):
        arguments = random(shapes, 96, device, torch.bfloat16)
        exact = results(own, [x.float() for x in arguments])
        for ours, theirs, true in zip(results(fused, arguments), results(own, arguments), exact, strict=True):
            assert ours.dtype == torch.bfloat16
            assert (ours - true).norm() < 1.2 * (theirs - true).norm()


def test_a_tile_gets_the_product_and_both_gradients_at_once(kernels, device):
    grad, gate, up = random([(-1, WIDE)] * 3, 96, device, torch.float32)
    product, *grads = kernels.swiglu.backward(grad, gate.clone(), up.clone())
    torch.testing.assert_close(product, F.silu(gate) * up)
    gate.requires_grad_(), up.requires_grad_()
    exact = torch.autograd.grad(F.silu(gate) * up, (gate, up), grad)
    torch.testing.assert_close(tuple(grads), exact, rtol=1e-5, atol=1e-5)


def test_a_rotation_at_a_million_tokens_is_exact_to_fp32(kernels, device):
    """Of a one in a head's first half at position 1,048,575: the cosine and sine of its angle, in Python's doubles."""
    q = torch.zeros(1, 2, HEADS, HEAD, device=device)
    q[..., : HEAD // 2] = 1
    turned, _ = kernels.rotate(q, q[:, :, :KV_HEADS].clone(), *tables(q))
    angles = [LAST * THETA ** (-2 * i / HEAD) for i in range(HEAD // 2)]
    exact = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])
    assert (turned[0, 1].cpu() - exact).abs().max() < 1e-7


@pytest.mark.slow
def test_no_number_of_tokens_is_compiled_for_twice():
    def compute(tokens: int) -> None:
        for fused, _, shapes in parts(load_kernels("compile")):
            results(fused, random(shapes, tokens, "cpu", torch.float32))

    compute(96)
    with torch.compiler.set_stance("fail_on_recompile"):
        compute(50)
        compute(1023)


@pytest.mark.slow
def test_fused_parts_keep_less_for_the_backward():
    gate, up = (x.requires_grad_() for x in random([(1, -1, 512)] * 2, 1024, "cpu", torch.float32))
    weight = torch.ones(512, requires_grad=True)
    compiled = load_kernels("compile")
    row = 4 * 1024 * 512
    pairs = (
        (compiled.swiglu.forward, lambda gate, up: F.silu(gate) * up, (gate, up)),
        (lambda x, weight: compiled.rms_norm(x, weight, EPS), norm, (gate, weight)),
    )
    for fused, own, arguments in pairs:
        fused(*arguments)  # compiled before it is measured
        assert held(own, arguments) - held(fused, arguments) > 0.9 * row


def held(part: Callable, arguments: tuple[Tensor, ...]) -> int:
    """The most bytes that are allocated while the part runs, its result and what it keeps included."""
    results: list[Tensor] = []
    return peak_bytes(lambda: results.append(part(*arguments)))


@pytest.mark.slow
def test_a_fused_model_has_the_weights_names_of_a_plain_one_and_still_generates():
    model, plain = tiny_llama(), tiny_llama()
    names = list(model.state_dict())
    apply_memory_settings(model, MemorySettings(mlp_tile=8))
    fuse(model, "compile")
    assert list(model.state_dict()) == names
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        cache = model(tokens[:, :8], use_cache=True).past_key_values
        logits = model(tokens[:, 8:], past_key_values=cache).logits
        torch.testing.assert_close(logits, plain(tokens).logits[:, 8:], rtol=1e-4, atol=1e-4)


def test_kernels_of_an_mlp_that_is_no_swiglu_are_refused(monkeypatch):
    monkeypatch.setattr("model.layers.fused_layers.load_kernels", lambda name: None)
    model = tiny_llama()
    model.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="kernels compile are for an MLP of silu without biases, not gelu"):
        fuse(model, "compile")


def test_what_is_missing_is_told(monkeypatch):
    assert missing_for("torch") is None
    monkeypatch.setattr(loading, "_is_installed", lambda package: False)
    monkeypatch.setattr(loading, "_has_compiler", lambda: False)
    assert missing_for("liger").startswith("the package liger-kernel is not installed; pip install 'ringworld[liger]'")
    assert missing_for("compile").startswith("torch.compile finds no C++ compiler; install g++")
    assert missing_for("torch") is None
