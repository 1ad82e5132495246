"""Frames to codes and back: the VQGAN as the pipelines see it.

In: uint8 frames. Out: int32 codes, and the same way back. A frame's codes are a pure function of that frame and the
weights: whatever chunk it arrives in, a retry of its partition must write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from storage.errors import UserError
from tokenization.codecs.vqgan.architecture import build_vqgan
from tokenization.codecs.vqgan.config import VQGANConfig

__all__ = ["VQGAN", "VQGANConfig", "build_vqgan", "nearest_codes", "pixels_of"]


_DECODING = ("decoder.", "post_quant_conv.")


class VQGAN:
    """A VQGAN ready to encode and decode frames.

    model: a diffusers `VQModel` of LWM's architecture; it is moved and put in evaluation mode. device: where it runs.
    dtype: float32 (exact) or bfloat16 (convolutions under autocast; the codebook search stays fp32).

    Every forward pass has the same number of frames, the last filled up by repeating one, and on a CPU the same
    number of threads: libraries choose their kernels, and with them the order of their sums, by both. `batch_size`
    None means as many frames as 32,768 pixels hold: 8 of 64x64, and 1 of LWM's 256x256, of which nothing is ever
    wasted.
    """

    def __init__(
        self,
        model: Any,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int | None = None,
        threads: int = 1,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise UserError(f"vqgan.dtype: {dtype} is neither float32 nor bfloat16; choose one of the two")
        self.config = VQGANConfig.from_diffusers(model.config)
        self.device = torch.device(device)
        self.dtype = dtype
        self.batch_size = batch_size or max(1, 2**15 // self.config.resolution**2)
        self.threads = threads
        self.model: Any = model.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """Codes int32 [n, h*w] (row by row) of frames uint8 [n, H, W, 3]; n may be 0. Raises ValueError on other
        shapes.
        """
        size = self.config.resolution
        if frames.dtype != np.uint8 or frames.shape[1:] != (size, size, 3):
            raise ValueError(f"frames {frames.dtype} {frames.shape}, not uint8 [n, {size}, {size}, 3]")
        codes = np.empty((len(frames), self.config.codes_per_frame), dtype=np.int32)
        for rows, batch in self._batches(frames):
            with self._inference():
                latents = self.model.encode(pixels_of(batch)).latents
            codes[rows] = nearest_codes(latents, self.codebook)[: rows.stop - rows.start].flatten(1).cpu().numpy()
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Frames uint8 [n, H, W, 3] of codes [n, h*w], any integer dtype.

        Pixels are clipped to [-1, 1] and then `(x + 1) * 127.5` truncated, as LWM does. Raises ValueError on a code
        out of range (LWM's released code clamps it silently) or another shape.
        """
        if codes.shape[1:] != (self.config.codes_per_frame,):
            raise ValueError(f"codes {codes.shape}, not [n, {self.config.codes_per_frame}]")
        if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codebook_size:
            raise ValueError(f"codes {codes.min()}..{codes.max()} outside the codebook of {self.config.codebook_size}")
        size = self.config.resolution
        frames = np.empty((len(codes), size, size, 3), dtype=np.uint8)
        for rows, batch in self._batches(codes):
            pixels = self.decode_pixels(batch.long())[: rows.stop - rows.start]
            frames[rows] = ((pixels + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return frames

    def decode_pixels(self, codes: torch.Tensor) -> torch.Tensor:
        """Pixels fp32 [n, 3, H, W] in [-1, 1] of codes int64 [n, h*w], in one pass."""
        grid = self.config.grid
        latents = self.codebook[codes].view(-1, grid, grid, self.config.embed_dim).permute(0, 3, 1, 2)
        with self._inference():
            sample = self.model.decode(latents, force_not_quantize=True).sample
        return sample.float().clamp(-1, 1)

    @property
    def codebook(self) -> torch.Tensor:
        """fp32 [codebook_size, embed_dim]."""
        return self.model.quantize.embedding.weight

    @property
    def fingerprint(self) -> str:
        """sha256 hex over the sizes and every weight: equal exactly when the codes mean the same."""
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `diffusion_pytorch_model.safetensors`, which `VQModel.from_pretrained` reads."""
        self.model.to(memory_format=torch.contiguous_format).save_pretrained(folder)
        self.model.to(memory_format=torch.channels_last)

    @classmethod
    def load(
        cls, folder: str | Path, expected: VQGANConfig | None = None, *, encoder_only: bool = False, **compute: Any
    ) -> VQGAN:
        """Read weights in diffusers' format, safetensors only; `compute` as in the constructor.

        encoder_only: leave out the decoder, two thirds of the memory; such a VQGAN encodes and nothing else. Raises
        UserError if they are missing or unreadable, or if their sizes are not `expected`, the recipe's.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise UserError(f"vqgan weights {folder}: no config.json there; name a folder in diffusers' format")
        try:
            sizes = VQGANConfig.from_diffusers(json.loads((folder / "config.json").read_text(encoding="utf-8")))
            with torch.device("meta"):
                model = build_vqgan(sizes)
            state = load_file(folder / "diffusion_pytorch_model.safetensors")
            if encoder_only:
                del model.decoder, model.post_quant_conv
                state = {name: value for name, value in state.items() if not name.startswith(_DECODING)}
            # The file's own pages become the weights: nothing is initialised and thrown away.
            model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
        except UserError:
            raise
        except (
            Exception
        ) as error:  # damaged JSON, damaged safetensors, missing keys: each library has its own exception
            reason = str(error).split("\n")[0]
            raise UserError(f"vqgan weights {folder}: unreadable ({reason}); write them again") from error
        del state
        vqgan = cls(model, **compute)
        if expected is not None:
            vqgan.require(expected, str(folder))
        return vqgan

    def require(self, expected: VQGANConfig, where: str) -> None:
        """Raise UserError naming the first size in which these weights (from `where`) are not what the recipe says."""
        found, wanted = self.config.to_dict(), expected.to_dict()
        for key, value in wanted.items():
            if found[key] != value:
                raise UserError(
                    f"vqgan weights {where}: {key} is {found[key]} but the recipe's vqgan.{key} is {value}; "
                    "change the recipe or name other weights"
                )

    def _batches(self, items: np.ndarray) -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, len(items), self.batch_size):
            batch = items[start : start + self.batch_size]
            rows = slice(start, start + len(batch))
            if len(batch) < self.batch_size:
                batch = np.concatenate([batch, np.repeat(batch[-1:], self.batch_size - len(batch), axis=0)])
            yield rows, torch.from_numpy(np.require(batch, requirements=("C", "W"))).to(self.device)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            # TF32 and autotuned kernels would make the codes depend on the device's mood.
            stack.enter_context(
                torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
            )
            stack.enter_context(torch_threads(self.threads))
            if self.dtype == torch.bfloat16:
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            yield


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run with `count` torch threads, then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pixels_of(frames: torch.Tensor) -> torch.Tensor:
    """Frames uint8 [n, H, W, 3] to pixels fp32 [n, 3, H, W] in [-1, 1]."""
    return frames.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def nearest_codes(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """int64 [n, h, w]: the codebook entry nearest in L2 to each cell of latents [n, D, h, w], searched in fp32.

    `|z - e|^2` without `|z|^2`, which is the same for every entry; frame by frame, so that the search of one frame
    is one matrix product whose shape does not depend on the batch.
    """
    half_norms = codebook.float().square().sum(dim=1) / 2
    cells = latents.float().permute(0, 2, 3, 1)
    return torch.stack([(frame @ codebook.float().T - half_norms).argmax(dim=-1) for frame in cells])
