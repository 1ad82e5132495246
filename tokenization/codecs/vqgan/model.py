"""Frames to codes and back: the VQGAN as the pipelines see it.

In: uint8 frames or int32 codes. Out: the other. The codes of a frame are a pure function of the frame and the weights,
whatever chunk it is in, so that a retry of a partition writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import VQModel
from safetensors.torch import load_file

from storage.errors import UserError
from tokenization.codecs.vqgan.config import VQGANConfig


class VQGAN:
    """A VQGAN ready to encode and decode frames.

    model: a diffusers `VQModel` of LWM's architecture; it is moved and put in evaluation mode. device: where it runs.
    dtype: float32 (exact) or bfloat16 (convolutions under autocast; the codebook search stays fp32).

    Libraries choose their kernels, and with them the order of their sums, by the batch size and the number of threads.
    Every forward pass therefore has `batch_size` frames, the last filled up by repeating one, and on a CPU `threads`
    threads. By default a batch has up to 32,768 pixels: 8 frames of 64x64, or one of LWM's 256x256.
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
        """Codes int32 [n, h*w], row by row, of frames uint8 [n, H, W, 3]; n may be 0. Raises ValueError on others."""
        size = self.config.resolution
        if frames.dtype != np.uint8 or frames.shape[1:] != (size, size, 3):
            raise ValueError(f"frames {frames.dtype} {frames.shape}, not uint8 [n, {size}, {size}, 3]")
        codes = np.empty((len(frames), self.config.codes_per_frame), dtype=np.int32)
        for rows, batch in self._batches(frames):
            found = nearest_codes(self.encode_latents(batch), self.codebook)
            codes[rows] = found[: rows.stop - rows.start].flatten(1).cpu().numpy()
        return codes

    def encode_latents(self, batch: torch.Tensor) -> torch.Tensor:
        """Latents [n, D, h, w] of frames uint8 [n, H, W, 3] on the device, in one pass; fp32 or bf16."""
        with self._inference():
            return self.model.encode(pixels_of(batch)).latents

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Frames uint8 [n, H, W, 3] of codes [n, h*w] of any integer dtype.

        Pixels are clipped to [-1, 1] and `(x + 1) * 127.5` is truncated, as in LWM. Raises ValueError on another shape
        and on a code out of range, which LWM's released code clamps silently.
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
        """sha256 (hex) of the sizes and all weights, which is equal exactly when the codes mean the same."""
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

        encoder_only: leave out the decoder, which takes two thirds of the memory. Raises UserError on weights that are
        missing or unreadable, or whose sizes are not `expected`, the recipe's.
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
                parts = ("decoder.", "post_quant_conv.")
                state = {name: value for name, value in state.items() if not name.startswith(parts)}
            # The file's own pages become the weights, so that none are initialized only to be replaced.
            model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
        except UserError:
            raise
        except Exception as error:  # each library has its own exception for damage or missing keys
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
        # With TF32 or autotuned kernels the codes would differ between devices and runs.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        with torch.inference_mode(), exact, torch_threads(self.threads), autocast:
            yield


def build_vqgan(config: VQGANConfig, seed: int | None = None) -> Any:
    """A diffusers `VQModel` of these sizes, fp32, on the default device; with a seed, a pure function of it."""
    with torch.random.fork_rng(devices=[], enabled=seed is not None):  # the global generator keeps its state
        if seed is not None:
            torch.manual_seed(seed)
        levels = len(config.channels)
        return VQModel(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.channels,
            layers_per_block=config.res_blocks,
            latent_channels=config.latent_channels,
            sample_size=config.resolution,
            num_vq_embeddings=config.codebook_size,
            norm_num_groups=config.norm_groups,
            vq_embed_dim=config.embed_dim,
            mid_block_add_attention=False,
        )


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set the number of torch threads to `count` within the context."""
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

    `|z|^2` is left out of `|z - e|^2`, as it is the same for every entry. Each frame is searched by one matrix product
    of its own, whose shape does not depend on the batch.
    """
    half_norms = codebook.float().square().sum(dim=1) / 2
    cells = latents.float().permute(0, 2, 3, 1)
    return torch.stack([(frame @ codebook.float().T - half_norms).argmax(dim=-1) for frame in cells])
