"""The joint vocabulary: text ids first, then the vision ids (codes, `<eof>`, `<eov>`), in one table and one head.

LWM keeps two embedding tables and two output heads; Ringworld stores a vision id as `text_size + code`, so a checkpoint
is a plain Llama. A modality never travels beside the ids: it is a range of this vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

MODALITIES = ("text", "vision")
"""In the order of their ids."""


@dataclass(frozen=True)
class JointVocabulary:
    """Sizes and special ids of the joint vocabulary.

    `text_size` text ids are followed by `vision_size` vision ids, of which the first `codebook_size` are VQGAN codes,
    the next two `<eof>` (end of a frame) and `<eov>` (end of the vision stream), and the rest padding of the table.
    """

    text_size: int
    codebook_size: int
    vision_size: int
    bos_id: int = 1
    eos_id: int = 2

    @classmethod
    def for_codebook(cls, text_size: int, codebook_size: int, **special: int) -> JointVocabulary:
        """Round the vision range up to a multiple of 256, as LWM does (8,192 codes -> 8,448 ids)."""
        return cls(text_size, codebook_size, -(-(codebook_size + 2) // 256) * 256, **special)

    def __post_init__(self) -> None:
        if self.vision_size and self.vision_size < self.codebook_size + 2:
            raise ValueError(f"vision_size {self.vision_size} holds no {self.codebook_size} codes, <eof> and <eov>")

    @property
    def size(self) -> int:
        """Rows of the embedding table and of the output head."""
        return self.text_size + self.vision_size

    @property
    def eof_id(self) -> int:
        """Joint id that ends every frame but the last."""
        return self.text_size + self.codebook_size

    @property
    def eov_id(self) -> int:
        """Joint id that ends the last frame of a vision stream."""
        return self.text_size + self.codebook_size + 1

    def is_vision(self, ids: Any) -> Any:
        """Where `ids` (array, tensor or int) lie in the vision range, to which `<eof>` and `<eov>` belong: bool."""
        return ids >= self.text_size

    def codes_to_ids(self, codes: np.ndarray) -> np.ndarray:
        """VQGAN codes (any integer dtype and shape) to joint ids, int32. Raises ValueError on a code out of range."""
        if codes.size and (codes.min() < 0 or codes.max() >= self.codebook_size):
            raise ValueError(
                f"code {int(codes.min())}..{int(codes.max())} outside the codebook of {self.codebook_size}"
            )
        return (codes + self.text_size).astype(np.int32)

    def ids_to_codes(self, ids: np.ndarray) -> np.ndarray:
        """Joint vision ids to VQGAN codes, int32. Raises ValueError where an id is no code."""
        codes = ids.astype(np.int64) - self.text_size
        if codes.size and (codes.min() < 0 or codes.max() >= self.codebook_size):
            raise ValueError("ids outside the range of VQGAN codes")
        return codes.astype(np.int32)
