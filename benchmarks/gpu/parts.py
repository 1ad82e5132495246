"""All parts of the GPU script, in order of worth: what a lent card proves first when its time is short."""

from __future__ import annotations

from benchmarks.gpu.part import Part
from storage.errors import UserError

ENGINE = ("deepspeed", "pydantic", "transformers")

PARTS: tuple[Part, ...] = (
    Part(
        "kernels",
        "right",
        "block attention forward and backward against fp64: head sizes, groups of heads, lengths, empty runs, strides",
        "benchmarks.gpu.right.kernels:run",
        seconds=45,
        skips=frozenset({"FlashAttention-3"}),
    ),
    Part(
        "ring",
        "right",
        "packed ring attention and Ulysses, 2 to 8 ranks as threads on one card, every layout and route, against fp64",
        "benchmarks.gpu.right.ring:run",
        seconds=40,
        packages=("numba", "pydantic"),
        skips=frozenset({"plans beyond the part's time"}),
    ),
    Part(
        "loss",
        "right",
        "the chunked loss over both softmaxes, forward and both gradients, against fp64",
        "benchmarks.gpu.right.loss:run",
        seconds=20,
        packages=("pydantic", "transformers"),
    ),
    Part(
        "rope",
        "right",
        "rotary tables and rotations up to position 1,048,575 against Python's doubles and fp64",
        "benchmarks.gpu.right.rope:run",
        seconds=40,
        packages=("transformers",),
        skips=frozenset({"compile", "liger"}),
    ),
    Part(
        "law",
        "right",
        "the gradient law in fp32 and bf16: ZeRO stages, accumulation, offloading, recomputation, tiles, fused kernels",
        "benchmarks.gpu.right.law:run",
        seconds=75,
        packages=(*ENGINE, "numba", "pyarrow"),
        skips=frozenset({"compile", "liger"}),
    ),
    Part(
        "cache",
        "right",
        "cached decoding against the full forward: chunks, batches, rows that go on, in bf16 and fp32",
        "benchmarks.gpu.right.cache:run",
        seconds=15,
        packages=("numba", "pydantic", "transformers"),
        skips=frozenset({"cases"}),
    ),
    Part(
        "vqgan-codes",
        "right",
        "codes of frames: bf16 against fp32, fp32 against fp64, and the same by other batches and compiled encoders",
        "benchmarks.gpu.right.vqgan_codes:run",
        seconds=35,
        packages=("diffusers", "pydantic", "safetensors"),
        skips=frozenset({"compiled"}),
    ),
    Part(
        "attention",
        "fast",
        "a rank's part of ring attention beside one kernel call of the same work, and beside peers' figures",
        "benchmarks.gpu.fast.attention:run",
        seconds=45,
        packages=("numba", "pydantic"),
        skips=frozenset({"out of time"}),
    ),
    Part(
        "stack",
        "fast",
        "layers of the 7B, forward and backward, from 8K to 1M tokens: tokens/s, MFU, memory",
        "benchmarks.gpu.fast.stack:run",
        seconds=90,
        packages=("numba", "pydantic", "transformers"),
        skips=frozenset({"out of time"}),
    ),
    Part(
        "longest",
        "long",
        "the longest training context of one card: memory predicted by the plan, measured, and extrapolated",
        "benchmarks.gpu.long.context:run",
        seconds=110,
        packages=(*ENGINE, "numba", "psutil"),
        skips=frozenset({"contexts", "depths"}),
    ),
    Part(
        "layers",
        "fast",
        "a decoder layer of the 7B by kernels torch, compile and liger, side by side",
        "benchmarks.gpu.fast.layers:run",
        seconds=60,
        packages=("numba", "pydantic", "transformers"),
        skips=frozenset({"compile", "liger"}),
    ),
    Part(
        "waits",
        "fast",
        "how often the host waits for the card in a step of the engine, and where",
        "benchmarks.gpu.fast.waits:run",
        seconds=40,
        packages=("numba", *ENGINE),
    ),
    Part(
        "decoding",
        "fast",
        "tokens a second and seconds of prefill of a 7B at 1K to 256K tokens, beside the floor of its bytes",
        "benchmarks.gpu.fast.decoding:run",
        seconds=45,
        packages=("numba", "pydantic", "transformers"),
        skips=frozenset({"contexts"}),
    ),
    Part(
        "vqgan",
        "fast",
        "frames a second that the VQGAN codes, by batches and variants, against the matrix peak",
        "benchmarks.gpu.fast.vqgan:run",
        seconds=45,
        packages=("diffusers", "pydantic", "safetensors"),
        skips=frozenset({"CUDA graph", "compiled"}),
    ),
    Part(
        "communicators",
        "many",
        "ZeRO-3 and the ring on two cards at once: the law, one order of launches, no hang",
        "benchmarks.gpu.many.communicators:run",
        seconds=75,
        packages=(*ENGINE, "numba", "pyarrow"),
        cards=2,
    ),
)
"""A part's place is its worth; its limit is what it may take of the whole."""


def chosen(names: list[str]) -> tuple[Part, ...]:
    """The parts of these names or groups, in order of worth; all where none is named. Raises UserError."""
    known = {name for part in PARTS for name in (part.name, part.group)}
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: there is no such part; there are {', '.join(p.name for p in PARTS)}")
    return tuple(part for part in PARTS if not names or part.name in names or part.group in names)
